"""Branches and batch norms folded at export: the same function, in fewer layers, and the user's model untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.capture.reparameterize import reparameterize
from support.batch_norms import count_norms, settle_norms
from support.laws import cnn, pictures
from support.timm_apart import TIMM, run_with_timm

torch.set_num_threads(1)


class Branches(nn.Module):
    """A 3x3 and a 1x1 convolution side by side, which `reparameterize` makes one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(width, width, 3, padding=1)
        self.point = nn.Conv2d(width, width, 1)
        self.one: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.point(x) if self.one is None else self.one(x)

    def reparameterize(self) -> None:
        self.one = copy.deepcopy(self.wide)
        self.one.weight.data += F.pad(self.point.weight.data, (1, 1, 1, 1))
        self.one.bias.data += self.point.bias.data
        del self.wide, self.point


class ConvNorm(nn.Sequential):
    """`fuse` returns the layer that replaces it."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width))

    def fuse(self) -> nn.Conv2d:
        return torch.nn.utils.fusion.fuse_conv_bn_eval(self[0], self[1])


class Wrong(Branches):
    """Forgets the branch."""

    def reparameterize(self) -> None:
        self.one = self.wide
        del self.wide, self.point


class Raising(Branches):
    def reparameterize(self) -> None:
        del self.wide
        raise RuntimeError("no such branch")


def network(block: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return settle_norms(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), block(8), nn.Flatten(), nn.LazyLinear(3))
    )


def picture() -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def fused(model: nn.Module, inputs: Tensor) -> tuple[nn.Module, Tensor]:
    with torch.no_grad():
        return model, model(inputs)


@pytest.mark.parametrize(("block", "name"), [(Branches, "3"), (ConvNorm, "3")])
def test_blocks_fuse_by_their_own_method(block: type[nn.Module], name: str) -> None:
    model, wanted = fused(network(block), picture())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found, report = reparameterize(model, picture())
    assert report.branches == (name,)
    assert report.norms == ("1",)
    assert report.refused == ()
    assert count_norms(found) == 0
    assert sum(isinstance(m, nn.Conv2d) for m in found.modules()) == 2
    assert 0 < report.difference < 1e-5
    with torch.no_grad():
        assert torch.allclose(found(picture()), wanted, atol=1e-5)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert "1 blocks fused, 1 batch norms folded; logits differ by" in str(report)


def test_a_block_that_fuses_wrongly_is_kept_and_said_so() -> None:
    model, wanted = fused(network(Wrong), picture())
    found, report = reparameterize(model, picture())
    assert report.branches == ()
    assert report.norms == ("1",), "the batch norm is another step"
    assert report.refused[0].startswith("3: the logits would differ by")
    assert "kept: 3:" in str(report)
    with torch.no_grad():
        assert torch.allclose(found(picture()), wanted, atol=1e-5)


def test_a_block_whose_method_raises_is_kept_whole() -> None:
    model, wanted = fused(network(Raising), picture())
    found, report = reparameterize(model, picture())
    assert report.refused == ("3: reparameterize() raised RuntimeError: no such branch",)
    with torch.no_grad():
        assert torch.allclose(found(picture()), wanted, atol=1e-5)


def test_nothing_to_fold_gives_the_model_itself() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    assert reparameterize(model, torch.randn(1, 3))[0] is model
    training = network(Branches).train()
    found, report = reparameterize(training, picture())
    assert found is training
    assert str(report) == "nothing folded"


class Shapes(nn.Module):
    """Batch norms that may be folded (0 to 3) and such that may not."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3, bias=False)
        self.norm0 = nn.BatchNorm1d(6)
        self.back = nn.ConvTranspose1d(6, 4, 3)
        self.norm1 = nn.BatchNorm1d(4)
        self.groups = nn.ConvTranspose1d(4, 4, 3, groups=2)
        self.spread = nn.BatchNorm1d(4)  # the library cannot fold it
        self.dense = nn.Linear(4, 5)
        self.norm2 = nn.BatchNorm1d(5)
        self.seen = nn.Linear(5, 5)
        self.beside = nn.BatchNorm1d(5)  # its input is read again
        self.twice = nn.Linear(5, 5)
        self.shared = nn.BatchNorm1d(5)  # its layer is called twice
        self.alone = nn.BatchNorm1d(5)  # behind no layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.back(self.norm0(self.line(x))))
        x = self.spread(self.groups(x))
        x = self.norm2(self.dense(x.mean(-1)))
        seen = self.seen(x)
        x = self.beside(seen) + seen
        x = self.shared(self.twice(x)) + self.twice(x * 2)
        return self.alone(torch.relu(x))


def test_only_a_norm_that_nothing_else_shares_is_folded() -> None:
    torch.manual_seed(0)
    model, inputs = settle_norms(Shapes()), torch.randn(2, 4, 9)
    found, report = reparameterize(model, inputs)
    assert report.norms == ("norm0", "norm1", "norm2")
    assert report.refused == ("spread: behind a transposed convolution in groups",)
    assert count_norms(found) == 4
    with torch.no_grad():
        assert torch.allclose(found(inputs), model(inputs), atol=1e-5)


class NormAct(nn.BatchNorm2d):
    """As timm's: with an activation of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def test_the_activation_of_a_norm_stays() -> None:
    torch.manual_seed(0)
    model = settle_norms(nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8), nn.Conv2d(8, 2, 3), nn.Flatten()))
    found, report = reparameterize(model, picture())
    assert report.norms == ("1",)
    assert any(isinstance(m, nn.ReLU) for m in found.modules())
    assert report.difference < 1e-5


def test_every_norm_of_a_network_goes() -> None:
    model = settle_norms(cnn())
    found, report = reparameterize(model, pictures())
    assert (count_norms(model), count_norms(found)) == (7, 0)
    assert len(report.norms) == 7


TIMM_CHILD = """
import sys, torch
from edgetune.capture.positional import Positional
from edgetune.export.lower import lower
from edgetune.capture.reparameterize import reparameterize
from edgetune.export.targets import TARGETS
from support.batch_norms import count_norms, settle_norms

torch.set_num_threads(1)
for name in sys.argv[2:]:
    torch.manual_seed(0)
    model = settle_norms(timm.create_model(name, num_classes=4))
    inputs = (torch.randn(1, 3, 64, 64),)
    found, report = reparameterize(model, inputs)
    print(name, count_norms(found), report.refused, report.difference < 1e-5, len(report.branches) > 0)
    if name == sys.argv[1]:
        lowered = lower(Positional(model, inputs).eval(), inputs, TARGETS["xnnpack"])
        print(lowered.delegates, lowered.undelegated, len(lowered.operators) < 150)
"""


@pytest.mark.slow
@pytest.mark.skipif(not TIMM.is_dir(), reason="tests/assets.txt, by `make test`")
def test_the_networks_that_are_made_to_be_fused() -> None:
    names = ["mobileone_s0", "repvgg_a0", "repvit_m0_9", "fastvit_t8", "ghostnetv2_100", "resnet18"]
    child = run_with_timm(TIMM_CHILD, names[0], *names)
    plain = {"ghostnetv2_100", "resnet18"}
    wanted = [f"{name} 0 () True {name not in plain}" for name in names]
    wanted.insert(1, "1 () True")
    assert child.stdout.splitlines() == wanted, child.stderr[-2000:]
