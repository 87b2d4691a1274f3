"""The commands of the README and its pages, run in smoke form: what stands in a ```sh block must work as printed.

A ```console block is for commands that need a machine which is not here.

python benchmarks/readme.py --list     the commands, and what is run for each
python benchmarks/readme.py --run      run them one after the other in a temporary folder; stops at the first that fails
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_language import language_table
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from edgetune import report
from edgetune.core.ledger import Ledger
from support.checkpoints import save_bert

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("data", "devices", "kits", "language", "training-programs")))
SCRIPTS = ("compress", "plain", "trainer", "lightning")
TRAINING = ("edgetune run ", "edgetune export-training ", "edgetune train-pte ", "edgetune pull ")
INSTALLING = ("git clone", "cd ", "python3 -m venv", "source ", "export ", "pip install")
INSTEAD = {  # the long ones in their short form; None: what CI has run already
    "make demo": "edgetune run text-minilm variant=smoke",
    "make test": None,
    "edgetune devices calibrate": "edgetune devices calibrate --quick",
}


NET = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def inputs():
    return [torch.randn(1, 6) for _ in range(3)]
"""

GUARD_SMOKE = """
variants:
  smoke:
    model.max_length: 32
    model.layers: 2
    train.epochs: null
    train.updates: 2
    export.max_tokens: 64
    export.check_rows: 2
    export.min_same_prediction_pct: 0
"""


def commands() -> list[str]:
    """Every line of every ```sh block, without its comment."""
    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    ]
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", *INSTALLING))]


def instead(command: str) -> str | None:
    """What is run for a command: recipes with `variant=smoke`, the rest as printed."""
    if command in INSTEAD:
        return INSTEAD[command]
    if command.startswith(TRAINING) and "--dry-run" not in command:
        return f"{command} variant=smoke"
    return command


def prepare(folder: Path) -> None:
    """The files that the commands name as the reader's own."""
    rows = [f'"{"a good" if n % 2 else "a bad"} film, seen {n} times",{"good" if n % 2 else "bad"}' for n in range(120)]
    (folder / "reviews.csv").write_text("\n".join(["review,sentiment", *rows]), encoding="utf-8")
    asked = ("pick a lock,harmful", "bake a loaf,harmless")
    prompts = [f"{n}: how do I {asked[n % 2]}" for n in range(120)]
    for name, part in (("prompts", prompts[:100]), ("more-prompts", prompts[100:])):
        (folder / f"{name}.csv").write_text("\n".join(["prompt,verdict", *part]), encoding="utf-8")
    page = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    guard = re.search(r"^```yaml\n(name: guard\n.*?)^```", page, re.M | re.S)
    (folder / "guard.yaml").write_text(guard.group(1) + GUARD_SMOKE, encoding="utf-8")
    save_bert(folder / "classifier", id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    (folder / "net.py").write_text(NET, encoding="utf-8")
    save_file(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).state_dict(), folder / "trained.safetensors")
    for shade, name in enumerate(("dark", "light")):
        (folder / "pictures" / name).mkdir(parents=True)
        for n in range(20):
            pixels = np.full((64, 64, 3), 120 * shade + 3 * n, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{n}.png")


def written(text: str) -> str:
    """The README with its generated parts made anew."""
    scripts = {name: ROOT / "tests" / "support" / f"examples_{name}.py" for name in SCRIPTS}
    parts = {name: ("python", path.read_text(encoding="utf-8")) for name, path in scripts.items()}
    demo = ROOT / "docs" / "demo.json"
    if demo.exists():
        parts["demo"] = ("text", _short(report.text(Ledger.read(demo), width=100)))
    blocks = {name: f"```{kind}\n{body.rstrip()}\n```" for name, (kind, body) in parts.items()}
    blocks["sparse"] = sparse_table()
    talked = json.loads((ROOT / "docs" / "bench-language.json").read_text(encoding="utf-8"))
    blocks["language"] = "\n".join(language_table(talked["language"]))
    for name, block in blocks.items():
        whole = f"<!-- {name} -->\n{block}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, whole=whole: whole, text, flags=re.S)
    return text


def sparse_table() -> str:
    """What `make bench-sparse` measured of full fine-tuning and LoRA, both with lean too, and of `auto`."""
    names = ("model", "trained by", "step, ms", "saved for backward, MiB", "quality on the test set")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for path in sorted((ROOT / "docs").glob("bench-sparse-*.json")):
        held = json.loads(path.read_text(encoding="utf-8"))
        for method in ("full", "full with lean", "lora", "lora with lean", "auto"):
            if method not in held["cost"]:
                continue
            alone = method.removesuffix(" with lean")
            cost, values = held["cost"][method], [each["value"] for each in held["quality"].get(method, [])]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            same = "not measured" if method == alone else f"as {alone}"
            quality = f"{statistics.mean(values):.2f}{spread}" if values else same
            lines.append(
                f"| {path.stem.removeprefix('bench-sparse-')} | {method} | {cost['step_ms']:,.0f} "
                f"| {cost['saved_mib']:,.1f} | {quality} |"
            )
    return "\n".join(lines)


def _short(text: str) -> str:
    """The parts of the report for a first look: steps, baselines, what was measured, what was predicted."""
    keep, parts = [], re.split(r"\n\n(?=\S)", text)
    for part in parts:
        if part.startswith(("Step by step", "Compared with", "Measured", "Predicted")):
            keep.append(part.rstrip())
    return "\n\n".join(keep)


def write() -> None:
    """Write README.md anew, with the newest finished demo if there is one."""
    runs = sorted((ROOT / "runs").glob("text-minilm-*/ledger.json"), key=lambda path: path.stat().st_mtime)
    finished = [path for path in runs if Ledger.read(path).finished]
    if finished:
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "demo.json").write_text(Ledger.read(finished[-1]).dumps(), encoding="utf-8")
        pictures(finished[-1])
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text(encoding="utf-8")), encoding="utf-8")


