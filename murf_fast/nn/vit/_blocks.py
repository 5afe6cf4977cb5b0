"""The blocks of a vision transformer over a packed buffer of tokens."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from murf_fast.nn._signatures import Signature, has_global_hooks, is_plain_tensor, shell_of, signature, trains
from murf_fast.nn.vit import _attention
from murf_fast.nn.vit._attention import Run
from murf_fast.nn.vit._products import Products
from murf_fast.nn.vit.families._family import Family, Layer, Rotation
from murf_fast.nn.vit.families._layout import Product
from murf_fast.ops._derivatives import writes_nothing
from murf_fast.ops.patch_embed import PackedTokens

# Rows, about, of a chunk of token-wise work on a CPU. The memory of the hidden layer of 512 rows (6 MB of 3072 floats)
# is used again, where that of a whole buffer is handed out anew, page by page, in every block; it also bounds the peak.
# 512 itself was not tuned: the time goes to products, whose rate hardly depends on it from some hundred rows on.
CHUNK = 512

# Rows from which on a segment ends: whole sequences that are projected and attend together on a CPU. Products of fewer
# rows are slower, those of more are not faster, and take more memory.
SEGMENT = 1024

# Bytes up to which memory that was let go is handed out again with its pages; beyond, glibc maps new ones every time,
# and a buffer of ours is faster, though products into one that is there take a twentieth longer.
HANDED_OUT_AGAIN = 32 << 20

# Rows of a chunk elsewhere, where launches count: 16384 are 128 rows of tiles of 128 x 128, which times the columns of
# any product of a block are more than a GPU has multiprocessors. Not measured.
TOGETHER = 16384

_NO_ATTENTIONS = (
    "murf_fast.MultiResolutionEncoder: `attentions` need the parts of the model's {}, which has hooks, a forward of "
    "its own or other parts, and is called as a whole"
)


def run(
    packed: PackedTokens,
    family: Family,
    rotations: Sequence[Rotation | None],
    wanted: Collection[int],
    packable: Collection[Signature],
    attention: str = "sdpa",
    *,
    owns: bool = True,
    attentions: dict[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """Outputs (T, D) of the ``wanted`` blocks, by index.

    A block whose signature is among the ``packable`` ones runs over the whole buffer, by its parts. Every other one,
    and whatever calls the blocks if that is not packable, is called as the model does, once per resolution.

    With ``owns`` ``packed.tokens`` may be overwritten. ``attentions`` receives what CLS attends to in the wanted
    blocks.
    """
    hooked = has_global_hooks()
    container = family.container
    if container is not None and (hooked or shell_of(container) not in packable):
        if attentions is not None:
            raise ValueError(_NO_ATTENTIONS.format(type(container).__name__))
        return _through_container(packed, family, rotations, wanted)
    all_runs = _attention.runs(packed, rotations)
    limits = _attention.limits(attention, all_runs, packed.tokens.device)
    x, buffers, outputs = packed.tokens, _Buffers(packed.tokens), {}
    for i, block in enumerate(list(family.blocks)[: max(wanted) + 1]):
        into = attentions if i in wanted else None
        if hooked or not family.has_usual_attention or signature(block) not in packable:
            if into is not None:
                raise ValueError(_NO_ATTENTIONS.format(f"{type(block).__name__} {i}"))
            x, owns = _called(packed.with_tokens(x), family, block, rotations), False
        elif _is_functional(x, block):
            arguments = (x, family.layer(block), all_runs, limits, i, into)
            if family.checkpoints and torch.is_grad_enabled():
                x = checkpoint(_functional, *arguments, use_reentrant=False)
            else:
                x = _functional(*arguments)
        else:
            x, owns = x if owns else x.clone(), True
            _in_place(x, family.layer(block), all_runs, limits, buffers, i, into)
        if i in wanted:
            outputs[i], owns = x, False
    return outputs


def _called(packed: PackedTokens, family: Family, block: nn.Module, rotations: Sequence[Rotation | None]) -> Tensor:
    """A block by its own call, resolution by resolution."""
    call = family.call_block
    if family.checkpoints and torch.is_grad_enabled():
        call = functools.partial(checkpoint, call, use_reentrant=False)
    parts = [call(block, packed.block(s), r).flatten(0, 1) for s, r in enumerate(rotations)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _through_container(
    packed: PackedTokens, family: Family, rotations: Sequence[Rotation | None], wanted: Collection[int]
) -> dict[int, Tensor]:
    parts = [family.call_container(packed.block(s), r, wanted) for s, r in enumerate(rotations)]
    return {i: torch.cat([part[i].flatten(0, 1) for part in parts]) for i in wanted}


def _is_functional(x: Tensor, block: nn.Module) -> bool:
    """Whether a block's input must not be overwritten."""
    # Parameters may carry tangents, which is not worth a look at every one.
    if writes_nothing([x]) or x.requires_grad or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and trains(block)


