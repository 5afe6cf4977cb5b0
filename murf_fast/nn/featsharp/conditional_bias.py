"""What an encoder leaves in its features that depends on the image, learned and taken out again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast.nn.featsharp.block import LayerScale
from murf_fast.ops import _checks


class ConditionalBias(nn.Module):
    """``f(x) + g(f(x))``: a transformer block on the tokens of one view, after the :class:`BiasBuffer`.

    ``y = x + ls1 attn(norm1(x))``, ``out = y + ls2 mlp(norm2(y))``, every token of a view attending to all of it; the
    layer scales begin at 1e-8, so that a new one changes nothing. FeatSharp's code has it as an option.

    Args:
        channels: C, a multiple of ``num_heads``.
        num_heads: Heads.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Source: the ``cond_bias`` of FeatSharp's code: a block of timm's vision transformer (no bias of queries, keys and
    values, four times as wide an MLP, GELU, layer norms with an eps of 1e-5), whose names the weights have.
    """

    def __init__(self, channels: int, num_heads: int = 16) -> None:
        super().__init__()
        what = "ConditionalBias"
        channels = _checks.integer(what, "channels", channels, 1)
        num_heads = _checks.integer(what, "num_heads", num_heads, 1)
        if channels % num_heads:
            raise ValueError(f"murf_fast.{what}: `channels` must be a multiple of {num_heads} heads, got {channels}")
        self.channels = channels
        self.norm1 = nn.LayerNorm(channels)
        self.attn = _Attention(channels, num_heads)
        self.ls1 = LayerScale(channels, 1e-8)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = _MLP(channels)
        self.ls2 = LayerScale(channels, 1e-8)

    def forward(self, features: Tensor) -> Tensor:
        """Features without their bias.

        Args:
            features: (B, C, h, w) in the dtype of the parameters, any strides; of the encoder's views, each by itself.

        Returns:
            (B, C, h, w), channels_last by strides; differentiable.

        Raises:
            TypeError, ValueError: ``features`` is no map of C channels, dtype and device of the parameters.

        Memory: queries, keys and values, then the hidden layer, four times the features.
        """
        what = "ConditionalBias"
        _checks.map_(what, "features", features)
        if features.shape[1] != self.channels:
            raise ValueError(
                f"murf_fast.{what}: `features` must have {self.channels} channels, got {features.shape[1]}"
            )
        if not torch.is_autocast_enabled(features.device.type):
            _checks.same_device_and_dtype(what, "features", features, "its parameters", self.ls1.gamma)
        tokens = features.permute(0, 2, 3, 1).flatten(1, 2)
        tokens = self.ls1(self.attn(self.norm1(tokens)), tokens)
        tokens = self.ls2(self.mlp(self.norm2(tokens)), tokens)
        return tokens.unflatten(1, tuple(features.shape[2:])).permute(0, 3, 1, 2)

    if TYPE_CHECKING:
        __call__ = forward


class _Attention(nn.Module):
    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    if TYPE_CHECKING:
        __call__ = forward


class _MLP(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))

    if TYPE_CHECKING:
        __call__ = forward
