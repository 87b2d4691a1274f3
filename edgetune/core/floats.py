"""The types that an exported program computes in, and that its key-value cache has."""

from __future__ import annotations

from typing import Literal

import torch

FloatType = Literal["fp32", "bf16", "fp16"]
KeyValueType = Literal["fp32", "bf16", "fp16", "int8"]

TORCH_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # the largest relative error of one rounding
