"""int4's embeddings: which are quantized, in 8 or 4 bits, and what their program stores."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgetune.core.apply import apply
from edgetune.export import export
from edgetune.quant.int4 import Int4
from edgetune.quant.size import parameter_count, stored_bytes
from edgetune.quant.tables import looks_up

WORDS, WIDE = 300, 64


class Scaled(nn.Embedding):
    """Bart's and Gemma's."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.tensor(3.0).to(self.weight.dtype)


class Shifted(nn.Embedding):
    """Bart's positions."""

    def forward(self, ids: Tensor, past: int = 0) -> Tensor:
        places = torch.arange(past, past + ids.shape[1], device=self.weight.device).expand(len(ids), -1)
        return super().forward(places + 2)


class Sliced(nn.Embedding):
    """Whisper's positions."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[: ids.shape[1]]


class Indexed(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class Both(nn.Embedding):
    """A look-up, and a mean over the whole weight."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) - self.weight.mean(0)


class OfShape(nn.Embedding):
    """Pegasus' positions, which want a size."""

    def forward(self, shape: torch.Size) -> Tensor:
        return super().forward(torch.arange(shape[:2][1]))


class Reader(nn.Module):
    def __init__(self, positions: type[nn.Embedding]) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDE, padding_idx=0), positions(16, WIDE)
        self.head = nn.Linear(WIDE, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head((self.words(ids) + self.positions(ids)).mean(1))


def reader(positions: type[nn.Embedding] = Shifted) -> Reader:
    torch.manual_seed(0)
    return Reader(positions).eval()


def tokens() -> Tensor:
    return torch.randint(0, WORDS, (40, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "plain"),
    [(nn.Embedding, True), (Scaled, True), (Shifted, True), (Sliced, False), (Indexed, False), (Both, False),
     (OfShape, False)],
)  # fmt: skip
def test_only_a_table_that_looks_rows_up_is_quantized(kind: type[nn.Embedding], plain: bool) -> None:
    assert looks_up(kind(16, WIDE)) == plain


@pytest.mark.parametrize(
    ("module", "name", "settings"),
    [
        ("bart", "BartScaledWordEmbedding", {"padding_idx": 1, "embed_scale": 8.0}),
        ("bart", "BartLearnedPositionalEmbedding", {}),
        ("gemma3", "Gemma3TextScaledWordEmbedding", {"padding_idx": 0, "embed_scale": 8.0}),
        ("whisper", "WhisperPositionalEmbedding", None),
    ],
)
def test_tables_of_transformers(module: str, name: str, settings: dict[str, Any] | None) -> None:
    import importlib

    kind = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    assert looks_up(kind(16, WIDE, **(settings or {}))) == (settings is not None)


def test_a_table_that_cannot_be_quantized_is_named_and_its_program_runs(tmp_path: Path) -> None:
    model = reader(Sliced)
    with pytest.warns(UserWarning, match=r"int4: positions: .*stays in floating point.*skip: \['positions'\]"):
        apply(model, Int4())
    assert type(model.positions.weight) is nn.Parameter
    assert model.words.weight.target_dtype == torch.int8  # type: ignore[attr-defined]
    call = export(model, tokens()[:1], tmp_path / "sliced.pte", check_inputs=[tokens()], one_row=True).manifest.main
    assert call.parity is not None
    assert call.parity.same_prediction_pct == 100.0


def test_nothing_is_said_of_a_table_that_skip_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(reader(Sliced), Int4(skip=("positions",)))
        apply(reader(Sliced), Int4(embeddings="none"))
        apply(reader(), Int4())


def test_weights_that_no_layer_holds_are_named() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "head": nn.Linear(64, 64)})
    with pytest.warns(UserWarning, match=r"int4: attention.in_proj_weight: these weights do not belong to"):
        Int4(skip=("attention.out_proj",)).apply(model)
    assert type(model["attention"].in_proj_weight) is nn.Parameter


