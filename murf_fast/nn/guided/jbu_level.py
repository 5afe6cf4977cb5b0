"""One level of a joint bilateral upsampler, under the parameter names of FeatUp and FeatSharp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast import _arguments
from murf_fast.annotations import SmoothMode
from murf_fast.nn._parts import unlike
from murf_fast.ops import BilateralParams, joint_bilateral_upsample
from murf_fast.ops.adaptive_conv import MODES


class JBULevel(nn.Module):
    """Upsamples a map to the size of a guidance: :func:`murf_fast.joint_bilateral_upsample` with learned networks.

    ``out(p) = sum_t K(p, t) up(source)(p + t)`` over the ``(2 radius + 1)^2`` pixels around p. The kernels of
    :func:`murf_fast.bilateral_kernels` depend on the guidance alone: its projection ``range_proj``, the temperature
    ``range_temp``, the width ``sigma_spatial`` and, if there is one, the correction ``fixup_proj``.

    Args:
        radius: Half the width of the kernels, at least 0.
        guides, keys: Channels of the guidance and of its projection.
        mode: Interpolation of the source: ``"bicubic"`` (FeatUp) or ``"bilinear"`` (FeatSharp).
        fixup: Whether a network corrects the normalized kernels (FeatUp) or not (FeatSharp).
        dropout: Probability with which training drops hidden channels of an image; None: there is no such layer.

    Source: FeatUp's ``JBULearnedRange``; FeatSharp's ``JBULevel``.
    """

    def __init__(
        self,
        radius: int = 3,
        *,
        guides: int = 3,
        keys: int = 32,
        mode: SmoothMode = "bicubic",
        fixup: bool = True,
        dropout: float | None = 0.1,
    ) -> None:
        super().__init__()
        radius = _arguments.integer("JBULevel", "radius", radius, 0)
        guides = _arguments.integer("JBULevel", "guides", guides, 1)
        keys = _arguments.integer("JBULevel", "keys", keys, 1)
        if dropout is not None and not 0 <= (dropout := _arguments.number("JBULevel", "dropout", dropout)) <= 1:
            raise ValueError(f"murf_fast.JBULevel: `dropout` must be a probability or None, got {dropout}")
        self.radius, self.mode = radius, _arguments.choice("JBULevel", "mode", mode, MODES)
        taps = (2 * radius + 1) ** 2
        self.range_temp = nn.Parameter(torch.tensor(0.0))
        self.range_proj = _network(guides, keys, dropout)
        fixup = _arguments.flag("JBULevel", "fixup", fixup)
        self.fixup_proj = _network(taps + guides, taps, dropout) if fixup else None
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))

    def forward(self, source: Tensor, guidance: Tensor) -> Tensor:
        """Upsamples ``source`` to the size of ``guidance``.

        Args:
            source: (B, C, h, w), floating point, any strides.
            guidance: (B, guides, H, W) at the output's size, H, W > radius; in the dtype of the source, or float32
                beside a half type.

        Returns:
            (B, C, H, W) in dtype and layout of the source; differentiable.

        Raises:
            TypeError, ValueError: An argument is wrong, or one of the networks has hooks or was replaced, whose weights
                alone are read; the message names it.

        Memory: as :func:`murf_fast.joint_bilateral_upsample`.
        """
        strange = strangeness(self)
        if strange is not None:
            raise ValueError(f"murf_fast.JBULevel: {strange}, which would do nothing: only its weights are read")
        drawn = Drawn.of(self, guidance)
        return joint_bilateral_upsample(source, guidance, **drawn._asdict(), radius=self.radius, mode=self.mode)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"radius={self.radius}, mode={self.mode!r}"


class Drawn(NamedTuple):
    """What a call of a level needs from its module: the parameters, and in training this call's dropout."""

    params: BilateralParams
    range_mask: Tensor | None
    fixup_mask: Tensor | None

    @classmethod
    def of(cls, level: Any, guidance: Tensor) -> Drawn:
        """From any module with FeatUp's names; masks are drawn in FeatUp's order."""
        fixup = getattr(level, "fixup_proj", None)
        layers = [level.range_proj[0], level.range_proj[-1], *([] if fixup is None else [fixup[0], fixup[-1]])]
        params = BilateralParams(
            level.range_temp, level.sigma_spatial, *(p for layer in layers for p in (layer.weight, layer.bias))
        )
        batch = guidance.shape[0]
        range_mask = dropout_mask(level.range_proj, batch, layers[0].out_channels, guidance.device)
        fixup_mask = None
        if fixup is not None:
            fixup_mask = dropout_mask(fixup, batch, layers[2].out_channels, guidance.device)
        return cls(params, range_mask, fixup_mask)


def strangeness(level: nn.Module, prefix: str = "") -> str | None:
    """What the networks of a level have that would be passed over where only their weights are read, or None."""
    for name in ("range_proj", "fixup_proj"):
        network = getattr(level, name, None)
        if network is not None:
            drop = [nn.Dropout2d] if len(network) == 4 else []
            reason = unlike(f"{prefix}{name}", network, [nn.Conv2d, nn.GELU, *drop, nn.Conv2d])
            if reason is not None:
                return reason
    return None


def dropout_mask(network: nn.Sequential, batch: int, channels: int, device: torch.device) -> Tensor | None:
    """(batch, channels) factors as the network's Dropout2d draws them, or None where it does nothing."""
    dropout = next((m for m in network if isinstance(m, nn.Dropout2d)), None)
    if dropout is None or not dropout.training or dropout.p == 0:
        return None
    return F.dropout2d(torch.ones(batch, channels, 1, 1, dtype=torch.float32, device=device), dropout.p)[..., 0, 0]


def _network(inputs: int, outputs: int, dropout: float | None) -> nn.Sequential:
    drop = [] if dropout is None else [nn.Dropout2d(dropout)]
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.GELU(), *drop, nn.Conv2d(outputs, outputs, 1))
