"""Tensors with drawn values in drawn memory layouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fuzz.draw import DTYPES, Draw

VALUES = ("normal", "offset", "far", "large", "small", "subnormal", "integers", "constant")
LAYOUTS = ("contiguous", "channels_last", "tokens", "sliced", "expanded", "permuted", "negative", "offset")


def values(d: Draw, name: str, shape: Sequence[int], dtype: torch.dtype, kinds: Sequence[str] = VALUES) -> Tensor:
    """Contiguous values of one kind; "offset" and "far" lie on a large common mean, "constant" ones are all alike."""
    kind = d.choice(f"{name}.values", kinds, [6 if k == "normal" else 1 for k in kinds])
    x = torch.randn(shape, generator=d.generator, dtype=torch.float64)
    if kind == "offset":
        x = x + 1000.0
    elif kind == "far":
        x = 3 * x + (3e4 if dtype == torch.float16 else 1e5)
    elif kind == "large":
        x = x * (1000.0 if dtype == torch.float16 else 1e5)
    elif kind == "small":
        x = x * (1e-3 if dtype == torch.float16 else 1e-9)
    elif kind == "subnormal":
        x = x * (torch.finfo(dtype).tiny / 8)
    elif kind == "integers":
        x = (2 * x).round()
    elif kind == "constant":
        x = torch.full_like(x, 0.7)
    return x.to(dtype)


def laid_out(d: Draw, name: str, x: Tensor, layouts: Sequence[str] = LAYOUTS) -> Tensor:
    """The values of a map (B, C, H, W) in a drawn layout; an expanded one repeats the first along a dimension."""
    layout = d.choice(f"{name}.layout", layouts)
    batch, channels, height, width = x.shape
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "tokens":
        tokens = x.new_full((batch, height * width + 1, channels), torch.nan)
        tokens[:, 1:] = x.flatten(2).mT
        return tokens[:, 1:].mT.unflatten(2, (height, width))
    if layout == "sliced":
        padded = x.new_full((batch, channels + 2, height + 1, 2 * width), torch.nan)
        padded[:, 1:-1, :height, ::2] = x
        return padded[:, 1:-1, :height, ::2]
    if layout == "expanded":
        dim = d.choice(f"{name}.expanded", (0, 1, 2, 3))
        return x.narrow(dim, 0, min(1, x.shape[dim])).expand_as(x) if x.shape[dim] else x
    if layout == "permuted":
        return x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    if layout == "negative":
        return torch._neg_view(-x)
    if layout == "offset":
        flat = x.new_full((x.numel() + 3,), torch.nan)
        flat[3:] = x.flatten()
        return flat[3:].view(x.shape)
    return x


def drawn_map(
    d: Draw,
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    kinds: Sequence[str] = VALUES,
    wants_grad: bool = False,
) -> Tensor:
    """A map (B, C, H, W), as a leaf."""
    d.note(name, tuple(shape))
    x = laid_out(d, name, values(d, name, shape, dtype, kinds))
    return x.detach().requires_grad_(wants_grad)


def drawn_vector(
    d: Draw, name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype] = DTYPES, kinds: Sequence[str] = ("normal",)
) -> Tensor:
    """A small tensor of any dtype, sometimes strided, expanded, or with a negative bit."""
    d.note(name, tuple(shape))
    if d.interpreted:
        dtypes = [t for t in dtypes if t != torch.float64]
    x = values(d, name, shape, d.choice(f"{name}.dtype", dtypes), kinds)
    layout = d.choice(f"{name}.layout", ("contiguous", "strided", "expanded", "negative"), (3, 1, 1, 1))
    if layout == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded" and x.numel() and x.ndim:
        return x[..., :1].expand_as(x)
    return torch._neg_view(-x) if layout == "negative" else x


def cotangent(d: Draw, result: Tensor) -> Tensor:
    """What is sent back through a result."""
    g = torch.randn(result.shape, generator=d.generator, dtype=torch.float64).to(result.dtype)
    return laid_out(d, "cotangent", g, ("contiguous", "channels_last", "expanded", "sliced")) if g.ndim == 4 else g
