"""OpenVINO: Intel's CPU, GPU and NPU. Lowers and runs on an x86 Linux host with the package."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from typing import Any

from edgetune.core.quiet import silence_libraries
from edgetune.export.targets.target import Target


def _missing() -> str:
    if importlib.util.find_spec("openvino") is None:
        return "no module named 'openvino'"
    # executorch's package imports its quantizer last, which needs an nncf that is incompatible with this torch; the
    # partitioner has been loaded by then
    with contextlib.suppress(ImportError), silence_libraries():
        importlib.import_module("executorch.backends.openvino")
    return ""


def _build(kind: Any, target: Target) -> Any:
    from executorch.exir.backend.backend_details import CompileSpec

    class Silent(kind):  # type: ignore[misc]
        """The partitioner without its printout of every undelegated operator."""

        def partition(self, exported_program: Any) -> Any:
            with contextlib.redirect_stdout(io.StringIO()):
                return super().partition(exported_program)

    return Silent([CompileSpec("device", target.chip.encode())])


OPENVINO = Target(
    name="openvino",
    serves="Intel CPU, GPU and NPU",
    partitioner="executorch.backends.openvino.partitioner:OpenvinoPartitioner",
    takes=("fp32", "fp16"),
    runtime="OpenvinoBackend",
    install='pip install "edgetune[openvino]" (Linux)',
    chip="CPU",
    missing=_missing,
    build=_build,
)
