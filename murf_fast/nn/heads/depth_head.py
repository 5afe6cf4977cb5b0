"""The linear depth heads of MuRF, DINOv2 and DINOv3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from murf_fast import _arguments
from murf_fast.annotations import HeadGrid, Norm, Size
from murf_fast.nn import _checkpoints
from murf_fast.nn._checkpoints import Naming
from murf_fast.nn._options import DepthOptions
from murf_fast.nn.heads import _head_grid
from murf_fast.nn.heads.depth_losses import check_target, log_gradient_loss, scale_invariant_log_loss
from murf_fast.ops import _checks, resize, upsample_expectation
from murf_fast.ops.linear_head import low_resolution_logits
from murf_fast.ops.upsample_expectation import NORMS

if TYPE_CHECKING:
    from typing_extensions import Unpack

SPACINGS = ("midpoint", "linspace")

_OWN = Naming("murf_fast", "classifier", "batch_norm", norm_optional=True)
_MURF = Naming("MuRF", "depth_estimation_head.head")
_DINOV2 = Naming("DINOv2", "decode_head.conv_depth")
_DINOV3 = Naming("DINOv3", "conv_depth", "batchnorm_layer", norm_optional=True)

_CONVENTIONS: dict[Any, Any] = {
    _MURF: {"depth_range": (1e-3, 10.0), "rule": "midpoint", "norm": "softmax", "grid": "largest"},
    # The hub's heads are built for 80 m, those for NYU too.
    _DINOV2: {
        "depth_range": (1e-3, 80.0),
        "rule": "linspace",
        "norm": "linear",
        "grid": "first",
        "upsample": 4,
        "clamp": True,
    },
    # No range: DINOv3's own defaults for it disagree (10 m and 80 m).
    _DINOV3: {"rule": "linspace", "norm": "linear", "grid": "first"},
    _OWN: {},
}


class DepthHead(nn.Module):
    """A 1x1 convolution over concatenated maps to depth bins, their expectation, and that resized to the image.

    ``depth = V sum_k p_k values_k`` with ``p = norm(conv(cat_s [U_s F_s, cls_s]))`` over the K bins; ``U_s`` resizes
    map ``s`` to the head's grid and ``V`` depth from there to the image, both bilinear.

    The head ends where its distribution does: the expectation is taken on the head's grid and only depth goes to the
    image, as in every original. Whether the backbone's final norm was applied to the maps is the caller's choice.

    Args:
        columns: Channels of all maps (and of their CLS tokens) together.
        bins: Number of bins K, at least 2.
        depth_range: Nearest and farthest depth, in metres.
        rule: Depth of the bins: ``"midpoint"`` of K equal intervals (MuRF) or ``"linspace"``, K points from end to end
            (DINOv2, DINOv3).
        norm: ``"softmax"`` or ``"linear"`` (relu + 0.1, normalized).
        grid: The head's grid: the ``"largest"`` of the maps (MuRF), the ``"first"`` map's (DINOv2, DINOv3), or the
            ``"image"``'s.
        upsample: The head's grid is that many times the map's (DINOv2's hub: 4); every map goes straight there.
        clamp: Clamp the expectation to the range before the resize (DINOv2's hub).
        batch_norm: Whether there is a batch norm before the convolution.

    Raises:
        ValueError: An argument is none of its choices, or out of its range; the message names it.

    Source: MuRF's ``DINOv2DepthEstimationMRF``, DINOv2's ``BNHead`` and ``DepthEncoderDecoder``, DINOv3's
    ``LinearHead`` and ``FeaturesToDepth``.
    """

    def __init__(
        self,
        columns: int,
        bins: int,
        *,
        depth_range: tuple[float, float],
        rule: Literal["midpoint", "linspace"] = "midpoint",
        norm: Norm = "softmax",
        grid: HeadGrid = "largest",
        upsample: int = 1,
        clamp: bool = False,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        columns, bins = (_arguments.integer("DepthHead", *x) for x in (("columns", columns, 1), ("bins", bins, 2)))
        _arguments.choice("DepthHead", "rule", rule, SPACINGS)
        _arguments.choice("DepthHead", "norm", norm, NORMS)
        nearest, farthest = _arguments.numbers("DepthHead", "depth_range", depth_range, 2)
        upsample = _arguments.integer("DepthHead", "upsample", upsample, 1)
        for name, value in (("clamp", clamp), ("batch_norm", batch_norm)):
            _arguments.flag("DepthHead", name, value)
        if not 0 <= nearest < farthest:
            raise ValueError(f"murf_fast.DepthHead: `depth_range` must be (nearest, farthest), got {depth_range!r}")
        self.depth_range, self.rule, self.norm = (nearest, farthest), rule, norm
        self.grid, self.upsample, self.clamp = _head_grid.check("DepthHead", grid), upsample, clamp
        self.batch_norm = nn.BatchNorm2d(columns) if batch_norm else None
        self.classifier = nn.Conv2d(columns, bins, kernel_size=1)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], **options: Unpack[DepthOptions]) -> DepthHead:
        """A head with the weights of a checkpoint, which is recognised by its names.

        ``depth_estimation_head.head.*`` (MuRF; 1e-3 to 10 m, mid-points, softmax, the largest grid),
        ``decode_head.conv_depth.*`` (DINOv2's hub; 1e-3 to 80 m, linspace, linear, four times the first grid, clamped),
        ``conv_depth.*`` and, if there is one, ``batchnorm_layer.*`` (DINOv3; linspace, linear, the first grid; the
        range must be given) or this class's own names. ``options`` are those of the class and override what goes with
        the names.

        Wrappers and prefixes are taken off as by :meth:`AnyUp.from_checkpoint`.

        Raises:
            TypeError: ``state_dict`` is no mapping.
            ValueError: The names belong to none of them, a key is missing or unknown, a shape is wrong, or there is no
                ``depth_range``.
        """
        weights = _checkpoints.read("DepthHead", state_dict, (_OWN, _MURF, _DINOV2, _DINOV3))
        options = {**_CONVENTIONS[weights.naming], **options}
        if "depth_range" not in options:
            raise ValueError(
                f"murf_fast.DepthHead: `depth_range` must be given for a checkpoint of {weights.naming.source}"
            )
        bins, columns = weights.shape
        head = cls(columns, bins, batch_norm=weights.norm is not None, **options)
        weights.load_into(head.classifier, head.batch_norm)
        return head

    def values(self, device: torch.device | None = None) -> Tensor:
        """Depth of every bin, (K,) in float32 as in the originals, also when the head is of another dtype."""
        near, far = self.depth_range
        bins = self.classifier.out_channels
        if self.rule == "linspace":
            return torch.linspace(near, far, bins, dtype=torch.float32, device=device)
        edges = torch.linspace(near, far, bins + 1, dtype=torch.float32, device=device)
        return 0.5 * (edges[:-1] + edges[1:])

    def forward(self, features: Sequence[Tensor], size: Size, cls: Sequence[Tensor | None] | None = None) -> Tensor:
        """Depth of the image.

        Args:
            features: Maps (B, C_s, h_s, w_s), floating point, one batch size, in the dtype of the head; any strides.
            size: (height, width) of the result in pixels; one integer means a square.
            cls: CLS tokens (B, C'_s), one entry per map, None where a map has none; None: none at all. The columns of
                the head are, map by map, those of the map and of its CLS token.

        Returns:
            (B, height, width) in the unit of ``depth_range``, float32 (float64 for float64 maps); differentiable.

        Raises:
            TypeError, ValueError: An argument is wrong, or the columns are not those of the head; the message names it.

        Memory: the result, depth on the head's grid, and K channels per low-resolution pixel; no tensor has K channels
        at the resolution of the head's grid or of the image, in the backward either.
        """
        features = _checks.maps("DepthHead.forward", features, same_channels=False)
        size = tuple(_checks.grid("DepthHead.forward", "size", size))
        depth = self.depth_on_head_grid(features, cls, size=size)
        return depth if self.grid == "image" else resize(depth[:, None], size)[:, 0]

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def predict(self, features: Sequence[Tensor], size: Size, cls: Sequence[Tensor | None] | None = None) -> Tensor:
        """:meth:`forward` without gradients."""
        return self(features, size, cls)

    def loss(
        self,
        features: Sequence[Tensor],
        target: Tensor,
        cls: Sequence[Tensor | None] | None = None,
        *,
        mask: Tensor | None = None,
        max_depth: float | None = None,
        warm_up: bool = False,
        gradient_weight: float = 0.5,
    ) -> Tensor:
        """SigLoss and the multi-scale gradient loss of ``forward(...)``, as DINOv2's and MuRF's heads are trained.

        ``scale_invariant_log_loss(depth, target) + gradient_weight log_gradient_loss(depth, target)``. Gradients go
        through the fused expectation, whose backward adds them up on the grids of the maps.

        Args:
            features, cls: As for :meth:`forward`.
            target: Depth (B, height, width) in the unit of ``depth_range``, any floating dtype; its grid is the
                image's. Pixels count where it is above 0, finite and at most ``max_depth``.
            mask, max_depth, warm_up: As for :func:`murf_fast.nn.scale_invariant_log_loss`.
            gradient_weight: 0.5 beside 1 in DINOv2's trainings; 0 leaves the gradient loss out.

        Returns:
            A scalar in float32 (float64 for float64 maps); differentiable.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.

        Memory: K channels per low-resolution pixel, depth on the head's grid and six float32 maps (B, height, width);
        no tensor has K channels at the resolution of the head's grid or of the image, in the backward either.
        """
        what = "DepthHead.loss"
        features = _checks.maps(what, features, same_channels=False)
        check_target(what, target, mask, max_depth)
        if len(target) != len(features[0]):
            raise ValueError(
                f"murf_fast.{what}: `target` must have the batch size of `features`, {len(features[0])}, "
                f"got {len(target)}"
            )
        _checks.same_device(what, "target", target, "features[0]", features[0])
        _checks.flag(what, "warm_up", warm_up)
        gradient_weight = _checks.number(what, "gradient_weight", gradient_weight)
        if gradient_weight < 0:
            raise ValueError(f"murf_fast.{what}: `gradient_weight` must be at least 0, got {gradient_weight}")
        depth = self(features, tuple(target.shape[1:]), cls)
        where: dict[str, Any] = {"mask": mask, "max_depth": max_depth}
        loss = scale_invariant_log_loss(depth, target, warm_up=warm_up, **where)
        return loss + gradient_weight * log_gradient_loss(depth, target, **where) if gradient_weight else loss

    def depth_on_head_grid(
        self,
        features: Sequence[Tensor],
        cls: Sequence[Tensor | None] | None = None,
        *,
        size: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Depth on the head's grid, before the last resize: (B, rows, columns).

        Arguments, dtype and errors as for :meth:`forward`; ``size`` only matters to a head whose grid is the image's,
        and must be given there.
        """
        features = _checks.maps("DepthHead.depth_on_head_grid", features, same_channels=False)
        if self.grid == "image" and size is None:
            raise ValueError('murf_fast.DepthHead.depth_on_head_grid: `size` must be given for grid="image"')
        grid = _head_grid.head_grid(self.grid, features, size, self.upsample)
        weight, bias = self.classifier.weight, self.classifier.bias
        logits, bias = low_resolution_logits(features, weight, bias, grid=grid, norm=self.batch_norm, cls=cls)
        depth = upsample_expectation(logits, grid, self.values(features[0].device), bias=bias, norm=self.norm)
        return depth.clamp(*self.depth_range) if self.clamp else depth

    def extra_repr(self) -> str:
        names = ("depth_range", "rule", "norm", "grid", "upsample", "clamp")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
