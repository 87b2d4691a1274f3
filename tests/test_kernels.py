"""Operators without a kernel: written otherwise and equal to eager, or named at the lowering with their modules."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
import torch
from nn_table import CASES, load_libraries, tried, tried_apart
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.capture.positional import Positional
from edgetune.capture.repairs import bags, decomposed, folding, volumes
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.export.lower import lower
from edgetune.export.targets import find
from edgetune.runtime.child_failures import child_error
from edgetune.runtime.run import run_in_child
from support.nn_cases import modules_without_case
from support.nn_functions import functions_without_case

torch.set_num_threads(1)

REPAIRED = (
    "nn.EmbeddingBag", "nn.EmbeddingBag, padded", "nn.EmbeddingBag, weights", "nn.Conv3d, groups",
    "nn.ConvTranspose3d, groups", "nn.MultiheadAttention, of another sequence",
    "nn.AvgPool3d, uneven", "nn.MaxPool3d", "nn.PReLU, of a volume", "F.pad, cropping",
)  # fmt: skip


@pytest.mark.parametrize("name", REPAIRED)
def test_what_has_no_kernel_is_written_otherwise(name: str) -> None:
    row = tried(CASES[name])
    assert row.state == "right", row


def test_every_module_and_function_of_torch_nn_has_a_case() -> None:
    assert modules_without_case() == set()
    assert functions_without_case() == set()


@pytest.mark.slow
def test_every_module_and_function_of_torch_nn_is_right_or_refused_by_name() -> None:
    load_libraries()
    rows = {name: tried_apart(case) for name, case in CASES.items()}
    assert {name: row for name, row in rows.items() if row.state in ("wrong", "crashed")} == {}
    unnamed = {n: row.reason for n, row in rows.items() if row.state == "refused" and " layer" not in row.reason}
    assert set(unnamed) <= {"F.scaled_grouped_mm"}  # which torch itself does not compute here


class Turned(nn.Module):
    """Rotary embeddings as LLaMA's first code has them, and what else is done to complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.polar(torch.ones(3, 4), torch.arange(12.0).reshape(3, 4)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, turn = torch.view_as_complex(x.reshape(2, 3, 4, 2)), self.turn
        moved = torch.cat([x[:, 1:], x[:, :1]], 1).transpose(-2, -1)[:, 2] * turn[0, 0]
        return (
            torch.view_as_real(x * turn).flatten(2),
            torch.view_as_real(x * turn.conj() - x.conj()),
            (x + turn).real * x.imag + (turn - x).imag,
            (x * 2.0 / turn).abs() + x.angle(),
            torch.view_as_real(moved),
            torch.view_as_real(x @ turn.T),
            torch.view_as_real(torch.polar(x.abs(), x.real) + torch.exp(1j * x.imag)),
            torch.fft.rfft(x.real).abs(),
        )


def test_complex_numbers_are_pairs() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    row = tried(lambda: (Turned(), (x,)))
    assert row.state == "right", row


class Pooled(nn.Module):
    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 4, 1), pool

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z: Tensor = self.pool(y)[1] if isinstance(self.pool, nn.MaxPool3d) else self.pool(y)
        return z


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(x)).real


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


@pytest.mark.parametrize("target", ["xnnpack", "portable"])
@pytest.mark.parametrize(
    ("module", "operator", "action"),
    [
        (nn.MaxPool3d(1, return_indices=True), "aten::max_pool3d_with_indices.out", "return_indices"),
        (Spectrum(), "fft_c2c", "outside of the program"),
        (Noise(), "aten.randn_like.default", "pass it in"),
    ],
)
def test_what_cannot_be_is_named_with_its_module(module: nn.Module, operator: str, action: str, target: str) -> None:
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(EdgetuneError) as caught:
        lower(Positional(Pooled(module), x).eval(), (x,), find(target))
    assert operator in caught.value.what
    assert "in pool" in caught.value.what
    assert action in caught.value.action
    assert caught.value.exit_code == Exit.EXPORT


