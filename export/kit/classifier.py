"""The kit of a text or image classifier."""

from __future__ import annotations

from pathlib import Path

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import write_atomically
from edgetune.export.kit import cpp
from edgetune.export.kit.fields import common_fields, format_bullets
from edgetune.export.kit.platforms import Platform
from edgetune.program.artifact import Artifact
from edgetune.program.card import card_path, postprocessing, preprocessing, write_card
from edgetune.program.carried import Carried, ClassScores, ImagePreprocessing, TextPreprocessing
from edgetune.program.manifest import Manifest, manifest_path

_DESCRIPTIONS = {
    "pte": "the program",
    "json": "its metadata: shapes, preprocessing, classes, versions, checksums",
    "md": "the model card, with its quality and speed",
    "tokenizer.json": "the tokenizer, in the format of Hugging Face's `tokenizers`",
}
_ROWS = '"a text" "another text"'
_TEXT = {"kind": "Text", "argument": '"a text"', "rows": _ROWS, "cpp_rows": _ROWS, "library": "tokenizers>=0.21"}
_IMAGE = {
    "kind": "Picture", "argument": "image", "rows": "image.jpg another.png", "cpp_rows": "image.ppm",
    "library": "pillow>=10",
}  # fmt: skip
_NO_CPP = "No C++ sample: it only supports tokenizers of the BERT family, and this program has another.\n"


def check(platform: Platform, carried: Carried | None) -> None:
    """Raise unless the platform's samples support the metadata of a program."""
    preprocessing = carried.preprocessing if carried is not None else None
    if carried is None or preprocessing is None or carried.postprocessing is None:
        raise EdgetuneError(
            "the program has no preprocessing and no classes in its metadata",
            action="make kits of classifiers and text-generation programs: give a model by name, or a run's folder",
            exit_code=Exit.EXPORT,
        )
    if not isinstance(carried.postprocessing, ClassScores):
        raise EdgetuneError(
            "the samples of a kit show classes, but this program does not classify",
            got=carried.task,
            action="use the program without a kit: model.json and model.md describe its outputs",
            exit_code=Exit.EXPORT,
        )
    if not platform.python and isinstance(preprocessing, TextPreprocessing) and preprocessing.wordpiece is None:
        raise EdgetuneError(
            f"the sample for {platform.title} only supports tokenizers of the BERT family",
            action="use a model of that family, or add a library to the app that reads model.tokenizer.json",
            exit_code=Exit.EXPORT,
        )


def files(platform: Platform, artifact: Artifact) -> dict[str, str]:
    """The templates and their paths in the kit."""
    preprocessing = _carried_by(artifact.manifest).preprocessing
    templates = platform.files(preprocessing)
    if isinstance(preprocessing, TextPreprocessing) and preprocessing.wordpiece is None:
        return {source: goal for source, goal in templates.items() if not goal.startswith("cpp/")}
    return templates


def fields(platform: Platform, artifact: Artifact, folder: Path) -> dict[str, str]:
    """The values for the templates. Writes a card if there is none, and the vocabulary for C++ into the kit."""
    manifest, path = artifact.manifest, artifact.path
    check(platform, manifest.carried)
    _check_inputs(manifest)
    if not card_path(path).is_file():
        write_card(path, manifest)
    carried = _carried_by(manifest)
    preprocessing = carried.preprocessing
    names = [path.name, manifest_path(path).name, card_path(path).name, *manifest.files]
    values = _common(platform, manifest, names)
    values |= _TEXT if isinstance(preprocessing, TextPreprocessing) else _IMAGE
    if not platform.python:
        return values
    if isinstance(preprocessing, TextPreprocessing):
        if preprocessing.wordpiece is None:
            return {**values, "cpp": _NO_CPP}
        (folder / "cpp").mkdir(exist_ok=True)
        write_atomically(folder / "cpp" / "vocab.txt", cpp.list_vocabulary(path.with_name(preprocessing.tokenizer)))
    return {**values, **cpp.fields(manifest)}


def _carried_by(manifest: Manifest) -> Carried:
    assert manifest.carried is not None  # `check` has checked it
    return manifest.carried


def _check_inputs(manifest: Manifest) -> None:
    """Raise for a program whose inputs or outputs the samples do not support."""
    carried, call = _carried_by(manifest), manifest.main
    preprocessing = carried.preprocessing
    if isinstance(preprocessing, ImagePreprocessing):
        fits = [spec.shape for spec in call.inputs] == [
            (1, len(preprocessing.mean), preprocessing.size_px, preprocessing.size_px)
        ]
    else:
        names = tuple(spec.name for spec in call.inputs)
        fits = names == ("input_ids", "attention_mask") and all(spec.shape[0] == 1 for spec in call.inputs)
    fits = fits and len(carried.labels) in (0, call.outputs[0].shape[-1])
    if not fits:
        raise EdgetuneError(
            "the inputs or outputs of the program do not match its metadata",
            got=[str(spec) for spec in (*call.inputs, *call.outputs)],
            action="export with one row in the shape of carried.preprocessing, and a name for each class",
            exit_code=Exit.EXPORT,
        )
    if manifest.data is not None:
        raise EdgetuneError(
            "the weights of the program are in a separate file",
            got=manifest.data.file,
            action="export it without external_data",
            exit_code=Exit.EXPORT,
        )


def _common(platform: Platform, manifest: Manifest, names: list[str]) -> dict[str, str]:
    carried, backend = _carried_by(manifest), platform.packages.get(manifest.target, "")
    parity = ""
    if (result := manifest.main.parity) is not None:
        parity = (
            f"The program ran on the machine that exported it and was compared with the model on {result.rows} rows: "
            f"the same prediction on {result.same_prediction_pct:g} %."
        )
    files = {name: _DESCRIPTIONS[name.partition(".")[2]] for name in names}
    products = ["executorch", *([backend] if backend else []), "kernels_optimized", "kernels_quantized"]
    return {
        **common_fields(platform, manifest, carried.model or "A model", files, products, parity),
        "task": carried.task.replace("-", " "),
        "how": format_bullets(preprocessing(carried)),
        "out": format_bullets(postprocessing(carried)),
    }