def _functional(
    x: Tensor, layer: Layer, all_runs: list[Run], limits: object | None, i: int, into: dict[int, Tensor] | None
) -> Tensor:
    normed = layer.norm1(x)
    q, k, v = _heads([p(normed) for p in layer.projections], layer.heads)
    parts = (
        q if layer.query_norm is None else layer.query_norm(q),
        k if layer.key_norm is None else layer.key_norm(k),
        v,
    )
    if into is not None:
        into[i] = _attention.of_the_first(*parts[:2], all_runs, layer.scale)
    x = x + layer.attention_branch(_attended(parts, all_runs, limits, layer.scale).flatten(1))
    return x + layer.mlp_branch(x)


def _in_place(
    x: Tensor, layer: Layer, all_runs: list[Run], limits: object | None, buffers: _Buffers, i: Any, into: Any
) -> None:
    """The same block on ``x`` itself: beside it live q, k, v and the attention of one segment."""
    whole = limits is not None or x.device.type != "cpu"
    buffers.products.next_block()
    seen = []
    for segment in [all_runs] if whole else _attention.segments(all_runs, SEGMENT):
        start, stop = segment[0].start, segment[-1].stop
        own_runs = [replace(run_, start=run_.start - start) for run_ in segment]
        normed = layer.norm1(x[start:stop])
        projected = [buffers.project(key, normed, project) for key, project in enumerate(layer.projections)]
        del normed
        q, k, v = _heads(projected, layer.heads)
        for part, norm in ((q, layer.query_norm), (k, layer.key_norm)):
            if norm is not None:
                for rows in _chunks(part, 0, len(part)):
                    part[rows] = norm(part[rows])
        if into is not None:
            seen.append(_attention.of_the_first(q, k, own_runs, layer.scale))
        attended = _attended((q, k, v), own_runs, limits, layer.scale).flatten(1)
        del projected, q, k, v
        _finish(x, attended, layer, start, buffers.products)
    if into is not None:
        into[i] = torch.cat(seen) if seen else x.new_empty((0, layer.heads), dtype=torch.float32)


def _finish(x: Tensor, attended: Tensor, layer: Layer, start: int, products: Products) -> None:
    """Output projection and MLP of the rows from ``start`` on."""
    for rows in _chunks(x, start, start + len(attended)):
        part = x[rows]
        part += layer.attention_branch(attended[rows.start - start : rows.stop - start], products)
        part += layer.mlp_branch(part, products)


def _attended(
    parts: tuple[Tensor, Tensor, Tensor], all_runs: list[Run], limits: object | None, scale: float | None
) -> Tensor:
    if limits is not None:
        return _attention.attend_together(*parts, all_runs, limits, scale)
    q, k, v = parts
    results = [
        _attention.attend(q[r.start : r.stop], k[r.start : r.stop], v[r.start : r.stop], r, scale) for r in all_runs
    ]
    return results[0] if len(results) == 1 else torch.cat(results)


def _heads(projected: Sequence[Tensor], heads: int) -> Sequence[Tensor]:
    """q, k, v as (T, heads, dim), of three tensors or of one fused one."""
    if len(projected) == 1:
        return projected[0].unflatten(-1, (3, heads, -1)).unbind(1)
    return [part.unflatten(-1, (heads, -1)) for part in projected]


def _chunks(x: Tensor, start: int, stop: int) -> Iterator[slice]:
    """Equal ones of about the right size: products of the few rows that would be left take as long as those of many."""
    if stop == start:
        return
    step = CHUNK if x.device.type == "cpu" else TOGETHER
    count = max(1, round((stop - start) / step))
    ends = [start + (stop - start) * i // count for i in range(count + 1)]
    for begin, end in itertools.pairwise(ends):
        yield slice(begin, end)


class _Buffers:
    """The products of a pass, and what its projections write into, allocated once per pass."""

    def __init__(self, x: Tensor) -> None:
        self.products = Products(x)
        self._kept: dict[int, Tensor] = {}

    def project(self, key: int, x: Tensor, project: Any) -> Tensor:
        """``project(x)``; overwritten by the next one of this key."""
        shape = (len(x), project.out_features)
        if x.device.type == "cpu" and math.prod(shape) * x.element_size() <= HANDED_OUT_AGAIN:
            result = self.products.linear(x, project)
            return project(x) if result is None else result
        out = self._kept.get(key)
        if out is None or len(out) < math.prod(shape):
            out = self._kept[key] = x.new_empty(math.prod(shape))
        out = out[: math.prod(shape)].view(shape)
        # A subclass (an adapter, a quantized layer or weight) or autocast make a projection more than its product.
        is_plain = type(project) in (nn.Linear, Product) and is_plain_tensor(project.weight)
        if is_plain and not torch.is_autocast_enabled(x.device.type):
            if project.bias is None:
                return torch.mm(x, project.weight.mT, out=out)
            return torch.addmm(project.bias, x, project.weight.mT, out=out)
        return out.copy_(project(x))
