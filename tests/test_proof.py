"""The proof: every value of every output, on inputs as they are; what differs is refused, told where it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgetune.capture.positional import Positional
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.parity import OutputParity, Parity
from edgetune.core.quiet import silence_libraries
from edgetune.core.technique import Sample
from edgetune.export import export
from edgetune.quant.int4 import Int4
from edgetune.quant.int8 import Int8
from edgetune.runtime import verify
from edgetune.runtime.allowed import DYNAMIC_INT8, FLOAT, STATIC_INT8, allowed_difference
from edgetune.runtime.predictions import class_dim, predictions_of
from edgetune.runtime.verify import Bounds, check, compare
from support.proofs import Stream, draw, held, one_logit, seeded

with silence_libraries():  # libraries that these load warn on import
    from transformers import BertConfig, BertForSequenceClassification


# What is compared


def test_one_logit_is_held_to_its_sign_and_its_value(tmp_path: Path) -> None:
    x = draw(32, 8)
    model, other = seeded(one_logit, seed=1), seeded(one_logit, seed=2)
    artifact = export(model, x, tmp_path / "m.pte")
    assert artifact.manifest.main.inputs[0].shape == (32, 8)
    check(compare(artifact.path, Positional(model, x).eval(), [(x,)]).parity(1, FLOAT), Bounds())
    parity = compare(artifact.path, Positional(other, x).eval(), [(x,)]).parity(1, FLOAT)
    with torch.no_grad():
        signs = float(((model(x) > 0) == (other(x) > 0)).float().mean())
    assert parity.same_prediction_pct == pytest.approx(100 * signs)
    with pytest.raises(EdgetuneError, match=r"output logits of the program differs .* allowed is 0\.001"):
        check(parity, Bounds())
    with pytest.raises(EdgetuneError, match="predicts the same"):
        check(parity, Bounds(max_relative_difference=10))


@pytest.mark.parametrize(
    ("shape", "inputs", "dim"),
    [
        ((4, 10), (4, 8), 1), ((4, 1), (4, 8), None), ((4,), (4, 8), None), ((10,), (8,), 0), ((), (4, 8), None),
        ((4, 6, 10), (4, 6), 2), ((4, 6, 10), (4, 6, 8), 2), ((4, 10, 6), (4, 8, 6), 1),
        ((4, 10, 6, 6), (4, 3, 6, 6), 1),
        ((4, 1, 6, 6), (4, 3, 6, 6), None), ((4, 10, 6, 6, 6), (4, 3, 6, 6, 6), 1),
    ],
)  # fmt: skip
def test_where_the_classes_lie(shape: tuple[int, ...], inputs: tuple[int, ...], dim: int | None) -> None:
    assert class_dim(shape, (torch.zeros(inputs),)) == dim


def test_a_map_predicts_along_its_classes() -> None:
    scores = torch.zeros(1, 2, 2, 3)
    scores[0, 1] = torch.tensor([[1.0, -1, 1], [-1, 1, -1]])
    other = scores.clone()
    other[0, 1, 0, 0] = -1
    assert predictions_of({"logits": scores}, {"logits": other}, (torch.zeros(1, 3, 2, 3),)) == (5, 6)


def test_predictions_that_only_rounding_tells_apart_are_the_same() -> None:
    scores = torch.tensor([[1.0, 1.0 - 1e-7], [1.0, 0.9]])
    assert predictions_of({"logits": scores}, {"logits": scores.flip(1)}, (scores,)) == (1, 2)


def parity(*outputs: OutputParity, allowed: float = FLOAT) -> Parity:
    largest = max(output.max_abs_difference for output in outputs)
    return Parity(
        rows=8, same_prediction_pct=100, max_abs_difference=largest, outputs=outputs, max_relative_allowed=allowed
    )


def test_equal_predictions_excuse_no_value() -> None:
    off = OutputParity(name="logits", largest=0.9, max_abs_difference=0.37, max_relative_difference=0.37 / 0.9)
    with pytest.raises(EdgetuneError, match=r"by 0\.37, which is 0\.41 of its largest value \(0\.9\)") as caught:
        check(parity(off), Bounds())
    assert caught.value.exit_code == Exit.EXPORT
    assert "backend is at fault" not in str(caught.value)
    assert "report" not in str(caught.value)
    check(parity(off), Bounds(max_relative_difference=0.5))
    with pytest.raises(EdgetuneError, match=r"differs by 0\.37, more than 0\.2"):
        check(parity(off), Bounds(max_relative_difference=0.5, max_abs_difference=0.2))
    whole = OutputParity(name="ids", largest=900, max_abs_difference=1, max_relative_difference=1 / 900, exact=True)
    with pytest.raises(EdgetuneError, match="output ids of the program has other integers"):
        check(parity(whole, allowed=0.25), Bounds())


def test_the_bound_follows_from_the_layers() -> None:
    x = draw(4, 32)
    build = lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))  # noqa: E731
    assert allowed_difference(seeded(build)) == FLOAT
    assert allowed_difference(seeded(build).half()) == 16 * 2**-11
    assert allowed_difference(seeded(build).bfloat16()) == 16 * 2**-8
    assert allowed_difference(Int4().apply(seeded(build))) == DYNAMIC_INT8
    assert allowed_difference(Int8().apply(seeded(build), Sample.of(x))) == STATIC_INT8
    table = Int4().apply(nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 3)))[:1]  # type: ignore[index]
    assert type(table[0].weight).__module__.startswith("torchao")
    assert allowed_difference(table) == FLOAT, "a table is looked up: nothing is rounded as it runs"


class Elsewhere(nn.Module):
    """Computes something else where it is captured, as a lowering that is wrong would."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(8, 8), factor

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * self.factor if torch.compiler.is_exporting() else y


