"""Where parameters are headed: under SSP a step may be computed from there, and not from where they were some versions ago.

SpecTrain (Chen et al. 2018) predicts weights by the optimizer's smoothed update. Here it is the last update that was made,
whatever optimizer made it: with momentum it is smooth, and two versions say what it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def look_ahead(parameters: Mapping[str, Tensor], before: Mapping[str, Tensor], num_versions: int) -> None:
    """Moves each of `parameters`, in place, on by its difference to the version `before`, `num_versions` times; uses `before` up.

    One rounding an operation and tensor, so that a stage and the whole model come to the same bits.
    """
    for name, parameter in parameters.items():
        way = torch.sub(parameter, before[name], out=before[name])
        parameter.add_(way.mul_(float(num_versions)))
