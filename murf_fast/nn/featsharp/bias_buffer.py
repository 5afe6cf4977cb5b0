"""What an encoder's positions leave in its features, learned and taken out again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from murf_fast.ops import _checks
from murf_fast.ops.resize import resize


class BiasBuffer(nn.Module):
    """``f(x) + g``: one learned map, added to the features of every image (FeatSharp's de-bias module).

    It learns to cancel what the encoder's positions, not the image, put into features. Features of another size get
    the map resized bilinearly. A new one is zero and changes nothing.

    Args:
        channels: C.
        height, width: Of the map, in patches of the encoder's own resolution.

    Raises:
        TypeError, ValueError: An argument is no integer of at least 1.

    Attributes:
        buffer: (1, C, height, width), a parameter.

    Source: FeatSharp, section 3.4, equation 5, and appendix B.1.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        sizes = {"channels": channels, "height": height, "width": width}
        shape = [_checks.integer("BiasBuffer", name, n, 1) for name, n in sizes.items()]
        self.channels = shape[0]
        self.buffer = nn.Parameter(torch.zeros(1, *shape))

    def forward(self, features: Tensor) -> Tensor:
        """Features without their bias.

        Args:
            features: (B, C, h, w), floating point, any strides; of the encoder's views, tiles like whole images.

        Returns:
            The same shape, dtype and layout; differentiable.

        Raises:
            TypeError, ValueError: ``features`` is no map of C channels on the buffer's device.

        Memory: the result, and the buffer at the size and in the dtype of the features where those are others.
        """
        what = "BiasBuffer"
        _checks.map_(what, "features", features)
        _checks.same_device(what, "features", features, "buffer", self.buffer)
        if features.shape[1] != self.buffer.shape[1]:
            raise ValueError(
                f"murf_fast.{what}: `features` must have {self.buffer.shape[1]} channels, got {features.shape[1]}"
            )
        bias = self.buffer
        if bias.shape[2:] != features.shape[2:]:
            bias = resize(bias, tuple(features.shape[2:]))
        return features + bias.to(features.dtype)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return "channels={}, height={}, width={}".format(*self.buffer.shape[1:])
