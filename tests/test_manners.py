"""The API's manners: wrong settings and wrong calls are answered in a line, values print as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.core import other_names
from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import Predicted
from edgetune.core.numbers import format_number
from edgetune.core.places import Errors
from edgetune.core.registry import STEPS, TECHNIQUES
from edgetune.core.validated import setting_names
from edgetune.profile import Profile, device
from edgetune.recipe import recipe
from edgetune.sparse.scheme import Slice
from support.manifests import stored

ALL: dict[str, Any] = {"targets": ["*.query"]}


@pytest.mark.parametrize(
    ("make", "lines"),
    [
        (lambda: et.LoRA(rank=-1, **ALL), ["LoRA, rank: must be at least 1: got -1"]),
        (lambda: et.LoRA(rank=-1), ["LoRA: 2 errors:", "LoRA, targets: is missing", "LoRA, rank: must be"]),
        (lambda: et.NF4(targets="q"), ["NF4, targets: must be a list, as in ['q']: got 'q'"]),
        (lambda: et.Train(epochs=1, updates=2), ["Train: give either epochs or updates"]),
        (lambda: et.Train(distill={"temp": 3, "teacher": "x"}), ["Train, distill.temp: unknown field: got 'temp'"]),
        (lambda: Slice(ratio=2), ["Slice, ratio: must be less than 1: got 2"]),
        (lambda: et.SparseUpdate(scheme={"*": {"ratio": 3}}), ["SparseUpdate, scheme.*.ratio: must be less than 1"]),
        (lambda: et.SparseUpdate(scheme=3), ["SparseUpdate, scheme: must be text or a mapping: got 3"]),
        (lambda: et.LoRA(8), ["LoRA: settings must be given by name: got 8", "  next: write LoRA(targets=...)"]),
    ],
)
def test_wrong_settings_are_one_line_each(make: Callable[[], object], lines: list[str]) -> None:
    with pytest.raises(EdgetuneError) as error:
        make()
    written = str(error.value).splitlines()
    assert len(written) == len(lines)
    assert all(line.startswith(start) for line, start in zip(written, lines, strict=True)), written
    assert "pydantic" not in str(error.value)


def test_a_model_given_for_a_number_is_cut() -> None:
    with pytest.raises(EdgetuneError, match="must be a number") as error:
        et.Prune(ratio=nn.Sequential(*(nn.Linear(2, 2) for _ in range(99))))  # type: ignore[arg-type]
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


PEFT = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets", "use_dora": "dora",
    "modules_to_save": "also_train", "use_rslora": "rslora", "exclude_modules": "skip",
}  # fmt: skip
COMMON = {
    "lr": "learning_rate", "bs": "batch_size", "batch": "batch_size", "epoch": "epochs", "wd": "weight_decay",
    "num_train_epochs": "epochs", "max_steps": "updates", "gradient_accumulation_steps": "accumulate",
}  # fmt: skip


@pytest.mark.parametrize(("step", "names"), [("lora", PEFT), ("train", COMMON)])
def test_names_of_other_libraries_are_answered_with_ours(step: str, names: dict[str, str]) -> None:
    kind = {"lora": et.LoRA, "train": et.Train}[step]
    for theirs, ours in names.items():
        with pytest.raises(EdgetuneError, match=f"did you mean '{ours}'"):
            kind(**{**(ALL if step == "lora" else {}), theirs: 1})
        lines = ["model: minilm", "data: tweets", "steps:", f"  - {step}: {{{theirs}: 1, targets: ['*']}}"]
        with pytest.raises(EdgetuneError, match=f"{step}.{theirs}: unknown field.*did you mean '{ours}'"):
            recipe.parse("\n".join(lines), "mine.yaml")


def test_every_answer_is_a_setting_or_a_step_that_exists() -> None:
    from edgetune.data.settings import DataSettings
    from edgetune.models.loaded import ModelSettings

    kinds = [recipe.settings_class(name) for name in (*TECHNIQUES, *STEPS)]
    parts = [et.Train.model_fields["distill"].annotation.__args__[0], recipe.ExportSettings]  # type: ignore[union-attr]
    fields = {field for kind in (*kinds, *parts, DataSettings, ModelSettings) for field in setting_names(kind)}
    assert {ours for several in other_names.SETTINGS.values() for ours in several} <= fields
    assert set(other_names.STEPS.values()) <= set(recipe.step_names())


def test_an_override_without_its_step_is_answered_with_it() -> None:
    text = "model: minilm\ndata: tweets\nsteps: [{lora: {targets: ['*']}}, train]"
    for theirs, ours in {"lr": "train.learning_rate", "rank": "lora.rank", "sede": "seed", "trian": "train"}.items():
        with pytest.raises(EdgetuneError, match=f"no such field or step: got '{theirs}'.*did you mean '{ours}'"):
            recipe.parse(text, "mine.yaml", {theirs: 1})


def test_step_names_of_others_are_answered(tmp_path: Path) -> None:
    for theirs, ours in {"LoRA": "lora", "sparse_update": "sparse-update", "qlora": "nf4", "fit": "train"}.items():
        with pytest.raises(EdgetuneError, match=f"unknown step: got '{theirs}'.*did you mean '{ours}'"):
            recipe.parse(f"model: minilm\ndata: tweets\nsteps: [{theirs}]", "mine.yaml")


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"lora": 8}, r"write et.LoRA\(...\)"),
        ("lora", r"write et.LoRA\(...\)"),
        (["int8"], r"write et.Int8\(...\)"),
        ([et.LoRA], r"make an object of the class: et.LoRA\(targets=...\)"),
        (et.Int8, r"make an object of the class: et.Int8\(\)"),
        (None, r"one object for each technique"),
        (8, r"one object for each technique"),
        ([et.Train()], "train in your own loop"),
    ],
)
def test_apply_says_what_it_takes(given: Any, answer: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(EdgetuneError, match=f"(?s)et.apply: not a technique.*next: .*{answer}"):
        et.apply(model, given)
    assert not hasattr(model, "edgetune_techniques")


def test_apply_and_finalize_take_a_model_first() -> None:
    with pytest.raises(EdgetuneError, match=r"et\.apply: not a model"):
        et.apply([et.Int8()], nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(EdgetuneError, match=r"et\.finalize: not a model"):
        et.finalize("model.pt")  # type: ignore[arg-type]


def test_values_print_as_one_short_line(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))
    artifact = et.export(net.eval(), torch.randn(1, 8), tmp_path / "m.pte")
    profile = et.profile(artifact)
    manifest = artifact.manifest
    values = [artifact, manifest, manifest.main.operators[0], artifact.program(), profile, profile.predicted]
    values += [device.load("pixel-8"), stored(tmp_path, "methods")]
    for value in values:
        for text in (repr(value), str(value)):
            assert len(text) < 160 + len(str(tmp_path)), text
            assert "\n" not in text
    assert repr(artifact).startswith(f"Artifact('{tmp_path}/m.pte', xnnpack, 0.")
    latency = format_number(profile.predicted.latency_ms)
    assert repr(profile) == f"Profile(pixel-8: predicted {latency} ms, not measured)"


def test_a_profile_names_its_call_and_what_was_measured() -> None:
    predicted = Predicted(
        device="pixel-8", call="a token", latency_ms=2, latency_low_ms=1, latency_high_ms=3, peak_memory_mib=1,
        calibrated=False,
    )  # fmt: skip
    assert repr(Profile(predicted)) == "Profile(pixel-8, a token: predicted 2.00 ms, not measured)"


def test_errors_keep_each_problem_apart() -> None:
    with pytest.raises(Errors) as error:
        et.LoRA(r=8, target_modules=["q"])  # type: ignore[call-arg]
    assert [one.where for one in error.value.errors] == ["LoRA, targets", "LoRA, r", "LoRA, target_modules"]
