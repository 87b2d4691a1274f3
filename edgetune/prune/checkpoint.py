"""Save a model that was cut, and load it again: what its config cannot say stands in a small file beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.registry import require
from edgetune.prune.depth import take_blocks
from edgetune.prune.structure import Entry, config_before, cut_as, history_of, set_config_before, set_history

FILE, WEIGHTS = "edgetune.json", "model.safetensors"
_FORMAT = 1


def replay(model: nn.Module, history: list[Entry]) -> None:
    """Make the cuts of a history in a model as it was before them."""
    for entry in history:
        if "blocks" in entry:
            take_blocks(model, entry["blocks"])
        else:
            cut_as(model, entry)
    set_history(model, history)


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Save a model, cut or not, for `et.load_pretrained`.

    A model of transformers is saved by its own `save_pretrained`; where its config can say the new widths, plain
    `from_pretrained` loads it too. Other models: their tensors in `model.safetensors`. What cuts changed stands in
    `edgetune.json` beside them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)  # type: ignore[operator]
    else:
        save_model(model, str(folder / WEIGHTS))
    document = {"format": _FORMAT, "cuts": history_of(model), "config": config_before(model)}
    (folder / FILE).write_text(json.dumps(document, indent=1), encoding="utf-8")


def load_pretrained(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load what `et.save_pretrained` saved, in eval mode.

    `model`: the network as it was before it was cut, which becomes the saved one in place; not needed for models of
    transformers, whose folder has their config. Raises `EdgetuneError` if the tensors do not fit.
    """
    folder = Path(folder)
    history, config = _read(folder)
    if model is None:
        return _from_transformers(folder, history, config).eval()
    replay(model, history)
    try:
        load_model(model, str(folder / WEIGHTS))
    except (RuntimeError, OSError) as error:
        raise EdgetuneError(
            f"the saved tensors do not fit the model: {str(error).splitlines()[-1].strip()}",
            where=str(folder / WEIGHTS),
            action="pass the model as it was before it was cut",
        ) from error
    return model.eval()


def _read(folder: Path) -> tuple[list[Entry], dict[str, Any] | None]:
    """The cuts, and the config before them."""
    try:
        document = json.loads((folder / FILE).read_text(encoding="utf-8"))
        history, config, form = document["cuts"], document["config"], document["format"]
    except OSError as error:
        raise EdgetuneError("there is no saved model", where=str(folder / FILE), action="et.save_pretrained") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EdgetuneError("the file cannot be read", where=str(folder / FILE), action="save it again") from error
    if form != _FORMAT:
        where, allowed = str(folder / FILE), [str(_FORMAT)]
        raise EdgetuneError("the file is of another version", where=where, got=form, allowed=allowed)
    return history, config


def _from_transformers(folder: Path, history: list[Entry], before: dict[str, Any] | None) -> nn.Module:
    """Build the class that the config names from the config before the cuts, cut it as it is built, and load."""
    transformers = require("transformers", "load_pretrained")
    config = transformers.AutoConfig.from_pretrained(folder)
    named: Any = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if named is None:
        raise EdgetuneError(
            "the folder names no class of transformers",
            where=str(folder / "config.json"),
            got=getattr(config, "architectures", None),
            action="pass the model as it was before it was cut: et.load_pretrained(folder, model)",
        )

    def build(self: nn.Module, *args: Any, **settings: Any) -> None:
        named.__init__(self, *args, **settings)
        replay(self, history)

    cut = type(named.__name__, (named,), {"__init__": build, "__module__": named.__module__})
    whole = config if before is None else type(config).from_dict(before)
    loaded: Any = cut.from_pretrained(folder, config=whole)  # type: ignore[attr-defined]
    loaded.__class__ = named
    public = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    vars(loaded.config).update(public)  # what it can say of the cuts
    set_config_before(loaded, before)
    return loaded  # type: ignore[no-any-return]
