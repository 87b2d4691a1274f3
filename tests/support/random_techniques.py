"""Techniques on random small modules: right by values to the end, or refused by name before anything trains.

    python tests/support/random_techniques.py --modules 400

Each module is taken through LoRA, SparseUpdate, a slice, Prune, Int8, Int4 (by absmax and GPTQ) and Int8Dynamic:
apply, a few training steps, finalize, lower, run. A refusal that says which layer to skip is followed. Prints how many
were right, refused, wrong, crashed, and each wrong one; exit code 1 where there are any.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor, nn

import edgetune as et
from edgetune.capture.positional import Positional
from edgetune.core.apply import active_techniques
from edgetune.core.errors import EdgetuneError
from edgetune.core.quiet import silence_libraries
from edgetune.core.technique import Technique
from edgetune.export.lower import lower
from edgetune.export.targets import find
from edgetune.runtime.allowed import allowed_difference
from edgetune.runtime.clock.runs import load_runtime
from support.forked import ask_fork
from support.random_modules import ROWS, Drawn, Plan, inputs_of, plans

SEED = 14
_RIGHT = 1e-4  # of the largest output
_SKIPS = 12  # hints that are followed


def layers_of(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and name != "head"]


def lora(model: nn.Module, skip: tuple[str, ...]) -> Technique:
    names = [n for n in layers_of(model, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding) if n not in skip]
    return et.LoRA(rank=2, targets=(*names, "head"))


def sparse(model: nn.Module, skip: tuple[str, ...]) -> Technique:
    return et.SparseUpdate(scheme={"*": "bias", "head": "full"})


def sliced(model: nn.Module, skip: tuple[str, ...]) -> Technique:
    names = [n for n in layers_of(model, nn.Linear, nn.Conv1d, nn.Conv2d) if n not in skip]
    return et.SparseUpdate(scheme={"*": "frozen", **dict.fromkeys(names, 0.5), "head": "full"})


def prune(model: nn.Module, skip: tuple[str, ...]) -> Technique:
    return et.Prune(ratio=0.5, round_to=2, what={"channels"} if layers_of(model, nn.Conv2d) else {"ffn"}, skip=skip)


def int8(model: nn.Module, skip: tuple[str, ...]) -> Technique:
    return et.Int8()


def int4(model: nn.Module, skip: tuple[str, ...]) -> Technique:
    return et.Int4(skip=skip)


def gptq(model: nn.Module, skip: tuple[str, ...]) -> Technique:
    return et.Int4(algorithm="gptq", group_size="channel", skip=skip)


def int8_dynamic(model: nn.Module, skip: tuple[str, ...]) -> Technique:
    return et.Int8Dynamic(skip=skip)


TECHNIQUES: dict[str, Callable[[nn.Module, tuple[str, ...]], Technique]] = {
    "lora": lora, "sparse-update": sparse, "slice": sliced, "prune": prune, "int8": int8, "int4": int4,
    "gptq": gptq, "int8_dynamic": int8_dynamic,
}  # fmt: skip


def outcome(plan: Plan, technique: str) -> str:
    """`right`, `refused: ...`, or `wrong: ...`; an exception is for the caller to report."""
    plain, inputs = Drawn(plan).eval(), inputs_of(plan)
    before = outputs(plain, inputs)
    skip: tuple[str, ...] = ()
    for _ in range(_SKIPS):
        model = copy.deepcopy(plain)
        chosen = TECHNIQUES[technique](model, skip)
        try:
            model = et.apply(model, chosen, et.Sample.of(inputs) if technique in ("prune", "int8", "gptq") else None)
            trained = train(model, inputs)
            break
        except EdgetuneError as error:
            named = re.search(r'"([\w.]+)" to skip|skip: \[[\'"]([\w.]+)', error.action)
            name = next((part for part in named.groups() if part), "") if named else ""
            if not name or name in skip or technique in ("int8", "sparse-update"):
                return f"refused: {str(error).splitlines()[0]}"
            skip = (*skip, name)
    else:
        return "wrong: its hints to skip never end"
    unreached = [name for name in trained if not name.startswith(dead_layers(plan))]
    if unreached:
        return f"wrong: trainable, and no gradient came: {unreached}"
    finalized_from = outputs(model.eval(), inputs)
    model = et.finalize(model)
    after = outputs(model, inputs)
    difference = apart(finalized_from, after)
    if difference > _RIGHT:
        return f"wrong: finalize changed the outputs by {difference:.1e}"
    if technique == "prune":
        pass  # compared with the model with those units at zero by prune itself
    elif technique in ("int8", "int4", "gptq", "int8_dynamic"):
        if apart(before, after) > 1.0:
            return f"wrong: quantization changed the outputs by {apart(before, after):.1e}"
    elif apart(before, after) < 1e-6:
        return "wrong: nothing was trained"
    return compiled(model, inputs, after)


def dead_layers(plan: Plan) -> tuple[str, ...]:
    """What the name of a layer begins with whose value nothing reads: no gradient can reach it."""
    live = {len(plan.steps)}
    for number in range(len(plan.steps), 0, -1):  # value 0 is the input
        if number in live:
            live.update(plan.steps[number - 1].sources)
    return tuple(f"layers.{n - 1}." for n in range(1, len(plan.steps) + 1) if n not in live)


def outputs(model: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        result: Any = model(inputs)
    values = result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else (result,)
    return tuple(values)


def apart(expected: tuple[Tensor, ...], actual: tuple[Tensor, ...]) -> float:
    """The largest difference over the largest value, of all outputs."""
    return max(
        float((a - b).abs().max() / a.abs().max().clamp(min=1e-2)) for a, b in zip(expected, actual, strict=True)
    )


def train(model: nn.Module, inputs: Tensor) -> list[str]:
    """Three updates, if anything trains; the names of trainable tensors that no gradient reached."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    floating = [p for p in parameters.values() if p.is_floating_point()]
    if not floating or not any(active_techniques(model)):
        return []
    optimizer = torch.optim.AdamW(floating, lr=1e-2)
    model.train()
    reached: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        result: Any = model(inputs)
        values = result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else (result,)
        sum((value - 0.5).square().sum() for value in values).backward()  # type: ignore[union-attr]
        reached |= {name for name, p in parameters.items() if p.grad is not None}
        optimizer.step()
    model.eval()
    return sorted(set(parameters) - reached)