def settings(draw: random.Random) -> dict[str, list[int]]:
    kernel = [draw.randint(1, 3) for _ in range(3)]
    return {
        "kernel": kernel,
        "stride": [draw.randint(1, 3) for _ in range(3)],
        "padding": [draw.randint(0, k // 2) for k in kernel],
        "dilation": [draw.randint(1, 2) for _ in range(3)],
    }


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("seed", range(12))
def test_volumes_equal_eager(seed: int) -> None:
    draw = random.Random(seed)
    groups, (kernel, stride, padding, dilation) = draw.choice([1, 2]), settings(draw).values()
    x = torch.randn(2, 4, *(draw.randint(5, 7) for _ in range(3)))
    weight, bias = torch.randn(6, 4 // groups, *kernel), torch.randn(6)
    same = (F.conv3d(x, weight, bias, 1, "same", dilation, groups),
            volumes.conv3d_padded(x, weight, bias, (1,), "same", dilation, groups))  # fmt: skip
    back, more = torch.randn(4, 6 // groups, *kernel), [draw.randint(0, s - 1) for s in stride]
    counts, up, by = draw.random() < 0.5, draw.random() < 0.5, draw.choice([None, 3])
    pairs = {
        "convolution": (F.conv3d(x, weight, bias, stride, padding, dilation, groups),
                        volumes.conv3d(x, weight, bias, stride, padding, dilation, groups)),
        "same": same,
        "transposed": (F.conv_transpose3d(x, back, bias, stride, padding, more, groups, dilation),
                       volumes.conv_transpose3d(x, back, bias, stride, padding, more, groups, dilation)),
        "average": (F.avg_pool3d(x, kernel, stride, padding, up, counts, by),
                    volumes.average(x, kernel, stride, padding, up, counts, by)),
        "largest": (F.max_pool3d(x, kernel, stride, padding, 1, up),
                    volumes.largest(x, kernel, stride, padding, (1,), up)),
    }  # fmt: skip
    for name, (expected, got) in pairs.items():
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
def test_uneven_bags_equal_eager(mode: str, last: bool) -> None:
    table, ids = torch.randn(20, 8), torch.randint(0, 20, (9,), generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 4, 4, 9] if last else [0, 4, 4])  # one bag is empty
    padding = int(ids[1])
    given = {"mode": mode, "include_last_offset": last, "padding_idx": padding}
    expected = F.embedding_bag(ids, table, offsets, **given)  # type: ignore[arg-type]
    number = ("sum", "mean", "max").index(mode)
    got = bags.embedding_bag(table, ids, offsets, False, number, False, None, last, padding)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("given", [(3, 1, 1, 3), (2, 1, 0, 1), (3, 2, 2, 2), (2, 1, 1, 3)])
def test_folded_blocks_equal_eager(given: tuple[int, ...]) -> None:
    picture = torch.randn(2, 3, 7, 8)
    blocks = F.unfold(picture, *given)
    kernel, dilation, padding, stride = ([value] * 2 for value in given)
    got = folding.fold(blocks, (7, 8), kernel, dilation, padding, stride)
    torch.testing.assert_close(got, F.fold(blocks, (7, 8), *given))


def test_formulas_equal_eager() -> None:
    x, y = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    x[:3], y[2:5] = float("nan"), float("nan")
    for name in ("fmax", "fmin", "copysign"):
        torch.testing.assert_close(getattr(decomposed, name)(x, y), getattr(torch, name)(x, y), equal_nan=True)
    x, y = x[5:], y[5:]
    for name in ("hypot", "logaddexp"):
        torch.testing.assert_close(getattr(decomposed, name)(x, y), getattr(torch, name)(x, y))
    for down in (False, True):
        torch.testing.assert_close(decomposed.sort(x, 0, down)[1], torch.sort(x, 0, down)[1])
    target = torch.tensor([[3, 0, -1, 1, 1], [4, -1, 0, 2, 2]])
    scores = torch.randn(2, 5)
    for number, reduction in enumerate(("none", "mean", "sum")):
        expected = F.multilabel_margin_loss(scores, target, reduction=reduction)
        torch.testing.assert_close(decomposed.multilabel_margin_loss(scores, target, number), expected)


# What a child said


@pytest.mark.parametrize(
    ("line", "error", "action"),
    [
        ("[method.cpp:819] Missing operator: [0] aten::_fft_c2c.out", "0x14", "DFT matrix"),
        ("[method.cpp:819] Missing operator: [0] my::own.out", "0x14", "write my::own.out with other operators"),
        ("[method.cpp:1203] Input 0 has unexpected scalar type: expected Float but was Long.", "0x12", "types"),
        ("[method.cpp:1154] Input index (1) must be less than the number of inputs in method (1).", "0x12", "as many"),
        ("[program.cpp:67] No method named 'fwd' in program", "0x12", "inspect"),
        ("[method.cpp:1480] KernelCall failed at instruction 0:0 in operator aten::glu.out: 0x12", "0x12", "aten::glu"),
        ("[method.cpp:85] Backend VulkanBackend is not registered.", "0x20", "where that backend is"),
        ("[program.cpp:168] Program identifier 'ET99' != expected 'ET12'", "0x23", "another executorch version"),
        ("[flat_tensor_data_map.cpp:247] Failed to parse FlatTensor header with error code 32.", "0x24", ".ptd"),
        ("[method.cpp:1] failed", "0x21", "more memory"),
        ("[mmap_data_loader.cpp:89] Failed to open m.pte: No such file or directory (2)", "0x:22", "path"),
    ],
)
def test_each_failure_of_a_program_has_an_action_of_its_own(line: str, error: str, action: str) -> None:
    done = subprocess.CompletedProcess([], 0, "", f"[cpuinfo_utils.cpp:71] Reading file\n{line}\n")
    found = child_error(
        Path("m.pte"), done, {"error": f"RuntimeError: Failed to execute method forward, error: {error}"}
    )
    assert action in found.action
    assert line.partition("] ")[2] in found.what
    assert "cpuinfo" not in str(found)
    assert found.exit_code == Exit.EXPORT


@pytest.mark.parametrize(("signal", "action"), [(9, "ran out of memory"), (11, "target='portable'"), (15, "again")])
def test_a_signal_has_its_own_action(signal: int, action: str) -> None:
    assert action in child_error(Path("m.pte"), subprocess.CompletedProcess([], -signal, "", ""), None).action


def test_inputs_of_another_shape_are_named(tmp_path: Path) -> None:
    path, x = tmp_path / "m.pte", torch.ones(1, 4)
    path.write_bytes(lower(Positional(nn.Linear(4, 2), x).eval(), (x,), find("xnnpack")).data)
    with pytest.raises(EdgetuneError, match=r"Expected shape \(1, 4\), but received \(2, 4\)") as caught:
        run_in_child(path, [(torch.ones(2, 4),)])
    assert "inputs of the shapes" in caught.value.action
