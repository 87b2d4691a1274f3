"""A machine whose truth is known: operators of every kernel, and what each of them takes there."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from edgetune.profile import calibrate, device
from edgetune.profile.calibration import Calibration
from edgetune.profile.equations import Setting, Timed, calls_of, parts_of, program_us
from edgetune.profile.terms import (
    ACTIVATIONS_NEAR,
    CALL,
    DELEGATE,
    PRODUCTS,
    TRAFFIC,
    WEIGHTS_FAR,
    WEIGHTS_NEAR,
    KernelTile,
    Key,
)
from edgetune.profile.trials import Clocked
from edgetune.program.operators import DType, Kind, Operator

BASE = "raspberry-pi-5"  # whose descriptor the calibration is for
_BYTES: dict[DType, float] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "8da4w": 0.5}


@dataclass(frozen=True)
class Kernel:
    """A kernel by the name that `edgetune.program.executed` gives it."""

    name: str
    kind: Kind
    delegated: bool = True
    window: int = 1
    groups: int = 1


KERNELS = (
    Kernel("xnnpack.fully-connected", "linear"),
    Kernel("xnnpack.conv2d", "conv", window=9),
    Kernel("xnnpack.conv2d", "pointwise-conv"),
    Kernel("xnnpack.batch-matrix-multiply", "matmul", groups=4),
    Kernel("xnnpack.depthwise-conv2d", "depthwise-conv", window=9),
    Kernel("xnnpack.depthwise-conv2d", "depthwise-conv", window=25),
    Kernel("xnnpack.depthwise-conv2d", "depthwise-conv", window=49),
    Kernel("xnnpack.global-avg-pooling2d", "reduction", window=16),
    Kernel("xnnpack.softmax", "softmax"),
    Kernel("xnnpack.max-pooling2d", "pooling", window=9),
    Kernel("xnnpack.static-transpose", "data-movement"),
    Kernel("xnnpack.add", "elementwise"),
    Kernel("aten.native_layer_norm.out", "normalization", delegated=False),
    Kernel("aten.embedding.out", "embedding", delegated=False),
    Kernel("aten.cumsum.out", "other", delegated=False),
)


def made(kernel: Kernel, rows: int, columns: int, depth: int, dtype: DType = "fp32") -> Operator:
    """An operator of that kernel: `rows` x `columns` values for each group, of a product `depth` deep."""
    kind, groups, window = kernel.kind, kernel.groups, kernel.window
    values, width = groups * rows * columns, 1 if dtype == "int8" else 4
    product = kind in ("linear", "conv", "pointwise-conv", "matmul")
    read = groups * rows * depth if product else values
    macs = values * depth * window if product else values * window if kind == "depthwise-conv" else 0
    stored = columns * depth * window if product and kind != "matmul" else columns * window
    weights = int(stored * _BYTES[dtype]) + 4 * columns if kernel.kind in _WEIGHTED else 0
    return Operator(
        operator=kernel.name,
        module="",
        kind=kind,
        dtype=dtype,
        output_shape=(groups, rows, columns),
        macs=macs,
        weight_bytes=weights,
        activation_bytes=(read + values) * width,
        delegated=kernel.delegated,
        columns=columns,
        groups=groups,
        window=window,
    )


_WEIGHTED: tuple[Kind, ...] = ("linear", "conv", "pointwise-conv", "depthwise-conv", "embedding")

# The truth: microseconds for a unit of each term, by the term's name; of each kernel its own share of them.

TILES: dict[DType, KernelTile] = {"fp32": KernelTile(rows=6, columns=16), "int8": KernelTile(rows=4, columns=8)}
CACHES = calibrate.caches_of(device.load(BASE))
SETTING = Setting(CACHES, TILES)
_UNITS = {
    "1": 0.6, "macs": 20.0, "one row": 55.0, "one column": 40.0, "written": 0.6, "read": 0.4, "packed": 0.3,
    "values": 0.5, "rows": 2.0, "tiles": 0.9, "bytes": 0.1, "places": 6.0, "vectors": 0.4, "weights": 0.3,
    "windows": 0.7, "channels": 4.0,
}  # fmt: skip
_SHARED: dict[Key, float] = {
    (CALL, "1"): 8.0,
    (DELEGATE, "1"): 3.0,
    (TRAFFIC, WEIGHTS_NEAR): 0.05,
    (TRAFFIC, WEIGHTS_FAR): 0.15,
    (TRAFFIC, ACTIVATIONS_NEAR): 0.04,
}


def true_rate(key: Key) -> float:
    """What the machine takes for a unit of that term."""
    curve, term = key
    own = 0.7 + 0.6 * random.Random(curve).random()
    return _SHARED[key] if key in _SHARED else own * _UNITS[term] * (0.4 if curve.endswith("int8") else 1.0)


def true_us(operators: Sequence[Operator]) -> float:
    """Microseconds of a program."""
    return program_us(parts_of(operators, SETTING), calls_of(operators), _TrueRates())


class _TrueRates(dict[Key, float]):
    """The rate of every term."""

    def get(self, key: Key, _: float = 0.0) -> float:  # type: ignore[override]
        return true_rate(key)


_SIZES = (
    (1, 64, 64), (1, 500, 700), (1, 128, 1024), (4, 40, 64), (5, 64, 500), (6, 100, 128), (7, 256, 96), (8, 24, 300),
    (11, 48, 80), (13, 16, 600), (24, 17, 128), (31, 130, 64), (50, 33, 200), (64, 384, 64), (100, 64, 130),
    (196, 90, 40), (400, 20, 400), (900, 16, 16), (2000, 24, 24),
    (40, 300, 64), (9, 700, 32), (90, 260, 20),
)  # fmt: skip

_NARROW = ((30, 1, 900), (100, 1, 64), (700, 1, 200))  # of products


def programs(noise: float = 0.03, seed: int = 0, dtypes: Sequence[DType] = ("fp32", "int8")) -> list[Timed]:
    """Chains of one operator each in several sizes, timed with that much noise."""
    draw, found = random.Random(seed), []
    for dtype in dtypes:
        for number, kernel in enumerate(KERNELS):
            if dtype != "fp32" and not kernel.delegated:
                continue
            for size in (*_SIZES, *(_NARROW if kernel.kind in PRODUCTS else ())):
                chain = (made(kernel, *size, dtype),) * draw.choice((1, 3, 8))
                us = true_us(chain) * math.exp(draw.gauss(0, noise))
                found.append(Timed(f"{number}-{kernel.kind}-{dtype}-{'x'.join(map(str, size))}", chain, us))
    return found


def mixes(count: int, seed: int = 1, dtypes: Sequence[DType] = ("fp32", "int8")) -> list[tuple[Operator, ...]]:
    """Programs of many kernels, in sizes of their own."""
    draw = random.Random(seed)

    def one() -> Operator:
        kernel = draw.choice(KERNELS)
        sizes = (int(2 ** draw.uniform(0, 9)), int(2 ** draw.uniform(3, 8)), int(2 ** draw.uniform(4, 9)))
        return made(kernel, *sizes, draw.choice(dtypes) if kernel.delegated else "fp32")

    return [tuple(one() for _ in range(draw.randint(8, 30))) for _ in range(count)]


@cache
def calibration() -> Calibration:
    """What `edgetune.profile.calibrate` makes of the programs and of some networks."""
    draw = random.Random(2)
    timed = programs() + [
        Timed(f"network-{n}", mix, true_us(mix) * math.exp(draw.gauss(0, 0.03)), network=True)
        for n, mix in enumerate(mixes(16, seed=3))
    ]
    return calibrate.fit_calibration(
        [Clocked(item.name, item.us, load_ms=0.5) for item in timed],
        {item.name: item.operators for item in timed},
        {item.name: "" for item in timed if item.network},
        device.load(BASE),
        threads=4,
    )


def calibrated() -> device.Device:
    """The described device with that calibration."""
    return device.load(BASE).model_copy(update={"calibration": calibration()})
