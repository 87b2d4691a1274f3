"""How far a value of a program may differ from eager mode, as a share of the largest absolute value of its output.

- a model in floating point: 1e-3 (45 families of models stay within 2e-5);
- a program in 16 bits, compared with the model in fp32: `ROUNDINGS` times the error of one rounding, which is 2^-11 in
  fp16 and 2^-8 in bf16: 7.8e-3 and 6.3e-2. Each layer rounds its output once, and the errors of layers add up like
  random steps, so this is a network of 16^2 layers;
- activations rounded to 8 bits dynamically, as with 4-bit weights: 5e-2 (the families stay within 2e-2). A value
  between two steps may be rounded either way, since eager mode and the backend add in a different order;
- activations rounded to 8 bits by fixed scales: 0.25 (convolutional families are equal to the bit, small vision
  transformers, whose attention is computed between two roundings, within 0.17);
- whole numbers and truth values: none.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

FLOAT, DYNAMIC_INT8, STATIC_INT8 = 1e-3, 5e-2, 0.25
ROUNDINGS = 16  # of 16-bit floats
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # largest relative error of one rounding


def allowed_difference(model: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    """How far a value of the program in `dtype` may differ from this model's: see the top of this file."""
    allowed = allowed_in(dtype)
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            allowed = max(allowed, _allowed_in_graph(module))
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            allowed = max(allowed, allowed_in(tensor.dtype))
            if rounds_activations(tensor):
                allowed = max(allowed, DYNAMIC_INT8)
    return allowed


def allowed_in(dtype: torch.dtype) -> float:
    """How far a value may differ because its program computes in `dtype`."""
    return ROUNDINGS * UNIT_ROUNDOFF[dtype] if dtype in UNIT_ROUNDOFF else FLOAT


def rounds_activations(weight: Tensor) -> bool:
    """Whether a weight is one of torchao's that rounds the activations it is multiplied with."""
    settings = (getattr(weight, name, None) for name in ("activation_quantization", "act_quant_kwargs"))
    return type(weight).__module__.startswith("torchao") and any(setting is not None for setting in settings)


def _allowed_in_graph(module: fx.GraphModule) -> float:
    """For a captured graph whose operators may round to fixed or to measured scales."""
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_function"}
    rounding = {name for name in called if name.startswith(("quantized_decomposed.quantize", "torchao.quantize"))}
    if not rounding:
        return FLOAT
    return DYNAMIC_INT8 if any("choose_qparams" in name for name in called) else STATIC_INT8
