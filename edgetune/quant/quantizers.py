"""ExecuTorch's quantizers: that of XNNPACK, which most targets take, and those of targets with their own.

They annotate in a graph what to round. Executorch's compiler, which makes programs of such graphs, is used by
`edgetune.export` alone.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from edgetune.capture.operators import module_of
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.quiet import silence_libraries
from edgetune.quant.observers import Observer, observer_for
from edgetune.recipe.names import TARGET_NAMES, unknown_target

ETHOS_U_CHIP = "ethos-u85-256"
TOSA_PROFILE = "TOSA-1.0+INT+FP"  # both profiles: float models lower as well as quantized ones
ARM_INSTALL = 'pip install "edgetune[ethos-u]"'
QNN_INSTALL = (
    "install Qualcomm's AI Engine Direct SDK, set QNN_SDK_ROOT to it and put its lib/x86_64-linux-clang on "
    "LD_LIBRARY_PATH, then pip install py-cpuinfo"
)
_NOTE = "quantization_annotation"


@dataclass(frozen=True)
class OwnQuantizer:
    """The quantizer of one target, built from `per_channel`."""

    build: Callable[[bool], Any]
    install: str  # what to do where it cannot be imported


def _ethos_u(per_channel: bool) -> Any:
    from executorch.backends.arm.ethosu import EthosUCompileSpec
    from executorch.backends.arm.quantizer import EthosUQuantizer, get_symmetric_quantization_config

    config = get_symmetric_quantization_config(is_per_channel=per_channel)
    return EthosUQuantizer(EthosUCompileSpec(ETHOS_U_CHIP)).set_global(config)


def _tosa(per_channel: bool) -> Any:
    from executorch.backends.arm.quantizer import TOSAQuantizer, get_symmetric_quantization_config
    from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec

    config = get_symmetric_quantization_config(is_per_channel=per_channel)
    return TOSAQuantizer(TosaCompileSpec(TOSA_PROFILE)).set_global(config)


def _qnn(per_channel: bool) -> Any:
    if lacking := qnn_lacks():
        raise ImportError(lacking)
    from executorch.backends.qualcomm.quantizer.quantizer import QnnQuantizer

    return QnnQuantizer()


OWN = {
    "ethos-u": OwnQuantizer(_ethos_u, ARM_INSTALL),
    "tosa": OwnQuantizer(_tosa, ARM_INSTALL),
    "qnn": OwnQuantizer(_qnn, QNN_INSTALL),
}


def qnn_lacks() -> str:
    """What Qualcomm's compiler lacks on this machine; empty if it is complete.

    Importing executorch's Qualcomm package downloads a missing SDK, so this is checked before the import.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"Qualcomm's compiler runs on x86 Linux, this is {platform.system()} {platform.machine()}"
    root = os.environ.get("QNN_SDK_ROOT", "")
    if not root:
        return "Qualcomm's AI Engine Direct SDK is not here: QNN_SDK_ROOT is not set"
    if not (Path(root) / "lib" / "x86_64-linux-clang" / "libQnnHtp.so").is_file():
        return f"QNN_SDK_ROOT={root} does not contain lib/x86_64-linux-clang/libQnnHtp.so"
    return "" if importlib.util.find_spec("cpuinfo") else "no module named 'cpuinfo'"


def quantizer_for(
    target: str, *, per_channel: bool, observer: Observer = "minmax", skip: frozenset[str] = frozenset()
) -> Any:
    """The quantizer of a target: its own, with its own observer, or XNNPACK's.

    `skip`: names of layers to keep in floating point.
    """
    if target not in TARGET_NAMES:
        raise EdgetuneError("unknown target", **unknown_target(target))
    with silence_libraries():
        if target not in OWN:
            return _xnnpack(per_channel=per_channel, observer=observer, skip=skip)
        if skip:
            raise EdgetuneError(f"int8 for target {target} takes no skip", got=sorted(skip), action="leave it out")
        try:
            return OWN[target].build(per_channel)
        except (ImportError, RuntimeError, OSError, AttributeError) as error:  # a broken install raises any of them
            raise EdgetuneError(
                f"int8 cannot quantize for target {target} on this machine ({error})",
                action=OWN[target].install,
                exit_code=Exit.EXPORT,
            ) from error


def _xnnpack(*, per_channel: bool, observer: Observer, skip: frozenset[str]) -> Any:
    """ExecuTorch's quantizer, with one scale after a layer and its clamp instead of one before and one after.

    The stock one fuses a layer with relu but not with relu6: it spreads the 8 bits of such a layer over values that
    the clamp then cuts off, which cost EfficientNet-Lite0 a tenth of its predictions. XNNPACK fuses both.
    """
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as stock
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation

    class Fused(stock.XNNPACKQuantizer):  # type: ignore[misc]
        def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
            model = super().transform_for_annotation(model)
            _whole_constants(model)
            return model

        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            model = super().annotate(model)
            for node in model.graph.nodes:
                layer = node.args[0] if node.target in clamps else None
                if not isinstance(layer, fx.Node) or layer.target not in layers or len(layer.users) != 1:
                    continue
                noted = layer.meta.get(_NOTE)
                if noted is not None:
                    node.meta[_NOTE] = QuantizationAnnotation(output_qspec=noted.output_qspec, _annotated=True)
                    noted.output_qspec = None
            return model

    aten = torch.ops.aten
    clamps = {aten.hardtanh.default, aten.hardtanh_.default}
    layers = {aten.conv1d.default, aten.conv2d.default, aten.linear.default}
    config = stock.get_symmetric_quantization_config(is_per_channel=per_channel)
    spec = replace(config.input_activation, observer_or_fake_quant_ctr=observer_for(observer))
    quantizer = Fused().set_global(replace(config, input_activation=spec, output_activation=spec))
    return quantizer.set_filter_function(lambda node: module_of(node) not in skip)


def _whole_constants(graph_module: fx.GraphModule) -> None:
    """Give constants that were numbers the type of what they are added to: the quantizer makes floats of all.

    An index plus 0, as transformers computes for its masks, would be a float, and a float is no index.
    """
    for node in graph_module.graph.nodes:
        constant = (
            getattr(graph_module, node.target, None) if node.op == "get_attr" and "." not in node.target else None
        )
        if not isinstance(constant, Tensor) or not node.target.startswith("_tensor_constant"):
            continue
        types = {getattr(user.meta.get("val"), "dtype", None) for user in node.users}
        if len(types) == 1 and (dtype := types.pop()) is not None and not dtype.is_floating_point:
            setattr(graph_module, node.target, constant.to(dtype))


@contextmanager
def fast_annotation() -> Iterator[None]:
    """Skip XNNPACK's search for convolutions with a batch norm if the graph has no batch norm left.

    It traces its twelve patterns again for each model, which takes longer than the rest of quantizing a small one.
    """
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer_utils

    quantizer: Any = xnnpack_quantizer_utils
    stock = quantizer._do_annotate_conv_bn

    def annotate(graph_module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        if any("batch_norm" in str(node.target) for node in graph_module.graph.nodes):
            return stock(graph_module, *args, **kwargs)
        graph_module.graph.eliminate_dead_code()  # as it does before it looks
        graph_module.recompile()
        return []

    quantizer._do_annotate_conv_bn = annotate
    try:
        yield
    finally:
        quantizer._do_annotate_conv_bn = stock
