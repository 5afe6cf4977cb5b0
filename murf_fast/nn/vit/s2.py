"""S2 (scaling on scales): one model at several scales, in tiles of its own size, pooled and concatenated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from murf_fast.annotations import Sizes
from murf_fast.nn._options import LayerOptions
from murf_fast.nn.vit import _images, _resolutions
from murf_fast.nn.vit.families import is_supported
from murf_fast.nn.vit.multi_resolution_encoder import MultiResolutionEncoder
from murf_fast.ops import _checks
from murf_fast.ops.resize import resize
from murf_fast.ops.upsample_concat import upsample_concat
from murf_fast.scales import Ratio, scaled_pixels

if TYPE_CHECKING:
    from typing_extensions import Unpack


class S2(nn.Module):
    """``cat_s pool(merge(f(tiles(resize(image, s)))))``: channels of every scale on one grid.

    Every scale is resized (bicubic, not antialiased), cut into the fewest equal tiles of at most ``max_split_size``
    pixels a side, encoded, put together and area-pooled to the grid of one scale. Prefix tokens (CLS, registers) are
    averaged over the tiles of an image.

    Args:
        model: A model that :class:`MultiResolutionEncoder` takes: all scales then are one packed pass. Or any callable
            from tiles (n, 3, p, q) to tokens (n, ``num_prefix_tokens`` + h * w, D): tiles of one size are one batch.
        scales: Factors of the (square or not) images' size, as they are written: 1.15 times 420 is 483.
        img_sizes: The sizes themselves, (height, width) or one integer for a square, instead of ``scales``.
        max_split_size: Longest side of a tile in pixels; None for the longer side of the images.
        resize_output_to_idx: The scale whose grid is that of the result.
        num_prefix_tokens: For callables: tokens before the patches.
        options: For supported models: other options of the encoder (layers, norm, mean, std, attention); one layer.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Source: scaling_on_scales' ``multiscale_forward``, whose names the arguments have.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[Tensor], Tensor],
        scales: Sequence[float] | None = None,
        *,
        img_sizes: Sizes | None = None,
        max_split_size: int | None = None,
        resize_output_to_idx: int = 0,
        num_prefix_tokens: int = 0,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__()
        if (scales is None) == (img_sizes is None):
            raise ValueError("murf_fast.S2: give either `scales` or `img_sizes`")
        self._ratios: list[Ratio] = [] if scales is None else _resolutions.checked_scales("S2", scales)
        self.scales: list[float] | None = None if scales is None else [n / d for n, d in self._ratios]
        self.img_sizes = None if img_sizes is None else _resolutions.checked_sizes("S2", "img_sizes", img_sizes)
        count = len(self.scales or self.img_sizes or ())
        resize_output_to_idx = _checks.integer("S2", "resize_output_to_idx", resize_output_to_idx, 0, count - 1)
        if max_split_size is not None:
            max_split_size = _checks.integer("S2", "max_split_size", max_split_size, 1)
        num_prefix_tokens = _checks.integer("S2", "num_prefix_tokens", num_prefix_tokens, 0)
        self.is_packed = isinstance(model, nn.Module) and is_supported(model)
        if self.is_packed and num_prefix_tokens:
            raise ValueError("murf_fast.S2: `num_prefix_tokens` is known for this model; leave it out")
        if not self.is_packed and options:
            raise ValueError(f"murf_fast.S2: {', '.join(options)} are for supported models, `model` is a callable")
        if len(options.get("layers") or [0]) != 1:
            raise ValueError(f"murf_fast.S2: `layers` must be one layer, got {options['layers']!r}")
        if not callable(model):
            raise TypeError(f"murf_fast.S2: `model` must be a module or a callable, got {type(model).__name__}")
        self.max_split_size, self.resize_output_to_idx = max_split_size, resize_output_to_idx
        self.num_prefix_tokens = num_prefix_tokens
        if self.is_packed:
            # Any one size: every call has its own.
            self.encoder = MultiResolutionEncoder(cast("nn.Module", model), scales=[1.0], mode="bicubic", **options)
        else:
            self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Prefix tokens and patches of all scales, concatenated over channels.

        Args:
            images: (B, 3, H, W) or (B, H, W, 3); uint8 or floating point, for callables floating point.

        Returns:
            (B, P + N, sum D): the prefix tokens, then the patches of the pooled map in raster order.

        Raises:
            TypeError, ValueError: ``images`` are wrong, a scale leaves no pixel of them or cannot be cut into equal
                tiles; or a callable gives tokens that are no grid of a tile's shape.

        Memory: for supported models what :class:`MultiResolutionEncoder` takes, for callables the resized images, their
        tiles, and what the model takes; then the maps and the result.
        """
        maps, prefixes = self._encode(images)
        fused = self._fused(maps).permute(0, 2, 3, 1).flatten(1, 2)
        return fused if prefixes is None else torch.cat([torch.cat(prefixes, dim=-1), fused], dim=1)

    if TYPE_CHECKING:
        __call__ = forward

    def maps(self, images: Tensor) -> Tensor:
        """(B, sum D, h, w), channels_last by strides: the patches alone. All else is as for :meth:`forward`."""
        return self._fused(self._encode(images)[0])

    def _fused(self, maps: list[Tensor]) -> Tensor:
        grid = tuple(maps[self.resize_output_to_idx].shape[2:])
        return upsample_concat(maps, grid, mode="area", memory_format=torch.channels_last)

    def _encode(self, images: Tensor) -> tuple[list[Tensor], list[Tensor] | None]:
        height, width = _images.size_of("S2", images)
        sizes = self.img_sizes or [(scaled_pixels(r, height), scaled_pixels(r, width)) for r in self._ratios]
        if min(map(min, sizes)) < 1:
            raise ValueError(
                f"murf_fast.S2: `scales` must leave a pixel of images of {height} x {width}, got {self.scales}"
            )
        longest = self.max_split_size or max(height, width)
        splits = [math.ceil(max(size) / longest) for size in sizes]
        for size, split in zip(sizes, splits, strict=True):
            if any(n % split for n in size):
                raise ValueError(
                    f"murf_fast.S2: size {size} cannot be cut into {split} x {split} equal tiles of at most {longest} "
                    "pixels"
                )
        return (self._packed if self.is_packed else self._called)(images, sizes, splits)

    def _packed(self, images: Any, sizes: Any, splits: Any) -> tuple[list[Tensor], list[Tensor] | None]:
        features = self.encoder.at(sizes, splits)(images)
        packed = features.tokens[0]
        prefixes = [packed.prefix_tokens(s) for s in range(len(packed))] if packed.prefix else None
        return features.maps, prefixes

    def _called(self, images: Any, sizes: Any, splits: Any) -> tuple[list[Tensor], list[Tensor] | None]:
        if not images.is_floating_point():
            raise TypeError(f"murf_fast.S2: `images` must be floating point for a callable, got {images.dtype}")
        images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
        resized = [resize(images, size, mode="bicubic", memory_format=torch.contiguous_format) for size in sizes]
        tiles = [_split(x, t) for x, t in zip(resized, splits, strict=True)]
        outputs: list[Any] = [None] * len(tiles)
        for shape in dict.fromkeys(x.shape[2:] for x in tiles):
            group = [i for i, x in enumerate(tiles) if x.shape[2:] == shape]
            tokens = self.model(torch.cat([tiles[i] for i in group]))
            for i, part in zip(group, tokens.split([len(tiles[i]) for i in group]), strict=True):
                outputs[i] = part
        p, batch = self.num_prefix_tokens, len(images)
        maps = [_merge(x[:, p:], t, batch, tile.shape[2:]) for x, t, tile in zip(outputs, splits, tiles, strict=True)]
        prefixes = [x[:, :p].unflatten(0, (-1, batch)).mean(0) for x in outputs] if p else None
        return maps, prefixes


def _split(images: Tensor, t: int) -> Tensor:
    """(B, 3, t h, t w) -> (t t B, 3, h, w), tile-major and batch-minor."""
    batch, channels, height, width = images.shape
    tiles = images.view(batch, channels, t, height // t, t, width // t).permute(2, 4, 0, 1, 3, 5)
    return tiles.reshape(t * t * batch, channels, height // t, width // t)


def _merge(tokens: Tensor, t: int, batch: int, tile: Sequence[int]) -> Tensor:
    """(t t B, N, D) -> (B, D, t h, t w), the grid of a tile having its aspect ratio."""
    rows = math.isqrt(tokens.shape[1] * tile[0] // tile[1])
    if rows == 0 or tokens.shape[1] % rows or rows * tile[1] != tokens.shape[1] // rows * tile[0]:
        raise ValueError(
            f"murf_fast.S2: `model` made {tokens.shape[1]} patch tokens of a tile of {tuple(tile)} pixels, which is no "
            "grid of its shape; is `num_prefix_tokens` right?"
        )
    columns = tokens.shape[1] // rows
    merged = tokens.reshape(t, t, batch, rows, columns, -1).permute(2, 0, 3, 1, 4, 5)
    return merged.reshape(batch, t * rows, t * columns, -1).permute(0, 3, 1, 2)
