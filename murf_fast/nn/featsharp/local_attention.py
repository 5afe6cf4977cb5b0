"""Attention of every token of a map to the tokens around it, nearer ones preferred."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from murf_fast import windows
from murf_fast.nn._parts import peculiarity
from murf_fast.nn._signatures import has_global_hooks, is_customized, trains
from murf_fast.ops import _checks
from murf_fast.ops._derivatives import writes_nothing
from murf_fast.ops.window_attention import window_attention

# Where no gradient is needed: bytes of the queries, keys and values of the heads that are attended at a time, and
# tokens of a chunk of token-wise work, whose hidden layer (8 MB of 4096 floats a token) is made and used in the same
# memory. They bound the peak of a block; on a CPU neither costs time that can be measured. A GPU's are larger, so that
# there is work for all of it, and were measured nowhere.
_BYTES = {"cpu": 12 << 20, "cuda": 512 << 20}
_CHUNK = {"cpu": 512, "cuda": 1 << 15}


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

    def attend(self, tokens: Tensor, norm: nn.Module | None = None, weight: Tensor | None = None) -> Tensor:
        """The heads' results before ``proj``: (B, H, W, G) from (B, H, W, G), which ``norm`` is called on first.

        ``weight`` is :meth:`projection`'s, for callers that have it: a parametrization makes it anew every time.
        """
        norm, weight = nn.Identity() if norm is None else norm, self.projection() if weight is None else weight
        heads, bias = self.num_heads, self._bias(tokens)
        if is_functional(tokens, self, norm):
            return self._attended(F.linear(norm(tokens), _of_heads(weight, heads, 0, heads)), 0, heads, bias)
        # Heads are independent: some at a time, so that not all queries, keys and values are there at once.
        step = self._heads_at_a_time(tokens)
        d, result = tokens.shape[-1] // heads, tokens.new_empty(tokens.shape)
        projected = tokens.new_empty((*tokens.shape[:3], step * (len(weight) // heads)))
        for first in range(0, heads, step):
            of_heads = _of_heads(weight, heads, first, first + step)
            out = projected[..., : len(of_heads)]
            for rows, its_out in zip(chunks_of(tokens), chunks_of(out), strict=True):
                torch.mm(norm(rows), of_heads.mT, out=its_out)
            result[..., first * d : (first + step) * d] = self._attended(out, first, first + step, bias)
        return result

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, H, W, G) from (B, H, W, G), differentiable.

        Memory: the heads' results, and queries, keys and values; without gradients those of some heads at a time.
        """
        return self.proj(self.attend(tokens))

    if TYPE_CHECKING:
        __call__ = forward

    def projection(self) -> Tensor:
        """The weight of ``qkv``.

        Raises:
            ValueError: It has hooks, or is no ``nn.Linear``: it is not called.
        """
        reason = peculiarity(self.qkv)
        if reason is None and not isinstance(self.qkv, nn.Linear):
            reason = f"is a {type(self.qkv).__name__}"
        if reason is not None:
            raise ValueError(
                f"murf_fast.LocalAttention: `qkv` {reason}, which would do nothing: only its weight is read"
            )
        return self.qkv.weight

    def _attended(self, projected: Tensor, first: int, last: int, bias: tuple[Tensor, Tensor]) -> Tensor:
        """Results of some heads, (B, H, W, d heads), from their queries, keys and values."""
        count, d = last - first, self.qkv.in_features // self.num_heads
        wide = (projected.shape[-1] // count - d) // 2
        q, k, v = projected.permute(0, 3, 1, 2).split([count * wide, count * wide, count * d], 1)
        result = window_attention(
            q,
            k,
            v,
            windows=windows.clamped(self.window // 2),
            num_heads=count,
            values="split",
            scale=d**-0.5,
            bias=(bias[0][first:last], bias[1][first:last]),
        )
        return result.permute(0, 2, 3, 1)

    def _heads_at_a_time(self, tokens: Tensor) -> int:
        a_head = self.qkv.out_features // self.num_heads * tokens[..., 0].numel() * tokens.element_size()
        most = _BYTES.get(tokens.device.type, _BYTES["cuda"]) // max(a_head, 1)
        return max(n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0 and n <= max(most, 1))

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


def chunks_of(tokens: Tensor) -> tuple[Tensor, ...]:
    """Rows (n, C) of tokens (B, H, W, C), which are dense but for their channels; in pieces of equal size, as products
    of the few rows that would be left take as long as those of many.
    """
    rows = tokens.flatten(0, 2)
    return rows.tensor_split(max(1, round(len(rows) / _CHUNK.get(tokens.device.type, _CHUNK["cuda"]))))


def is_functional(x: Tensor, *modules: nn.Module) -> bool:
    """Whether what modules make of ``x`` must be made by expressions alone, and not in pieces of one buffer: for
    derivatives, of parameters too (and those of DataParallel's replicas), compilers, dtypes that autocast picks, and
    hooks, which see all tokens at once.
    """
    if writes_nothing([x]) or forward_ad._current_level >= 0 or torch.is_autocast_enabled(x.device.type):
        return True
    if torch.is_grad_enabled() and any(map(trains, modules)):
        return True
    return has_global_hooks() or any(is_customized(part) for module in modules for part in module.modules())


def _of_heads(weight: Tensor, heads: int, first: int, last: int) -> Tensor:
    """What makes queries and keys of some heads, and those of their values that are used."""
    d = weight.shape[1] // heads
    if first == 0 and last == heads and len(weight) == 3 * heads * d:
        return weight
    q, k, v = weight.unflatten(0, (3, heads, -1))[:, first:last].unbind(0)
    return torch.cat([x.flatten(0, 1) for x in (q, k, v[:, :d])])


def padded_width(n: int) -> int:
    """The least power of two of at least n."""
    return 1 << (n - 1).bit_length()
