"""The README's own commands, run in smoke form: what stands in a ```sh block must work as printed.

python tests/readme.py --list     the commands, and what is run for each
python tests/readme.py --run      run them one after the other in a temporary folder; stops at the first that fails
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSTEAD = {  # the long ones in their short form; None: what CI has run already
    "make demo": "edgetune run text-minilm variant=smoke",
    "make test": None,
    "make bench": None,
    "edgetune devices calibrate": "edgetune devices calibrate --quick",
}


def commands() -> list[str]:
    """Every line of every ```sh block, without its comment."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "git clone", "cd ", "pip install"))]


def instead(command: str) -> str | None:
    """What is run for a command: recipes with `variant=smoke`, the rest as printed."""
    if command in INSTEAD:
        return INSTEAD[command]
    if command.startswith("edgetune run ") and "--dry-run" not in command:
        return f"{command} variant=smoke"
    return command


def main() -> int:
    """List or run the commands."""
    found = commands()
    if not found:
        sys.exit("README.md has no commands")
    if "--run" not in sys.argv:
        print("\n".join(f"{command}  ->  {instead(command) or 'left out'}" for command in found))
        return 0
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    with tempfile.TemporaryDirectory() as folder:
        import os

        environment = {**os.environ, "PATH": path, "XDG_CONFIG_HOME": folder}
        for command in found:
            short = instead(command)
            if short is None:
                continue
            started = time.monotonic()
            print(f"$ {short}", flush=True)
            code = subprocess.run(short, shell=True, cwd=folder, env=environment, check=False).returncode
            print(f"  exit code {code}, {time.monotonic() - started:.0f} s", flush=True)
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