def test_a_table_in_4_bits_is_stored_so(tmp_path: Path) -> None:
    sizes = {}
    for bits in ("int8", "int4"):
        model = Int4(embeddings=bits).apply(reader())
        table = model.words
        assert table.weight.target_dtype == getattr(torch, bits)
        assert table.padding_idx is None
        known = export(model, tokens()[:1], tmp_path / f"{bits}.pte", check_inputs=[tokens()], one_row=True).manifest
        assert known.main.parity is not None
        assert known.main.parity.max_abs_difference < 1e-5
        kernels = {operator.operator for operator in known.main.undelegated if "embedding" in operator.operator}
        assert kernels == {f"quantized_decomposed.embedding_{'4bit' if bits == 'int4' else 'byte'}.out"}
        sizes[bits] = known.size_bytes, stored_bytes(model)
    fewer = WIDE // 2 - 4 * (WIDE // 32 - 1)  # bytes of a row: half of its codes, but one more scale
    assert sizes["int8"][1] - sizes["int4"][1] == (WORDS + 16) * fewer
    # in a program the rows of fixed positions are looked up beforehand; alignment and names take some bytes
    assert abs(sizes["int8"][0] - sizes["int4"][0] - WORDS * fewer) < 128


def test_a_table_in_4_bits_stays_within_half_a_step() -> None:
    model = reader()
    before = model.words.weight.detach().clone()
    table = Int4(embeddings="int4").apply(model).words.weight
    step = table.scale.repeat_interleave(32, dim=1)
    error = (table.dequantize() - before).abs()
    top = before >= 7 * step  # symmetric: +7.5 steps has no code
    assert (error[~top] <= 0.501 * step[~top]).all()
    assert (error[top] <= 1.001 * step[top]).all()
    assert error.max() > 0


def test_a_table_whose_rows_the_group_does_not_divide_gets_8_bits_and_is_named() -> None:
    model = nn.ModuleDict({"narrow": nn.Embedding(10, 40), "linear": nn.Linear(32, 2)})
    with pytest.warns(UserWarning, match=r"int4: narrow: .*8 bits instead of 4.*round_to=32; or skip: \['narrow'\]"):
        Int4(embeddings="int4").apply(model)
    assert model["narrow"].weight.target_dtype == torch.int8
    assert model["linear"].weight.target_dtype == torch.int4


def test_a_tied_head_and_table_may_have_other_bits() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(50, 32), "head": nn.Linear(32, 50, bias=False)})
    model["head"].weight = model["table"].weight
    shared = model["table"].weight.detach().clone()
    Int4(embeddings="int4", int8_linears=("head",)).apply(model)
    assert (model["table"].weight.target_dtype, model["head"].weight.target_dtype) == (torch.int4, torch.int8)
    assert torch.allclose(model["table"].weight.dequantize(), shared, atol=float(shared.abs().max()) / 7)
    assert torch.allclose(model["head"].weight.dequantize(), shared, atol=float(shared.abs().max()) / 100)


@pytest.mark.parametrize("embeddings", ["int8", "int4"])
def test_tables_that_share_a_weight_share_its_integers(embeddings: Any) -> None:
    class Translator(nn.Module):
        """As T5 and BART, with a table that only the others read."""

        def __init__(self) -> None:
            super().__init__()
            self.shared, self.source, self.target = (nn.Embedding(WORDS, WIDE) for _ in range(3))
            self.source.weight = self.target.weight = self.shared.weight
            self.head = nn.Linear(WIDE, 8)

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.head(self.source(ids) + self.target(ids))
            return y

    model = Translator().eval()
    ids = torch.arange(12).view(2, 6)
    expected = model(ids)
    values = parameter_count(model)
    apply(model, Int4(embeddings=embeddings))
    assert model.source.weight is model.target.weight is model.shared.weight
    assert parameter_count(model) == values
    assert (model(ids) - expected).norm() < 0.2 * expected.norm()
