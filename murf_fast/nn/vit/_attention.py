"""Self-attention inside each sequence of a packed buffer."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from murf_fast.nn.vit.families._family import Rotation
from murf_fast.ops import _dense_attention
from murf_fast.ops._derivatives import in_transform
from murf_fast.ops.patch_embed import PackedTokens
from murf_fast.tables._table import kept

KINDS = ("sdpa", "varlen", "xformers")


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
    """The runs in groups of as few whole sequences as have so many ``rows``; the last has up to half of that more, as
    products of the few rows that would be left take as long as those of many.
    """
    group: list[Run] = []
    left = sum(run.stop - run.start for run in all_runs)
    for run in all_runs:
        while run.sequences:
            missing = rows - sum(r.stop - r.start for r in group)
            enough = -(-missing // max(run.length, 1)) if missing > 0 else run.sequences
            count = min(enough, run.sequences)
            group.append(replace(run, sequences=count))
            run = replace(run, start=group[-1].stop, sequences=run.sequences - count)
            held = group[-1].stop - group[0].start
            if held >= rows and left - held >= rows // 2:
                yield group
                group, left = [], left - held
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
    by_tokens = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if _dense_attention.pays(*by_tokens):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return _dense_attention.dense_attention(*by_tokens, scale).flatten(0, 1)
    # torch's fused kernels have no forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH) if forward_ad._current_level >= 0 else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)


def limits(kind: str, all_runs: Sequence[Run], device: torch.device) -> object | None:
    """Where sequences begin and end, as the one launch of ``kind`` takes it; None for ``"sdpa"``, which has no such.

    None, too, for an empty batch, which nobody but "sdpa" takes.
    """
    if all_runs[-1].stop == 0:
        return None
    if kind == "varlen":
        return starts(all_runs, device)
    if kind == "xformers":
        mask = _block_diagonal(tuple([r.length for r in all_runs for _ in range(r.sequences)]), device)
        # Its tensors were copied from the host, which a graph would do again from memory that is gone.
        return kept(device, ("block diagonal mask", *mask[0]), mask)[1]
    return None


def starts(all_runs: Sequence[Run], device: torch.device) -> Tensor:
    """(sequences + 1,) int32 offsets, made on the device: a copy from the host would stall it and be lost to graphs."""
    options: dict[str, Any] = {"dtype": torch.int32, "device": device}
    parts = [torch.arange(run.start, run.stop, run.length, **options) for run in all_runs]
    return torch.cat([*parts, torch.full((1,), all_runs[-1].stop, **options)])


def attend_together(
    q: Tensor, k: Tensor, v: Tensor, all_runs: Sequence[Run], limits: object, scale: float | None = None
) -> Tensor:
    """Attention of all sequences in one launch; ``limits`` are those of :func:`limits`."""
    if any(run.rotation is not None for run in all_runs):
        q, k = (_rotate_all(t, all_runs) for t in (q, k))
    if isinstance(limits, Tensor):
        from torch.nn.attention.varlen import varlen_attn

        longest = max(run.length for run in all_runs)
        options: dict[str, Any] = {} if scale is None or scale == q.shape[-1] ** -0.5 else {"scale": scale}
        return cast("Tensor", varlen_attn(q, k, v, limits, limits, longest, longest, **options))
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=limits, scale=scale)[0]


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


def chosen(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """What ``attention=None`` means on a GPU: one launch for all sequences where something can, else "sdpa".

    Tangents, ``torch.func`` and compilers know "sdpa" alone; autocast makes other dtypes than the model's.
    """
    traced = torch.compiler.is_compiling() or in_transform() or forward_ad._current_level >= 0
    if traced or torch.is_autocast_enabled(device.type):
        return "sdpa"
    return next((kind for kind in ("varlen", "xformers") if not reasons_against(kind, device, dtype, width)), "sdpa")


def reasons_against(kind: str, device: torch.device, dtype: torch.dtype, width: int) -> list[str]:
    """Why ``attention=kind`` cannot be used; empty where it can."""
    if kind == "sdpa":
        return []
    reasons = [] if device.type == "cuda" else [f"it needs a CUDA device, the images are on {device.type}"]
    return reasons + (_varlen_reasons if kind == "varlen" else _xformers_reasons)(device, dtype, width)


def _varlen_reasons(device: torch.device, dtype: torch.dtype, width: int) -> list[str]:
    reasons = []
    # Fake tensors may be on a device that is not here.
    if device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < (8, 0)):
        reasons.append("it needs a GPU of compute capability 8.0")
    if dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"it takes bfloat16 and float16, the model is {dtype}")
    if width % 8 or width > 256:
        reasons.append(f"it takes heads of a multiple of 8 channels up to 256, the model's have {width}")
    if not _has_varlen():
        reasons.append(f"torch {torch.__version__} has no torch.nn.attention.varlen")
    return reasons


def _xformers_reasons(device: torch.device, dtype: torch.dtype, width: int) -> list[str]:
    reasons = []
    if width * dtype.itemsize % 16:
        reasons.append(f"it takes heads of a multiple of 16 bytes, the model's have {width} channels of {dtype}")
    found = _xformers_dtypes()
    if isinstance(found, str):
        reasons.append(found)
    elif dtype not in found:
        reasons.append(f"this build of xformers has no operator for {dtype}")
    return reasons


@functools.lru_cache(maxsize=1)
def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return True


@functools.lru_cache(maxsize=1)
def _xformers_dtypes() -> frozenset[torch.dtype] | str:
    """What the operators of xformers take that know sequences of several lengths; or why there is none."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    try:
        from xformers.ops.fmha import cutlass, flash
    except ImportError as error:
        return f"xformers cannot be imported: {error}"
    return frozenset(dtype for op in (cutlass.FwOp, flash.FwOp) if op.is_available() for dtype in op.SUPPORTED_DTYPES)


@functools.lru_cache(maxsize=64)
def _block_diagonal(lengths: tuple[int, ...], device: torch.device) -> tuple[tuple[int, ...], object]:
    """The lengths and xformers' mask of sequences behind each other, whose tensors outlive inference mode."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    with torch.inference_mode(False):
        return lengths, BlockDiagonalMask.from_seqlens(list(lengths), device=device)


def _rotate_all(x: Tensor, all_runs: Sequence[Run]) -> Tensor:
    """Rotary positions on queries or keys (rows, heads, dim) of all runs."""
    parts = [x[r.start : r.stop].unflatten(0, (r.sequences, r.length)).transpose(1, 2) for r in all_runs]
    turned = [_rotate(part, *cast("Rotation", run.rotation)) for part, run in zip(parts, all_runs, strict=True)]
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in turned])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool, rounds: bool) -> Tensor:
    """Rotary positions on the patches, which come last, rounded to the dtype of ``x``."""
    dtype, x = x.dtype, x.to(cos.dtype) if rounds else x
    rotated = cos.shape[0]
    prefix, patches = x.split((x.shape[-2] - rotated, rotated), dim=-2)
    if is_interleaved:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    else:
        a, b = patches.chunk(2, dim=-1)
        turned = torch.cat([-b, a], dim=-1)
    return torch.cat([prefix, (patches * cos + turned * sin).to(x.dtype)], dim=-2).to(dtype)