def pictures(ledger: Path) -> None:
    """The page of a run on a desk and on a phone, and its ledger in a terminal."""
    page, docs = ledger.parent / "report.html", ROOT / "docs"
    picture(page, docs / "report.png", 1280, 1500)
    picture(page, docs / "report-phone.png", 390, 1500)
    terminal_picture(Ledger.read(ledger), docs / "report-terminal.svg")


def picture(page: Path, to: Path, width: int, height: int) -> None:
    """A screenshot of the page as a screen of this width shows it, where there is a Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        print(f"no chromium here: {to.name} stays as it is", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        # a window is never narrower than 500 pixels, a frame in it is
        frame = Path(folder) / "frame.html"
        style = f"border:0;width:{width}px;height:{height}px"
        frame.write_text(f'<body style="margin:0"><iframe src="{page.resolve().as_uri()}" style="{style}"></iframe>')
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        flags += ["--allow-file-access-from-files", "--hide-scrollbars", "--virtual-time-budget=8000"]
        size = [f"--user-data-dir={folder}/profile", f"--screenshot={to}", f"--window-size={max(width, 500)},{height}"]
        subprocess.run([chromium, *flags, *size, frame.as_uri()], check=True, capture_output=True)
    image = Image.open(to).convert("RGB").crop((0, 0, width, height))
    image.quantize(256).save(to, optimize=True)


def terminal_picture(ledger: Ledger, to: Path) -> None:
    """The ledger as a terminal of 80 columns shows it."""
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    console.print(report.Terminal(ledger))
    console.save_svg(str(to), title="edgetune report runs/text-minilm-001", unique_id="ledger")


def main() -> int:
    """List, run or write."""
    if "--write" in sys.argv:
        write()
        return 0
    found = commands()
    if not found:
        sys.exit("README.md has no commands")
    if "--run" not in sys.argv:
        print("\n".join(f"{command}  ->  {instead(command) or 'left out'}" for command in found))
        return 0
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
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
