"""AWQ: scale the inputs of linears before they are rounded, and round with a thought to the sizes of the inputs.

Lin et al., 2023, arXiv:2306.00978. Scales that can move into the layer before do; no other is scaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from edgetune.capture.recorded import record
from edgetune.core.inputs import Inputs
from edgetune.quant.calibration import measure_inputs
from edgetune.quant.channels import check_outputs, find_groups
from edgetune.quant.rounding import Grid
from edgetune.quant.scales import fold_scales, search_scales


def scale_inputs(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    grids: Mapping[str, Grid],
    inputs: Inputs,
    batches: Sequence[Inputs],
) -> dict[str, Tensor]:
    """Move the scales that the search chooses into the layers before `linears`; the outputs of the model stay.

    Returns for each of the linears that a batch reaches the mean squares of its scaled inputs, `(in,)`.
    """
    groups = [group for group in find_groups(model, record(model, inputs)) if group.readers.keys() <= linears.keys()]
    sizes = measure_inputs(model, linears, batches)
    groups = [group for group in groups if group.readers.keys() <= sizes.keys()]
    scales = [search_scales(model, group, sizes, grids) for group in groups]
    importance = {name: size.mean_square for name, size in sizes.items()}
    with check_outputs(model, inputs, [name for group in groups for name in group.layers]):
        for group, factors in zip(groups, scales, strict=True):
            fold_scales(model, group, factors)
            for name, channels in group.readers.items():
                importance[name] = importance[name] / factors[channels].to(importance[name].device).square()
    return importance
