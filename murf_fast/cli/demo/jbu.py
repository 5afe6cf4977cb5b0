"""FeatUp's upsampler in the demo: its levels as trained for CLIP, which see the image only and fit any features."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.nn import JBULevel, JBUStack
from murf_fast.nn.guided.jbu_level import Drawn

WEIGHTS = "featup_clip_jbu_levels.npz"


def bundled() -> JBUStack:
    with as_file(files("murf_fast") / "assets" / WEIGHTS) as path, np.load(path) as arrays:
        weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return JBUStack.from_checkpoint(weights).requires_grad_(False)


def smallest(maps: Sequence[Tensor]) -> int | None:
    """Index of the first map that is large enough for the kernels' borders."""
    return next((i for i, m in enumerate(maps) if min(m.shape[2:]) >= 2), None)


def guidance(image: Tensor, feature: Tensor, scale: int) -> Tensor:
    """The image averaged to ``scale`` times the map's grid, as the stack does it."""
    height, width = feature.shape[2:]
    return F.adaptive_avg_pool2d(image, (scale * height, scale * width))


def params(level: JBULevel) -> list[Tensor]:
    """As the reference takes them."""
    return [p for p in Drawn.of(level, torch.empty(1, 3, 0, 0)).params if p is not None]
