import operator

import pytest
import torch
from torch import Tensor, fx, nn

from edgetune.export import failures


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
        found = failures.not_lowered(program, "xnnpack", caught)
    assert f"cannot be lowered for xnnpack: a pass has failed ({target} in " in str(found)


def test_a_getitem_is_no_operator() -> None:
    program = torch.export.export(Twice().eval(), (torch.ones(2, 3),))
    node = next(n for n in program.graph.nodes if n.target is operator.getitem)
    with pytest.raises(KeyError) as caught:
        failing_at(node)
    assert "(" not in str(failures.not_lowered(program, "xnnpack", caught.value)).splitlines()[0]