class Nested(nn.Module):
    def __init__(self, factor: float, between: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU())])
        self.blocks.append(nn.Sequential(nn.ReLU(), Elsewhere(factor)))
        self.between, self.head = between, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.between if torch.compiler.is_exporting() else x)


def test_the_module_where_a_difference_begins_is_named(tmp_path: Path) -> None:
    x = draw(4, 8)
    with pytest.raises(
        EdgetuneError, match=r"begins in module blocks\.1\.1 \(Elsewhere\).* 0\.01 .*no module inside it does"
    ) as caught:
        export(seeded(Nested, 1.01), x, tmp_path / "m.pte")
    assert caught.value.exit_code == Exit.EXPORT
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EdgetuneError, match=r"no single module differs as much: .* code between the modules"):
        export(seeded(Nested, 1.0, 1.1), x, tmp_path / "b.pte")


def test_a_value_that_the_program_alone_makes_infinite_is_located(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU(), seeded(Elsewhere, float("inf")))
    with pytest.raises(EdgetuneError, match=r"not finite; those of the model are; it begins in module 1 \(Elsewhere\)"):
        export(model.eval(), draw(4, 8), tmp_path / "m.pte")


# Inputs as they are


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.lstm(x)
        return self.head(y), state


def test_a_batch_that_stands_second(tmp_path: Path) -> None:
    model, x = seeded(TimeFirst), draw(5, 2, 8)
    artifact = export(model, x, tmp_path / "m.pte")
    got = held(model, x, artifact)
    assert {name: tuple(t.shape) for name, t in got.items()} == {
        "output_0": (5, 2, 4), "output_1.0": (1, 2, 16), "output_1.1": (1, 2, 16)
    }  # fmt: skip
    assert artifact.manifest.main.parity is not None
    assert (artifact.manifest.main.parity.rows, artifact.manifest.main.parity.counted) == (1, "input")
    with pytest.raises(
        EdgetuneError, match=r"not batch first: [\s\S]*differs from that row of a batch[\s\S]*leave out one_row"
    ) as caught:
        export(model, x, tmp_path / "one.pte", one_row=True)
    assert caught.value.exit_code == Exit.EXPORT
    with pytest.raises(EdgetuneError, match=r"not batch first: their first dimensions differ: .*\(2, 4, 8\)"):
        export(Stream().eval(), (draw(4, 5, 8), draw(2, 4, 8)), tmp_path / "one.pte", one_row=True)


