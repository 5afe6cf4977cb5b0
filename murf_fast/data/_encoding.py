"""From pixels to the arrays that are stored of an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from murf_fast.data.layout import DTYPES, Array
from murf_fast.data.settings import FUSIONS, Options
from murf_fast.nn.heads.depth_head import DepthHead
from murf_fast.nn.vit.murf import MuRF


class Encoding:
    """A model and what is wanted of it: images to arrays of fixed shapes, as the encoder's sizes are fixed.

    Args:
        murf: With sizes, not scales.
        options: What is wanted.

    Raises:
        ValueError: The encoder has scales, or an option is none of its choices.
    """

    def __init__(self, murf: MuRF, options: Options) -> None:
        if murf.encoder.sizes is None:
            raise ValueError("features of one shape need `sizes`; with scales every image has grids of its own")
        if options.fuse not in FUSIONS:
            raise ValueError(f"--fuse must be one of {', '.join(FUSIONS)}, got {options.fuse!r}")
        if options.dtype is not None and (options.dtype not in DTYPES or not DTYPES[options.dtype].is_floating_point):
            known = ", ".join(n for n, d in DTYPES.items() if d.is_floating_point)
            raise ValueError(f"--dtype must be one of {known}, got {options.dtype!r}")
        self._murf, self._options = murf, options
        self._device = murf.encoder.family.like.device

    def arrays(self) -> tuple[Array, ...]:
        """Names, shapes and dtypes, by an image of one colour; with the errors of the model and of its head."""
        (found,) = self([np.full((64, 64, 3), 128, np.uint8)])
        return tuple(Array(name, tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in found.items())

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> list[dict[str, Tensor]]:
        """The arrays of every image (H, W, 3), uint8, by name; on the CPU, not checked for their range.

        The images may be of any sizes. What comes for one may depend, in its last bits, on those that share its pass.
        """
        pixels = [torch.from_numpy(image).permute(2, 0, 1).to(self._device) for image in images]
        return [{name: self._stored(x) for name, x in one.items()} for one in self._results(pixels)]

    def _results(self, pixels: list[Tensor]) -> list[dict[str, Tensor]]:
        murf, grid = self._murf, self._options.grid
        if murf.head is not None:
            is_depth = isinstance(murf.head, DepthHead)
            size = grid or tuple(max(axis) for axis in zip(*murf.encoder.sizes or (), strict=True))
            results = (murf.depth if is_depth else murf.segment)(pixels, size)
            return [{"depth" if is_depth else "labels": x} for x in results]
        if self._options.fuse == "concat":
            return [{"features": x} for x in murf.features(pixels, grid)]
        if grid is not None:
            raise ValueError("--grid is for --fuse concat and for heads: with --fuse none every map keeps its own")
        encoder = murf.encoder
        names = [f"{h}x{w}_layer{i}" for h, w in encoder.sizes or () for i in encoder.layers]
        if len(set(names)) != len(names):
            raise ValueError("--fuse none needs sizes and layers that differ, as arrays are named by them")
        found = []
        for features in murf.encode(pixels):
            one = {f"map_{name}": x[0] for name, x in zip(names, features.maps, strict=True)}
            one |= {f"cls_{name}": x[0] for name, x in zip(names, features.cls, strict=True) if x is not None}
            found.append(one)
        return found

    def _stored(self, x: Tensor) -> Tensor:
        dtype = self._options.dtype
        x = x.to(DTYPES[dtype]) if dtype is not None and x.is_floating_point() else x
        return x.cpu().contiguous()


def problem(arrays: dict[str, Tensor]) -> str | None:
    """Why these cannot be stored: numbers beyond the range of their dtype, or none at all."""
    for name, x in arrays.items():
        if x.is_floating_point() and not bool(x.isfinite().all()):
            return f"its {name} are not finite in {str(x.dtype).removeprefix('torch.')}"
    return None
