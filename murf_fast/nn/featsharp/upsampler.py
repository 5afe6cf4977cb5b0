"""FeatSharp's upsampler: a coarse map and the maps of tiles, refined into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from murf_fast import _arguments
from murf_fast.annotations import SharpInput, Size
from murf_fast.nn._checkpoints import load_into
from murf_fast.nn.featsharp import _checkpoint
from murf_fast.nn.featsharp.block import FeatSharpBlock
from murf_fast.nn.featsharp.tiles import levels_of
from murf_fast.nn.guided.featsharp_jbu import FeatSharpJBU
from murf_fast.ops import _checks
from murf_fast.ops.resize import resize
from murf_fast.ops.upsample_concat import upsample_concat

INPUTS = ("bilinear", "jbu", "tiles")


class FeatSharpUpsampler(nn.Module):
    """``block(cat(inputs))``: views of one scene at the finer grid, concatenated and refined by local attention.

    The inputs are the coarse map upsampled bilinearly (``"bilinear"``) or along the image's edges (``"jbu"``,
    :class:`FeatSharpJBU`), and the map of tiles with a learned position for each tile (``"tiles"``). The first of them
    is the residual, which the block corrects.

    Args:
        channels: C.
        factor: Output cells per cell of the coarse map, at least 1; or the factors of (height, width).
        inputs: One to three of the names, the residual first (Table 8). The paper's model has jbu and tiles.
        progressive: One level for every prime factor, each of which refines the result of the last one.
        num_heads, window, norm: As for :class:`FeatSharpBlock`.
        guides: Channels of the images.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Source: FeatSharp, section 3.3, Figures 2 and 3, Table 8.
    """

    def __init__(
        self,
        channels: int,
        factor: Size,
        inputs: Sequence[SharpInput] = ("jbu", "tiles"),
        *,
        progressive: bool = False,
        num_heads: int = 16,
        window: int = 7,
        norm: bool = True,
        guides: int = 3,
    ) -> None:
        super().__init__()
        what = "FeatSharpUpsampler"
        self.channels = channels = _checks.integer(what, "channels", channels, 1)
        self.factor = _arguments.pair(what, "factor", factor)
        self.inputs = checked_inputs(what, inputs)
        self.progressive = progressive
        grids = levels_of(what, self.factor, progressive)
        steps = list(zip(grids, grids[1:] or grids, strict=False))
        options = {"num_heads": num_heads, "window": window, "norm": norm, "guides": guides}
        self.ups = nn.ModuleList(Level(channels, before, after, self.inputs, **options) for before, after in steps)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | PathLike[str] | Mapping[str, Any],
        inputs: Sequence[SharpInput] = ("jbu", "tiles"),
        *,
        factor: Size | None = None,
        num_heads: int = 16,
        window: int = 7,
    ) -> FeatSharpUpsampler:
        """An upsampler with trained weights, in eval mode; channels, levels, norms and factor follow from them.

        Args:
            checkpoint: A file or a state dict, as for :meth:`FeatSharp.from_checkpoint`; or of an upsampler alone.
            inputs: Those it was trained with, in their order, which the weights do not tell.
            factor: Where there are no tiles, which tell it.
            num_heads, window: As for the class.

        Raises:
            TypeError, ValueError: As :meth:`FeatSharp.from_checkpoint`.
        """
        inputs = checked_inputs("FeatSharpUpsampler", inputs)
        parts = _checkpoint.read("FeatSharpUpsampler", checkpoint, inputs, factor)
        model = cls(**parts.arguments, inputs=inputs, num_heads=num_heads, window=window)
        load_into(model, parts.upsampler)
        return model.eval()

    def forward(self, low: Tensor, images: Tensor | None, tiles: Tensor | Sequence[Tensor] | None) -> Tensor:
        """The refined map, of features at hand.

        Args:
            low: (B, C, h, w), the map of the whole image, in the dtype of the parameters.
            images: (B, guides, H, W), normalized, of any size; for ``"jbu"``, else None or unused. In the dtype of
                ``low``, or float32 beside a half type.
            tiles: (B, C, factor * h, factor * w), the maps of the tiles put together, as :func:`merge_tiles` does;
                where there are more levels a list, coarsest first. For ``"tiles"``, else None or unused.

        Returns:
            (B, C, factor * h, factor * w), channels_last by strides; differentiable.

        Raises:
            TypeError, ValueError: An argument is missing or wrong; the message names it.

        Memory: the concatenated inputs of the finest level, what :class:`FeatSharpJBU` makes of the coarse map, and as
        :class:`FeatSharpBlock`.
        """
        what = "FeatSharpUpsampler"
        _checks.map_(what, "low", low)
        if low.shape[1] != self.channels:
            raise ValueError(f"murf_fast.{what}: `low` must have {self.channels} channels, got {tuple(low.shape)}")
        if not torch.is_autocast_enabled(low.device.type):
            _checks.same_device_and_dtype(
                what, "low", low, "its parameters", cast("Level", self.ups[0]).block.ls2.gamma
            )
        if "tiles" not in self.inputs:
            mosaics: Any = [None] * len(self.ups)
        else:
            mosaics = [tiles] if isinstance(tiles, Tensor) else tiles
            if not _checks.is_sequence(mosaics) or len(mosaics) != len(self.ups):
                count = len(mosaics) if _checks.is_sequence(mosaics) else type(tiles).__name__
                raise ValueError(
                    f"murf_fast.{what}: `tiles` must be one map for each of {len(self.ups)} levels, got {count}"
                )
        for i, (level, mosaic) in enumerate(zip(self.ups, mosaics, strict=True)):
            if mosaic is not None:
                self._check_tiles(i, level, low, mosaic)
        if "jbu" in self.inputs:
            _checks.map_(what, "images", images)
        for level, mosaic in zip(self.ups, mosaics, strict=True):
            low = level(low, images, mosaic)
        return low

    if TYPE_CHECKING:
        __call__ = forward

    def _check_tiles(self, i: int, level: Any, low: Tensor, mosaic: Any) -> None:
        what, name = "FeatSharpUpsampler", "tiles" if len(self.ups) == 1 else f"tiles[{i}]"
        _checks.map_(what, name, mosaic)
        _checks.same_device_and_dtype(what, name, mosaic, "low", low)
        expected = (*low.shape[:2], *(n * t for n, t in zip(low.shape[2:], level.grid, strict=True)))
        if tuple(mosaic.shape) != expected:
            raise ValueError(
                f"murf_fast.{what}: `{name}` must be (B, C, rows, columns) of {level.grid} times the size of `low`, "
                f"{expected}, got {tuple(mosaic.shape)}"
            )

    def extra_repr(self) -> str:
        return f"factor={self.factor}, inputs={self.inputs}, progressive={self.progressive}"


class Level(nn.Module):
    """One block and what it is fed. ``grid``: tiles (rows, columns) of its output; ``before``: of its input."""

    def __init__(
        self,
        channels: int,
        before: tuple[int, int],
        grid: tuple[int, int],
        inputs: Sequence[SharpInput],
        *,
        guides: int,
        **options: Any,
    ) -> None:
        super().__init__()
        self.inputs, self.grid = inputs, grid
        self.step = grid[0] // before[0], grid[1] // before[1]
        self.tile_pos: nn.Parameter | Any = nn.Parameter(torch.zeros(1, channels, *grid)) if "tiles" in inputs else None
        self.jbu = FeatSharpJBU(self.step, guides=guides) if "jbu" in inputs else None
        self.block = FeatSharpBlock(len(inputs) * channels, channels, **options)

    def forward(self, low: Tensor, images: Tensor | None, tiles: Tensor | None) -> Tensor:
        return self.block(self._together(low, images, tiles))

    if TYPE_CHECKING:
        __call__ = forward

    def _together(self, low: Tensor, images: Tensor | None, tiles: Tensor | None) -> Tensor:
        """The inputs at the finer grid, one behind the other; what they are made of is not kept."""
        size = tuple(n * s for n, s in zip(low.shape[2:], self.step, strict=True))
        maps: dict[str, Any] = {"bilinear": low, "tiles": tiles}
        if self.jbu is not None:
            maps["jbu"] = self.jbu(low, resize(cast("Tensor", images), size))
        # Bilinear interpolation leaves a map of the size as it is: one write for all of them.
        together = upsample_concat([maps[name] for name in self.inputs], size, memory_format=torch.channels_last)
        if self.tile_pos is not None:
            self._add_positions(together)
        return together

    def _add_positions(self, together: Tensor) -> None:
        """To the channels of the tiles, tile by tile."""
        channels, (rows, columns) = self.tile_pos.shape[1], self.grid
        first = self.inputs.index("tiles") * channels
        cells = together[:, first : first + channels].unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
        cells.add_(self.tile_pos[:, :, :, None, :, None].to(cells.dtype))


def checked_inputs(what: str, inputs: Any) -> tuple[SharpInput, ...]:
    """Some of :data:`INPUTS`, each at most once."""
    is_listed = _checks.is_sequence(inputs) and all(isinstance(name, str) for name in inputs)
    if not is_listed or len(inputs) == 0 or len(set(inputs)) != len(inputs):
        raise ValueError(f"murf_fast.{what}: `inputs` must be one to three different ones of {INPUTS}, got {inputs!r}")
    return tuple(_checks.choice(what, "inputs", name, INPUTS) for name in inputs)
