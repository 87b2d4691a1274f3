"""Peak memory of a program: what is packed and padded, what lies there twice for a moment, and that it only grows."""

from __future__ import annotations

import random

import pytest

from edgetune.core.numbers import MIB
from edgetune.profile import cost, device
from edgetune.profile.memory import RUNTIME_MIB, packed_bytes, peak_memory_mib
from edgetune.program.operators import DType, Operator
from support.machine import KERNELS, Kernel, made

LINEAR, CONV, POINTWISE, MATMUL, DEPTHWISE = KERNELS[:5]
WIDE = KERNELS[6]
PORTABLE = Kernel("aten.cumsum.out", "other", delegated=False)


def test_packed_weights_are_padded_to_whole_vectors() -> None:
    assert packed_bytes(made(LINEAR, 4, 16, 10)) == 16 * (10 * 4 + 4)
    assert packed_bytes(made(LINEAR, 4, 17, 10)) == 32 * (10 * 4 + 4)
    assert packed_bytes(made(CONV, 4, 20, 10)) == 32 * (9 * 10 * 4 + 4)
    assert packed_bytes(made(POINTWISE, 4, 3, 10)) == 16 * (10 * 4 + 4)
    assert packed_bytes(made(DEPTHWISE, 4, 20, 1)) == 32 * (9 * 4 + 4)
    assert packed_bytes(made(WIDE, 4, 20, 1)) == 20 * 16 * (49 * 4 + 4)  # a product for each channel
    assert packed_bytes(made(MATMUL, 4, 20, 8)) == 0  # both of its sides are activations


def test_eight_bit_weights_are_padded_in_depth_too() -> None:
    assert packed_bytes(made(LINEAR, 4, 16, 10, "int8")) == 16 * (16 + 8)
    assert packed_bytes(made(LINEAR, 4, 16, 16, "int8")) == 16 * (16 + 8)
    assert packed_bytes(made(CONV, 4, 16, 3, "int8")) == 16 * (9 * 8 + 8)


def test_four_bit_weights_keep_their_scales() -> None:
    plain = made(LINEAR, 4, 64, 64, "8da4w")
    scaled = plain.model_copy(update={"weight_bytes": plain.weight_bytes + 1000})
    assert packed_bytes(scaled) == packed_bytes(plain) + 1000
    assert packed_bytes(plain) < packed_bytes(made(LINEAR, 4, 64, 64, "int8"))


