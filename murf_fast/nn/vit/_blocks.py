"""The blocks of a vision transformer over a packed buffer of tokens."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from murf_fast.nn._signatures import Signature, has_global_hooks, is_plain_tensor, shell_of, signature, trains
from murf_fast.nn.vit import _attention
from murf_fast.nn.vit._attention import Run
from murf_fast.nn.vit.families._family import Family, Layer, Rotation
from murf_fast.nn.vit.families._layout import Product
from murf_fast.ops._derivatives import writes_nothing
from murf_fast.ops.patch_embed import PackedTokens

# Rows of a chunk of token-wise work on a CPU. The memory of the hidden layer of 512 rows (6 MB of 3072 floats) is used
# again, where that of a whole buffer is handed out anew, page by page, in every block; it also bounds the peak. 512
# itself was not tuned: the time goes to products, whose rate hardly depends on it.
CHUNK = 512

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
    cu_seqlens = packed.cu_seqlens.to(packed.tokens.device, non_blocking=True) if attention == "varlen" else None
    x, buffers, outputs = packed.tokens, _Buffers(), {}
    for i, block in enumerate(list(family.blocks)[: max(wanted) + 1]):
        into = attentions if i in wanted else None
        if hooked or not family.has_usual_attention or signature(block) not in packable:
            if into is not None:
                raise ValueError(_NO_ATTENTIONS.format(f"{type(block).__name__} {i}"))
            x, owns = _called(packed.with_tokens(x), family, block, rotations), False
        elif _is_functional(x, block):
            arguments = (x, family.layer(block), all_runs, cu_seqlens, i, into)
            if family.checkpoints and torch.is_grad_enabled():
                x = checkpoint(_functional, *arguments, use_reentrant=False)
            else:
                x = _functional(*arguments)
        else:
            x, owns = x if owns else x.clone(), True
            _in_place(x, family.layer(block), all_runs, cu_seqlens, buffers, i, into)
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
    x: Tensor, layer: Layer, all_runs: list[Run], cu_seqlens: Tensor | None, i: int, into: dict[int, Tensor] | None
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
    x = x + layer.attention_branch(_attended(parts, all_runs, cu_seqlens, layer.scale).flatten(1))
    return x + layer.mlp_branch(x)


def _in_place(x, layer: Layer, all_runs: list[Run], cu_seqlens: Tensor | None, buffers: _Buffers, i, into) -> None:
    """The same block on ``x`` itself: beside it live q, k, v and the attention of one run (with varlen, of all)."""
    projected = []
    for key, project in enumerate(layer.projections):
        projected.append(buffers.like(key, x, project))
    parts = _heads(projected, layer.heads)
    norms = [(part, n) for part, n in ((parts[0], layer.query_norm), (parts[1], layer.key_norm)) if n is not None]
    for rows in _chunks(x, 0, len(x)):
        normed = layer.norm1(x[rows])
        for project, out in zip(layer.projections, projected, strict=True):
            _project_into(out[rows], normed, project)
        for part, norm in norms:
            part[rows] = norm(part[rows])
    if into is not None:
        into[i] = _attention.of_the_first(*parts[:2], all_runs, layer.scale)
    if cu_seqlens is not None:
        _finish(x, _attended(parts, all_runs, cu_seqlens, layer.scale).flatten(1), layer, 0)
        return
    for run_ in all_runs:
        attended = _attention.attend(*(part[run_.start : run_.stop] for part in parts), run_, layer.scale)
        _finish(x, attended.flatten(1), layer, run_.start)


def _finish(x: Tensor, attended: Tensor, layer: Layer, start: int) -> None:
    """Output projection and MLP of the rows from ``start`` on."""
    for rows in _chunks(x, start, start + len(attended)):
        part = x[rows]
        part += layer.attention_branch(attended[rows.start - start : rows.stop - start])
        part += layer.mlp_branch(part)


def _attended(parts: Sequence[Tensor], all_runs: list[Run], cu_seqlens: Tensor | None, scale: float | None) -> Tensor:
    if cu_seqlens is not None:
        return _attention.attend_varlen(*parts, all_runs, cu_seqlens, scale)
    results = [_attention.attend(*(part[r.start : r.stop] for part in parts), r, scale) for r in all_runs]
    return results[0] if len(results) == 1 else torch.cat(results)


def _heads(projected: Sequence[Tensor], heads: int) -> Sequence[Tensor]:
    """q, k, v as (T, heads, dim), of three tensors or of one fused one."""
    if len(projected) == 1:
        return projected[0].unflatten(-1, (3, heads, -1)).unbind(1)
    return [part.unflatten(-1, (heads, -1)) for part in projected]


def _project_into(out: Tensor, x: Tensor, project: nn.Module | Product) -> None:
    # A subclass (an adapter, a quantized layer or weight) or autocast make a projection more than its product.
    is_plain = type(project) in (nn.Linear, Product) and is_plain_tensor(project.weight)
    if is_plain and not torch.is_autocast_enabled(x.device.type):
        if project.bias is None:
            torch.mm(x, project.weight.mT, out=out)
        else:
            torch.addmm(project.bias, x, project.weight.mT, out=out)
    else:
        out.copy_(project(x))


def _chunks(x: Tensor, start: int, stop: int) -> Iterator[slice]:
    step = CHUNK if x.device.type == "cpu" else stop - start
    for i in range(start, stop, max(step, 1)):
        yield slice(i, min(i + step, stop))


class _Buffers:
    """What the projections of every block write into, allocated once per pass."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def like(self, key: int, x: Tensor, project: nn.Module | Product) -> Tensor:
        width = project.out_features
        buffer = self._kept.get(key)
        if buffer is None or buffer.shape[1] != width:
            buffer = self._kept[key] = x.new_empty((len(x), width))
        return buffer
