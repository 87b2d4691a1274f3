"""What to change where a backend does not take an operator: one sentence for each operator that was met."""

from __future__ import annotations

_REMEDIES: dict[str, str] = {
    "native_layer_norm": "none needed: one fast portable kernel; nn.RMSNorm is taken whole",
    "embedding": "none needed: a look-up of rows has no arithmetic",
    "native_group_norm": "fix the input's size, so that it can be written as means",
    "_native_batch_norm_legit_no_training": "put it behind a convolution or linear layer that nothing else reads",
    "mean": "fix the input's size; export writes a mean of fixed size otherwise",
    "grouped_mm_fallback": 'choose static experts: model.set_experts_implementation("batched_mm")',
    "_grouped_mm": 'choose static experts: model.set_experts_implementation("batched_mm")',
    "nonzero": "keep all places and multiply by a mask of zeros and ones",
    "masked_select": "keep all places and multiply by a mask of zeros and ones",
    "unique": "compute it before the program and pass it in",
    "index": "keep all places: torch.where with a mask, or an index of fixed shape",
    "index_put": "write the whole tensor with torch.where instead of a part of it in place",
    "gather": "small tables: a product with a one-hot matrix; else none needed",
    "sort": "sort outside of the program, or use topk with a fixed k",
    "where": "in floating point, multiply by the mask; one at the input of the model costs little",
    "bitwise_and": "combine masks before the program, or pass one float mask",
    "convolution": "1- and 2-dimensional convolutions with constant weights are taken",
    "conv3d": "write it as 2-dimensional convolutions, or leave it to the portable kernel",
    "stft": "compute the spectrogram outside of the program",
    "_fft_r2c": "compute the spectrum outside of the program, or as a product with a DFT matrix",
    "_fft_c2c": "compute the spectrum outside of the program, or as a product with a DFT matrix",
    "lstm": "none on this backend: its linears are delegated, the gates run step by step",
    "_to_dim_order_copy": "convert once at the input instead of in the layer",
    "rand": "draw the noise outside of the program and pass it in",
    "randn": "draw the noise outside of the program and pass it in",
    "multinomial": "return the logits and draw outside of the program",
    "grid_sampler_2d": "resize with F.interpolate, which is taken where the grid is regular",
    "upsample_bicubic2d": "resize bilinearly, or outside of the program",
    "erf": "F.gelu is taken as a whole; erf alone is not",
}


def remedy(operator: str) -> str:
    """What helps with `aten.index.Tensor` or `aten::index`; empty where nothing is known to."""
    parts = operator.replace("::", ".").split(".")
    return _REMEDIES.get(parts[1] if len(parts) > 1 else parts[0], "")