def test_each_group_is_padded_by_itself() -> None:
    whole = made(CONV, 4, 32, 8)
    grouped = whole.model_copy(update={"groups": 4, "columns": 8, "macs": whole.macs // 4})
    assert packed_bytes(grouped) == 4 * 16 * (9 * 2 * 4 + 4)


def test_the_convolutions_of_one_delegate_lie_there_twice() -> None:
    layer, left = made(POINTWISE, 1, 512, 512), made(PORTABLE, 1, 1, 1)
    together = peak_memory_mib([layer, layer, left])
    apart = peak_memory_mib([layer, left, layer])
    assert together - apart == pytest.approx(layer.weight_bytes / MIB)
    between = made(KERNELS[11], 1, 1, 1)  # in the same delegate, so that nothing goes back
    assert peak_memory_mib([layer, between, layer]) == pytest.approx(peak_memory_mib([layer, layer, between]))


def test_of_linear_layers_only_the_largest_lies_there_twice() -> None:
    layer, left = made(LINEAR, 1, 512, 512), made(PORTABLE, 1, 1, 1)
    assert peak_memory_mib([layer, layer, left]) == pytest.approx(peak_memory_mib([layer, left, layer]))
    smaller = made(LINEAR, 1, 512, 256)
    more = peak_memory_mib([layer, smaller]) - peak_memory_mib([layer, layer])
    assert more == pytest.approx((packed_bytes(smaller) - packed_bytes(layer)) / MIB)
    convolution = made(POINTWISE, 1, 512, 512)
    more = peak_memory_mib([convolution, convolution]) - peak_memory_mib([layer, layer])
    assert more == pytest.approx(layer.weight_bytes / MIB)
    mixed = peak_memory_mib([convolution, layer, layer]) - peak_memory_mib([left, convolution, left, layer, layer])
    assert mixed > layer.weight_bytes / MIB - 0.5  # what a convolution keeps and a layer takes meet in one delegate


def test_what_of_the_file_is_no_weight_lies_in_memory_too() -> None:
    layer = made(LINEAR, 1, 512, 512)
    stored = layer.weight_bytes
    table = made(Kernel("aten.embedding.out", "embedding", delegated=False), 1, 8, 1)
    alone = peak_memory_mib([layer])
    assert peak_memory_mib([layer], 0, stored + 3 * int(MIB)) == pytest.approx(alone + 3)
    assert peak_memory_mib([layer], 0, stored // 2) == alone  # shared weights are stored once
    looked_up = peak_memory_mib([layer, table]) - peak_memory_mib([layer])  # and the kernel that does it
    whole = stored + 90 * int(MIB)  # the rows of all words, of which the table's operator reads some
    assert peak_memory_mib([layer, table], 0, whole) == pytest.approx(alone + 90 + looked_up - table.weight_bytes / MIB)


def test_an_empty_looking_program_takes_what_the_runtime_takes() -> None:
    nothing = made(Kernel("xnnpack.add", "elementwise"), 1, 1, 1)
    assert peak_memory_mib([nothing]) == pytest.approx(RUNTIME_MIB, abs=0.03)
    assert peak_memory_mib([nothing], plan_bytes=3 * int(MIB)) == pytest.approx(RUNTIME_MIB + 3, abs=0.03)


def test_four_bit_kernels_and_each_kind_of_kernel_take_their_own() -> None:
    small = [made(LINEAR, 1, 16, 16, dtype) for dtype in ("int8", "8da4w")]
    assert peak_memory_mib(small[1:]) > peak_memory_mib(small[:1]) + 0.1
    assert peak_memory_mib(small) < peak_memory_mib(small[1:]) + 0.1  # once, however many layers
    kinds = [made(KERNELS[11], 1, 16, 1), made(LINEAR, 1, 16, 1)]
    assert peak_memory_mib(kinds) > peak_memory_mib([kinds[1], kinds[1]]) + 0.01


def test_kernels_outside_of_delegates_count_once_and_their_weights_as_stored() -> None:
    def table(name: str, weights: int) -> Operator:
        return made(Kernel(name, "embedding", delegated=False), 1, 1, 1).model_copy(update={"weight_bytes": weights})

    one, again, other = table("aten.embedding.out", 0), table("aten.embedding.out", 0), table("aten.other.out", 0)
    same, both = peak_memory_mib([one, again]), peak_memory_mib([one, other])
    assert both > same + 0.1
    read = table("aten.embedding.out", 2 * int(MIB))
    assert peak_memory_mib([read]) == pytest.approx(peak_memory_mib([one]) + 2)


def test_weights_that_are_freed_leave_room_for_what_runs() -> None:
    """A convolutional network holds its weights twice while it is loaded, and its tensors afterwards."""
    layer = made(POINTWISE, 1, 512, 512)
    loaded, spare = peak_memory_mib([layer], workspace_bytes=0), layer.weight_bytes
    assert peak_memory_mib([layer], plan_bytes=spare // 2, workspace_bytes=spare // 2) == loaded
    assert peak_memory_mib([layer], plan_bytes=spare, workspace_bytes=spare) == pytest.approx(loaded + spare / MIB)


def test_the_workspace_is_that_of_the_largest_operator() -> None:
    small, large = made(KERNELS[11], 64, 64, 1), made(KERNELS[11], 1024, 1024, 1)
    alone, beside = peak_memory_mib([large]), peak_memory_mib([large, small])
    assert beside == pytest.approx(alone, abs=0.01)
    part = (alone - peak_memory_mib([small])) / ((large.activation_bytes - small.activation_bytes) / MIB)
    assert 0 < part < 1  # most of them lie in the arena
    twice = large.model_copy(update={"activation_bytes": 2 * large.activation_bytes})
    assert peak_memory_mib([twice]) - alone == pytest.approx(part * large.activation_bytes / MIB)


def test_no_size_ever_shrinks_it() -> None:
    draw = random.Random(6)
    dtypes: tuple[DType, ...] = ("fp32", "int8", "8da4w")
    beside = [made(LINEAR, 8, 64, 64), made(PORTABLE, 8, 8, 1)]
    for _ in range(300):
        kernel, dtype = draw.choice(KERNELS), draw.choice(dtypes)
        size = [int(2 ** draw.uniform(0, 10)) for _ in range(3)]
        one, plan = made(kernel, *size, dtype), draw.choice((0, 10**6))
        before = peak_memory_mib([one, *beside], plan)
        assert before > RUNTIME_MIB
        for axis in range(3):
            larger = list(size)
            larger[axis] += draw.choice((1, 9, 100))
            assert peak_memory_mib([made(kernel, *larger, dtype), *beside], plan) >= before, (kernel, dtype, size, axis)
        for name in ("weight_bytes", "activation_bytes"):
            grown = one.model_copy(update={name: getattr(one, name) + 10**6})
            assert peak_memory_mib([grown, *beside], plan) >= before, (kernel, dtype, size, name)
        assert peak_memory_mib([one, *beside], plan + 10**9) > before
        assert peak_memory_mib([one, one, *beside], plan) > before


def test_too_much_for_the_device_is_said() -> None:
    huge = made(LINEAR, 1, 65536, 65536)
    assert "more than the 8 GiB fitted" in cost.predict([huge], device.load("raspberry-pi-5")).note
    assert "GiB" not in cost.predict([made(LINEAR, 1, 64, 64)], device.load("raspberry-pi-5")).note
