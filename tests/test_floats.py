"""Programs in 16-bit floats: called as before, half as large, and as near to the fp32 model as their format allows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from edgetune.capture.narrow import TORCH_DTYPES, narrow
from edgetune.cli.main import app
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.floats import FloatType, KeyValueType
from edgetune.core.inputs import Inputs
from edgetune.core.technique import Sample
from edgetune.export import export
from edgetune.export.language.parity import eager_logits
from edgetune.profile.memory import peak_memory_mib
from edgetune.program.artifact import Artifact
from edgetune.quant.int4 import Int4
from edgetune.quant.int8 import Int8
from edgetune.recipe import recipe
from edgetune.runtime.allowed import allowed_in
from edgetune.runtime.hosts.host import Host
from edgetune.runtime.hosts.session import measure_on
from edgetune.runtime.language import greedy_in_child
from support.decoders import CACHE, decoder, export_decoder
from support.families import FAMILIES

BOUNDS = {"bf16": 16 * 2**-8, "fp16": 16 * 2**-11}


def exported(model: nn.Module, inputs: Inputs, folder: Path, dtype: FloatType, **settings: Any) -> Artifact:
    return export(model.eval(), inputs, folder / f"{dtype}.pte", dtype=dtype, **settings)


class Attending(nn.Module):
    """What a transformer has: tables, attention, norms, a product of two activations."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, 4, batch_first=True)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        x = self.table(tokens) * scale
        x = x + self.mix(y := self.norm(x), y, y, need_weights=False)[0]
        return self.head((x + self.shrink(F.gelu(self.grow(x)))).mean(1))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, groups=32),
        nn.Hardswish(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip


ATTENDED = (torch.arange(16).reshape(1, 16), torch.full((1, 16, 1), 0.5))
IMAGE = (torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)),)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_program_in_16_bits_is_called_as_before(dtype: FloatType, tmp_path: Path) -> None:
    plain = exported(Attending(), ATTENDED, tmp_path, "fp32").manifest
    artifact = exported(Attending(), ATTENDED, tmp_path, dtype)
    manifest = artifact.manifest
    assert (plain.dtype, manifest.dtype) == ("fp32", dtype)
    assert manifest.main.inputs == plain.main.inputs
    assert manifest.main.outputs == plain.main.outputs
    assert manifest.size_bytes < 0.6 * plain.size_bytes
    parity = manifest.main.parity
    assert parity is not None
    assert parity.max_relative_allowed == BOUNDS[dtype] == allowed_in(TORCH_DTYPES[dtype])
    assert 1e-5 < (parity.max_relative_difference or 0) < BOUNDS[dtype] / 4
    linears = [operator for operator in manifest.main.executed if operator.operator == "xnnpack.fully-connected"]
    assert len(linears) == 5
    assert {operator.dtype for operator in linears} == {dtype}
    weights = sum(operator.weight_bytes for operator in linears)
    before = sum(o.weight_bytes for o in plain.main.executed if o.operator == "xnnpack.fully-connected")
    assert weights < 0.52 * before
    products = {o.dtype for o in manifest.main.executed if o.operator == "xnnpack.batch-matrix-multiply"}
    assert products == {"fp32" if dtype == "bf16" else "fp16"}
    assert manifest.main.delegated_macs_pct == 100
    assert artifact.run(ATTENDED)[0].dtype == torch.float32


def test_the_model_stays_as_it_was() -> None:
    model = Attending().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    half = narrow(model, torch.bfloat16)
    assert half(*ATTENDED).dtype == torch.float32
    assert half.grow.weight.dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_a_convolutional_network_is_half_as_large_in_fp16_and_refused_in_bf16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ConvTranspose2d(64, 8, 2)).eval()
    plain, half = (exported(model, IMAGE, tmp_path, dtype).manifest for dtype in ("fp32", "fp16"))  # type: ignore[arg-type]
    assert half.size_bytes < 0.6 * plain.size_bytes
    assert {o.dtype for o in half.main.executed if o.operator == "xnnpack.conv2d"} == {"fp16"}
    with pytest.raises(EdgetuneError, match=r"in bf16, 100 % of the weights would stay in fp32.*Conv2d") as caught:
        exported(model, IMAGE, tmp_path, "bf16")
    assert "dtype: fp16" in caught.value.action
    assert caught.value.exit_code == Exit.EXPORT


def test_a_few_convolutions_stay_in_fp32_in_bf16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 5))
    executed = exported(model, IMAGE, tmp_path, "bf16").manifest.main.executed
    dtypes = {operator.operator: operator.dtype for operator in executed}
    assert (dtypes["xnnpack.conv2d"], dtypes["xnnpack.fully-connected"]) == ("fp32", "bf16")


