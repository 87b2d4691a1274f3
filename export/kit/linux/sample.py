"""Answers of the program in this folder, for texts or for image files.

python sample.py "a text" ...
python sample.py image.jpg ...

It only reads model.json, which has the preprocessing and the meaning of the outputs under "carried".
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Preparation:
    """Turns a text or an image into the inputs of a program, by the program's metadata."""

    def __init__(self, manifest: dict[str, Any], folder: Path) -> None:
        """`manifest` is the content of model.json, `folder` has the files that it names."""
        self.folder = folder
        (self.call,) = manifest["calls"]
        self.carried: dict[str, Any] = manifest["carried"]
        self.tokenizer = self._tokenizer() if self.carried["preprocessing"]["kind"] == "text" else None

    def inputs(self, row: str) -> dict[str, torch.Tensor]:
        """The tensors of a text, or of an image file, by the names of the program's inputs."""
        if self.tokenizer is not None:
            return self._text(row)
        from PIL import Image

        with Image.open(row) as image:
            return self.image(image)

    def image(self, image: Any) -> dict[str, torch.Tensor]:
        """The tensors of an image that Pillow has opened."""
        (spec,) = self.call["inputs"]
        return {spec["name"]: self._pixels(image)}

    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        how = self.carried["preprocessing"]
        tokenizer = Tokenizer.from_file(str(self.folder / how["tokenizer"]))
        tokenizer.enable_truncation(self._tokens(), direction=how["cut"])
        return tokenizer

    def _tokens(self) -> int:
        """The maximum number of tokens."""
        return int(min(self.call["inputs"][0]["shape"][1], self.carried["preprocessing"]["max_length"]))

    def _text(self, text: str) -> dict[str, torch.Tensor]:
        assert self.tokenizer is not None
        return self.pad(self.tokenizer.encode(text + self.carried["preprocessing"]["ending"]).ids)

    def pad(self, ids: list[int]) -> dict[str, torch.Tensor]:
        """Tokens padded to the length that the program takes, and their attention mask."""
        how, width = self.carried["preprocessing"], self.call["inputs"][0]["shape"][1]
        empty = width - len(ids)
        return {
            "input_ids": torch.tensor([ids + [how["pad_id"]] * empty]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * empty]),
        }

    def _pixels(self, image: Any) -> torch.Tensor:
        from PIL import Image, ImageOps

        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise ValueError("it has more than 8 bits per channel")
        how = self.carried["preprocessing"]
        px = how["size_px"]
        if how["rounded"]:
            image.draft("RGB", (px, px))  # a JPEG is decoded at a fraction of its size, as in training
        image = ImageOps.exif_transpose(image).convert("L" if how["color"] == "grey" else "RGB")
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side) if how["crop"] == "center" else (0, 0, width, height)
        # Pillow rounds when it resizes bytes, but not floats
        planes = image.split() if how["rounded"] else [plane.convert("F") for plane in image.split()]
        small = [np.asarray(plane.resize((px, px), Image.Resampling.BILINEAR, box=box)) for plane in planes]
        small *= len(how["mean"]) // len(small)  # the grey plane in every channel
        channels = np.stack(small).astype(np.float32) * np.float32(how["scale"])
        mean, std = (np.array(how[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
        return torch.from_numpy((channels - mean) / std)[None]


class Model:
    """A program and its metadata."""

    def __init__(self, path: Path) -> None:
        """Load the .pte at `path` with its .json and the files that it names."""
        import executorch.kernels.quantized  # noqa: F401  registers the kernels of quantized embeddings
        from executorch.runtime import Runtime

        manifest: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        check_runtime(manifest)
        self.preparation = Preparation(manifest, path.parent)
        self.program = Runtime.get().load_program(path)  # must outlive its methods
        self.method = self.program.load_method("forward")

    def answer(self, row: str) -> list[tuple[str, float]]:
        """The classes of a text, or of an image file, with their scores; the most likely first."""
        scores = torch.softmax(self.logits(row), 0).tolist()
        labels = self.preparation.carried["labels"] or [str(index) for index in range(len(scores))]
        return sorted(zip(labels, scores, strict=True), key=lambda pair: -pair[1])

    def logits(self, row: str) -> torch.Tensor:
        """The program's output for a text, or for an image file."""
        tensors = self.preparation.inputs(row)
        outputs = self.method.execute([tensors[spec["name"]] for spec in self.preparation.call["inputs"]])
        logits: torch.Tensor = outputs[0][0]
        return logits.clone()


def check_runtime(manifest: dict[str, Any]) -> None:
    """Exit unless the installed executorch is of the version that the program was made for."""
    made, installed = manifest["versions"]["executorch"], version("executorch")
    if made.split(".")[:2] != installed.split(".")[:2]:
        raise SystemExit(
            f"model.pte was made for executorch {made}; installed: {installed}\n  next: pip install -r requirements.txt"
        )


def main(rows: list[str]) -> int:
    """Print the answer to each row; returns the exit code."""
    if not rows:
        print(__doc__)
        return 2
    model = Model(Path(__file__).resolve().parent / "model.pte")
    for row in rows:
        best = model.answer(row)[:3]
        print(f"{row}: {', '.join(f'{label} {100 * score:.1f} %' for label, score in best)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
