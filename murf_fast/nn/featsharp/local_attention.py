"""Attention of every token of a map to the tokens around it, nearer ones preferred."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast import windows
from murf_fast.nn._parts import peculiarity
from murf_fast.ops import _checks
from murf_fast.ops.window_attention import window_attention


class LocalAttention(nn.Module):
    """Multi-head attention within a clamped window, with a distance bias (ALiBi) along one axis per head.

    ``s_n(p, j) = <q_n(p), k_n(j)> d^-1/2 + b_n(p - j)``, over ``|p - j| <= window // 2`` in rows and columns (fewer at
    the borders), with ``b_n = -2^-(1 + n // 2) |rows|`` of even heads n and ``|columns|`` of odd ones;
    ``out = proj(cat_n sum_j softmax_j(s_n) v_n(j))``. Heads are d channels wide; queries and keys have as many as the
    next power of two, and so have values, of which the first d are used.

    Args:
        dim: G, a multiple of ``num_heads``.
        num_heads: Heads.
        window: Keys per axis, an odd number.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Source: FeatSharp, section 3.3, whose local attention this is; ALiBi (Press et al., 2022).
    """

    def __init__(self, dim: int, num_heads: int = 16, window: int = 7) -> None:
        super().__init__()
        what = "LocalAttention"
        self.num_heads = _checks.integer(what, "num_heads", num_heads, 1)
        dim = _checks.integer(what, "dim", dim, 1)
        if dim % num_heads:
            raise ValueError(f"murf_fast.{what}: `dim` must be a multiple of {num_heads} heads, got {dim}")
        if _checks.integer(what, "window", window, 1) % 2 == 0:
            raise ValueError(f"murf_fast.{what}: `window` must be odd, got {window}")
        self.window = window
        width = padded_width(dim // num_heads)
        self.qkv = nn.Linear(dim, 3 * num_heads * width, bias=False)
        self.proj = nn.Linear(dim, dim)

    def attend(self, tokens: Tensor) -> Tensor:
        """The heads' results before ``proj``: (B, H, W, G) from (B, H, W, G)."""
        reason = peculiarity(self.qkv)
        if reason is not None or not isinstance(self.qkv, nn.Linear):
            reason = reason or f"is a {type(self.qkv).__name__}"
            raise ValueError(
                f"murf_fast.LocalAttention: `qkv` {reason}, which would do nothing: only its weight is read"
            )
        weight, heads, dim = self.qkv.weight, self.num_heads, tokens.shape[-1]
        d, wide = dim // heads, len(weight) // 3
        if heads * d == wide:
            q, k, v = F.linear(tokens, weight).split(wide, -1)
        else:  # no use for the rest of the values
            q, k = F.linear(tokens, weight[: 2 * wide]).split(wide, -1)
            v = F.linear(tokens, weight[2 * wide :].unflatten(0, (heads, -1))[:, :d].flatten(0, 1))
        result = window_attention(
            *(x.permute(0, 3, 1, 2) for x in (q, k, v)),
            windows=windows.clamped(self.window // 2),
            num_heads=heads,
            values="split",
            scale=d**-0.5,
            bias=self._bias(tokens),
        )
        return result.permute(0, 2, 3, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, H, W, G) from (B, H, W, G), differentiable.

        Memory: queries, keys, values, and the heads' results.
        """
        return self.proj(self.attend(tokens))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window={self.window}"

    def _bias(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Distances of rows (heads, H, H) and of columns (heads, W, W), times their heads' slopes."""
        dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        head = torch.arange(self.num_heads, device=tokens.device)
        slopes = -(2.0 ** -(1 + head // 2).to(dtype))
        tables = []
        for axis, n in enumerate(tokens.shape[1:3]):
            at = torch.arange(n, device=tokens.device, dtype=dtype)
            of_axis = torch.where(head % 2 == axis, slopes, torch.zeros_like(slopes))
            tables.append(of_axis[:, None, None] * (at[:, None] - at).abs())
        return tables[0], tables[1]


def padded_width(n: int) -> int:
    """The least power of two of at least n."""
    return 1 << (n - 1).bit_length()
