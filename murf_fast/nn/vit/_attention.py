"""Self-attention inside each sequence of a packed buffer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from murf_fast.nn.vit.families._family import Rotation
from murf_fast.ops import _dense_attention
from murf_fast.ops.patch_embed import PackedTokens

KINDS = ("sdpa", "varlen")


@dataclass(frozen=True)
class Run:
    """Sequences of one length behind each other: a batch without padding or a mask."""

    start: int
    sequences: int
    length: int
    rotation: Rotation | None

    @property
    def stop(self) -> int:
        return self.start + self.sequences * self.length


def runs(packed: PackedTokens, rotations: Sequence[Rotation | None]) -> list[Run]:
    """The fewest runs of a buffer: neighbouring resolutions of one grid (an image and tiles of its size) are one, and
    without rotary positions those of one length.
    """
    found: list[Run] = []
    for i, (block, rotation) in enumerate(zip(packed.blocks, rotations, strict=True)):
        length = block.length(packed.prefix)
        is_alike = block.grid == packed.blocks[i - 1].grid or rotation is None
        if found and found[-1].length == length and is_alike:
            last = found.pop()
            found.append(Run(last.start, last.sequences + block.sequences, length, rotation))
        else:
            found.append(Run(block.start, block.sequences, length, rotation))
    return found


def segments(all_runs: Sequence[Run], rows: int) -> Iterator[list[Run]]:
    """The runs in groups of as few whole sequences as have so many ``rows``."""
    group: list[Run] = []
    for run in all_runs:
        while run.sequences:
            missing = rows - sum(r.stop - r.start for r in group)
            count = min(-(-missing // max(run.length, 1)), run.sequences)
            group.append(replace(run, sequences=count))
            run = replace(run, start=group[-1].stop, sequences=run.sequences - count)
            if group[-1].stop - group[0].start >= rows:
                yield group
                group = []
    if group:
        yield group


def attend(q: Tensor, k: Tensor, v: Tensor, run: Run, scale: float | None = None) -> Tensor:
    """Attention of one run; q, k, v and the result are (rows, heads, dim).

    By torch's scaled_dot_product_attention, which serves every dtype and device, is differentiable and compiles, but
    for inference on CPUs (:mod:`murf_fast.ops._dense_attention`).
    """
    q, k, v = (t.unflatten(0, (run.sequences, run.length)).transpose(1, 2) for t in (q, k, v))
    if run.rotation is not None:
        q, k = (_rotate(t, *run.rotation) for t in (q, k))
    by_tokens = [t.transpose(1, 2) for t in (q, k, v)]
    if _dense_attention.pays(*by_tokens):
        return _dense_attention.dense_attention(*by_tokens, q.shape[-1] ** -0.5 if scale is None else scale).flatten(
            0, 1
        )
    # torch's fused kernels have no forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH) if forward_ad._current_level >= 0 else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, all_runs: Sequence[Run], cu_seqlens: Tensor, scale: float | None = None
) -> Tensor:
    """Attention of all sequences in one launch by ``torch.nn.attention.varlen``: CUDA and half types only."""
    from torch.nn.attention.varlen import varlen_attn

    if any(run.rotation is not None for run in all_runs):
        q, k = (
            torch.cat(
                [
                    _rotate(t[r.start : r.stop].unflatten(0, (r.sequences, r.length)).transpose(1, 2), *r.rotation)
                    .transpose(1, 2)
                    .flatten(0, 1)
                    for r in all_runs
                ]
            )
            for t in (q, k)
        )
    longest = max(run.length for run in all_runs)
    options = {} if scale is None or scale == q.shape[-1] ** -0.5 else {"scale": scale}
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)


def of_the_first(q: Tensor, k: Tensor, all_runs: Sequence[Run], scale: float | None = None) -> Tensor:
    """What the first token of each sequence (CLS) attends to: (T, heads), float32, over all tokens of its sequence."""
    parts = []
    for run in all_runs:
        its_q, its_k = (t[run.start : run.stop].unflatten(0, (run.sequences, run.length)) for t in (q, k))
        its_q, its_k = its_q[:, :1].transpose(1, 2), its_k.transpose(1, 2)
        if run.rotation is not None:
            its_k = _rotate(its_k, *run.rotation)  # CLS itself has no position
        scores = (its_q.float() @ its_k.float().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        parts.append(scores.softmax(-1)[:, :, 0].mT.flatten(0, 1))
    return torch.cat(parts)


def varlen_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why ``attention="varlen"`` cannot be used; empty where it can."""
    reasons = []
    if device.type != "cuda":
        reasons.append(f"it needs a CUDA device, the images are on {device.type}")
    if dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"it takes bfloat16 and float16, the model is {dtype}")
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        reasons.append(f"torch {torch.__version__} has no torch.nn.attention.varlen")
    return reasons


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool, rounds: bool) -> Tensor:
    """Rotary positions on the patches, which come last, rounded to the dtype of ``x``."""
    dtype, x = x.dtype, x.to(cos.dtype) if rounds else x
    prefix, patches = x.split((x.shape[-2] - len(cos), len(cos)), dim=-2)
    if is_interleaved:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    else:
        a, b = patches.chunk(2, dim=-1)
        turned = torch.cat([-b, a], dim=-1)
    return torch.cat([prefix, (patches * cos + turned * sin).to(x.dtype)], dim=-2).to(dtype)
