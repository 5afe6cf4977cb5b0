"""AnyUp: feature maps of any backbone at any resolution."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from murf_fast import _arguments
from murf_fast.annotations import Integers, Size, Values
from murf_fast.nn import _checkpoints, _parts
from murf_fast.nn._options import AnyUpOptions
from murf_fast.nn.guided import _anyup_checkpoint
from murf_fast.nn.guided._anyup_forward import WINDOWS, encode, keys_of, statistics_of, wants_gradients, window_rule
from murf_fast.nn.guided._encoded import EncodedImage, ImageStatistics
from murf_fast.nn.guided._image_range import check_image_range, imagenet_normalized
from murf_fast.nn.guided._upsampler import GuidedUpsampler
from murf_fast.ops import _checks
from murf_fast.ops.window_attention import VALUES
from murf_fast.windows import Windows

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AnyUp(GuidedUpsampler):
    """Feature maps of any backbone, with any number of channels, at the resolution of an image, along its edges.

    Every output pixel is a weighted mean of the features around it: ``out = mean_n P_n V`` with raw features ``V`` and
    attention ``P_n`` of four heads from queries of the image to keys of image and features, within a window.

    Args:
        qk_dim: Channels of queries and keys, a multiple of 8 and of twice the heads.
        num_heads: Heads of the attention.
        window_ratio: Half the window's side, as a share of the map's; zero or less: every query sees the whole map.
        windows: ``"dense"``, the windows that the model was trained with and the paper's numbers are of; or
            ``"natten"``, those of the original's ``use_natten=True``, which change the results a lot.
        input_dim: Channels of the image.
        kernel_size: Of the image encoder's first convolution. Only 1, as released, has the fast path.
        kernel_size_lfu: Of the basis that unifies the features.
        lfu_dim: Filters of that basis (M in the paper's Table 9), a multiple of 8; other than ``qk_dim``, the first
            residual block behind them has a 1x1 convolution beside it. 0: keys of the image alone, without features
            (Table 8), for which the original has no code; its ``aggregation`` then takes the image's keys. None:
            ``qk_dim``.
        values: ``"mean"``: every head weighs all channels, and the heads are averaged, as released. ``"split"``: each
            head has its share of the channels, whose number must be a multiple of the heads, as in Falcon Perception;
            weights are trained for one of them.
        image_range: (low, high) of images that are not normalized; the model then does it, with ImageNet's mean and
            deviation, as Falcon Perception's does with (-1, 1). None: images are normalized.

    The output projection has no influence and is kept because state dicts have it; it is frozen, as a parameter that
    never gets a gradient stops ``DistributedDataParallel``. (So do the values' rows of ``in_proj``, whose gradient is
    zero.)

    Without gradients the image's encoders run as passes over the pixels that read and write activations once per group
    norm. Where gradients are needed they keep the argument of each residual block and compute the rest again, band by
    band; in float64 without gradients, under a compiler, and for derivatives in other ways than by a first backward (a
    gradient's own gradient, tangents, ``torch.func``) they are plain PyTorch.

    In bfloat16 (``model.bfloat16()``) its result on a photo is wrong by 0.2 to 0.4 % of its norm, with both released
    checkpoints, most of it by the rounded inputs; in float16 by 0.04 %. AnyUp's own arithmetic is wrong by 5 % and
    0.8 %: the features' part of the keys lies within millionths of a constant. That part is computed in float32 here,
    as are the norms' statistics, the angles of positions, softmax and all sums; every other map may be rounded when
    stored. On a CPU with matrix units for bfloat16 (AMX, on Linux) the encoders use them and keep their maps in
    bfloat16; on others they compute in float32.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Source: AnyUp (Wimmer et al., arXiv 2510.12764), ``AnyUp``; weights CC BY 4.0. ``values="split"``:
    github.com/tiiuae/Falcon-Perception, ``falcon_perception/anyup.py``, which pools by whole blocks of pixels, where
    there are such, and is the same there.
    """

    def __init__(
        self,
        qk_dim: int = 128,
        *,
        num_heads: int = 4,
        window_ratio: float = 0.1,
        windows: Literal["dense", "natten"] = "dense",
        input_dim: int = 3,
        kernel_size: int = 1,
        kernel_size_lfu: int = 5,
        lfu_dim: int | None = None,
        values: Values = "mean",
        image_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        _arguments.choice("AnyUp", "windows", windows, WINDOWS)
        window_ratio = _arguments.number("AnyUp", "window_ratio", window_ratio)
        qk_dim = _arguments.integer("AnyUp", "qk_dim", qk_dim, 1)
        num_heads = _arguments.integer("AnyUp", "num_heads", num_heads, 1)
        input_dim = _arguments.integer("AnyUp", "input_dim", input_dim, 1)
        for name, size in (("kernel_size", kernel_size), ("kernel_size_lfu", kernel_size_lfu)):
            if _arguments.integer("AnyUp", name, size, 1) % 2 == 0:
                raise ValueError(f"murf_fast.AnyUp: `{name}` must be odd, got {size}")
        if qk_dim % 8 or qk_dim % (2 * num_heads):
            raise ValueError(
                f"murf_fast.AnyUp: `qk_dim` must be a multiple of 8 and of {2 * num_heads}, twice the heads, "
                f"got {qk_dim}"
            )
        lfu_dim = qk_dim if lfu_dim is None else _arguments.integer("AnyUp", "lfu_dim", lfu_dim, 0)
        if lfu_dim % 8:
            raise ValueError(f"murf_fast.AnyUp: `lfu_dim` must be a multiple of 8, got {lfu_dim}")
        self._values = _arguments.choice("AnyUp", "values", values, VALUES)
        self.image_range = check_image_range("AnyUp", image_range, input_dim)
        self.qk_dim, self.num_heads, self.lfu_dim = qk_dim, num_heads, lfu_dim
        self.window_ratio, self.windows = window_ratio, windows
        self.image_encoder = _encoder(nn.Conv2d(input_dim, qk_dim, kernel_size, bias=False), qk_dim)
        self.key_encoder = _encoder(nn.Conv2d(qk_dim, qk_dim, 1, bias=False), qk_dim)
        self.query_encoder = _encoder(nn.Conv2d(qk_dim, qk_dim, 1, bias=False), qk_dim)
        if lfu_dim:
            self.key_features_encoder = _encoder(_Basis(lfu_dim, kernel_size_lfu), qk_dim, lfu_dim)
        of_keys = 2 * qk_dim if lfu_dim else qk_dim
        self.aggregation = _encoder(nn.Conv2d(of_keys, qk_dim, 3, bias=False), qk_dim)
        attention = nn.Module()
        attention.norm_q, attention.norm_k = nn.RMSNorm(qk_dim), nn.RMSNorm(qk_dim)
        # Of its projections only those of queries and keys matter; the released state dicts have all.
        attention.attention = nn.MultiheadAttention(qk_dim, num_heads)
        attention.attention.out_proj.requires_grad_(False)
        self.cross_decode = nn.Module()
        self.cross_decode.conv2d = nn.Conv2d(qk_dim, qk_dim, 3, bias=False)
        self.cross_decode.cross_attn = attention
        self.rope = nn.Module()
        self.rope.freqs = nn.Parameter(_frequencies(qk_dim))
        self._names, self._forms = [name for name, _ in self.named_parameters()], _parts.forms_of(self)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | PathLike[str] | Mapping[str, Any], **options: Unpack[AnyUpOptions]
    ) -> AnyUp:
        """A model with released weights, in eval mode.

        Entries ``state_dict``, ``model``, ``teacher`` are opened, and prefixes ``module.``, ``_orig_mod.``, ``model.``
        and ``teacher.`` taken off if all names have them.

        Args:
            checkpoint: ``anyup_paper.pth``, ``anyup_multi_backbone.pth``, a ``.safetensors`` file, or a state dict; of
                the dense model, of one with ``use_natten=True``, or of Falcon Perception's (its ``itok_upsampler``).
            options: Arguments of the class that weights do not tell: ``windows``, ``window_ratio``, ``num_heads``,
                ``values``, ``image_range``.

        Raises:
            TypeError: ``checkpoint`` is neither a path nor a state dict.
            ValueError: Keys are missing or unexpected, or a shape is wrong (all of them are listed); or the file is
                missing, empty, damaged, no checkpoint, or a pickle of more than tensors and plain values, which is not
                loaded (``weights_only=True``).
        """
        layout, opened = _anyup_checkpoint.read(checkpoint, options.get("values", "mean"))
        model = cls(
            layout.qk_dim,
            input_dim=layout.input_dim,
            kernel_size=layout.kernel_size,
            kernel_size_lfu=layout.kernel_size_lfu,
            lfu_dim=layout.lfu_dim,
            **options,
        )
        _checkpoints.load_into(model, opened)
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
        q_chunk_size: int | None = None,
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
        q_chunk_size: int | None = None,
    ) -> list[Tensor]: ...
    def forward(
        self,
        image: Tensor | EncodedImage,
        features: Tensor | Sequence[Tensor],
        output_size: Size | None = None,
        *,
        values: Tensor | Sequence[Tensor] | None = None,
        region: Integers | None = None,
        q_chunk_size: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Upsamples ``features`` to ``output_size``.

        Args:
            image: (B, 3, H, W), normalized with ImageNet's mean and deviation (or in ``image_range``); in the dtype of
                the parameters. Or what :meth:`encode_image` made of it.
            features: (B, C, h, w) with any C (``"split"``: a multiple of the heads), as the backbone gives them, in any
                floating-point dtype: the attention runs in the wider of the values' and the parameters'. Or a list of
                such maps, of any grids and channels, which share the queries.
            output_size: (height, width) in pixels; None: that of the image.
            values: (B, K, h, w) to weigh in place of the features, which then give the attention alone; a list beside a
                list.
            region: (top, left, height, width) of the output: the result is this rectangle of the whole one. None: all.
            q_chunk_size: The original's; there is nothing to cut here, and a value is warned about once.

        Returns:
            ``(B, C, *output_size)`` in the dtype of the features (or the values, with their channels), channels_last in
            memory; a list if ``features`` is one. Differentiable with respect to image, features, values and
            parameters. Autocast changes nothing.

        Raises:
            TypeError, ValueError: An argument is wrong, or a submodule has hooks or was replaced, whose weights alone
                are read; the message names it.

        Memory: without gradients the result and its queries (a third of it at 384 channels), or, if that is more, two
        maps of ``qk_dim`` channels at the image's size (three, and as many at the output's, if that is another), which
        are gone when the result is made. Features narrower than the parameters take a second result, in the parameters'
        dtype. Of a region, result and queries are the region's, and the norms, which are the whole image's, take three
        maps of ``qk_dim`` channels at its size; :meth:`statistics` does without. Where gradients are needed,
        eight maps of ``qk_dim`` channels at the image's size are kept beside the result, for a region too, and the
        backward takes four more.
        """
        if q_chunk_size is not None:
            _arguments.integer("AnyUp", "q_chunk_size", q_chunk_size, 1)
            _warn_of_chunks()
        return self._upsample(image, features, output_size, values, region)

    if TYPE_CHECKING:
        __call__ = forward

    def _encode(self, image: Tensor, size: Any, region: Any, grids: Any, known: Any = None) -> EncodedImage:
        encoded = encode(self._weights(), self._normalized(image), size, region, grids, known)
        return EncodedImage("AnyUp", *encoded, size, region)

    def _statistics(self, image: Tensor, size: Any, grids: Any, recompute: Any) -> ImageStatistics:
        return statistics_of(self._weights(), self._normalized(image), grids, recompute)

    def _wants_gradients(self, image: Tensor) -> bool:
        return wants_gradients(self._weights(), image)

    def _normalized(self, image: Tensor) -> Tensor:
        return image if self.image_range is None else imagenet_normalized(image, self.image_range)

    def _keys(self, of_image: Tensor, features: Tensor) -> Tensor:
        return keys_of(self._weights(), of_image, features)

    def _check_parts(self) -> None:
        _parts.refuse_peculiar("AnyUp", _parts.submodules_of(self), self._forms)

    def _weights(self) -> dict[str, Tensor]:
        return _parts.weights_of(self, self._names)

    def _rule(self, size: Any, grid: Any) -> Windows:
        return window_rule(self.windows, self.window_ratio, size, grid)

    # Results are channels_last.
    _keeps_layout = False

    def _arithmetic(self, own: torch.dtype, values: torch.dtype) -> torch.dtype:
        return torch.promote_types(own, values)

    def _query_channels(self) -> int:
        return self.qk_dim

    def _check_image(self, image: Tensor, output_size: Any) -> tuple[int, int]:
        self._check_parts()
        weights = self._weights()
        channels = weights["image_encoder.0.weight"].shape[1]
        return check_image(image, output_size, weights["rope.freqs"], channels)

    def _check_features(self, features: Tensor, image: Tensor) -> None:
        check_features(features, image)

    def extra_repr(self) -> str:
        return (
            f"qk_dim={self.qk_dim}, num_heads={self.num_heads}, window_ratio={self.window_ratio}, "
            f"windows={self.windows!r}, values={self._values!r}, image_range={self.image_range}"
        )


def check_image(image: Tensor, output_size: Any, parameter: Tensor, channels: int) -> tuple[int, int]:
    """The output's (height, width), of an image that fits."""
    op = "AnyUp"
    _checks.map_(op, "image", image)
    if image.shape[1] != channels:
        raise ValueError(f"murf_fast.{op}: `image` must have {channels} channels, got {image.shape[1]}")
    _checks.same_device_and_dtype(op, "image", image, "the parameters", parameter)
    return (image.shape[2], image.shape[3]) if output_size is None else _checks.grid(op, "output_size", output_size)


def check_features(features: Tensor, image: Tensor) -> None:
    """Features beside an image, or its queries."""
    op = "AnyUp"
    _checks.map_(op, "features", features)
    if features.device != image.device:
        raise ValueError(
            f"murf_fast.{op}: `features` must be on the device of `image`, {image.device}, got {features.device}"
        )
    if features.shape[0] != image.shape[0]:
        raise ValueError(
            f"murf_fast.{op}: `features` must have the batch size of `image`, {image.shape[0]}, got {features.shape[0]}"
        )
    if features.shape[2] < 2 or features.shape[3] < 2:
        raise ValueError(
            f"murf_fast.{op}: `features` need at least 2 rows and columns, whose borders are reflected, got "
            f"{tuple(features.shape[2:])}"
        )


@functools.cache
def _warn_of_chunks() -> None:
    warnings.warn(
        "murf_fast.AnyUp: `q_chunk_size` is not needed and does nothing: queries are not attended in chunks here",
        stacklevel=3,
    )


class _Residual(nn.Module):
    """Weights of a residual block: twice group norm, SiLU, 1x1 convolution; another beside it if channels change."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        layers = [[nn.GroupNorm(8, n), nn.SiLU(), nn.Conv2d(n, dim, 1, bias=False)] for n in (inputs, dim)]
        self.block = nn.Sequential(*layers[0], *layers[1])
        if inputs != dim:
            self.shortcut = nn.Conv2d(inputs, dim, 1, bias=False)


class _Basis(nn.Module):
    """Filters of the feature-agnostic layer, (dim, 1, k, k)."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.randn(dim, 1, kernel_size, kernel_size))


def _encoder(first: nn.Module, dim: int, inputs: int | None = None) -> nn.Sequential:
    """A first layer of ``inputs`` channels (None: ``dim``), two blocks."""
    return nn.Sequential(OrderedDict([("0", first), ("1", _Residual(inputs or dim, dim)), ("2", _Residual(dim, dim))]))


def _frequencies(dim: int) -> Tensor:
    """Axial frequencies 1 to 1/100 over a quarter of the channels for each axis, the same in both halves."""
    powers = 100 ** -torch.linspace(0, 1, dim // 4)
    nothing = torch.zeros_like(powers)
    rows, columns = torch.cat([powers, nothing]), torch.cat([nothing, powers])
    return torch.stack([rows.repeat(2), columns.repeat(2)])