def test_one_row_takes_the_rows_apart(tmp_path: Path) -> None:
    model, x = seeded(one_logit), draw(6, 8)
    call = export(model, x, tmp_path / "m.pte", one_row=True).manifest.main
    assert call.inputs[0].shape == (1, 8)
    assert call.parity is not None
    assert (call.parity.number, call.parity.counted) == ("6 rows", "held-out row")
    with pytest.raises(EdgetuneError, match=r"check_inputs: shapes.*does not accept.*\(2, 8\).*\(6, 8\)"):
        export(model, x, tmp_path / "m.pte", check_inputs=[x[:2]])
    with pytest.raises(EdgetuneError, match="batch is free too"):
        export(model, x, tmp_path / "m.pte", one_row=True, dynamic={"batch": (1, 8)})


def test_inputs_that_lie_otherwise_in_memory_give_the_same(tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    x = draw(2, 3, 8, 6)
    artifact = export(model, x.contiguous(memory_format=torch.channels_last), tmp_path / "m.pte")
    (expected,) = held(model, x, artifact).values()
    turned = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for copy in (turned, x.contiguous(memory_format=torch.channels_last), torch.cat([x, x], -1)[..., :6]):
        assert not copy.is_contiguous()
        assert torch.equal(artifact.run(copy)[0], expected)
    assert artifact.manifest.main.parity is not None
    assert artifact.manifest.main.parity.tried == ("inputs out of memory order", "channels-last inputs")


def bert(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3, **settings,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


class MaskAtExport(nn.Module):
    """Forgets its mask where it is captured: right on full rows, wrong on others."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = torch.ones_like(attention_mask) if torch.compiler.is_exporting() else attention_mask
        x = self.table(input_ids) * mask.unsqueeze(-1)
        return self.head(x.sum(1) / mask.sum(1, keepdim=True) + 0.0 * attention_mask.sum())


def test_a_mask_that_hides_something_is_tried_where_the_example_has_none(tmp_path: Path) -> None:
    ids = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = bert(output_hidden_states=True)
    artifact = export(model, inputs, tmp_path / "m.pte")
    assert list(held(model, inputs, artifact)) == ["logits", "hidden_states.0", "hidden_states.1"]
    assert artifact.manifest.main.parity is not None
    assert artifact.manifest.main.parity.tried[0] == "a mask that hides the second half"
    with pytest.raises(EdgetuneError, match="differs from the model's"):
        export(seeded(MaskAtExport), inputs, tmp_path / "m.pte")


# Every output


# The fast path of torch's encoder


class Padded(nn.Module):
    """Encoders without a norm behind them, with one, and without nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        norm = nn.LayerNorm(16)
        nn.init.normal_(norm.bias)
        self.plain, self.normed = nn.TransformerEncoder(layer, 1), nn.TransformerEncoder(layer, 2, norm)
        self.unnested = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        encoders = {"plain": self.plain, "normed": self.normed, "unnested": self.unnested}
        x, hidden = self.table(ids), ids == 0
        return {name: encoder(x, src_key_padding_mask=hidden) for name, encoder in encoders.items()}


def test_an_encoder_with_a_padding_mask_gives_what_eager_mode_does(tmp_path: Path) -> None:
    model = seeded(Padded)
    ids = torch.randint(1, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    ids[0, 4:] = 0
    artifact = export(model, ids, tmp_path / "m.pte")
    got = held(model, ids, artifact)
    assert not got["plain"][0, 4:].any()
    assert got["unnested"][0, 4:].all(), "its fast path leaves no zeros"
    got = held(model, ids.flip(1), artifact)  # padding at the start: eager mode keeps off its fast path
    assert got["plain"].all()
    assert torch.backends.mha.get_fastpath_enabled()


class Summing(nn.Module):
    """Keeps the sum of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.sum(0, keepdim=True)
        return x + self.total


@pytest.mark.parametrize(("model", "most"), [(nn.Linear(4, 3), 8), (Summing(), 80)])
def test_many_rows_are_computed_at_once_where_nothing_joins_them(model: nn.Module, most: int) -> None:
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    rows = [(torch.randn(1, 4),) for _ in range(70)]
    with torch.no_grad():
        outputs = [each["logits"] for each in verify._eager_rows(Positional(model, rows[0]), rows)]
        assert len(calls) <= most
        if isinstance(model, Summing):
            torch.testing.assert_close(outputs[-1], rows[-1][0] + torch.cat([row for (row,) in rows]).sum(0))
        else:
            torch.testing.assert_close(torch.cat(outputs), model(torch.cat([row for (row,) in rows])))
