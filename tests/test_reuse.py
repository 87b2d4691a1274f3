"""A changed recipe, resumed: what came before the change stands, and is not done again."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.ledger import Ledger
from edgetune.recipe import recipe
from edgetune.run import pipeline, reuse
from edgetune.train.loggers import read
from support.checkpoints import save_bert

RECIPE = """
name: small
model: {{source: 'hf:{folder}/model', max_length: 8}}
data: 'csv:{folder}/rows.csv'
steps:
  - sparse-update: {{scheme: last-1}}
  - train: {{updates: 2, batch_size: 4, checkpoint_every: 1}}
  - prune: {{ratio: 0.25, what: [ffn], importance: activation}}
  - train: {{updates: 2, batch_size: 4, checkpoint_every: 1}}
  - int4: {{embeddings: none}}
"""
TRAINED = [1, 2]  # rows of sparse-update and the first training


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_bert(folder / "model", "Model", hidden_size=64, intermediate_size=256, num_hidden_layers=2)
    rows = [f"{'good' if n % 2 else 'bad'} text {'very ' * (n % 5)}a,{n % 2}" for n in range(40)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *dict.fromkeys(rows)]), encoding="utf-8")
    (folder / "small.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return folder / "small.yaml"


@pytest.fixture(scope="module")
def finished(recipe_path: Path) -> pipeline.Run:
    return pipeline.run(recipe_path, out=recipe_path.parent / "whole")


def copy_of(run: pipeline.Run, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run.folder, folder / "run"))


def begun(out: Path, path: Path, *changes: str, **how: Any) -> tuple[Ledger, list[str]]:
    """The ledger of a resumed run, and the names of what it did (not of what it reused)."""
    from edgetune.recipe.overrides import parse_overrides

    done: list[str] = []

    def note(what: str, at: int, of: int, detail: str) -> None:
        if what.endswith("train") or (what == "measure" and at == 0):
            done.append(detail if what == "measure" else "train")

    ledger = pipeline.run(path, parse_overrides(list(changes)), out=out, progress=note, **how).ledger
    return ledger, list(dict.fromkeys(done))


def test_what_comes_before_a_changed_step_is_not_done_again(
    recipe_path: Path, finished: pipeline.Run, tmp_path: Path
) -> None:
    out = copy_of(finished, tmp_path)
    ledger, done = begun(out, recipe_path, "steps.5.embeddings=int8", resume=True)
    assert done == ["after int4"]
    assert ledger.rows[:-1] == finished.ledger.rows[:-1], "their time stamps too"
    assert ledger.rows[-1].size_mib != finished.ledger.rows[-1].size_mib
    assert ledger.trainings == finished.ledger.trainings
    assert ledger.finished
    assert recipe.load(out / "recipe.yaml").steps[-1].settings.embeddings == "int8"
    with pytest.raises(EdgetuneError, match="the run is finished") as caught:
        begun(out, recipe_path, "steps.5.embeddings=int8", resume=True)
    assert "--from" in caught.value.action


def test_what_comes_after_a_changed_step_is_done_again(
    recipe_path: Path, finished: pipeline.Run, tmp_path: Path
) -> None:
    out = copy_of(finished, tmp_path)
    ledger, done = begun(out, recipe_path, "steps.3.ratio=0.5", resume=True)
    assert done == ["after prune", "train", "after train", "after int4"]
    assert ledger.trainings[0] == finished.ledger.trainings[0]
    fresh = pipeline.run(recipe_path, {"steps.3.ratio": 0.5}, out=tmp_path / "fresh").ledger
    assert [t.losses for t in ledger.trainings] == [t.losses for t in fresh.trainings]
    assert [r.quality for r in ledger.rows] == [r.quality for r in fresh.rows]


def test_a_step_can_be_done_again_and_a_run_can_stop_after_one(
    recipe_path: Path, finished: pipeline.Run, tmp_path: Path
) -> None:
    out = copy_of(finished, tmp_path)
    ledger, done = begun(out, recipe_path, from_step=4, until_step=4)
    assert done == ["train", "after train"]
    assert not ledger.finished
    assert [row.step for row in ledger.rows][-1] == "train"
    ledger, done = begun(out, recipe_path, resume=True)
    assert done == ["after int4"]
    assert [row.quality for row in ledger.rows] == [row.quality for row in finished.ledger.rows]


def test_loggers_change_no_result(recipe_path: Path, finished: pipeline.Run, tmp_path: Path) -> None:
    logs = [read(finished.folder / "checkpoints" / name / "log.jsonl") for name in ("02-train", "04-train")]
    for lines, training in zip(logs, finished.ledger.trainings, strict=True):
        figures = [(line["update"], line["loss"], line["learning_rate"]) for line in lines]
        assert figures == [(p.update, p.loss, p.learning_rate) for p in training.losses]
    out = copy_of(finished, tmp_path)
    pytest.importorskip("tensorboard")
    ledger, done = begun(out, recipe_path, "train.log=[tensorboard]", from_step=4)
    assert done == ["train", "after train", "after int4"]
    assert [t.losses for t in ledger.trainings] == [t.losses for t in finished.ledger.trainings]
    assert list(out.glob("checkpoints/*/tensorboard/events*"))
    assert read(out / "checkpoints" / "02-train" / "log.jsonl") == logs[0]


def test_a_missing_logger_is_known_before_any_work(recipe_path: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    with pytest.raises(EdgetuneError, match=r"train\.log names trackio") as caught:
        pipeline.run(recipe_path, {"train.log": ["trackio"]}, out=tmp_path / "run")
    assert caught.value.action == "pip install trackio"
    assert not (tmp_path / "run" / "data.txt").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"from_step": "train"}, "several steps have this name: got 'train'.*2 train"),
        ({"from_step": "distil"}, "no such step"),
        ({"from_step": 6}, "no such step"),
        ({"until_step": "export"}, "no such step"),
        ({"from_step": 5, "until_step": 2}, "names an earlier step than --from"),
    ],
)
def test_a_step_is_named_or_numbered(how: dict[str, Any], message: str, recipe_path: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match=message):
        pipeline.run(recipe_path, out=tmp_path / "run", **how)


def test_other_data_leave_nothing_to_reuse(recipe_path: Path, finished: pipeline.Run, tmp_path: Path) -> None:
    out = copy_of(finished, tmp_path)
    with pytest.raises(EdgetuneError, match="nothing of this run can be reused"):
        begun(out, recipe_path, "seed=3", resume=True)
    assert Ledger.read(out / "ledger.json") == finished.ledger, "and nothing of it is lost"


def test_a_late_step_that_cannot_work_stops_the_run_before_any_training(
    recipe_path: Path, finished: pipeline.Run, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(EdgetuneError, match=r"step 5, int4: .*matches no layer \(found before any") as caught:
        pipeline.run(recipe_path, {"steps.5.skip": ["nothing"]}, out=out)
    assert caught.value.exit_code == Exit.USAGE
    assert not (out / "checkpoints").exists()
    out = copy_of(finished, tmp_path / "b")
    with pytest.raises(EdgetuneError, match="before any"):
        begun(out, recipe_path, "steps.5.skip=[nothing]", resume=True)
    assert Ledger.read(out / "ledger.json") == finished.ledger, "a wrong change costs nothing"


def test_widths_are_rounded_to_what_comes_later(recipe_path: Path) -> None:
    def rounded(*changes: str) -> int:
        from edgetune.recipe.overrides import parse_overrides

        settings: Any = recipe.load(recipe_path, parse_overrides(list(changes))).steps[2].settings
        return settings.round_to

    assert rounded() == 32
    assert rounded("steps.5.group_size=64") == 64
    assert rounded("steps.3.round_to=8") == 8


def test_a_digest_depends_on_all_that_came_before(recipe_path: Path) -> None:
    def chain(**changes: Any) -> tuple[str, ...]:
        return reuse.step_digests(recipe.load(recipe_path, {k.replace("__", "."): v for k, v in changes.items()}))

    plain = chain()
    assert len(set(plain)) == 6
    assert chain(steps__2__updates=3)[:2] == plain[:2]
    assert not set(chain(steps__2__updates=3)[2:]) & set(plain)
    assert chain(steps__2__checkpoint_every=2) == plain, "changes no result"
    assert chain(steps__2__log=["tensorboard"]) == plain, "nor does this"
    assert not set(chain(seed=1)) & set(plain)


def test_a_disk_without_room_stops_the_run_before_any_training(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**16))
    with pytest.raises(EdgetuneError, match=r"will write at least .* MiB, and the disk has less"):
        pipeline.run(recipe_path, out=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
