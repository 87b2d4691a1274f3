"""A STAND-IN for adb and a phone: it lets the commands of the protocol through, by a real shell, and nothing else.

No phone was ever behind it: what passes here shows that the protocol is spoken, not what a phone would answer.
`STANDIN` is a folder with `phones` (the answer to `adb devices`), `runner` (a script in place of executor_runner),
`sys/` and `services/`, and gets `root/` (the phone's files) and `said` (every command, one a line).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(os.environ["STANDIN"])
TMP = "/data/local/tmp"
FOLDER = rf"{TMP}/edgetune-[0-9a-f]{{12}}"
RUN = r"\./executor_runner --model_path=model\.pte --cpu_threads=\d+( --data_path=model\.ptd)? --num_executions=\d+"
BATTERY = " ".join(f"/sys/class/power_supply/battery/{name}" for name in ("status", "current_now", "voltage_now"))
SHELL = (
    r"getprop ro\.product\.(manufacturer|model|cpu\.abilist)",
    r"nproc",
    rf"mkdir {FOLDER}",
    rf"chmod 755 {FOLDER}/executor_runner",
    rf"cd {FOLDER} && {RUN} 2>&1",
    rf"cd {FOLDER} && \{{ {RUN} >log 2>&1 & p=\$!; while kill -0 \$p 2>/dev/null; do grep VmHWM /proc/\$p/status "
    rf"2>/dev/null; echo battery \$\(cat {BATTERY} 2>/dev/null\); sleep 0\.1; done; wait \$p; c=\$\?; \[ \$c = 0 \] "
    r"\|\| cat log; rm -f log; exit \$c; \}",
    r"dumpsys (thermalservice|battery)",
    r"for f in /sys/class/thermal/thermal_zone\*/temp /sys/devices/system/cpu/cpu\[0-9\]\*/cpufreq/scaling_cur_freq; "
    r"do "
    r'v=\$\(cat \$f 2>/dev/null\) && echo "\$f \$v \$\(cat \$\{f%/temp\}/type 2>/dev/null\)"; done; true',
    rf"rm -f {FOLDER}/model\.pte {FOLDER}/model\.ptd",
    rf"rm -rf {FOLDER}",
)  # fmt: skip


def refuse(what: str) -> int:
    print(f"stand-in adb: not in the protocol: {what}", file=sys.stderr)
    return 64


def main(arguments: list[str]) -> int:
    with (HERE / "said").open("a", encoding="utf-8") as said:
        said.write(json.dumps(arguments) + "\n")
    phones = (HERE / "phones").read_text(encoding="utf-8")
    if arguments == ["devices"]:
        print("List of devices attached\n" + phones)
        return 0
    if len(arguments) < 4 or arguments[0] != "-s":
        return refuse(repr(arguments))
    if f"{arguments[1]}\tdevice" not in phones:
        print(f"adb: device '{arguments[1]}' not found", file=sys.stderr)
        return 1
    verb, rest = arguments[2], arguments[3:]
    if verb == "shell" and len(rest) == 1 and any(re.fullmatch(known, rest[0]) for known in SHELL):
        return shell(rest[0])
    if verb == "push" and len(rest) == 2 and re.fullmatch(rf"{FOLDER}/(executor_runner|model\.pt[ed])", rest[1]):
        return push(Path(rest[0]), rest[1])
    return refuse(repr(arguments))


def there(text: str) -> str:
    return text.replace(TMP, str(HERE / "root")).replace(" /sys/", f" {HERE}/sys/")


def push(source: Path, to: str) -> int:
    if (HERE / "full").exists():
        print("adb: error: failed to copy: remote write failed: No space left on device", file=sys.stderr)
        return 1
    ours = HERE / "runner" if to.endswith("/executor_runner") else source  # the ELF is for another processor
    shutil.copyfile(ours, there(to))
    return 0


def shell(script: str) -> int:
    (HERE / "root").mkdir(exist_ok=True)
    words = f"{HERE / 'services'}:{os.environ['PATH']}"
    return subprocess.run(["sh", "-c", there(script)], env={**os.environ, "PATH": words}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
