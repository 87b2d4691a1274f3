"""Which units stay: by weights, by activations, by the derivative of the loss, at random; in each layer or in all."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgetune.core.technique import Sample
from edgetune.prune.gates import gate_scores
from edgetune.prune.groups import find_groups
from edgetune.prune.structured import Prune
from support.pruned import mlp


class Learned(nn.Module):
    """Of 32 hidden units, 8 carry the answer, 8 are loud and unread, and the rest are faint."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 3)
        with torch.no_grad():
            self.first.weight[8:16] *= 30
            self.last.weight[:, 8:16] = 1e-4
            self.first.weight[16:] *= 1e-3
            self.first.bias[16:] = 0
            self.last.weight[:, :8] *= 4

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def labelled_sample(model: nn.Module) -> Sample:
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    labels = model(inputs).argmax(-1)
    batches = [(inputs[:32], labels[:32]), (inputs[32:], labels[32:])]
    return Sample(
        inputs, lambda: (x for x, _ in batches), labelled=lambda: iter(batches), loss=nn.functional.cross_entropy
    )


@pytest.mark.parametrize("importance", ["activation", "taylor", "fisher", "wanda", "flap"])
def test_what_carries_the_answer_stays(importance: str) -> None:
    model = Learned()
    sample = labelled_sample(model)
    (one,) = Prune(ratio=0.75, importance=importance).plan(model, sample)
    assert one.keep == tuple(range(8))
    assert all(parameter.requires_grad for parameter in model.parameters())
    Prune(ratio=0.75, importance=importance).apply(model, sample)
    whole = Learned()
    assert (model(sample.inputs).argmax(-1) == whole(sample.inputs).argmax(-1)).float().mean() > 0.95


def test_the_derivative_by_a_gate_is_that_of_autograd() -> None:
    model = Learned()
    sample = labelled_sample(model)
    groups = find_groups(model, sample.inputs, {"channels"}, ()).groups
    batches, loss = sample.labels()
    scores = gate_scores(model, groups, batches(), loss, "taylor")["first"]
    expected = torch.zeros(32, dtype=torch.float64)
    for inputs, labels in batches():
        for row in range(len(inputs)):
            hidden = model.first(inputs[row : row + 1]).relu().detach().requires_grad_(True)
            loss(model.last(hidden), labels[row : row + 1]).backward()
            expected += (hidden.grad * hidden).detach()[0].double().abs() / 64
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-7)


def test_random_units_follow_the_seed() -> None:
    plans = []
    for seed in (0, 0, 1):
        model, inputs = mlp(), torch.randn(2, 6)
        torch.manual_seed(seed)
        plans.append(Prune(importance="random", ratio=0.5).plan(model, Sample.of(inputs)))
    drops = [plan[0].drop for plan in plans]
    assert drops[0] == drops[1] != drops[2]


class Faint(nn.Module):
    """Three hidden layers: the second, as wide as the first, and the third, half as wide, change little."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = (6, 32, 32, 16, 3)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        with torch.no_grad():
            self.layers[2].weight *= 1e-2
            self.layers[3].weight *= 1e-2

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


@pytest.mark.parametrize(
    ("ranking", "widths"), [("layer", [16, 16, 8]), ("isomorphic", [32, 8, 8]), ("global", [32, 8, 8])]
)
def test_units_of_several_layers_are_ranked_together(ranking: str, widths: list[int]) -> None:
    model = Faint()
    Prune(ratio=0.5, ranking=ranking).apply(model, Sample.of(torch.randn(16, 6)))
    assert [layer.out_features for layer in model.layers[:-1]] == widths


def test_what_stays_stands_in_for_what_goes() -> None:
    """Half of the units are sums of the others: refitted, the readers lose nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 3))
    inputs = torch.randn(64, 6)
    expected = model(inputs).detach()
    errors = {}
    for repair in (False, True):
        pruned = copy.deepcopy(model)
        Prune(ratio=0.5, repair=repair).apply(pruned, Sample.of(inputs))
        assert pruned[0].out_features == 8
        errors[repair] = (pruned(inputs) - expected).square().mean().item()
    assert errors[True] < 1e-2 * errors[False]


def test_a_convolution_of_one_pixel_is_refitted_and_padded_tokens_do_not_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 3, 3))
    images = torch.randn(16, 4, 6, 6)
    expected = model[1](model[0](images)).detach()
    pruned = Prune(ratio=0.5, skip=("3",)).apply(copy.deepcopy(model), Sample.of(images))
    change = (pruned[1](pruned[0](images)) - expected).square().mean()
    assert change < 0.05 * expected.square().mean()


def test_the_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "pruning.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/pruning.md", "exec"), {})
    assert capsys.readouterr().out == printed
    assert (tmp_path / "smaller" / "edgetune.json").is_file()
