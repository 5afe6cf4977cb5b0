"""NAF: neighborhood attention filtering."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

from murf_fast import windows
from murf_fast.annotations import Integers, Size
from murf_fast.nn._checkpoint_files import open_checkpoint
from murf_fast.nn._checkpoints import few, load_into
from murf_fast.nn._parts import forms_of
from murf_fast.nn.guided._encoded import EncodedImage, ImageKeys, ImageStatistics
from murf_fast.nn.guided._encoders import GROUPS, Encoder, check_image, fused_backend, pooled, precise
from murf_fast.nn.guided._upsampler import GuidedUpsampler
from murf_fast.ops import _checks, resize
from murf_fast.ops._derivatives import derivatives_wanted
from murf_fast.ops._naf_encoder import naf_queries
from murf_fast.ops._naf_regions import naf_rectangle, naf_statistics

_FIRST = "image_encoder.encoder.0.weight"
_PERIODS = "image_encoder.rope.periods"


class NAF(GuidedUpsampler):
    """Features of any backbone at any resolution: neighborhood attention whose queries and keys see only the image.

    ``e = pool(cat[encoder(image), sem_encoder(image)], out)``, ``q = rope(e)``, ``k = pool(q, (h, w))``,
    ``out_n(p) = sum_j softmax_j(<q_n(p), k_n(j)> / sqrt(dim / heads)) features_n(j)`` over the ``kernel_size`` x
    ``kernel_size`` features around p, in NATTEN's window rule (:func:`murf_fast.windows.neighborhood`); head n has its
    share of the channels. The image is first resized to at most four times the output.

    In training, as in the original, the coordinates of the rotary embedding are scaled by a factor between
    ``1 / rope_rescale`` and ``rope_rescale``, log-uniform, from torch's generator of the parameters' device, drawn at
    the first call and whenever the output size is another than in the call before. In evaluation they never are (the
    original keeps the last factor for as long as the size stays that of training).

    Without gradients the encoders run as passes over the pixels that read and write activations once per group norm;
    where gradients are needed, in float64, under autocast, and if a submodule has hooks or was replaced, they are plain
    PyTorch.

    Args:
        dim: Channels of queries and keys, a multiple of 16 and of four times the heads.
        num_heads: Heads of the attention and of the rotary embedding.
        kernel_size: Rows and columns of a window, in features.
        blocks: Blocks of each of the two encoders.
        rope_rescale: The largest factor of the coordinates in training, from 1; None: they are not scaled.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Source: NAF (arXiv 2511.18452), github.com/valeoai/NAF.
    """

    def __init__(
        self,
        dim: int = 256,
        *,
        num_heads: int = 4,
        kernel_size: int = 9,
        blocks: int = 2,
        rope_rescale: float | None = 2.0,
    ) -> None:
        super().__init__()
        dim, num_heads = _checks.integer("NAF", "dim", dim, 1), _checks.integer("NAF", "num_heads", num_heads, 1)
        kernel_size = _checks.integer("NAF", "kernel_size", kernel_size, 1)
        blocks = _checks.integer("NAF", "blocks", blocks, 1)
        if dim % (2 * GROUPS) or dim % (4 * num_heads):
            raise ValueError(
                f"murf_fast.NAF: `dim` must be a multiple of {2 * GROUPS} and of four times the heads, "
                f"{4 * num_heads}, got {dim}"
            )
        if rope_rescale is not None:
            rope_rescale = _checks.number("NAF", "rope_rescale", rope_rescale)
            if rope_rescale < 1:
                raise ValueError(f"murf_fast.NAF: `rope_rescale` must be at least 1, got {rope_rescale!r}")
        self.dim, self.num_heads, self.kernel_size = dim, num_heads, kernel_size
        self.image_encoder = _ImageEncoder(dim, num_heads, blocks, rope_rescale)
        self._forms = forms_of(self)

    @classmethod
    def from_checkpoint(cls, checkpoint: str | PathLike[str] | Mapping[str, Any], *, kernel_size: int = 9) -> NAF:
        """A model with released weights, in eval mode.

        Entries ``state_dict``, ``model``, ``teacher`` are opened, and prefixes ``module.``, ``_orig_mod.``, ``model.``
        and ``teacher.`` taken off if all names have them.

        Args:
            checkpoint: A file of a state dict (``naf_release.pth``, ``.safetensors``), or a state dict; names are the
                original's.
            kernel_size: Not part of the checkpoint; 9 in the release.

        Raises:
            TypeError: ``checkpoint`` is neither a path nor a state dict.
            ValueError: Keys are missing or unexpected, or a shape is wrong (all of them are listed); or the file is
                missing, empty, damaged, no checkpoint, or a pickle of more than tensors and plain values, which is not
                loaded (``weights_only=True``).
        """
        opened = open_checkpoint("NAF", checkpoint)
        weights = opened.weights
        if _FIRST not in weights or _PERIODS not in weights or weights[_FIRST].ndim == 0:
            raise ValueError(
                f"murf_fast.NAF: {opened.origin} must hold {_FIRST} and {_PERIODS}; got the keys {few(weights)}"
            )
        dim, quarter = 2 * weights[_FIRST].shape[0], max(1, weights[_PERIODS].numel())
        blocks = sum(key.startswith("image_encoder.encoder.") and key.endswith(".conv1.weight") for key in weights)
        model = cls(dim, num_heads=max(1, dim // (4 * quarter)), kernel_size=kernel_size, blocks=max(1, blocks))
        load_into(model, opened)
        return model.eval()

    @overload
    def forward(
        self,
        image: Tensor | EncodedImage,
        features: Tensor,
        output_size: Size | None = None,
        *,
        values: Tensor | None = None,
        region: Integers | None = None,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        image: Tensor | EncodedImage,
        features: Sequence[Tensor],
        output_size: Size | None = None,
        *,
        values: Sequence[Tensor] | None = None,
        region: Integers | None = None,
    ) -> list[Tensor]: ...
    def forward(
        self,
        image: Tensor | EncodedImage,
        features: Tensor | Sequence[Tensor],
        output_size: Size | None = None,
        *,
        values: Tensor | Sequence[Tensor] | None = None,
        region: Integers | None = None,
    ) -> Tensor | list[Tensor]:
        """Upsamples ``features`` along the edges of ``image``.

        Args:
            image: (B, 3, H, W) of any size from 2 x 2, ImageNet-normalized, in the dtype of the parameters. Or what
                :meth:`encode_image` made of it.
            features: (B, C, h, w), C a multiple of the heads, any floating-point dtype; queries and keys are rounded
                to it. Or a list of such maps, of any grids and channels, which share the queries.
            output_size: (height, width) of the result, or one number for both; None: those of the image. Each has
                room for ``kernel_size`` windows: ``kernel_size * (height // h) <= height``, which holds if
                ``h >= kernel_size``.
            values: (B, K, h, w), K a multiple of the heads, to weigh in place of the features, of which then only the
                grid matters; a list beside a list. Queries and keys are rounded to their dtype.
            region: (top, left, height, width) of the output: the result is this rectangle of the whole one. None: all.

        Returns:
            (B, C, height, width) in dtype and layout of the features (or the values, with their channels); a list if
            ``features`` is one. Differentiable with respect to the image, the features, the values and every parameter.
            Autocast gives the encoders' convolutions its dtype, and changes nothing else.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.

        Memory: without gradients the result and its queries (a planar result: a copy of them, too), or, if that is
        more, one and a half maps of ``dim`` channels at the output's size, the queries among them (if the image has
        another size, up to two at the output's and one and a half at the image's, which is at most four times the
        output's), which are gone when the result is made; no upsampled keys or values, no scores. A region saves the
        attention of the rest: keys are averages of all queries, which :meth:`statistics` makes once for many
        regions. With hooks, replaced layers or autocast the encoders are called, which takes up to four maps; where
        gradients are needed, about sixteen maps of ``dim`` channels at the image's size are kept beside the result.
        """
        return self._upsample(image, features, output_size, values, region)

    if TYPE_CHECKING:
        __call__ = forward

    _values = "split"

    def _encode(self, image: Tensor, size: Any, region: Any, grids: Any, known: Any = None) -> EncodedImage:
        parts, backend = self.image_encoder, self._backend(image)
        if backend is not None:
            arguments = self._of_image(), parts.rope.turns(size), self.num_heads
            fitted = parts.fitted(image, size)
        if backend is not None and known is not None and known.norms is not None:
            q = naf_rectangle(fitted, known.norms, *arguments, region, backend)
            return EncodedImage("NAF", q, known.keys, size, region)
        named = grids or () if known is None else ()
        if backend is None:
            q = parts(image, size)
            maps = [pooled(q, grid) for grid in named]
        else:
            q, *maps = naf_queries(fitted, *arguments, named, backend)
        keys = known.keys if known is not None else ImageKeys((), q) if grids is None else ImageKeys(tuple(maps))
        return EncodedImage("NAF", q, keys, size, (0, 0, *size)).crop(region)

    def _statistics(self, image: Tensor, size: Any, grids: Any, recompute: Any) -> ImageStatistics:
        parts, backend, image_size = self.image_encoder, self._backend(image), (image.shape[2], image.shape[3])
        named = [size] if grids is None else grids
        if backend is None:
            q = parts(image, size)
            norms, maps = None, [pooled(q, grid) for grid in named]
        else:
            arguments = self._of_image(), parts.rope.turns(size), self.num_heads
            norms, *maps = naf_statistics(parts.fitted(image, size), *arguments, named, recompute, backend)
        return ImageStatistics("NAF", norms, ImageKeys.of(maps, grids), image_size, size)

    def _of_image(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters of both encoders."""
        return self.image_encoder.encoder.weights(), self.image_encoder.sem_encoder.weights()

    def _backend(self, image: Tensor) -> str | None:
        return fused_backend(self, self._forms, image, [w for e in self._of_image() for w in e])

    def _wants_gradients(self, image: Tensor) -> bool:
        return derivatives_wanted((image, *(w for e in self._of_image() for w in e)))

    def _keys(self, of_image: Tensor, features: Tensor) -> Tensor:
        return of_image

    def _rule(self, size: Any, grid: Any) -> windows.Windows:
        return windows.neighborhood(size, grid, self.kernel_size)

    def _query_channels(self) -> int:
        return self.dim

    def _check_image(self, image: Tensor, output_size: Any) -> tuple[int, int]:
        return check_image("NAF", image, output_size, self.image_encoder.rope.periods, reflects=True)

    def _check_features(self, features: Tensor, image: Tensor) -> None:
        super()._check_features(features, image)
        if features.shape[1] % self.num_heads:
            raise ValueError(
                f"murf_fast.NAF: `features` must have a multiple of {self.num_heads} channels, got {features.shape[1]}"
            )

    def _check_windows(self, size: Any, features: Tensor) -> None:
        for axis, out, n in zip(("height", "width"), size, features.shape[2:], strict=True):
            if self.kernel_size * max(1, out // n) > out:
                raise ValueError(
                    f"murf_fast.NAF: windows of {self.kernel_size} features do not fit: `features` of {axis} {n} and "
                    f"`output_size` of {out} leave steps of {max(1, out // n)} between the keys"
                )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}"


class _ImageEncoder(nn.Module):
    def __init__(self, dim: int, heads: int, blocks: int, rescale: float | None) -> None:
        super().__init__()
        options: dict[str, Any] = {"blocks": blocks, "bias": True, "residual": False}
        self.encoder = Encoder(3, dim // 2, kernel_size=1, block=1, **options)
        self.sem_encoder = Encoder(3, dim // 2, kernel_size=3, block=3, **options)
        self.rope = _AxialRotation(dim, heads, rescale)

    def forward(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        image = self.fitted(image, size).contiguous(memory_format=torch.channels_last)
        return self.rope(torch.cat([self.encoder(image, size), self.sem_encoder(image, size)], 1))

    if TYPE_CHECKING:
        __call__ = forward

    @staticmethod
    def fitted(image: Tensor, size: tuple[int, int]) -> Tensor:
        """The image, no larger than encoders take it."""
        height, width = image.shape[2:]
        if height > 4 * size[0] or width > 4 * size[1]:
            # Both sides are held below four times the smaller side of the output: so does the original.
            most = 4 * min(size)
            image = resize(image, (min(height, most), min(width, most)))
        return image


class _AxialRotation(nn.Module):
    """DINOv3's rotary embedding: a quarter of a head's channel pairs turns with the row, a quarter with the column.

    Channel i of a head of D turns with i + D / 2; of these pairs the first half by rows, the second by columns, by
    ``2 pi position / period``, positions within -1..1.
    """

    periods: Tensor

    def __init__(self, dim: int, heads: int, rescale: float | None, base: float = 100.0) -> None:
        super().__init__()
        self.heads, self.rescale = heads, rescale
        pairs = dim // heads // 4
        self.register_buffer("periods", base ** (torch.arange(pairs, dtype=torch.float32) / pairs))
        self._drawn: tuple[tuple[int, ...], Tensor] | None = None  # the size in training, and its factor

    def turns(self, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Angles of the rows (height, pairs / 2) and of the columns (width, pairs / 2), float32 at least."""
        periods = self.periods.to(precise(self.periods))
        factor = self._factor(tuple(size)) if self.training and self.rescale is not None else 1.0
        rows, columns = (
            2 * math.pi * (factor * (torch.arange(0.5, n, device=periods.device, dtype=periods.dtype) / n * 2 - 1))
            for n in size
        )
        return rows[:, None] / periods, columns[:, None] / periods

    def _factor(self, size: tuple[int, ...]) -> Tensor:
        if self._drawn is None or self._drawn[0] != size:
            most = math.log(cast("float", self.rescale))
            drawn = torch.empty(1, dtype=torch.float32, device=self.periods.device).uniform_(-most, most).exp()
            self._drawn = size, drawn
        return self._drawn[1]

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.turns(x.shape[2:])
        shape = (*x.shape[2:], rows.shape[1])
        angle = torch.stack([rows[:, None].expand(shape), columns.expand(shape)], 2)[:, :, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        pairs = x.permute(0, 2, 3, 1).unflatten(3, (self.heads, 2, 2, -1))
        a, b = pairs.unbind(4)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], 4)
        return turned.flatten(3).permute(0, 3, 1, 2)

    if TYPE_CHECKING:
        __call__ = forward
