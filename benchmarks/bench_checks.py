"""What the checks of the main job cost: the seconds inside them beside those of the whole run.

    python benchmarks/bench_checks.py

Each check is timed where it is called; one inside another is counted once. The proof of the program runs in it as well.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgetune.cli.progress import show_progress
from edgetune.run import pipeline

CHECKS = {  # what: (module, function), as the caller looks it up
    "program against model": ("edgetune.export.pipeline", "_prove"),
    "merged layers against unmerged": ("edgetune.core.merging", "merge_layer"),
    "weights read elsewhere": ("edgetune.lean.reads", "weights_read_elsewhere"),
    "layers that compute more than their class says": ("edgetune.core.plain", "describe_computation"),
    "slices against whole layers": ("edgetune.sparse.update", "refuse_unfollowed"),
    "pruned model against masked": ("edgetune.prune.cut", "_try_cuts"),
    "kernels": ("edgetune.export.kernels", "check"),
    "checkpoints quantized elsewhere": ("edgetune.export.quantized_weights", "check"),
    "late steps rehearsed": ("edgetune.run.fold", "rehearse"),
}
_SHARE_PCT = 5.0


class Clock:
    """Seconds inside each check; the outermost one counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(CHECKS, 0.0)
        self.inside = False

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[name] += time.perf_counter() - began

        return timed


def main() -> int:
    clock, recipe = Clock(), (sys.argv[1:] or ["text-minilm"])[0]
    for name, (module_name, function) in CHECKS.items():
        module: Any = importlib.import_module(module_name)
        setattr(module, function, clock.timed(name, getattr(module, function)))
    began = time.perf_counter()
    with show_progress() as progress:
        run = pipeline.run(recipe, progress=progress)
    whole = time.perf_counter() - began
    print(f"{recipe}: {whole:.0f} s in all, {Path(run.folder)}\n\n| check | seconds | share |\n|---|---|---|")
    for name, seconds in clock.seconds.items():
        print(f"| {name} | {seconds:.2f} | {100 * seconds / whole:.1f} % |")
    share = 100 * sum(clock.seconds.values()) / whole
    print(f"| together | {sum(clock.seconds.values()):.2f} | {share:.1f} % (at most {_SHARE_PCT:g}) |")
    return int(share > _SHARE_PCT)


if __name__ == "__main__":
    sys.exit(main())
