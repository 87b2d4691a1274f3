"""Language models as operator lists: a decoding step, a prefill, and the sizes of cache and file."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from edgetune.core.numbers import MIB
from edgetune.program.operators import DType, Kind, Operator


@dataclass(frozen=True)
class Architecture:
    """A decoder of llama's kind: gated feed-forward, grouped attention, RMS norms."""

    name: str
    layers: int
    hidden: int
    inner: int  # of the feed-forward
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = True  # the output head is the embedding table
    attention_bias: bool = False  # on query, key and value
    head_norms: bool = False  # norms of query and key
    norms: int = 2  # of a layer; 0: without weights, but computed twice

    @property
    def matrices(self) -> tuple[tuple[str, int, int], ...]:
        """The linear layers of one block: name, columns, rows."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            ("query", self.hidden, queries), ("key", self.hidden, keys), ("value", self.hidden, keys),
            ("output", queries, self.hidden), ("gate", self.hidden, self.inner), ("up", self.hidden, self.inner),
            ("down", self.inner, self.hidden),
        )  # fmt: skip

    @property
    def block_parameters(self) -> int:
        """Weights of the linear layers of all blocks."""
        return self.layers * sum(columns * rows for _, columns, rows in self.matrices)

    @property
    def head_parameters(self) -> int:
        """Weights of the output head, and of the embedding table."""
        return self.vocabulary * self.hidden

    @property
    def small_parameters(self) -> int:
        """Norms and biases, kept in full precision."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.attention_bias else 0
        own = self.norms * self.hidden + biases + (2 * self.head_dim if self.head_norms else 0)
        return self.layers * own + (self.hidden if self.norms else 0)

    @property
    def parameters(self) -> int:
        """All of them, a tied table once."""
        tables = self.head_parameters * (1 if self.tied else 2)
        return self.block_parameters + self.small_parameters + tables

    def cache_mib_per_token(self, element_bytes: int = 4) -> float:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes / MIB


@dataclass(frozen=True)
class QuantizationScheme:
    """How the weights are stored. Bits include the scales that are read with them."""

    name: str
    dtype: DType
    block_bits: float
    head_bits: float
    file_block_bits: float  # scales have 32 bits in a file, and 16 when packed for the kernels
    file_head_bits: float
    file_table_bits: float  # of the embedding table, if it is a separate copy
    copies: int = 2  # of a tied table: one for the embedding, one for the head
    cache_bytes: int = 4  # of one element
    adapter_rank: int = 0  # LoRA on every linear layer, in 32 bits


def _grouped_scheme(name: str, group: int, head_bits: float | None = None, adapter_rank: int = 0) -> QuantizationScheme:
    """4-bit weights in groups with a scale each, 8-bit activations, as ExecuTorch exports them (`8da4w`)."""
    packed, stored = 4 + 16 / group, 4 + 32 / group
    return QuantizationScheme(
        name, "8da4w", packed, head_bits or packed, stored, head_bits or stored, 8.0, adapter_rank=adapter_rank
    )


_ALL_SCHEMES = (
    QuantizationScheme("bf16", "bf16", 16, 16, 16, 16, 16, copies=1, cache_bytes=2),
    _grouped_scheme("8da4w-g32", 32),
    _grouped_scheme("8da4w-g128", 128),
    _grouped_scheme("8da4w-g256", 256),
    _grouped_scheme("8da4w-g32-head8", 32, head_bits=8.0),
    _grouped_scheme("8da4w-g32-head8-lora16", 32, head_bits=8.0, adapter_rank=16),
    # llama.cpp: blocks of 4 and 6 bits as its file of Llama 3.2 3B (2.02 GB) has them, the tied table in 6
    QuantizationScheme("q4-k-m", "8da4w", 4.81, 6.5625, 4.81, 6.5625, 0, copies=1, cache_bytes=2),
)
QUANTIZATION_SCHEMES = {scheme.name: scheme for scheme in _ALL_SCHEMES}

