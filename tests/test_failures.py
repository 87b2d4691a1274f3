import operator
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from edgetune.capture import failures
from edgetune.core.errors import EdgetuneError
from edgetune.export import export


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.inner(x).split([1, 2], 1)
        return first


def failing_at(node: fx.Node) -> None:
    """As a pass fails in the midst of a graph: the error itself names nothing."""
    user = next(iter(node.users), None)
    assert user is not node
    raise KeyError("val")


@pytest.mark.parametrize("target", ["aten.sigmoid.default", "aten.linear.default"])
def test_the_operator_is_named_that_a_pass_failed_at(target: str) -> None:
    program = torch.export.export(Twice().eval(), (torch.ones(2, 3),))
    node = next(n for n in program.graph.nodes if str(n.target) == target)
    try:
        try:
            failing_at(node)
        except KeyError as error:
            raise RuntimeError("a pass has failed") from error
    except RuntimeError as caught:
        found = failures.lowering_error(program, "xnnpack", caught)
    assert f"cannot be lowered for xnnpack: a pass has failed ({target} in " in str(found)


def test_a_getitem_is_no_operator() -> None:
    program = torch.export.export(Twice().eval(), (torch.ones(2, 3),))
    node = next(n for n in program.graph.nodes if n.target is operator.getitem)
    with pytest.raises(KeyError) as caught:
        failing_at(node)
    assert "(" not in str(failures.lowering_error(program, "xnnpack", caught.value)).splitlines()[0]


class Masked(nn.Module):
    """Builds its mask in forward, so that torch's encoder compares values to see whether it is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.encoder(x, mask=mask, src_key_padding_mask=x[:, :, 0] > 9)


def test_an_encoder_that_compares_its_mask_says_what_to_pass(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match=r"module encoder: .*decides by the values") as caught:
        export(Masked().eval(), torch.randn(1, 4, 8), tmp_path / "m.pte")
    assert "is_causal=False" in caught.value.action
    assert "def forward" not in capfd.readouterr().err, "torch prints the graph it had"
