"""CUDA: a Jetson's GPU, through AOTInductor. Lowers with an Nvidia GPU and triton; stores its weights in a `.ptd`."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

from edgetune.export.targets.target import Target


def _missing() -> str:
    import torch

    if not torch.cuda.is_available():
        return "AOTInductor compiles on an Nvidia GPU, and torch sees none"
    if importlib.util.find_spec("triton") is None:
        return "no module named 'triton'"
    return "" if shutil.which("nvcc") or torch.version.cuda is None else "nvcc of the CUDA toolkit is not on the PATH"


def _build(kind: Any, target: Target) -> Any:
    from executorch.backends.cuda.cuda_backend import CudaBackend

    return kind([CudaBackend.generate_method_name_compile_spec("forward")])


CUDA = Target(
    name="cuda",
    serves="the GPU of a Jetson",
    partitioner="executorch.backends.cuda.cuda_partitioner:CudaPartitioner",
    takes=("fp32", "fp16", "bf16"),
    runtime="CudaBackend",
    install="lower on a machine with an Nvidia GPU (a Jetson, say), torch built for CUDA, triton and the CUDA toolkit",
    missing=_missing,
    build=_build,
)
