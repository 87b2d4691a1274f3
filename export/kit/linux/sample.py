"""Answers of the program beside this file, for texts or for pictures in files.

python sample.py "a text" ...
python sample.py picture.jpg ...

It goes by model.json alone: how an input is made and what an output means stand there, under "carried".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Preparation:
    """How a text or a picture becomes what a program takes, by what the program carries."""

    def __init__(self, manifest: dict[str, Any], folder: Path) -> None:
        """`manifest` is what model.json holds, `folder` where the files lie that it names."""
        self.folder = folder
        (self.call,) = manifest["calls"]
        self.carried: dict[str, Any] = manifest["carried"]
        self.tokenizer = self._tokenizer() if self.carried["preprocessing"]["kind"] == "text" else None

    def inputs(self, row: str) -> dict[str, torch.Tensor]:
        """The tensors of a text, or of the picture in a file, by the names of the program's inputs."""
        if self.tokenizer is not None:
            return self._text(row)
        from PIL import Image

        with Image.open(row) as opened:
            return self.picture(opened)

    def picture(self, opened: Any) -> dict[str, torch.Tensor]:
        """The same of a picture that Pillow has opened."""
        (spec,) = self.call["inputs"]
        return {spec["name"]: self._pixels(opened)}

    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        how = self.carried["preprocessing"]
        found = Tokenizer.from_file(str(self.folder / how["tokenizer"]))
        found.enable_truncation(self._tokens(), direction=how["cut"])
        return found

    def _tokens(self) -> int:
        """How many tokens the program takes."""
        return int(min(self.call["inputs"][0]["shape"][1], self.carried["preprocessing"]["max_length"]))

    def _text(self, text: str) -> dict[str, torch.Tensor]:
        assert self.tokenizer is not None
        return self.padded(self.tokenizer.encode(text + self.carried["preprocessing"]["ending"]).ids)

    def padded(self, ids: list[int]) -> dict[str, torch.Tensor]:
        """Tokens filled up to as many as the program takes, and the mask that says where they are."""
        how, width = self.carried["preprocessing"], self.call["inputs"][0]["shape"][1]
        empty = width - len(ids)
        return {
            "input_ids": torch.tensor([ids + [how["pad_id"]] * empty]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * empty]),
        }

    def _pixels(self, opened: Any) -> torch.Tensor:
        from PIL import Image, ImageOps

        if opened.mode in ("I", "F") or opened.mode.startswith("I;"):
            raise ValueError("it has more than 8 bits a channel")
        how = self.carried["preprocessing"]
        px = how["size_px"]
        if how["rounded"]:
            opened.draft("RGB", (px, px))  # a JPEG is decoded at a fraction of its size, as in training
        image = ImageOps.exif_transpose(opened).convert("L" if how["color"] == "grey" else "RGB")
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side) if how["crop"] == "center" else (0, 0, width, height)
        # bytes are rounded when Pillow resizes them, floats are not
        planes = image.split() if how["rounded"] else [plane.convert("F") for plane in image.split()]
        small = [np.asarray(plane.resize((px, px), Image.Resampling.BILINEAR, box=box)) for plane in planes]
        small *= len(how["mean"]) // len(small)  # grey in every channel
        channels = np.stack(small).astype(np.float32) * np.float32(how["scale"])
        mean, std = (np.array(how[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
        return torch.from_numpy((channels - mean) / std)[None]


class Model:
    """A program and what it carries."""

    def __init__(self, path: Path) -> None:
        """Load the .pte at `path`, with its .json and the files that names beside it."""
        import executorch.kernels.quantized  # noqa: F401  makes the kernels of quantized embeddings known
        from executorch.runtime import Runtime

        manifest: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.preparation = Preparation(manifest, path.parent)
        self.program = Runtime.get().load_program(path)  # it must live as long as its methods
        self.method = self.program.load_method("forward")

    def answer(self, row: str) -> list[tuple[str, float]]:
        """The classes of a text, or of the picture in a file, with their scores; the likeliest first."""
        scores = torch.softmax(self.logits(row), 0).tolist()
        labels = self.preparation.carried["labels"] or [str(place) for place in range(len(scores))]
        return sorted(zip(labels, scores, strict=True), key=lambda pair: -pair[1])

    def logits(self, row: str) -> torch.Tensor:
        """What the program gives for a text, or for the picture in a file."""
        made = self.inputs(row)
        outputs = self.method.execute([made[spec["name"]] for spec in self.preparation.call["inputs"]])
        logits: torch.Tensor = outputs[0][0]
        return logits.clone()

    def inputs(self, row: str) -> dict[str, torch.Tensor]:
        """The tensors that the program takes, by name."""
        return self.preparation.inputs(row)


def main(rows: list[str]) -> int:
    """Print the answer to each row; the exit code."""
    if not rows:
        print(__doc__)
        return 2
    model = Model(Path(__file__).resolve().parent / "model.pte")
    for row in rows:
        found = model.answer(row)[:3]
        print(f"{row}: {', '.join(f'{label} {100 * score:.1f} %' for label, score in found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
