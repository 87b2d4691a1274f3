"""The kit of a text or picture classifier."""

from __future__ import annotations

from pathlib import Path

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import write_atomically
from edgetune.core.numbers import format_size
from edgetune.export.kit import cpp
from edgetune.export.kit.platforms import Platform
from edgetune.program.artifact import Artifact
from edgetune.program.card import card_path, postprocessing, preprocessing, write_card
from edgetune.program.carried import Carried, ClassScores, ImagePreprocessing, TextPreprocessing
from edgetune.program.manifest import Manifest, manifest_path

_WHAT = {
    "pte": "the program",
    "json": "its metadata: shapes, preprocessing, classes, versions, checksums",
    "md": "the model card, with its quality and speed",
    "tokenizer.json": "the tokenizer, in the format of Hugging Face's `tokenizers`",
}
_NO_CPP = "No C++ sample: it only supports tokenizers of the BERT family, and this program has another.\n"


def check(platform: Platform, carried: Carried | None) -> None:
    """Raise unless the samples for the platform know what to do with what a program carries."""
    told = carried.preprocessing if carried is not None else None
    if carried is None or told is None or carried.postprocessing is None:
        raise EdgetuneError(
            "the program has no preprocessing and no classes in its metadata",
            action="make kits of classifiers and text-generation programs: give a model by name, or a run's folder",
            exit_code=Exit.EXPORT,
        )
    if not isinstance(carried.postprocessing, ClassScores):
        raise EdgetuneError(
            "the samples of a kit show classes, and this program gives something else",
            got=carried.task,
            action="use the program alone: its model.json and model.md say what its outputs mean",
            exit_code=Exit.EXPORT,
        )
    if not platform.python and isinstance(told, TextPreprocessing) and told.wordpiece is None:
        raise EdgetuneError(
            f"the sample for {platform.title} only supports tokenizers of the BERT family",
            action="use a model of that family, or give the app a library that reads model.tokenizer.json",
            exit_code=Exit.EXPORT,
        )


def files(platform: Platform, artifact: Artifact) -> dict[str, str]:
    """Templates and where they go."""
    told = _told(artifact.manifest).preprocessing
    found = platform.files(told)
    if isinstance(told, TextPreprocessing) and told.wordpiece is None:
        return {source: goal for source, goal in found.items() if not goal.startswith("cpp/")}
    return found


def fields(platform: Platform, artifact: Artifact, folder: Path) -> dict[str, str]:
    """The values of the templates. Writes the card where there is none yet, and C++'s vocabulary into the kit."""
    manifest, path = artifact.manifest, artifact.path
    check(platform, manifest.carried)
    _check_inputs(manifest)
    if not card_path(path).is_file():
        write_card(path, manifest)
    carried = _told(manifest)
    told = carried.preprocessing
    names = [path.name, manifest_path(path).name, card_path(path).name, *manifest.files]
    found = _common(platform, manifest, names)
    found |= _of_texts() if isinstance(told, TextPreprocessing) else _of_pictures()
    if not platform.python:
        return found
    if isinstance(told, TextPreprocessing):
        if told.wordpiece is None:
            return {**found, "cpp": _NO_CPP}
        (folder / "cpp").mkdir(exist_ok=True)
        write_atomically(folder / "cpp" / "vocab.txt", cpp.vocabulary(path.with_name(told.tokenizer)))
    return {**found, **cpp.fields(manifest)}


def _told(manifest: Manifest) -> Carried:
    assert manifest.carried is not None  # `check` has seen it
    return manifest.carried


def _check_inputs(manifest: Manifest) -> None:
    """Raise for a program that takes other inputs than the samples give."""
    carried, call = _told(manifest), manifest.main
    told = carried.preprocessing
    if isinstance(told, ImagePreprocessing):
        fits = [spec.shape for spec in call.inputs] == [(1, len(told.mean), told.size_px, told.size_px)]
    else:
        names = tuple(spec.name for spec in call.inputs)
        fits = names == ("input_ids", "attention_mask") and all(spec.shape[0] == 1 for spec in call.inputs)
    fits = fits and len(carried.labels) in (0, call.outputs[0].shape[-1])
    if not fits:
        raise EdgetuneError(
            "the inputs or outputs of the program do not match its metadata",
            got=[str(spec) for spec in (*call.inputs, *call.outputs)],
            action="export with one row as carried.preprocessing makes it, and a name for each class",
            exit_code=Exit.EXPORT,
        )
    if manifest.data is not None:
        raise EdgetuneError(
            "the weights of the program are in a separate file",
            got=manifest.data.file,
            action="export it with its weights inside",
            exit_code=Exit.EXPORT,
        )


def _common(platform: Platform, manifest: Manifest, names: list[str]) -> dict[str, str]:
    carried, parity = _told(manifest), manifest.main.parity
    return {
        "title": f"{carried.model or 'A model'} for {platform.title}",
        "task": carried.task.replace("-", " "),
        "target": manifest.target,
        "size": format_size(manifest.size_bytes),
        "executorch": manifest.versions["executorch"],
        "torch": manifest.versions["torch"].partition("+")[0],
        "files": _bullets([f"`{name}`: {_WHAT[name.partition('.')[2]]}" for name in names]),
        "how": _bullets(preprocessing(carried)),
        "out": _bullets(postprocessing(carried)),
        "package": platform.packages.get(manifest.target, platform.packages.get("", "")),
        "products": _products(platform, manifest.target),
        "resources": ",\n".join(f'        .copy("Resources/{name}")' for name in names),
        "parity": f"The program ran on the machine that exported it and was compared with the model on {parity.rows} "
        f"rows: the same prediction on {parity.same_prediction_pct:g} %."
        if parity is not None
        else f"The program was {manifest.note}.",
    }


def _of_texts() -> dict[str, str]:
    rows = '"a text" "another text"'
    return {
        "kind": "Text",
        "argument": '"a text"',
        "rows": rows,
        "cpp_rows": rows,
        "library": "tokenizers>=0.21",
    }


def _of_pictures() -> dict[str, str]:
    return {
        "kind": "Picture",
        "argument": "picture",
        "rows": "image.jpg another.png",
        "cpp_rows": "picture.ppm",
        "library": "pillow>=10",
    }


def _products(platform: Platform, target: str) -> str:
    backend = platform.packages.get(target, "")
    names = ["executorch", *([backend] if backend else []), "kernels_optimized", "kernels_quantized"]
    return "\n".join(f'        .product(name: "{name}", package: "executorch"),' for name in names)


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
