"""The blocks of a vision transformer over a packed buffer of tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from murf_fast.nn import _attention
from murf_fast.nn._attention import Rotation, Run
from murf_fast.nn._families import Layer
from murf_fast.ops.patch_embed import PackedTokens

# Rows of a chunk of token-wise work on a CPU. The memory of the hidden layer of 512 rows (6 MB of 3072 floats) is used
# again, where that of a whole buffer is handed out anew, page by page, in every block; it also bounds the peak. 512
# itself was not tuned: the time goes to products, whose rate hardly depends on it.
CHUNK = 512


def run(
    packed: PackedTokens,
    layers: Sequence[Layer],
    heads: int,
    rotations: Sequence[Rotation | None],
    wanted: Collection[int],
    attention: str = "sdpa",
) -> dict[int, Tensor]:
    """Outputs (T, D) of the ``wanted`` blocks, by index. ``packed.tokens`` may be overwritten."""
    layers = layers[: max(wanted) + 1]
    all_runs = _attention.runs(packed, rotations)
    cu_seqlens = packed.cu_seqlens.to(packed.tokens.device, non_blocking=True) if attention == "varlen" else None
    functional = torch.compiler.is_compiling() or packed.tokens.requires_grad or _trains(layers)
    x, buffers, outputs = packed.tokens, _Buffers(), {}
    for i, layer in enumerate(layers):
        if functional:
            x = _functional(x, layer, heads, all_runs, cu_seqlens)
        else:
            _in_place(x, layer, heads, all_runs, cu_seqlens, buffers)
        if i in wanted:
            outputs[i] = x if functional or i == len(layers) - 1 else x.clone()
    return outputs


def _functional(x: Tensor, layer: Layer, heads: int, all_runs: list[Run], cu_seqlens: Tensor | None) -> Tensor:
    normed = layer.norm1(x)
    y = layer.output(_attended(_heads([p(normed) for p in layer.projections], heads), all_runs, cu_seqlens).flatten(1))
    x = x + (y if layer.scale1 is None else layer.scale1(y))
    y = layer.mlp(layer.norm2(x))
    return x + (y if layer.scale2 is None else layer.scale2(y))


def _in_place(x, layer: Layer, heads: int, all_runs: list[Run], cu_seqlens: Tensor | None, buffers: _Buffers) -> None:
    """The same block on ``x`` itself: beside it live q, k, v and the attention of one run (with varlen, of all)."""
    projected = []
    for i, project in enumerate(layer.projections):
        projected.append(buffers.like(i, x, project))
    for rows in _chunks(x, 0, len(x)):
        normed = layer.norm1(x[rows])
        for project, out in zip(layer.projections, projected, strict=True):
            _project_into(out[rows], normed, project)
    parts = _heads(projected, heads)
    if cu_seqlens is not None:
        _finish(x, _attended(parts, all_runs, cu_seqlens).flatten(1), layer, 0)
        return
    for run_ in all_runs:
        attended = _attention.attend(*(part[run_.start : run_.stop] for part in parts), run_)
        _finish(x, attended.flatten(1), layer, run_.start)


def _finish(x: Tensor, attended: Tensor, layer: Layer, start: int) -> None:
    """Output projection and MLP of the rows from ``start`` on."""
    for rows in _chunks(x, start, start + len(attended)):
        part = x[rows]
        y = layer.output(attended[rows.start - start : rows.stop - start])
        part += y if layer.scale1 is None else layer.scale1(y)
        y = layer.mlp(layer.norm2(part))
        part += y if layer.scale2 is None else layer.scale2(y)


def _attended(parts: Sequence[Tensor], all_runs: list[Run], cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is not None:
        return _attention.attend_varlen(*parts, all_runs, cu_seqlens)
    results = [_attention.attend(*(part[r.start : r.stop] for part in parts), r) for r in all_runs]
    return results[0] if len(results) == 1 else torch.cat(results)


def _heads(projected: Sequence[Tensor], heads: int) -> Sequence[Tensor]:
    """q, k, v as (T, heads, dim), of three tensors or of one fused one."""
    if len(projected) == 1:
        return projected[0].unflatten(-1, (3, heads, -1)).unbind(1)
    return [part.unflatten(-1, (heads, -1)) for part in projected]


def _project_into(out: Tensor, x: Tensor, project: nn.Module) -> None:
    # A subclass (an adapter, a quantized layer), hooks or autocast make a projection more than its product.
    plain = type(project) is nn.Linear and not (project._forward_hooks or project._forward_pre_hooks)
    if plain and not torch.is_autocast_enabled(x.device.type):
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


def _trains(layers: Sequence[Layer]) -> bool:
    if not torch.is_grad_enabled():
        return False
    modules = [m for layer in layers for m in vars(layer).values() if isinstance(m, nn.Module)]
    modules += [m for layer in layers for m in layer.projections]
    return any(p.requires_grad for m in modules for p in m.parameters())


class _Buffers:
    """What the projections of every block write into, allocated once per pass."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def like(self, key: int, x: Tensor, project: nn.Module) -> Tensor:
        width = project.out_features
        buffer = self._kept.get(key)
        if buffer is None or buffer.shape[1] != width:
            buffer = self._kept[key] = x.new_empty((len(x), width))
        return buffer
