"""The model of ``murf-fast extract``, made anew in every process that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from murf_fast.cli.anomaly.weights import Weights, load
from murf_fast.nn import DepthHead, MuRF, SegmentationHead
from murf_fast.nn._checkpoint_files import open_checkpoint
from murf_fast.nn.vit.families import resolved


@dataclass(frozen=True)
class Recipe:
    """What :class:`MuRF` is made of.

    Attributes:
        weights: A model as of ``--weights``.
        sizes: Resolutions in pixels.
        layers: Blocks; None: the last.
        norm: Whether the final norm is applied; None: as the model's own last tokens have it.
        head: A file with the weights of a head.
        head_kind: ``"segmentation"`` or ``"depth"``.
        depth_range: Nearest and farthest depth in metres, for heads that do not say it.
        dtype: In which the model runs.
    """

    weights: str | None
    sizes: tuple[tuple[int, int], ...]
    layers: tuple[int, ...] | None = None
    norm: bool | None = None
    head: Path | None = None
    head_kind: str = "segmentation"
    depth_range: tuple[float, float] | None = None
    dtype: torch.dtype = torch.float32

    def __call__(self, device: torch.device) -> MuRF:
        """Raises a ValueError where something does not load or fit; the message names it."""
        head = None if self.head is None else self._head()
        vit = load(self.weights)
        self._check_sizes(vit)
        options: dict[str, Any] = {"layers": self.layers and list(self.layers), "norm": self.norm, **vit.normalization}
        murf = MuRF(vit.model.to(device, self.dtype), list(self.sizes), head, **options)
        return murf.to(device, self.dtype).eval()

    def _check_sizes(self, vit: Weights) -> None:
        inner, family = resolved(vit.model)
        patch = family(inner).patch_size
        for size in self.sizes:
            if any(n % patch for n in size):
                near = [(below, below + patch) for below in (n // patch * patch for n in size)]
                some = " or ".join("x".join(map(str, sides)) for sides in zip(*near, strict=True) if all(sides))
                raise ValueError(
                    f"--sizes must be multiples of {patch} pixels, a patch of these weights, got "
                    f"{'x'.join(map(str, size))}; {some} would do"
                )

    def _head(self) -> SegmentationHead | DepthHead:
        weights: Mapping[str, Tensor] = open_checkpoint("extract", cast("Path", self.head)).weights
        if self.head_kind == "segmentation":
            return SegmentationHead.from_state_dict(weights)
        given: dict[str, Any] = {} if self.depth_range is None else {"depth_range": self.depth_range}
        return DepthHead.from_state_dict(weights, **given)
