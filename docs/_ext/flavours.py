"""How far the ways of resizing a table of positions are from each other, computed while the documentation builds."""

from __future__ import annotations

import torch

import murf_fast

TABLE = 37  # patches a side, DINOv2's
GRIDS = (16, 19, 28, 55, 56)
LIKE = "dinov2-hf"
FLAVOURS = ("dinov2-hub", "dinov2-reg", "siglip2")


def smooth_table(channels: int = 64, side: int = TABLE) -> torch.Tensor:
    """(1, side * side, channels): seeded noise of 9 x 9 values, resized; learned tables are about as smooth."""
    noise = torch.randn(1, channels, 9, 9, generator=torch.Generator().manual_seed(0))
    return murf_fast.resize(noise, side, mode="bicubic").flatten(2).mT


def differences() -> dict[str, list[float]]:
    """Per flavour, and per grid, |a - b| / |b| against LIKE."""
    positions, found = smooth_table(), {}
    for flavour in FLAVOURS:
        found[flavour] = []
        for grid in GRIDS:
            ours, like = (
                murf_fast.resample_pos_embed(positions, (grid, grid), flavor=name).double() for name in (flavour, LIKE)
            )
            found[flavour].append(float((ours - like).norm() / like.norm()))
    return found


def table() -> str:
    lines = ["| against `dinov2-hf`, from 37 x 37 | " + " | ".join(f"{g} x {g}" for g in GRIDS) + " |"]
    lines.append("|---|" + "---:|" * len(GRIDS))
    for flavour, shares in differences().items():
        lines.append(f"| `{flavour}` | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return "\n".join(lines)
