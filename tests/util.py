"""The error budget of every parity test, and ways to make inputs.

Oracle: the reference in float64. Budget: twice the error that the same-dtype PyTorch reference makes, plus one rounding
of the result to its dtype; nothing is typed by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(oracle: Tensor, dtype: torch.dtype, terms: float = 0.0) -> Tensor:
    """One rounding of each value to ``dtype``, at least that of ``terms`` or a quarter of the largest.

    Small results of large terms carry the terms' roundings; ``terms`` is their size where the results do not show it.
    """
    floor = oracle.abs().max() / 4 if oracle.numel() else oracle
    return torch.finfo(dtype).eps * torch.maximum(oracle.abs(), floor).clamp(min=terms)


def assert_within_budget(
    actual: Tensor, oracle: Tensor, same_dtype: Tensor, name: str = "result", terms: float = 0.0
) -> None:
    """``|actual - oracle| <= 2 max|same_dtype - oracle| + rounding``, elementwise; NaN and wrong shapes fail."""
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    oracle = oracle.detach().double()
    error = (actual.detach().double() - oracle).abs()
    allowed = 2 * (same_dtype.detach().double() - oracle).abs().max() if oracle.numel() else 0.0
    excess = error - (allowed + rounding(oracle, actual.dtype, terms))
    assert bool((excess <= 0).all()), (
        f"{name}: error {float(error.max()):.3g}, allowed {float(allowed):.3g} plus one rounding of "
        f"{float(oracle.abs().max()):.3g} in {actual.dtype}"
    )


def assert_gradient_within_budget(actual: Tensor, oracle: Tensor, same_dtype: Tensor, name: str = "gradient") -> None:
    """As above for a gradient: also by relative norm, which a zeroed or misplaced gradient cannot pass."""
    assert_within_budget(actual, oracle, same_dtype, name)
    oracle = oracle.detach().double()
    scale = oracle.norm()
    own = (actual.detach().double() - oracle).norm()
    theirs = (same_dtype.detach().double() - oracle).norm()
    assert own <= 2 * theirs + torch.finfo(actual.dtype).eps * scale, (
        f"{name}: relative error {float(own / scale):.3g}, the reference's is {float(theirs / scale):.3g}"
    )


def assert_labels_within_budget(
    labels: Tensor, oracle: Tensor, same_dtype: Tensor, dtype: torch.dtype | None = None, terms: float = 0.0
) -> Tensor:
    """``max oracle - oracle[label] <= 2 budgets``: of two logits that are off by one each, either may be the larger.

    ``oracle`` and ``same_dtype`` are logits (B, K, H, W); a logit's budget is that of `assert_within_budget`, its
    rounding to ``dtype``, by default that of ``same_dtype``. Returns what was allowed, (B, H, W).
    """
    assert labels.shape == oracle[:, 0].shape, f"labels {tuple(labels.shape)} for logits {tuple(oracle.shape)}"
    oracle = oracle.detach().double()
    chosen = oracle.gather(1, labels.long()[:, None])
    short = (oracle.amax(1, keepdim=True) - chosen)[:, 0]
    error = (same_dtype.detach().double() - oracle).abs().max() if oracle.numel() else 0.0
    allowed = 2 * (2 * error + rounding(oracle, dtype or same_dtype.dtype, terms).amax(1))
    assert bool((short <= allowed).all()), (
        f"a chosen logit is {float(short.max()):.3g} below the largest, allowed {float(allowed.min()):.3g}"
    )
    return allowed


def nudged(x: Tensor, seed: int) -> Tensor:
    """``x`` within half a rounding of its dtype: another draw from the rounding errors of whatever is made of it."""
    generator = torch.Generator().manual_seed(seed)
    eps = torch.finfo(x.dtype).eps
    return (x.double() * (1 + eps * (torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5))).to(x.dtype)


def worst(candidates: list[Tensor], oracle: Tensor) -> Tensor:
    """The candidate with the largest error: a single run of a formula may be right by chance."""
    return max(candidates, key=lambda t: float((t.double() - oracle).abs().max()) if t.numel() else 0.0)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in memory layouts that users have."""
    batch, channels, height, width = x.shape
    padded = torch.full((batch, channels + 2, height + 1, 2 * width), torch.nan, dtype=x.dtype, device=x.device)
    sliced = padded[:, 1:-1, :height, ::2]
    sliced.copy_(x)
    tokens = torch.full((batch, height * width + 1, channels), torch.nan, dtype=x.dtype, device=x.device)
    tokens[:, 1:] = x.flatten(2).mT
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "tokens": tokens[:, 1:].mT.unflatten(2, (height, width)),
        "sliced": sliced,
    }
