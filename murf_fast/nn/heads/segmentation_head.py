"""The linear segmentation heads of MuRF, DINOv2 and DINOv3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast import _arguments
from murf_fast.annotations import HeadGrid, Size
from murf_fast.nn import _checkpoints
from murf_fast.nn._checkpoints import Naming
from murf_fast.nn._options import LossOptions
from murf_fast.nn.heads import _head_grid
from murf_fast.ops import _checks, upsample_argmax, upsample_confusion, upsample_cross_entropy
from murf_fast.ops._batch_norm import running_statistics
from murf_fast.ops.linear_head import linear_head, low_resolution_logits

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OWN = Naming("murf_fast", "classifier", "norm", norm_optional=True)
_MURF = Naming("MuRF", "seg_head.classifier", "seg_head.bn")
_DINOV2 = Naming("DINOv2 (mmsegmentation)", "decode_head.conv_seg", "decode_head.bn")
_DINOV3 = Naming("DINOv3", "conv", "batchnorm_layer", norm_optional=True)


class SegmentationHead(nn.Module):
    """Batch norm and a 1x1 convolution over concatenated maps of several resolutions; logits or labels of the image.

    ``logits = V conv(norm(cat_s [U_s F_s, cls_s]))``: ``U_s`` resizes map ``s`` to the head's grid, ``V`` the logits
    from there to the image; both are bilinear. Neither resized maps nor their concatenation are made.

    Args:
        columns: Channels of all maps (and of their CLS tokens) together.
        classes: Number of classes K.
        norm: Whether there is a batch norm before the convolution.
        grid: Where the maps are concatenated: on the ``"largest"`` grid (MuRF), on that of the ``"first"`` map (DINOv2,
            DINOv3) or on the ``"image"``'s. From there the logits are resized to the image.
        dropout: Probability with which training drops a channel of an image before the batch norm (DINOv3: 0.1).

    Raises:
        ValueError: ``grid`` is none of the three.

    Source: MuRF's ``DinoV2SegmentationModelMRF``, DINOv2's ``BNHead``, DINOv3's ``LinearHead``.
    """

    def __init__(
        self, columns: int, classes: int, *, norm: bool = True, grid: HeadGrid = "largest", dropout: float = 0.0
    ) -> None:
        super().__init__()
        columns = _arguments.integer("SegmentationHead", "columns", columns, 1)
        classes = _arguments.integer("SegmentationHead", "classes", classes, 1)
        if not 0 <= (dropout := _arguments.number("SegmentationHead", "dropout", dropout)) <= 1:
            raise ValueError(f"murf_fast.SegmentationHead: `dropout` must be a probability, got {dropout}")
        _arguments.flag("SegmentationHead", "norm", norm)
        self.grid = _head_grid.check("SegmentationHead", grid)
        self.dropout = dropout
        self.norm = nn.BatchNorm2d(columns) if norm else None
        self.classifier = nn.Conv2d(columns, classes, kernel_size=1)

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], *, grid: HeadGrid | None = None, dropout: float | None = None
    ) -> SegmentationHead:
        """A head with the weights of a checkpoint, which is recognised by its names.

        ``seg_head.bn.*, seg_head.classifier.*`` (MuRF; grid "largest"), ``decode_head.bn.*, decode_head.conv_seg.*``
        (DINOv2; "first"), ``batchnorm_layer.*, conv.*`` (DINOv3; "first", dropout 0.1) or this class's own names
        ("largest"). ``grid`` and ``dropout`` override what goes with the names.

        Wrappers and prefixes are taken off as by :meth:`AnyUp.from_checkpoint`.

        Raises:
            TypeError: ``state_dict`` is no mapping.
            ValueError: The names belong to none of them, a key is missing or unknown, or a shape is wrong.
        """
        weights = _checkpoints.read("SegmentationHead", state_dict, (_OWN, _MURF, _DINOV2, _DINOV3))
        classes, columns = weights.shape
        convention: HeadGrid = "first" if weights.naming in (_DINOV2, _DINOV3) else "largest"
        head = cls(
            columns,
            classes,
            norm=weights.norm is not None,
            grid=convention if grid is None else grid,
            dropout=(0.1 if weights.naming is _DINOV3 else 0.0) if dropout is None else dropout,
        )
        weights.load_into(head.classifier, head.norm)
        return head

    def forward(self, features: Sequence[Tensor], size: Size, cls: Sequence[Tensor | None] | None = None) -> Tensor:
        """Logits of the image.

        Args:
            features: Maps (B, C_s, h_s, w_s), floating point, one batch size, in the dtype of the head; any strides.
            size: (height, width) of the result in pixels; one integer means a square.
            cls: CLS tokens (B, C'_s), one entry per map, None where a map has none; None: none at all. The columns of
                the head are, map by map, those of the map and of its CLS token.

        Returns:
            (B, K, height, width) in the dtype and layout of the maps; differentiable. Autocast as for ``F.linear``.

        Raises:
            TypeError, ValueError: An argument is wrong, or the columns are not those of the head; the message names it.

        Memory: the result, and K channels per low-resolution pixel; in training as :func:`murf_fast.linear_head`, and
        dropout copies the maps.
        """
        features, size, cls, grid = self._prepare("forward", features, size, cls)
        via = None if self.grid == "image" else grid
        weight, bias = self.classifier.weight, self.classifier.bias
        return linear_head(features, weight, bias, size=size, via=via, norm=self.norm, cls=cls)

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def predict(self, features: Sequence[Tensor], size: Size, cls: Sequence[Tensor | None] | None = None) -> Tensor:
        """``forward(...).argmax(1)`` without gradients and without the logits of the image; arguments as there.

        Returns:
            Labels (B, height, width): uint8 up to 256 classes, int16 up to 32768, int32 above.

        Memory: the result, and K channels per low-resolution pixel.
        """
        features, size, cls, grid = self._prepare("predict", features, size, cls)
        logits, bias = self._low_resolution(features, cls, grid)
        return upsample_argmax(logits, size, bias=bias, via=None if self.grid == "image" else grid)

    @torch.no_grad()
    def confusion(
        self,
        features: Sequence[Tensor],
        target: Tensor,
        cls: Sequence[Tensor | None] | None = None,
        *,
        ignore_index: int = -100,
    ) -> Tensor:
        """How many pixels of every label get every class: ``bincount(K target + predict(...))`` without the labels.

        Args:
            features, cls: As for :meth:`forward`.
            target: Labels (B, height, width), any integer dtype; their grid is the image's.
            ignore_index: Label of pixels that do not count.

        Returns:
            (K, K), int64: rows are labels, columns classes. Sums of them are what :func:`segmentation_scores` takes.

        Memory: the result, and K channels per low-resolution pixel.
        """
        features, _, cls, grid = self._prepare("confusion", features, tuple(target.shape[-2:]), cls)
        logits, bias = self._low_resolution(features, cls, grid)
        via = None if self.grid == "image" else grid
        return upsample_confusion(logits, target, bias=bias, via=via, ignore_index=ignore_index)

    def folded(self) -> tuple[Tensor, Tensor]:
        """The head as one matrix and one bias, the batch norm in them, for the ``predict`` of an upsampler.

        ``AnyUp.predict(image, features, *head.folded(), reduce="argmax")`` is this head on upsampled features, instead
        of resized ones, and its labels.

        Returns:
            Weight (K, columns) and bias (K,) in the dtype of the head; differentiable.

        Raises:
            ValueError: The head would use the statistics of a batch, or dropout: it is in training mode.
        """
        if self.training and (self.norm is not None or self.dropout > 0):
            raise ValueError("murf_fast.SegmentationHead.folded: the head must be in eval mode")
        weight, bias = self.classifier.weight.flatten(1), cast("Tensor", self.classifier.bias)
        if self.norm is None:
            return weight, bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale, mean = running_statistics(self.norm, wide)
        scaled = weight.to(wide) * scale
        offset = weight.to(wide) @ self.norm.bias.to(wide) - scaled @ mean
        return scaled.to(weight.dtype), (bias.to(wide) + offset).to(bias.dtype)

    def loss(
        self,
        features: Sequence[Tensor],
        target: Tensor,
        cls: Sequence[Tensor | None] | None = None,
        **options: Unpack[LossOptions],
    ) -> Tensor:
        """``F.cross_entropy(forward(...), target)`` without the logits of the image.

        Args:
            features, cls: As for :meth:`forward`.
            target: Labels (B, height, width), any integer dtype; their grid is the image's.
            options: ``ignore_index``, ``weight``, ``label_smoothing`` and ``reduction`` of
                :func:`murf_fast.upsample_cross_entropy`.

        Returns:
            A scalar, or (B, height, width) with ``reduction="none"``, in float32 (float64 for float64 maps);
            differentiable.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it. Labels out of range: as for
                :func:`murf_fast.upsample_cross_entropy`.

        Memory: K channels per low-resolution pixel and three float32 maps (B, height, width); no logits of the image in
        the backward either.
        """
        features, _, cls, grid = self._prepare("loss", features, tuple(target.shape[-2:]), cls)
        logits, bias = self._low_resolution(features, cls, grid)
        return upsample_cross_entropy(logits, target, bias=bias, via=None if self.grid == "image" else grid, **options)

    def _prepare(self, method: str, features: Sequence[Tensor], size: Any, cls: Any) -> Any:
        features = _checks.maps(f"SegmentationHead.{method}", features, same_channels=False)
        size = tuple(_checks.grid(f"SegmentationHead.{method}", "size", size))
        if self.training and self.dropout > 0:
            features = [F.dropout2d(f, self.dropout) for f in features]
            cls = None if cls is None else [None if t is None else F.dropout(t, self.dropout) for t in cls]
        return features, size, cls, _head_grid.head_grid(self.grid, features, size)

    def _low_resolution(self, features: Sequence[Tensor], cls: Any, grid: Any) -> tuple[list[Tensor], Tensor | None]:
        weight, bias = self.classifier.weight, self.classifier.bias
        return low_resolution_logits(features, weight, bias, grid=grid, norm=self.norm, cls=cls)

    def extra_repr(self) -> str:
        return f"grid={self.grid!r}, dropout={self.dropout}"
