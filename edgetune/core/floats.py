"""The types that an exported program computes in, and that its key-value cache has. No torch: the shell reads them."""

from __future__ import annotations

from typing import Literal, get_args

from edgetune.core.errors import EdgetuneError

FloatType = Literal["fp32", "bf16", "fp16"]
KeyValueType = Literal["fp32", "bf16", "fp16", "int8"]

FLOAT_TYPES: tuple[FloatType, ...] = get_args(FloatType)
KEY_VALUE_TYPES: tuple[KeyValueType, ...] = get_args(KeyValueType)


def check_types(dtype: str | None, cache_dtype: str | None = None) -> None:
    """Raise `EdgetuneError` for unknown names; `None` is the default of either."""
    if dtype is not None and dtype not in FLOAT_TYPES:
        raise EdgetuneError("unknown dtype of a program", got=dtype, allowed=FLOAT_TYPES)
    if cache_dtype is not None and cache_dtype not in KEY_VALUE_TYPES:
        raise EdgetuneError("unknown cache_dtype of a program", got=cache_dtype, allowed=KEY_VALUE_TYPES)