class Pieces(nn.Module):
    """Everything that XNNPACK does not have in bf16, in a model that is bf16 itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.relu(self.norm(self.conv(x)) * 2.0))
        x = F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
        x = x * x.mean((2, 3), keepdim=True)
        return torch.softmax(x @ x.transpose(2, 3), -1)


@pytest.mark.parametrize("target", ["xnnpack", "portable"])
def test_what_has_no_kernel_in_bf16_is_computed_in_fp32(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = (IMAGE[0].bfloat16(),)
    artifact = export(
        Pieces().eval().bfloat16(), image, tmp_path / "model.pte", target=target, min_same_prediction_pct=0
    )
    assert artifact.run(image)[0].dtype == torch.bfloat16
    if target == "xnnpack":
        assert artifact.manifest.main.delegated_macs_pct == 100


class Large(nn.Module):
    """Values beyond fp16 between two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.grow, self.shrink = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.shrink(self.grow(x) * 1e5) * 1e-5


def test_values_beyond_fp16_are_refused_with_bf16_as_the_way_out(tmp_path: Path) -> None:
    x = (torch.randn(1, 16, generator=torch.Generator().manual_seed(0)) * 10,)
    with pytest.raises(EdgetuneError, match=r"in fp16, whose largest number is 65,504: .*not finite") as caught:
        exported(Large(), x, tmp_path, "fp16")
    assert caught.value.action.startswith("export it with dtype: bf16")
    assert caught.value.exit_code == Exit.EXPORT
    assert not list(tmp_path.iterdir())
    assert exported(Large(), x, tmp_path, "bf16").manifest.dtype == "bf16"


def test_too_large_a_difference_in_bf16_names_fp32(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="in bf16, with 8 bits of mantissa: output logits") as caught:
        exported(Attending(), ATTENDED, tmp_path, "bf16", max_relative_difference=1e-5)
    assert caught.value.action.startswith("leave dtype out")


def test_integers_and_unknown_types_are_refused(tmp_path: Path) -> None:
    integers = Int8().apply(convolutional(), Sample.of(IMAGE[0]))
    with pytest.raises(EdgetuneError, match=r"quantized to static int8: .*no floats") as caught:
        exported(integers, IMAGE, tmp_path, "fp16")
    assert "before it is quantized" in caught.value.action
    with pytest.raises(EdgetuneError, match=r"computes in 16 bits already: got 'bfloat16'"):
        exported(Attending().bfloat16(), ATTENDED, tmp_path, "bf16")
    with pytest.raises(EdgetuneError, match=r"unknown dtype.*'fp8'.*allowed: fp32, bf16, fp16"):
        exported(Attending(), ATTENDED, tmp_path, "fp8")  # type: ignore[arg-type]
    result = CliRunner().invoke(app, ["export", "hf:nowhere", "--dtype", "half"])
    assert isinstance(result.exception, EdgetuneError)
    assert "unknown dtype" in str(result.exception)
    result = CliRunner().invoke(app, ["export", "hf:nowhere", "--language", "--cache-dtype", "int4"])
    assert "unknown cache_dtype" in str(result.exception)


RECIPE = "model: {source: smollm2, max_length: 32}\ndata: conversations\nsteps: [eval]\nexport: {language: true}\n"


def test_the_types_are_settings_of_a_recipe() -> None:
    settings = recipe.parse(RECIPE, "mine.yaml", {"export.dtype": "bf16", "export.cache_dtype": "int8"}).export
    assert settings is not None
    assert (settings.dtype, settings.cache_dtype) == ("bf16", "int8")
    with pytest.raises(EdgetuneError, match=r"export\.dtype"):
        recipe.parse(RECIPE, "mine.yaml", {"export.dtype": "float16"})
    with pytest.raises(EdgetuneError, match="cache_dtype is the type of a text-generation program's cache"):
        recipe.parse(RECIPE, "mine.yaml", {"export.language": False, "export.cache_dtype": "int8"})
    with pytest.raises(EdgetuneError, match="no floats to write in 16 bits"):
        recipe.parse(
            RECIPE.replace("[eval]", "[int8]"), "mine.yaml", {"export.language": False, "export.dtype": "fp16"}
        )


# Memory


def test_the_prediction_of_memory_holds_in_16_bits(tmp_path: Path) -> None:
    """In fp16 the weights are packed as they are; XNNPACK widens those in bf16, whose file alone is smaller."""
    peaks = {}
    for dtype in ("bf16", "fp16"):
        artifact = exported(Attending(1024), ATTENDED, tmp_path, dtype)  # type: ignore[arg-type]
        main = artifact.manifest.main
        # a process may also page in more of its libraries meanwhile: up to 4 MiB, a tenth of these weights
        processes = [measure_on(Host(), artifact, threads=1, seconds=0.1)[0] for _ in range(3)]
        peaks[dtype] = min(measured.peak_memory_mib for measured in processes)
        predicted = peak_memory_mib(main.executed, main.plan_bytes, artifact.manifest.size_bytes)
        assert predicted == pytest.approx(peaks[dtype], rel=0.2), dtype
    assert peaks["fp16"] < 0.5 * peaks["bf16"]


