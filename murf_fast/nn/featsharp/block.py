"""The block that refines a map by what others say of the same place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from murf_fast.nn.featsharp.local_attention import LocalAttention, chunks_of, is_functional
from murf_fast.nn.featsharp.swiglu import SwiGLU, hidden_width
from murf_fast.ops import _checks


class FeatSharpBlock(nn.Module):
    """A transformer block on G channels, of which the first C go on.

    ``y = x + ls1 attn(norm1(x))``, ``out = y[:C] + ls2 swiglu(norm2(y))``: the residual keeps the first C channels, so
    that a block that has learned nothing (its layer scales begin at 1e-6) returns the map that comes first.

    Args:
        inputs: G, all maps' channels together, a multiple of ``num_heads``.
        channels: C, at most G.
        num_heads, window: As for the local attention: heads, and keys per axis (odd).
        norm: Whether layer norms come before attention and MLP; False: identities.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Source: FeatSharp, section 3.3 and appendix B.2; DINOv2's block with layer scale and SwiGLU.
    """

    def __init__(self, inputs: int, channels: int, *, num_heads: int = 16, window: int = 7, norm: bool = True) -> None:
        super().__init__()
        what = "FeatSharpBlock"
        inputs = _checks.integer(what, "inputs", inputs, 1)
        self.channels = _checks.integer(what, "channels", channels, 1, inputs)
        _checks.flag(what, "norm", norm)
        num_heads = _checks.integer(what, "num_heads", num_heads, 1)
        if inputs % num_heads:
            raise ValueError(
                f"murf_fast.{what}: `inputs`, the channels of all maps, must be a multiple of {num_heads} heads, "
                f"got {inputs}"
            )
        self.norm1 = nn.LayerNorm(inputs) if norm else nn.Identity()
        self.attn = LocalAttention(inputs, num_heads, window)
        self.ls1 = LayerScale(inputs)
        self.norm2 = nn.LayerNorm(inputs) if norm else nn.Identity()
        self.mlp = SwiGLU(inputs, hidden_width(inputs), channels)
        self.ls2 = LayerScale(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The refined map.

        Args:
            x: (B, G, H, W) in the dtype of the parameters, any strides; channels_last is the fast layout.

        Returns:
            (B, C, H, W), channels_last by strides. Differentiable.

        Raises:
            TypeError, ValueError: ``x`` is no map of G channels, dtype and device of the parameters; or the projection
                to queries, keys and values has hooks or was replaced, whose weight alone is read.

        Memory: the attention's result and the block's; queries, keys and values of some heads (12 MiB on a CPU, 512 on
        a GPU, but at least one head's), and the hidden layer of 512 tokens (on a GPU 32768). Where gradients are
        needed what the layers keep: all of these of all tokens.
        """
        what, weight = "FeatSharpBlock", self.attn.projection()
        _checks.map_(what, "x", x)
        if x.shape[1] != weight.shape[1]:
            raise ValueError(f"murf_fast.{what}: `x` must have {weight.shape[1]} channels, got {x.shape[1]}")
        if not torch.is_autocast_enabled(x.device.type):
            _checks.same_device_and_dtype(what, "x", x, "its parameters", weight)
        tokens = x.permute(0, 2, 3, 1)
        if is_functional(x, self):
            return self._finished(tokens, self.attn.attend(tokens, self.norm1, weight)).permute(0, 3, 1, 2)
        tokens = tokens.contiguous()
        attended = self.attn.attend(tokens, self.norm1, weight)
        result = attended.new_empty((*tokens.shape[:3], self.channels))
        for rows, of_rows, out in zip(*map(chunks_of, (tokens, attended, result)), strict=True):
            out.copy_(self._finished(rows, of_rows))
        return result.permute(0, 3, 1, 2)

    if TYPE_CHECKING:
        __call__ = forward

    def _finished(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention, token by token."""
        tokens = self.ls1(self.attn.proj(attended), tokens)
        return self.ls2(self.mlp(self.norm2(tokens)), tokens[..., : self.channels])


class LayerScale(nn.Module):
    """``residual + gamma x``, one number per channel, which begins small."""

    def __init__(self, channels: int, begin: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), begin))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.addcmul(residual, x, self.gamma)

    if TYPE_CHECKING:
        __call__ = forward