_ARCHITECTURES = (
    Architecture("llama-2-7b", 32, 4096, 11008, 32, 32, 128, 32000, tied=False),
    Architecture("llama-3-8b", 32, 4096, 14336, 32, 8, 128, 128256, tied=False),
    Architecture("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256),
    Architecture("llama-3.2-3b", 28, 3072, 8192, 24, 8, 128, 128256),
    Architecture("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152),
    Architecture("smollm2-360m", 32, 960, 2560, 15, 5, 64, 49152),
    Architecture("smollm2-1.7b", 24, 2048, 8192, 32, 32, 64, 49152),
    Architecture("qwen2.5-0.5b", 24, 896, 4864, 14, 2, 64, 151936, attention_bias=True),
    Architecture("qwen2.5-1.5b", 28, 1536, 8960, 12, 2, 128, 151936, attention_bias=True),
    Architecture("qwen2.5-3b", 36, 2048, 11008, 16, 2, 128, 151936, attention_bias=True),
    Architecture("qwen3-0.6b", 28, 1024, 3072, 16, 8, 128, 151936, head_norms=True),
    Architecture("qwen3-1.7b", 28, 2048, 6144, 16, 8, 128, 151936, head_norms=True),
    Architecture("qwen3-4b", 36, 2560, 9728, 32, 8, 128, 151936, head_norms=True),
    Architecture("phi-4-mini", 32, 3072, 8192, 24, 8, 128, 200064),
    Architecture("gemma-3-1b", 26, 1152, 6912, 4, 1, 256, 262144, head_norms=True, norms=4),
    Architecture("olmo-1b", 16, 2048, 8192, 16, 16, 128, 50304, norms=0),
)
ARCHITECTURES = {architecture.name: architecture for architecture in _ARCHITECTURES}


class _Step:
    """Collects the operators of one run over `tokens` rows."""

    def __init__(self, architecture: Architecture, scheme: QuantizationScheme, tokens: int, cached: int) -> None:
        self.model, self.scheme, self.tokens, self.cached = architecture, scheme, tokens, cached
        self.bytes = 2 if scheme.dtype == "bf16" else 4  # activations stay in 32 bits
        self.operators: list[Operator] = []

    def add(
        self, name: str, kind: Kind, shape: tuple[int, ...], read_bytes: float, macs: int = 0, weight_bytes: float = 0
    ) -> None:
        quantized = kind == "linear" or self.scheme.dtype == "bf16"
        self.operators.append(
            Operator(
                operator=name,
                module="",
                kind=kind,
                dtype=self.scheme.dtype if quantized else "fp32",
                output_shape=shape,
                macs=macs,
                weight_bytes=round(weight_bytes),
                activation_bytes=round(read_bytes + prod(shape) * self.bytes),
                delegated=True,
                columns=shape[-1],
            )
        )

    def linear(self, columns: int, rows: int, bits: float, tokens: int) -> None:
        read = tokens * columns * self.bytes
        self.add(
            # the published programs in bf16 ran executorch's own kernel, which reads the weights as they are
            "aten.linear" if self.scheme.dtype == "bf16" else "xnnpack.fully-connected",
            "linear",
            (tokens, rows),
            read,
            tokens * columns * rows,
            columns * rows * bits / 8,
        )
        rank = self.scheme.adapter_rank
        if rank and bits == self.scheme.block_bits:
            self.linear_of_adapter(columns, rows, rank, tokens)

    def linear_of_adapter(self, columns: int, rows: int, rank: int, tokens: int) -> None:
        """LoRA on the layer: two thin products and an addition."""
        size = (columns + rows) * rank
        read = tokens * (columns + rank) * self.bytes
        self.add("xnnpack.fully-connected", "linear", (tokens, rows), read, tokens * size, 4 * size)
        self.elementwise("xnnpack.add", rows, 2)

    def elementwise(self, name: str, width: int, inputs: int) -> None:
        self.add(name, "elementwise", (self.tokens, width), inputs * self.tokens * width * self.bytes)

    def convert(self, width: int) -> None:
        """Convert rows to 8 bits with a scale each, for 8-bit products."""
        if self.scheme.dtype == "8da4w":
            self.elementwise("xnnpack.convert-fp32-qdint8", width, 1)

    def norm(self, width: int) -> None:
        weights = width * self.bytes if self.model.norms else 0
        self.add(
            "aten.rms_norm.default", "normalization", (self.tokens, width), self.tokens * width * self.bytes,
            weight_bytes=weights,
        )  # fmt: skip

    def attention(self) -> None:
        """Rotation, the cache written and read, and both products in one fused operator."""
        model, queries = self.model, self.model.heads * self.model.head_dim
        keys = model.kv_heads * model.head_dim
        if model.head_norms:
            self.norm(queries)
            self.norm(keys)
        self.elementwise("xnnpack.multiply", queries + keys, 2)
        # each row attends to the cache and to the rows up to itself
        pairs = self.tokens * self.cached + self.tokens * (self.tokens + 1) // 2
        seen = self.cached + self.tokens
        read = self.tokens * queries * self.bytes + 2 * seen * keys * self.scheme.cache_bytes
        self.add("llama.sdpa_with_kv_cache", "matmul", (self.tokens, queries), read, 2 * pairs * queries)

    def block(self) -> None:
        model, tokens = self.model, self.tokens
        self.norm(model.hidden)
        for name, columns, rows in model.matrices:
            if name == "output":
                self.attention()
            if name == "gate":
                self.elementwise("xnnpack.add", model.hidden, 2)
                self.norm(model.hidden)
            if name == "down":
                self.elementwise("xnnpack.sigmoid", model.inner, 1)
                self.elementwise("xnnpack.multiply", model.inner, 2)
                self.elementwise("xnnpack.multiply", model.inner, 2)
            if name not in ("key", "value", "up"):  # these share the conversion of the layer before them
                self.convert(columns)
            self.linear(columns, rows, self.scheme.block_bits, tokens)
        self.elementwise("xnnpack.add", model.hidden, 2)


def _run(architecture: Architecture, scheme: QuantizationScheme, tokens: int, cached: int) -> tuple[Operator, ...]:
    step = _Step(architecture, scheme, tokens, cached)
    step.add("aten.embedding.default", "embedding", (tokens, architecture.hidden), 0)
    for _ in range(architecture.layers):
        step.block()
    step.norm(architecture.hidden)
    step.convert(architecture.hidden)
    step.linear(architecture.hidden, architecture.vocabulary, scheme.head_bits, 1)  # logits of the last row alone
    return tuple(step.operators)


def decode(architecture: Architecture, scheme: QuantizationScheme, cached: int = 0) -> tuple[Operator, ...]:
    """The operators of one token after `cached` others."""
    return _run(architecture, scheme, 1, cached)


def prefill(architecture: Architecture, scheme: QuantizationScheme, tokens: int) -> tuple[Operator, ...]:
    """The operators of a prompt of `tokens` tokens; the head is computed for the last alone."""
    return _run(architecture, scheme, tokens, 0)


def adapter_parameters(architecture: Architecture, rank: int) -> int:
    """LoRA of that rank on every linear layer of the blocks."""
    return architecture.layers * rank * sum(columns + rows for _, columns, rows in architecture.matrices)


def file_mib(architecture: Architecture, scheme: QuantizationScheme) -> float:
    """Size of the program: weights, scales, tables, norms and adapters."""
    copies = 2 if not architecture.tied else scheme.copies
    table_bits = scheme.file_head_bits + (scheme.file_table_bits if copies == 2 else 0)
    bits = architecture.block_parameters * scheme.file_block_bits + architecture.head_parameters * table_bits
    small = architecture.small_parameters + adapter_parameters(architecture, scheme.adapter_rank)
    return (bits / 8 + 4 * small) / MIB
