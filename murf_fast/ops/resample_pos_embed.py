"""Learned position tables at other grids, and patch-embedding kernels at other patch sizes."""

from __future__ import annotations

import functools
import math
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from murf_fast import backends, reference
from murf_fast._torch_versions import known_equal
from murf_fast.annotations import Backend, Integers, Keep, PositionFlavor, Size, SmoothMode
from murf_fast.ops import _checks
from murf_fast.ops._derivatives import derivatives_wanted, in_transform, writes_nothing
from murf_fast.ops._resize import Resize
from murf_fast.ops.resize import resize, resize_out
from murf_fast.tables._table import is_capturing
from murf_fast.tables.resize import pseudo_inverse

# What is kept of one table beyond the results of its latest call, which are kept whatever they take.
KEPT_TABLES = 24
KEPT_BYTES = 4 << 20

KEEPS = (False, True, "checked")


@dataclass
class Kept:
    """What ``keep`` holds of one table, as long as the table is in ``state``: the results of its latest calls."""

    state: tuple[Any, ...]
    content: Tensor | None  # a copy to compare with, for `keep="checked"`
    tables: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)  # by how they were made
    # By the arguments as given, so that they are found before any check: keys of the above and results; the latest
    # comes last.
    calls: dict[tuple[Any, ...], tuple[list[tuple[Any, ...]], list[Tensor]]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def find(self, call: tuple[Any, ...]) -> list[Tensor] | None:
        """The results of a call, which is the latest from now on."""
        found = self.calls.pop(call, None)
        if found is None:
            return None
        self.calls[call] = found
        return found[1]

    def add(self, call: tuple[Any, ...], keys: list[tuple[Any, ...]], results: list[Tensor]) -> None:
        """Keep the results of a call, and let go of those that were used longest ago."""
        with self.lock:
            self.calls[call] = (keys, results)
            while True:
                kept = list(self.calls.items())
                self.tables = {key: table for _, used in kept for key, table in zip(*used, strict=True)}
                taken = sum(table.numel() * table.element_size() for table in self.tables.values())
                if len(kept) == 1 or (len(self.tables) <= KEPT_TABLES and taken <= KEPT_BYTES):
                    return
                self.calls.pop(kept[0][0], None)


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Flavor:
    """How one code base resizes its table."""

    mode: SmoothMode
    antialias: bool
    offset: float = 0.0  # added to the grid before the scale factor is taken


FLAVORS = {
    "dinov2-hub": Flavor("bicubic", False, 0.1),
    "dinov2-hf": Flavor("bicubic", False),
    "dinov2-reg": Flavor("bicubic", True),
    "clip": Flavor("bicubic", False),
    "open-clip": Flavor("bicubic", True),
    "siglip": Flavor("bicubic", False),
    "siglip2": Flavor("bilinear", True),
    "timm": Flavor("bicubic", True),
}


@overload
def resample_pos_embed(
    pos_embed: Tensor,
    grid: Size,
    *,
    flavor: PositionFlavor,
    num_prefix_tokens: int = 0,
    source_grid: Size | None = None,
    keep: Keep = False,
    backend: Backend | None = None,
) -> Tensor: ...
@overload
def resample_pos_embed(
    pos_embed: Tensor,
    grid: Sequence[Integers],
    *,
    flavor: PositionFlavor,
    num_prefix_tokens: int = 0,
    source_grid: Size | None = None,
    keep: Keep = False,
    backend: Backend | None = None,
) -> list[Tensor]: ...
def resample_pos_embed(
    pos_embed: Tensor,
    grid: Size | Sequence[Integers],
    *,
    flavor: PositionFlavor,
    num_prefix_tokens: int = 0,
    source_grid: Size | None = None,
    keep: Keep = False,
    backend: Backend | None = None,
) -> Tensor | list[Tensor]:
    """Resize a learned table of positions to another grid, as a named code base does.

    ``out = [prefix; U_h table U_w^T]``. The flavors are numerically different, and users compare them: ``dinov2-hub``
    (torch.hub models of DINO and of DINOv2 without registers, and transformers up to 4.40; bicubic with step
    ``M / (g + 0.1)``), ``dinov2-hf`` (transformers today; bicubic), ``dinov2-reg`` (hub and transformers models with
    registers; antialiased bicubic), ``clip`` (transformers' CLIP; bicubic), ``open-clip`` (OpenCLIP as it loads
    weights; antialiased bicubic), ``siglip`` (bicubic), ``siglip2`` (NaFlex; antialiased bilinear), ``timm``
    (antialiased bicubic, also for DINOv2). Every one returns the table itself for the square grid it was learned on.

    Args:
        pos_embed: (P + M_h * M_w, D) or (1, P + M_h * M_w, D), floating point.
        grid: (h, w) in patches, or a list of them (a ragged batch).
        flavor: One of the names above.
        num_prefix_tokens: P, rows in front of the grid (CLS, registers), which are not resized.
        source_grid: (M_h, M_w); None for a square table.
        keep: Keep the result while the table lives, and return that very tensor again (do not write into it) for the
            same arguments until the table changes: for frozen tables. ``True``: the table's address and version
            counter tell (about 4 microseconds); what goes round the counter, as writes through ``.data`` do, is not
            seen. ``"checked"``: its values are also compared with a copy of them, where that need not wait for a
            device: on other devices than CPUs nothing is kept. Without effect where gradients are needed, while
            compiling or capturing and in ``torch.func``'s transforms.
        backend: As for :func:`upsample_concat`.

    Returns:
        (P + h * w, D), with the leading 1 where the table has it, in its dtype; a list for a list of grids, where equal
        grids share one tensor. float32 arithmetic and one rounding for half tables, on every device. Differentiable.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: the results. Kept of one table are the results of the latest call and, of those before, up to 24 grids and
    4 MB, and with ``"checked"`` a copy of the table.

    Source: ``interpolate_pos_encoding`` of DINO, DINOv2 and transformers, ``resize_positional_embeddings`` of SigLIP 2,
    ``resample_abs_pos_embed`` of timm, ``resize_pos_embed`` of OpenCLIP.
    """
    op = "resample_pos_embed"
    _checks.tensor(op, "pos_embed", pos_embed)
    if not isinstance(keep, (bool, str)) or keep not in KEEPS:
        raise ValueError(f"murf_fast.{op}: `keep` must be one of {KEEPS}, got {keep!r}")
    kept = _kept_of(pos_embed, keep == "checked") if keep else None
    if kept is not None:
        # Written out, so that 4.0 and True are not taken for 4 and 1.
        call = (repr((grid, flavor, num_prefix_tokens, source_grid)), backends.asked_for(backend))
        results = kept.find(call)
        if results is not None:
            return results[0] if _is_single(grid) else list(results)
    if pos_embed.ndim not in (2, 3) or (pos_embed.ndim == 3 and pos_embed.shape[0] != 1):
        raise ValueError(f"murf_fast.{op}: `pos_embed` must be (N, D) or (1, N, D), got {tuple(pos_embed.shape)}")
    _checks.choice(op, "flavor", flavor, tuple(FLAVORS))
    rows = pos_embed.shape[-2]
    num_prefix_tokens = _checks.integer(op, "num_prefix_tokens", num_prefix_tokens)
    if not 0 <= num_prefix_tokens < rows:
        raise ValueError(f"murf_fast.{op}: `num_prefix_tokens` must be in [0, {rows}), got {num_prefix_tokens!r}")
    source = _source_grid(op, source_grid, rows - num_prefix_tokens)
    single = _is_single(grid)
    grids: list[Any] = [grid] if single else list(cast("Sequence[Integers]", grid))
    if not grids or not (single or all(map(_checks.is_sequence, grids))):
        raise ValueError(f"murf_fast.{op}: `grid` must be (h, w) or a non-empty list of them, got {grid!r}")
    grids = [tuple(_checks.grid(op, "grid", g)) for g in grids]
    tables = pos_embed.flatten(0, -2)
    prefix = tables[:num_prefix_tokens]
    table = tables[num_prefix_tokens:].unflatten(0, source).permute(2, 0, 1)[None]
    name = _checks.backend(backend, pos_embed)

    def resampled(g: tuple[int, ...]) -> Tensor:
        result = _resampled(prefix, table, g, FLAVORS[flavor], name)
        return result.view(*pos_embed.shape[:-2], *result.shape)

    if torch.compiler.is_compiling():
        # Looking a grid up would fix its size in the graph; compilers merge equal expressions themselves.
        results = [resampled(g) for g in grids]
    elif kept is None:
        tables = {g: resampled(g) for g in dict.fromkeys(grids)}
        results = [tables[g] for g in grids]
    else:
        keys = {g: (g, flavor, num_prefix_tokens, source, name) for g in grids}
        tables = {g: _keep(kept, key, functools.partial(resampled, g)) for g, key in keys.items()}
        results = [tables[g] for g in grids]
        kept.add(call, [keys[g] for g in grids], results)
    return results[0] if single else list(results)


def _is_single(grid: Any) -> bool:
    """Whether this is one grid, not a list of them."""
    return not _checks.is_sequence(grid) or (len(grid) == 2 and not any(_checks.is_sequence(n) for n in grid))


def _kept_of(pos_embed: object, is_checked: bool) -> Kept | None:
    """Where the results of this table are kept; None if they must not be."""
    if not isinstance(pos_embed, Tensor) or torch.compiler.is_compiling() or in_transform() or pos_embed.is_inference():
        return None
    if derivatives_wanted([pos_embed]) or (is_checked and pos_embed.device.type != "cpu"):
        return None
    if is_capturing(pos_embed.device):  # a replay must not read what may be forgotten, nor what the table was before
        return None
    state = (pos_embed.data_ptr(), pos_embed._version, pos_embed.dtype, pos_embed.device)
    kept = _kept.get(pos_embed)
    is_stale = kept is None or kept.state != state
    if is_checked and not is_stale:
        is_stale = kept.content is None or not torch.equal(pos_embed, kept.content)
    if is_stale:
        kept = _kept[pos_embed] = Kept(state, pos_embed.detach().clone() if is_checked else None)
    return kept


def _keep(kept: Kept, key: tuple[Any, ...], resampled: Callable[[], Tensor]) -> Tensor:
    table = kept.tables.get(key)
    if table is not None:
        return table
    # Outside inference mode, so that what is kept can be used under autograd later.
    with torch.inference_mode(False), torch.no_grad():
        return resampled()


def _resampled(prefix: Tensor, table: Tensor, grid: tuple[int, ...], flavor: Flavor, backend: str) -> Tensor:
    """Rows (P + h * w, D) of one grid, from a table (1, D, M_h, M_w)."""
    source = tuple(table.shape[2:])
    # Without an offset a table at its own grid is itself: no case for a graph of any size.
    is_same = grid == source and source[0] == source[1] if flavor.offset else known_equal(grid, source)
    if is_same:
        return torch.cat([prefix, _rows(table)])
    factors = [(g + flavor.offset) / m for g, m in zip(grid, source, strict=True)] if flavor.offset else None
    if backend == "reference":
        # Half tables are resized in float32, as all the sources do but CLIP's and SigLIP's.
        wide = table[0].permute(1, 2, 0).to(torch.promote_types(table.dtype, torch.float32))
        resized = reference.resample_pos_embed(wide, grid, flavor.mode, flavor.antialias, factors)
        return torch.cat([prefix, resized.to(table.dtype)])
    if writes_nothing([table]):
        target: dict[str, Any] = {"size": grid} if factors is None else {"scale_factor": tuple(factors)}
        options: dict[str, Any] = {"mode": flavor.mode, "antialias": flavor.antialias, "backend": backend}
        return torch.cat([prefix, _rows(resize(table, memory_format=torch.channels_last, **target, **options))])
    result = prefix.new_empty((prefix.shape[0] + grid[0] * grid[1], prefix.shape[1]))
    result[: prefix.shape[0]] = prefix
    map_ = result[prefix.shape[0] :].unflatten(0, grid).permute(2, 0, 1)[None]
    resize_out(table, Resize(None, flavor.mode, flavor.antialias), factors, map_, backend)
    return result


def _rows(map_: Tensor) -> Tensor:
    return map_[0].permute(1, 2, 0).flatten(0, 1)


def _source_grid(op: str, source_grid: object, patches: int) -> tuple[int, int]:
    if source_grid is None:
        side = math.isqrt(operator.index(patches))
        if side * side != patches:
            raise ValueError(
                f"murf_fast.{op}: `source_grid` is needed for a table of {patches} rows, which is no square"
            )
        return side, side
    height, width = _checks.grid(op, "source_grid", source_grid)
    if height * width != patches:
        raise ValueError(f"murf_fast.{op}: `source_grid` must hold the {patches} rows of the table, got {source_grid}")
    return height, width


def resample_patch_embed(
    weight: Tensor,
    patch_size: Size,
    *,
    mode: SmoothMode = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """A patch-embedding kernel for another patch size: the pseudo-inverse resize of FlexiViT.

    ``W' = W pinv(B)`` with ``B = U_h (x) U_w`` the resize of a patch: the token of an enlarged patch stays what it was.
    The pseudo-inverse of a Kronecker product is that of its factors, so the P'^2 x P^2 matrix never exists.

    Args:
        weight: (D, C, p_h, p_w), floating point.
        patch_size: (height, width) of the new patches in pixels; one integer means a square.
        mode, antialias: The resize; FlexiViT's and timm's is antialiased bicubic.

    Returns:
        (D, C, height, width) in the dtype of ``weight``; float32 arithmetic for half dtypes. Differentiable.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: the result, and one tensor of (D, C, height, p_w).

    Source: FlexiViT, section 3.4; ``resample_patch_embed`` of timm.
    """
    op = "resample_patch_embed"
    _checks.map_(op, "weight", weight)
    size = _checks.grid(op, "patch_size", patch_size)
    _checks.mode(op, mode, antialias)
    if tuple(size) == tuple(weight.shape[2:]):
        return weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows, columns = (
        torch.from_numpy(pseudo_inverse(n, m, mode, antialias)).to(weight.device, dtype)
        for n, m in zip(weight.shape[2:], size, strict=True)
    )
    return torch.einsum("dcij,iy,jx->dcyx", weight.to(dtype), rows, columns).to(weight.dtype)
