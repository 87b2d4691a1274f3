"""Adapters for several tasks: trained by task ids, and each task a plain LoRA on one base."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.adapt.poly import poly_layers
from support.laws import ATTENTION, bert, logits, loss_of, mlp, tokens, vectors

TASKS = ("reviews", "tickets", "news")


def inputs(*tasks: int) -> dict[str, Tensor]:
    """Four rows, and the task of each."""
    return {**tokens(), "task_ids": torch.tensor(tasks)}  # type: ignore[dict-item]


def trained(**settings: Any) -> nn.Module:
    """BERT with adapters after some updates with rows of all tasks."""
    model = et.apply(bert(), et.Poly(tasks=TASKS, skills=2, targets=ATTENTION, **settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    torch.manual_seed(0)
    for layer in poly_layers(model).values():  # as after much training: tasks that mix the skills differently
        nn.init.normal_(layer.poly_router["default"].module_logits, std=3)
        nn.init.normal_(layer.poly_lora_B["default"], std=0.5)
    model.train()
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model(**inputs(0, 1, 2, 0))).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("heads", [1, 4])
def test_each_task_is_a_plain_lora_on_one_base(heads: int, tmp_path: Path) -> None:
    model = trained(heads=heads, also_train=("classifier",))
    expected = [logits(model, inputs(*[task] * 4)) for task in range(3)]
    assert min((expected[0] - other).abs().max() for other in expected[1:]) > 1e-3
    mixed = logits(model, inputs(2, 0, 1, 1))
    for row, task in enumerate((2, 0, 1, 1)):
        torch.testing.assert_close(mixed[row], expected[task][row], atol=1e-5, rtol=1e-5)
    base, folders = et.split_tasks(copy.deepcopy(model), tmp_path)
    assert folders == {task: tmp_path / task for task in TASKS}
    assert base.state_dict().keys() == bert().state_dict().keys()
    assert not base._forward_pre_hooks
    assert not torch.equal(base.classifier.weight, bert().classifier.weight)
    for task, wanted in zip(TASKS, expected, strict=True):
        loaded = et.load_adapter(copy.deepcopy(base), folders[task])
        torch.testing.assert_close(logits(loaded, tokens()), wanted, atol=1e-5, rtol=1e-5)
        one = trained(heads=heads, also_train=("classifier",), task=task)
        torch.testing.assert_close(logits(et.finalize(one), tokens()), wanted, atol=1e-5, rtol=1e-5)


def test_all_tasks_are_exported_as_adapters_on_one_base(tmp_path: Path) -> None:
    model = trained(heads=2, rank=2)
    example = {name: value[:1] for name, value in tokens().items()}  # type: ignore[union-attr]
    expected = [logits(model, {**example, "task_ids": torch.tensor([task])}) for task in range(3)]
    base, folders = et.split_tasks(model, tmp_path / "tasks")
    artifact = et.export(base, example, tmp_path / "model.pte", adapters=folders, form="inputs")
    assert artifact.manifest.main.parity.max_relative_difference < 1e-5
    for task, wanted in zip(TASKS, expected, strict=True):
        (output,) = artifact.run(example, adapter=task)
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)


def test_the_skills_come_back_from_pefts_folder(tmp_path: Path) -> None:
    import peft

    model = trained(heads=4)
    et.save_adapter(model, tmp_path)
    loaded = et.load_adapter(bert(), tmp_path)
    batch = inputs(0, 1, 2, 1)
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=0, rtol=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        theirs = peft.PeftModel.from_pretrained(bert(), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs.base_model(**batch).logits, logits(model, batch), atol=0, rtol=0)


def test_a_task_trains_its_own_weights_only() -> None:
    model = et.apply(bert(), et.Poly(tasks=TASKS, skills=2, targets=ATTENTION))
    for layer in poly_layers(model).values():
        nn.init.normal_(layer.poly_lora_B["default"], std=0.1)
    loss_of(model(**inputs(1, 1, 1, 1))).backward()
    for layer in poly_layers(model).values():
        moved = layer.poly_router["default"].module_logits.grad.abs().sum(-1) > 0
        assert moved.tolist() == [False, True, False]


def test_a_run_saves_a_lora_for_each_task(tmp_path: Path) -> None:
    model = trained()
    et.Poly(tasks=TASKS, skills=2, targets=ATTENTION).save(model, tmp_path)
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == sorted(TASKS)
    assert poly_layers(model)


def test_what_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    model = et.apply(bert(), et.Poly(tasks=TASKS, targets=ATTENTION))
    with pytest.raises(et.EdgetuneError, match=r"the inputs have no task_ids"):
        model(**tokens())
    with pytest.raises(et.EdgetuneError, match=r"there are 3 tasks.*\[3\]"):
        model(**inputs(0, 1, 2, 3))
    with pytest.raises(et.EdgetuneError, match=r"a task for each row.*2 task_ids"):
        model(**{**inputs(), "task_ids": torch.tensor([0, 1])})
    with pytest.raises(et.EdgetuneError, match=r"a plain model computes one task(.|\n)*split_tasks"):
        et.finalize(model)
    with pytest.raises(et.EdgetuneError, match="heads must divide"):
        et.apply(bert(), et.Poly(tasks=TASKS, heads=3, targets=ATTENTION))
    with pytest.raises(et.EdgetuneError, match="there is no 'mail' in tasks"):
        et.Poly(tasks=TASKS, task="mail", targets=ATTENTION)
    with pytest.raises(et.EdgetuneError, match="no adapters with tasks"):
        et.split_tasks(bert(), tmp_path)
    flat = et.apply(mlp(), et.Poly(tasks=TASKS, task="news", targets=("*.up",)))
    with pytest.raises(et.EdgetuneError, match=r"over \(rows, tokens, width\)"):
        flat(vectors())


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8")
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "et.Poly(" in block]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/adapters.md", "exec"), {})
    assert (tmp_path / "model.tickets.safetensors").is_file()