def compiled(model: nn.Module, inputs: Tensor, expected: tuple[Tensor, ...]) -> str:
    """Lower the model for all rows at once, run the program, and compare every output, by the bound of an export."""
    try:
        data = lower(Positional(model, inputs).eval(), (inputs,), find("xnnpack")).data
    except EdgetuneError as error:
        if re.search(r"\baten[.:]|operator \S|torch\.\w|quantized", str(error)):
            return f"right: but for an operator that no program can have: {str(error).splitlines()[0]}"
        raise
    program = load_runtime(None)._load_for_executorch_from_buffer(data)
    actual = tuple(value.clone() for value in program.forward((inputs,)))
    if len(actual) != len(expected):
        return f"wrong: the program has {len(actual)} of {len(expected)} outputs"
    difference, bound = apart(expected, actual), allowed_difference(model)
    return "right" if difference <= bound else f"wrong: the program's outputs differ by {difference:.1e}"


def drawn_plans(count: int, number: int) -> list[Plan]:
    """So many different modules, the same for a seed."""
    collected: dict[Plan, None] = {}

    @seed(number)
    @settings(max_examples=2 * count, database=None, deadline=None, phases=(Phase.generate,),
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(plans(unusual=True))
    def collect(plan: Plan) -> None:
        collected[plan] = None

    collect()
    return list(collected)[:count]


def tried(pairs: list[tuple[Plan, str]], workers: int) -> Iterator[tuple[Plan, str, str]]:
    """Each pair in a process of its own, and what came of it."""
    warm_up()
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda pair: ask_fork(lambda: outcome(*pair)), pairs)
        for (plan, technique), result in zip(pairs, results, strict=True):
            yield plan, technique, result


def warm_up() -> None:
    """Import and use the libraries once, before the processes fork."""
    import bitsandbytes
    import peft

    with silence_libraries():
        import executorch.exir
    assert executorch.exir
    assert peft
    assert bitsandbytes
    torch.set_num_threads(1)
    lower(Positional(nn.Linear(2, 2), torch.ones(1, 2)).eval(), (torch.ones(1, 2),), find("xnnpack"))


def kind_of(result: str) -> str:
    """`right`, `refused`, `wrong` or `crashed`."""
    kind = result.partition(":")[0]
    return kind if kind in ("right", "refused", "wrong") else "crashed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, default=400)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--reasons", action="store_true", help="also print why modules were refused")
    parser.add_argument("--techniques", nargs="+", choices=TECHNIQUES, default=list(TECHNIQUES))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    modules = drawn_plans(arguments.modules, arguments.seed)
    counts: dict[str, Counter[str]] = {name: Counter() for name in arguments.techniques}
    reasons: Counter[str] = Counter()
    pairs = list(itertools.product(modules, arguments.techniques))
    for number, (plan, technique, result) in enumerate(tried(pairs, arguments.workers), 1):
        if number % 100 == 0:
            print(f"{number} of {len(pairs)}", file=sys.stderr)
        counts[technique][kind_of(result)] += 1
        if kind_of(result) == "refused":
            reasons[f"{technique}: {re.sub(r'layers[.][0-9a-z.]+|[0-9]+', '*', result)[9:109]}"] += 1
        if kind_of(result) in ("wrong", "crashed"):
            print(f"{technique}: {result}\n  {plan}", flush=True)
    print(f"{len(modules)} modules of {ROWS} rows, seed {arguments.seed}")
    print("| technique | right | refused | wrong | crashed |\n|---|---|---|---|---|")
    for name, count in counts.items():
        print(f"| {name} | {count['right']} | {count['refused']} | {count['wrong']} | {count['crashed']} |")
    if arguments.reasons:
        print("\nRefused:", *(f"{count:5} {reason}" for reason, count in reasons.most_common()), sep="\n")
    return int(any(count["wrong"] or count["crashed"] for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
