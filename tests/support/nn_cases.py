"""Every module of torch.nn with small inputs; for nn_table.py. The functions are in nn_functions.py.

A case is a function that makes a module, or a function of tensors, and its inputs. What takes several forms that people
use (attention with a mask, a bag of words by its mean) has a case of each: `EmbeddingBag, max`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Made = tuple[Any, tuple[Tensor, ...]]  # a module or a function, and what it is called with
Case = Callable[[], Made]


def randn(*shape: int) -> Tensor:
    """Normal values, the same each time for a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7 * len(shape) + shape[-1]))


def rand(*shape: int) -> Tensor:
    """Values between 0 and 1."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def ids(most: int, *shape: int) -> Tensor:
    """Whole numbers below `most`."""
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(most))


def signs(*shape: int) -> Tensor:
    """1 or -1."""
    return ids(2, *shape) * 2.0 - 1.0


def of(make: Callable[[], Any], *inputs: Callable[[], Tensor]) -> Case:
    """A case of a module (or function) that `make` returns."""
    return lambda: (make(), tuple(make_input() for make_input in inputs))


def fn(function: Callable[..., Any], *inputs: Callable[[], Tensor]) -> Case:
    """A case of a function."""
    return lambda: (function, tuple(make_input() for make_input in inputs))


def ROW() -> Tensor:
    return randn(2, 6)


def SEQUENCE() -> Tensor:
    return randn(2, 4, 8)


def PICTURE() -> Tensor:
    return randn(2, 4, 6, 8)


def VOLUME() -> Tensor:
    return randn(2, 4, 4, 6, 8)


_SHAPED: dict[int, Callable[[], Tensor]] = {1: SEQUENCE, 2: PICTURE, 3: VOLUME}


def _in_dims(name: str, make: Callable[[Any], nn.Module]) -> dict[str, Case]:
    """Cases of a module that exists for one, two and three dims."""
    cases = {}
    for dims, shaped in _SHAPED.items():
        kind = getattr(nn, f"{name}{dims}d", None)
        if kind is not None:
            cases[f"{name}{dims}d"] = of(lambda kind=kind: make(kind), shaped)  # type: ignore[misc]
    return cases


def _drawn(module: nn.Module) -> nn.Module:
    """The module with statistics that are not those of its start."""
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(rand(*buffer.shape) + (0.5 if "var" in name else 0.0))
    return module


def _made(module: nn.Module, *inputs: Tensor) -> nn.Module:
    """A lazy module that has seen its inputs."""
    module(*inputs)
    return module


def _elementwise() -> dict[str, Case]:
    kinds: dict[str, Callable[[], nn.Module]] = {
        **{name: getattr(nn, name) for name in (
            "CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity", "LeakyReLU",
            "LogSigmoid", "Mish", "PReLU", "RReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus",
            "Softshrink", "Softsign", "Tanh", "Tanhshrink", "GLU", "Dropout", "AlphaDropout", "FeatureAlphaDropout",
        )},
        "GELU, tanh": lambda: nn.GELU("tanh"),
        "Threshold": lambda: nn.Threshold(0.1, 0.5),
        "PReLU, of channels": lambda: nn.PReLU(4),
        "Softmax": lambda: nn.Softmax(-1),
        "Softmax, of channels": lambda: nn.Softmax(1),
        "Softmin": lambda: nn.Softmin(-1),
        "LogSoftmax": lambda: nn.LogSoftmax(-1),
        "LogSoftmax, of channels": lambda: nn.LogSoftmax(1),
        "Softmax2d": nn.Softmax2d,
        "ChannelShuffle": lambda: nn.ChannelShuffle(2),
        "PixelShuffle": lambda: nn.PixelShuffle(2),
        "PixelUnshuffle": lambda: nn.PixelUnshuffle(2),
        "CrossMapLRN2d": lambda: nn.CrossMapLRN2d(3),
        "LocalResponseNorm": lambda: nn.LocalResponseNorm(3),
        "GroupNorm": lambda: nn.GroupNorm(2, 4),
        "LayerNorm": lambda: nn.LayerNorm(8),
        "RMSNorm": lambda: nn.RMSNorm(8),
        "SyncBatchNorm": lambda: _drawn(nn.SyncBatchNorm(4)),
        "Linear": lambda: nn.Linear(8, 3),
        "LazyLinear": lambda: _made(nn.LazyLinear(3), PICTURE()),
        "Flatten": nn.Flatten,
        "Unflatten": lambda: nn.Unflatten(1, (2, 2)),
        "Unfold": lambda: nn.Unfold(2),
        "Unfold, with a stride": lambda: nn.Unfold(3, 2, 1, 2),
        "Upsample": lambda: nn.Upsample(scale_factor=2),
        "Upsample, bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
        "Upsample, bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
        "UpsamplingBilinear2d": lambda: nn.UpsamplingBilinear2d(scale_factor=2),
        "UpsamplingNearest2d": lambda: nn.UpsamplingNearest2d(scale_factor=2),
        "Sequential": lambda: nn.Sequential(nn.Linear(8, 3), nn.ReLU()),
        "FractionalMaxPool2d": lambda: nn.FractionalMaxPool2d(2, 3, _random_samples=rand(2, 4, 2)),
        "DataParallel": lambda: nn.DataParallel(nn.Linear(8, 3)),
    }  # fmt: skip
    return {name: of(make, PICTURE) for name, make in kinds.items()}


def _several_dims() -> dict[str, Case]:
    cases = {
        **_in_dims("AdaptiveAvgPool", lambda kind: kind(2)),
        **_in_dims("AdaptiveMaxPool", lambda kind: kind(2)),
        **_in_dims("AvgPool", lambda kind: kind(2)),
        **_in_dims("MaxPool", lambda kind: kind(2)),
        **_in_dims("LPPool", lambda kind: kind(2, 2)),
        **_in_dims("BatchNorm", lambda kind: _drawn(kind(4))),
        **_in_dims("InstanceNorm", lambda kind: kind(4)),
        **_in_dims("Dropout", lambda kind: kind()),
        **_in_dims("Conv", lambda kind: kind(4, 6, 3, padding=1)),
        **_in_dims("ConvTranspose", lambda kind: kind(4, 6, 3, 2)),
        **_in_dims("ConstantPad", lambda kind: kind(1, 0.5)),
        **_in_dims("ZeroPad", lambda kind: kind(1)),
        **_in_dims("ReflectionPad", lambda kind: kind(1)),
        **_in_dims("ReplicationPad", lambda kind: kind(1)),
        **_in_dims("CircularPad", lambda kind: kind(1)),
    }
    for dims, shaped in _SHAPED.items():
        for name, given in (("Conv", (6, 3)), ("ConvTranspose", (6, 3)), ("BatchNorm", ()), ("InstanceNorm", ())):
            lazy = getattr(nn, f"Lazy{name}{dims}d")
            cases[f"Lazy{name}{dims}d"] = of(lambda lazy=lazy, given=given, x=shaped: _made(lazy(*given), x()), shaped)  # type: ignore[misc]
    uneven = {"AdaptiveAvgPool": lambda kind: kind(3), "AdaptiveMaxPool": lambda kind: kind(3),
              "AvgPool": lambda kind: kind(3, 2, 1, ceil_mode=True, count_include_pad=False),
              "MaxPool": lambda kind: kind(3, 2, 1, ceil_mode=True)}  # fmt: skip
    for name, make in uneven.items():
        cases |= {f"{key}, uneven": case for key, case in _in_dims(name, make).items()}
    odd = {"padding='same'": {"padding": "same", "dilation": 2}, "groups": {"groups": 2, "stride": 2},
           "padding_mode='circular'": {"padding": 1, "padding_mode": "circular"},
           "padding_mode='reflect'": {"padding": 1, "padding_mode": "reflect"}}  # fmt: skip
    for told, given in odd.items():
        cases |= {
            f"{k}, {told}": c for k, c in _in_dims("Conv", lambda kind, given=given: kind(4, 6, 3, **given)).items()
        }  # type: ignore[misc]
    deep = {"output_padding": 1, "groups": 2, "dilation": 2, "padding": 1, "stride": 2}
    cases |= {f"{k}, groups": c for k, c in _in_dims("ConvTranspose", lambda kind: kind(4, 6, 3, **deep)).items()}
    cases |= {f"{k}, indices": c for k, c in _in_dims("MaxPool", lambda kind: kind(2, return_indices=True)).items()}
    for dims, shaped in _SHAPED.items():
        kind, pool = getattr(nn, f"MaxUnpool{dims}d"), getattr(F, f"max_pool{dims}d")
        cases[f"MaxUnpool{dims}d"] = lambda kind=kind, pool=pool, x=shaped: (kind(2), pool(x(), 2, return_indices=True))  # type: ignore[misc]
    cases["FractionalMaxPool3d"] = of(lambda: nn.FractionalMaxPool3d(2, 2, _random_samples=rand(2, 4, 3)), VOLUME)
    cases["PReLU, of a volume"] = of(lambda: nn.PReLU(4), VOLUME)
    cases["Upsample, linear"] = of(lambda: nn.Upsample(scale_factor=2, mode="linear"), SEQUENCE)
    cases["Upsample, nearest of a row"] = of(lambda: nn.Upsample(scale_factor=2), SEQUENCE)
    cases["Upsample, trilinear"] = of(lambda: nn.Upsample(scale_factor=2, mode="trilinear"), VOLUME)
    cases["Upsample, nearest of a volume"] = of(lambda: nn.Upsample(scale_factor=2), VOLUME)
    return cases


def _sequences() -> dict[str, Case]:
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    last = torch.tensor([[False] * 4, [False, False, True, True]])
    layer, block = (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), nn.TransformerDecoderLayer
    states: dict[str, Case] = {}
    for name in ("RNN", "GRU", "LSTM"):
        kind = getattr(nn, name)
        states[name] = of(lambda kind=kind: kind(8, 5), SEQUENCE)  # type: ignore[misc]
        states[f"{name}, batch first, both ways"] = of(
            lambda kind=kind: kind(8, 5, 2, batch_first=True, bidirectional=True), SEQUENCE  # type: ignore[misc]
        )  # fmt: skip
        states[f"{name}Cell"] = of(lambda name=name: getattr(nn, f"{name}Cell")(6, 5), ROW)  # type: ignore[misc]

    def attention(**given: Any) -> Callable[[], Any]:
        def make() -> Any:
            layer = nn.MultiheadAttention(8, 2, batch_first=True)
            return Calls(layer, lambda x: layer(x, x, x, **given))

        return make

    def crossed() -> Any:
        layer = nn.MultiheadAttention(8, 2, batch_first=True)
        return Calls(layer, lambda x, y: layer(x, y, y))

    def padded() -> Any:
        encoder = nn.TransformerEncoder(layer(), 2)
        return Calls(encoder, lambda x: encoder(x, src_key_padding_mask=last))

    def listed() -> Any:
        both = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        return Calls(both, lambda x: both[1](both[0](x)))

    return {
        **states,
        "LSTM, projected": of(lambda: nn.LSTM(8, 5, proj_size=3), SEQUENCE),
        "MultiheadAttention": of(attention(), SEQUENCE),
        "MultiheadAttention, no weights": of(attention(need_weights=False), SEQUENCE),
        "MultiheadAttention, causal": of(attention(attn_mask=causal), SEQUENCE),
        "MultiheadAttention, padded": of(attention(key_padding_mask=last), SEQUENCE),
        "MultiheadAttention, of another sequence": of(crossed, SEQUENCE, lambda: randn(2, 5, 8)),
        "TransformerEncoderLayer": of(layer, SEQUENCE),
        "TransformerEncoder": of(lambda: nn.TransformerEncoder(layer(), 2), SEQUENCE),
        "TransformerEncoder, padded": of(padded, SEQUENCE),
        "TransformerDecoderLayer": of(lambda: block(8, 2, 16, batch_first=True), SEQUENCE, SEQUENCE),
        "TransformerDecoder": of(lambda: nn.TransformerDecoder(block(8, 2, 16), 2), SEQUENCE, SEQUENCE),
        "Transformer": of(lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), SEQUENCE, SEQUENCE),
        "Embedding": of(lambda: nn.Embedding(20, 8, padding_idx=0), lambda: ids(20, 2, 6)),
        "EmbeddingBag": of(lambda: nn.EmbeddingBag(20, 8), lambda: ids(20, 2, 6)),
        "EmbeddingBag, sum": of(lambda: nn.EmbeddingBag(20, 8, mode="sum"), lambda: ids(20, 2, 6)),
        "EmbeddingBag, max": of(lambda: nn.EmbeddingBag(20, 8, mode="max"), lambda: ids(20, 2, 6)),
        "EmbeddingBag, padded": of(lambda: nn.EmbeddingBag(20, 8, padding_idx=3), lambda: ids(20, 2, 6)),
        "EmbeddingBag, weights": of(
            lambda: (b := nn.EmbeddingBag(20, 8, mode="sum")) and Calls(b, lambda i, w: b(i, per_sample_weights=w)),
            lambda: ids(20, 2, 6), lambda: rand(2, 6),
        ),
        "EmbeddingBag, offsets": of(
            lambda: nn.EmbeddingBag(20, 8), lambda: ids(20, 9), lambda: torch.tensor([0, 4]),
        ),
        "Bilinear": of(lambda: nn.Bilinear(6, 6, 3), ROW, lambda: rand(2, 6)),
        "CosineSimilarity": of(nn.CosineSimilarity, ROW, lambda: rand(2, 6)),
        "PairwiseDistance": of(nn.PairwiseDistance, ROW, lambda: rand(2, 6)),
        "Fold": of(lambda: nn.Fold((4, 5), 2), lambda: randn(2, 16, 12)),
        "Fold, with a stride": of(lambda: nn.Fold((6, 6), 3, 1, 1, 3), lambda: randn(2, 18, 4)),
        "ModuleList": of(listed, ROW),
        "ModuleDict": of(lambda: (m := nn.ModuleDict({"a": nn.Linear(6, 3)})) and Calls(m, lambda x: m["a"](x)), ROW),
        "ParameterList": of(lambda: (m := nn.ParameterList([randn(6)])) and Calls(m, lambda x: x * m[0]), ROW),
        "ParameterDict": of(lambda: (m := nn.ParameterDict({"a": randn(6)})) and Calls(m, lambda x: x * m["a"]), ROW),
    }  # fmt: skip


def _losses() -> dict[str, Case]:
    def scores() -> Tensor:
        return randn(3, 5)

    def classes() -> Tensor:
        return ids(5, 3)

    values = [scores, lambda: rand(3, 5)]
    pairs: dict[str, Callable[[], nn.Module]] = {
        name: getattr(nn, name) for name in ("L1Loss", "MSELoss", "SmoothL1Loss", "HuberLoss", "BCEWithLogitsLoss",
                                             "PoissonNLLLoss")
    }  # fmt: skip
    return {
        **{name: of(make, *values) for name, make in pairs.items()},
        "BCELoss": of(nn.BCELoss, lambda: rand(3, 5), lambda: rand(3, 5).flip(0)),
        "KLDivLoss": of(lambda: nn.KLDivLoss(reduction="batchmean"), lambda: scores().log_softmax(-1), values[1]),
        "CrossEntropyLoss": of(nn.CrossEntropyLoss, scores, classes),
        "CrossEntropyLoss, smoothed": of(lambda: nn.CrossEntropyLoss(label_smoothing=0.1), scores, classes),
        "CrossEntropyLoss, of pictures": of(nn.CrossEntropyLoss, lambda: randn(2, 5, 3, 3), lambda: ids(5, 2, 3, 3)),
        "LinearCrossEntropyLoss": of(lambda: nn.LinearCrossEntropyLoss(6, 5), lambda: randn(3, 6), classes),
        "NLLLoss": of(nn.NLLLoss, lambda: scores().log_softmax(-1), classes),
        "NLLLoss2d": of(nn.NLLLoss, lambda: randn(2, 5, 3, 3).log_softmax(1), lambda: ids(5, 2, 3, 3)),
        "GaussianNLLLoss": of(nn.GaussianNLLLoss, *values, lambda: rand(3, 5) + 0.1),
        "HingeEmbeddingLoss": of(nn.HingeEmbeddingLoss, scores, lambda: signs(3, 5)),
        "SoftMarginLoss": of(nn.SoftMarginLoss, scores, lambda: signs(3, 5)),
        "MarginRankingLoss": of(nn.MarginRankingLoss, scores, values[1], lambda: signs(3, 5)),
        "CosineEmbeddingLoss": of(nn.CosineEmbeddingLoss, *values, lambda: signs(3)),
        "MultiLabelMarginLoss": of(nn.MultiLabelMarginLoss, scores, lambda: torch.tensor([[3, 0, -1, 1, 1]] * 3)),
        "MultiLabelSoftMarginLoss": of(nn.MultiLabelSoftMarginLoss, scores, lambda: ids(2, 3, 5).float()),
        "MultiMarginLoss": of(nn.MultiMarginLoss, scores, classes),
        "TripletMarginLoss": of(nn.TripletMarginLoss, *values, lambda: randn(3, 5) * 0.5),
        "TripletMarginWithDistanceLoss": of(nn.TripletMarginWithDistanceLoss, *values, lambda: randn(3, 5) * 0.5),
        "CTCLoss": of(nn.CTCLoss, lambda: randn(8, 2, 5).log_softmax(-1), lambda: ids(4, 2, 3) + 1,
                      lambda: torch.tensor([8, 7]), lambda: torch.tensor([3, 2])),
        "AdaptiveLogSoftmaxWithLoss": of(lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 12, [3, 6]), ROW, lambda: ids(12, 2)),
        "AdaptiveLogSoftmaxWithLoss, log_prob": of(
            lambda: (m := nn.AdaptiveLogSoftmaxWithLoss(6, 12, [3, 6])) and Calls(m, m.log_prob), ROW
        ),
    }  # fmt: skip


class Calls(nn.Module):
    """A module called in another way than by its forward."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.call = module, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(*inputs)


MODULES: dict[str, Case] = {**_elementwise(), **_several_dims(), **_sequences(), **_losses()}

NO_FORWARD = {"Module", "Container", "RNNBase", "RNNCellBase"}  # nothing to call: what others are made of


def modules_without_case() -> set[str]:
    """Modules of this torch that no case tries."""
    kinds = {n for n, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)}
    return kinds - NO_FORWARD - {name.partition(",")[0] for name in MODULES}
