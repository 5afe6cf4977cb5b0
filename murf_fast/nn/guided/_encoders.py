"""Convolutional encoders of guidance images, as NAF and JAFAR build them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast import backends
from murf_fast.nn._parts import Form, is_as_made, is_plain
from murf_fast.ops import _checks
from murf_fast.ops._derivatives import derivatives_wanted
from murf_fast.ops.resize import resize

GROUPS = 8


def pooled(x: Tensor, size: Any) -> Tensor:
    """Adaptive average pooling, with a deterministic gradient."""
    return x if tuple(x.shape[2:]) == tuple(size) else resize(x, tuple(size), mode="area")


class EncoderBlock(nn.Module):
    """Group norm, SiLU and convolution, twice; with ``residual`` the input is added."""

    def __init__(self, channels: int, kernel_size: int, *, bias: bool, residual: bool) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.conv1 = convolution(channels, channels, kernel_size, bias=bias)
        self.norm2 = nn.GroupNorm(GROUPS, channels)
        self.conv2 = convolution(channels, channels, kernel_size, bias=bias)
        self.residual = residual

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """The block's result, averaged to ``size`` if given.

        A 1x1 convolution and a sum commute with averaging: where that leaves fewer pixels, it comes first.
        """
        y = _activated(self.norm2, self.conv1(_activated(self.norm1, x)))
        fewer = size is not None and size[0] * size[1] < y.shape[2] * y.shape[3]
        if fewer and is_plain(self.conv2, nn.Conv2d) and self.conv2.kernel_size == (1, 1):
            y = pooled(y, size)
            x = pooled(x, size) if self.residual else x
        y = self.conv2(y)
        y = y + x if self.residual else y
        return y if size is None else pooled(y, size)

    if TYPE_CHECKING:
        __call__ = forward


def _activated(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU of a norm, in place unless someone else may hold the norm's result."""
    return F.silu(norm(x), inplace=is_plain(norm, nn.GroupNorm))


class Encoder(nn.Sequential):
    """A convolution and a few blocks."""

    def __init__(
        self, inputs: int, channels: int, *, kernel_size: int, block: int, blocks: int, bias: bool, residual: bool
    ) -> None:
        super().__init__(
            convolution(inputs, channels, kernel_size, bias=bias),
            *(EncoderBlock(channels, block, bias=bias, residual=residual) for _ in range(blocks)),
        )

    def weights(self) -> list[Tensor]:
        """In the order of the layers, a bias behind its weight; those that its modules have."""
        layers = ["0", *(f"{i}.{n}" for i in range(1, len(self)) for n in ("norm1", "conv1", "norm2", "conv2"))]
        modules = [self.get_submodule(layer) for layer in layers]
        found = [getattr(m, kind, None) for m in modules for kind in ("weight", "bias")]
        return [w for w in found if w is not None]

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        *first, last = self
        for layer in first:
            x = layer(x)
        return last(x, size)


def convolution(inputs: int, outputs: int, kernel_size: int, *, bias: bool) -> nn.Conv2d:
    # With a padding mode, torch copies the map before the convolution even if there is nothing to pad.
    mode: Literal["reflect", "zeros"] = "reflect" if kernel_size > 1 else "zeros"
    return nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, padding_mode=mode, bias=bias)


def check_image(what: str, image: Any, output_size: Any, like: Tensor, *, reflects: bool) -> tuple[int, int]:
    """The image of a guided upsampler; returns the output's (height, width), the image's if not given.

    ``like`` is one of the module's parameters; with ``reflects`` an encoder pads the image by reflection.
    """
    _checks.map_(what, "image", image)
    if image.shape[1] != 3:
        raise ValueError(f"murf_fast.{what}: `image` must have 3 channels, got {image.shape[1]}")
    _checks.same_device_and_dtype(what, "image", image, "the parameters", like)
    if reflects and min(image.shape[2:]) < 2:
        raise ValueError(
            f"murf_fast.{what}: `image` must have at least 2 rows and columns, got {tuple(image.shape[2:])}"
        )
    return (image.shape[2], image.shape[3]) if output_size is None else _checks.grid(what, "output_size", output_size)


def precise(x: Tensor) -> torch.dtype:
    """The dtype in which positions and angles of ``x`` are computed."""
    return torch.promote_types(x.dtype, torch.float32)


def fused_backend(model: nn.Module, forms: Mapping[str, Form], image: Tensor, weights: Iterable[Tensor]) -> str | None:
    """The backend on which the encoders run as passes over the pixels of an image; None where modules are called.

    They are where something but their weights has a say (hooks, replaced parts, autocast), where a gradient to the
    image or a weight is needed, and in float64.
    """
    if torch.is_autocast_enabled(image.device.type) or not is_as_made(model, forms):
        return None
    backend = backends.resolve(None, image.device.type, image.dtype)
    return None if backend == "reference" or derivatives_wanted((image, *weights)) else backend