@pytest.mark.parametrize("target", ["xnnpack", "portable"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sums_of_many_values_are_added_up_in_fp32(dtype: FloatType, target: str, tmp_path: Path) -> None:
    """A portable layer norm of 512 values in bf16 was wrong by half of its largest value, in fp16 it overflowed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.LayerNorm(512), nn.Unflatten(1, (8, 64)), nn.GroupNorm(2, 8), nn.Flatten(), nn.LogSoftmax(1)
    )
    artifact = exported(
        model, (100 * torch.randn(1, 512) + 50,), tmp_path, dtype, target=target, min_same_prediction_pct=0
    )
    parity = artifact.manifest.main.parity
    assert parity is not None
    assert (parity.max_relative_difference or 0) < BOUNDS[dtype] / 4


# Text


def quantized() -> nn.Module:
    model = decoder("Llama", num_key_value_heads=2, num_hidden_layers=1)
    return Int4(group_size=32, int8_linears=("lm_head", "*.down_proj")).apply(model)


CACHED: list[tuple[FloatType, KeyValueType | None, str, int]] = [  # with the bytes of the cache
    ("bf16", None, "bf16", 2 * CACHE * 32 * 2),
    ("fp32", "int8", "int8", 2 * CACHE * 2 * (16 + 4 + 1)),
    pytest.param("bf16", "int8", "int8", 2 * CACHE * 2 * (16 + 4 + 1), marks=pytest.mark.slow),  # type: ignore[list-item]
    pytest.param("fp16", None, "fp16", 2 * CACHE * 32 * 2, marks=pytest.mark.slow),  # type: ignore[list-item]
    pytest.param("fp32", "bf16", "bf16", 2 * CACHE * 32 * 2, marks=pytest.mark.slow),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("dtype", "cache_dtype", "stored", "cache_bytes"), CACHED)
def test_text_in_16_bits_and_from_a_smaller_cache(
    dtype: FloatType, cache_dtype: KeyValueType | None, stored: str, cache_bytes: int, tmp_path: Path
) -> None:
    """Judged by the text: the eager fp32 model would choose nearly all of its tokens, and the others are as likely."""
    model: Any = quantized()
    artifact = export_decoder(model, tmp_path, dtype=dtype, cache_dtype=cache_dtype, min_same_prediction_pct=0)
    language, manifest = artifact.language, artifact.manifest
    assert (manifest.dtype, language.cache_dtype, language.cache_bytes) == (dtype, stored, cache_bytes)
    assert manifest.main.outputs[0].dtype == "float32"
    attention = [o for o in manifest.main.executed if "sdpa" in o.operator]
    assert {operator.dtype for operator in attention} == {stored}
    assert all(operator.macs > 0 and operator.activation_bytes > 0 for operator in attention)
    linears = [o for o in manifest.main.executed if o.operator == "xnnpack.fully-connected"]
    assert [o.dtype for o in linears].count("8da4w") == 6
    assert all(operator.delegated for operator in linears)
    prompt = torch.randint(2, 258, (33,), generator=torch.Generator().manual_seed(1)).tolist()
    ((got, _),) = greedy_in_child(artifact.path, [prompt], 96, 32)
    expected = eager_logits(model, prompt, got)
    margins = expected.max(-1).values - expected[range(96), got]
    assert len(set(got)) > 5
    assert int((margins == 0).sum()) >= 82
    assert float(margins.max()) < 0.5 * float(expected.std())


def test_a_window_is_masked_in_bf16(tmp_path: Path) -> None:
    model = decoder("Qwen3", num_key_value_heads=2, head_dim=32, num_hidden_layers=1, sliding_window=24,
                    use_sliding_window=True, layer_types=["sliding_attention"])  # fmt: skip
    artifact = export_decoder(model, tmp_path, dtype="bf16", min_same_prediction_pct=80)
    assert artifact.language.cache_dtype == "bf16"
    artifact = export_decoder(model, tmp_path, cache_dtype="int8", min_same_prediction_pct=80)
    assert artifact.language.cache_dtype == "int8"


# Families

_ROUTED = ("Mixtral", "OLMoE")  # a rounding sends a token to another expert
_CONVOLUTIONAL = ("pose head", "SqueezeNet")
HALVES = [f.name for f in FAMILIES.values() if f.source != "timm" and f.name not in _ROUTED]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HALVES if name not in _CONVOLUTIONAL])
def test_every_family_in_bf16(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    manifest = exported(family.made(), family.inputs(1), tmp_path, "bf16", min_same_prediction_pct=0).manifest
    assert manifest.main.delegated_macs_pct > 95


@pytest.mark.slow
@pytest.mark.parametrize("name", HALVES)
def test_every_family_in_fp16(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    manifest = exported(family.made(), family.inputs(1), tmp_path, "fp16", min_same_prediction_pct=0).manifest
    assert manifest.main.delegated_macs_pct > 95


CHILD = """
import sys
from pathlib import Path
from support.decoders import decoder, export_decoder
model = decoder("Llama", num_key_value_heads=2, num_hidden_layers=1)
export_decoder(model, Path(sys.argv[1]), cache_dtype="int8", min_same_prediction_pct=80, check_tokens=8)
"""


@pytest.mark.slow
def test_a_process_that_quantized_nothing_has_the_kernels_of_an_int8_cache(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-2000:]
