"""Whether a model is what its family says: once, on a stand-in of it, against its own forward.

The stand-in has the model's modules, without hooks and in evaluation mode, one block of each kind, and numbers of its
own in the place of the parameters: float32 on the CPU, such that every part counts (a layer scale of 1e-5 or a bias of
zero would hide one). So nothing of the model is run, written or read but its structure, and the cost does not depend
on its depth, its device or its dtype. No random numbers are drawn.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from murf_fast.nn._signatures import HOOKS, Signature, is_inert, is_patched, is_plain_tensor, shell_of, signature
from murf_fast.nn.vit import _attention, _blocks
from murf_fast.nn.vit.families._family import Family, Layer, Make, Rotation, left_out, tokens_in
from murf_fast.ops.image_to_patches import image_to_patches
from murf_fast.ops.patch_embed import Block, PackedTokens

GRID = (2, 3)  # in patches: no square, and another than a model's own
NEAR = 0.02  # of the largest value: structures differ by more, roundings (of bfloat16 products, if asked for) by less
NOISE = 4093  # a prime, so that the rows of a parameter differ

# What tells blocks of one class apart but does nothing in evaluation.
IDLE_ATTRIBUTES = ("training", "layer_idx", "p", "drop_prob", "gradient_checkpointing", "inplace")


class DiffersError(ValueError):
    """The model's own forward does otherwise than its family."""


class UninitializedError(Exception):
    """The model has no shapes or no buffers yet."""


def packable_parts(make: Make, model: nn.Module, verify: bool) -> frozenset[Signature]:
    """Signatures of the blocks, embeddings and norms of a model whose calls a packed pass may leave out.

    Raises:
        ValueError: The model's own forward does otherwise than its family; the message names the part that differs.
    """
    family = make(model)
    packable: set[Any] = set()
    for part in (family.container, family.final_norm, family.pre_norm, family.rope):
        if part is not None:
            packable.add((shell_of if part is family.container else signature)(part, is_bare=True))
    embedders = [m for m in family.embedders if m is not family.pre_norm]
    if not family.kind.calls_embeddings and all(_holds_only(m, family.projection) for m in embedders):
        packable |= {signature(m, is_bare=True) for m in embedders}
    kinds = _kinds(family)
    packable |= {kind[0] for kind, i in kinds.items() if _is_known(family, family.blocks[i])}
    if not verify:
        return frozenset(packable)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            return frozenset(packable - _refuted(make, model, list(kinds.values()), packable))
    except DiffersError:
        raise
    except Exception as error:  # a model that cannot be stood in for is taken as its kind, and its owner told
        if not isinstance(error, UninitializedError):
            warnings.warn(
                "murf_fast.MultiResolutionEncoder: `model` was not compared with its own forward: "
                f"{type(error).__name__}: {error}",
                stacklevel=4,
            )
        return frozenset(packable)


def _refuted(make: Make, model: nn.Module, indices: list[int], packable: set[Signature]) -> set[Signature]:
    """Signatures whose modules do otherwise than their parts."""
    twin = _twin(model, {id(make(model).blocks): indices})
    family = make(twin)
    refuted: set[Any] = set()
    seen: Any = _own_forward(family, twin)
    if seen is not None:
        ours = None if family.kind.calls_embeddings else _tokens(family, seen.patches, seen.grid)
        if not _is_near(ours, seen.tokens):
            if not _is_near(_called_tokens(family, seen.patches, seen.grid), seen.tokens):
                raise DiffersError(_refusal("the tokens before its first block (patch embedding, positions, CLS)"))
            refuted |= {signature(m, is_bare=True) for m in family.embedders}
        if seen.rotation is not None:
            rotation = family.rotation(seen.grid, torch.float32, torch.device("cpu"))
            if not all(_is_near(a, b) for a, b in zip(cast("Rotation", rotation)[:2], seen.rotation, strict=True)):
                refuted.add(signature(family.rope, is_bare=True))
        if seen.contained is not None and not _is_near(seen.last, seen.contained):
            refuted.add(shell_of(family.container, is_bare=True))
            seen.last = seen.contained
        last = family.final_norm(seen.last) if family.norms_last else seen.last
        if seen.features is not None and not _is_near(seen.pick(last), seen.features):
            raise DiffersError(_refusal("what follows its last block (the final norm)"))
    grid = GRID if seen is None else seen.grid
    prefix = family.prefix()
    rows = grid[0] * grid[1] + (0 if prefix is None else len(prefix))
    x = _numbers((2, rows, family.like.shape[0])) * 2
    packed = PackedTokens(x.flatten(0, 1), (Block(0, 2, grid),), rows - grid[0] * grid[1])
    rotation = family.rotation(grid, torch.float32, torch.device("cpu"))
    for block in family.blocks:
        own = signature(block, is_bare=True)
        if own in packable and not _is_block_near(family, block, packed, rotation):
            refuted.add(own)
    return refuted


def _is_block_near(family: Family, block: nn.Module, packed: PackedTokens, rotation: Rotation | None) -> bool:
    try:
        theirs = family.call_block(block, packed.block(0), rotation)
        parts = packed.with_tokens(packed.tokens.clone())
        ours = parts.tokens
        all_runs = _attention.runs(parts, [rotation])
        layer = family.layer(block)
        _blocks._in_place(ours, layer, all_runs, None, _blocks._Buffers(ours), 0, None)
        by_rows = _goes_by_rows(layer, ours.shape[1])
    except Exception:  # parts of any kind, which then are not taken out of their block
        return False
    return by_rows and _is_near(ours - packed.tokens, theirs.flatten(0, 1) - packed.tokens)


def _goes_by_rows(layer: Layer, width: int) -> bool:
    """Whether a token's results do not depend on which others are in the buffer: a layer that quantizes its input by
    the largest value (torch's dynamic quantization) has others with other resolutions.
    """
    first: Any = layer.projections[0]
    heads = first.out_features // (3 if len(layer.projections) == 1 else 1)
    for part, columns in (*((p, width) for p in (*layer.projections, layer.mlp)), (layer.output, heads)):
        x = _numbers((4, columns))
        if not _is_near(part(torch.cat([x, 64 * x]))[: len(x)], part(x)):
            return False
    return True


@dataclass
class _Seen:
    """What the model's own forward was seen to do."""

    patches: Tensor
    grid: tuple[int, int]
    tokens: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    last: Tensor | None = None
    contained: Tensor | None = None  # what the container of the blocks returns
    features: Tensor | None = None
    pick: Callable[[Tensor], Tensor] | None = None  # what the features are of all tokens


def _own_forward(family: Family, twin: nn.Module) -> _Seen | None:
    """The stand-in's own forward on a few patches, or on its own grid where it takes no other."""
    blocks = list(family.blocks)
    own_grid, errors = _own_grid(family), []
    for grid in dict.fromkeys((GRID, own_grid)):
        if grid is None:
            continue
        seen = _Seen(_patches(family, grid), grid)

        def before(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], seen: _Seen = seen) -> None:
            seen.tokens, seen.rotation = tokens_in(arguments[0]), options.get("position_embeddings")

        def after(module: nn.Module, arguments: tuple[Any, ...], output: object, seen: _Seen = seen) -> None:
            seen.last = tokens_in(output)

        def around(module: nn.Module, arguments: tuple[Any, ...], output: object, seen: _Seen = seen) -> None:
            seen.contained = tokens_in(output)

        handles = [
            blocks[0].register_forward_pre_hook(before, with_kwargs=True),
            blocks[-1].register_forward_hook(after),
        ]
        if family.container is not None and family.is_batch_first:
            handles.append(family.container.register_forward_hook(around))
        try:
            output = family.call_model(twin, seen.patches, grid)
        except NotImplementedError:
            return None  # a model without a forward
        except Exception as error:  # whatever it cannot do at this size
            errors.append(error)
            continue
        finally:
            for handle in handles:
                handle.remove()
        if seen.tokens is None or seen.last is None:
            raise RuntimeError("its forward does not call its blocks")
        if not family.is_batch_first:
            seen.tokens, seen.last = seen.tokens.transpose(0, 1), seen.last.transpose(0, 1)
        seen.pick, seen.features = _features(output, seen.last, family)
        return seen
    raise errors[0]


def _features(output: object, last: Tensor, family: Family) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    """What a forward returns, and which of the tokens that is; None where it is neither tokens nor CLS."""
    prefix = family.prefix()
    count = 0 if prefix is None else len(prefix)
    if isinstance(output, dict) and "x_norm_patchtokens" in output:
        return (lambda x: x[:, count:]), output["x_norm_patchtokens"]
    if not isinstance(output, (Tensor, dict)) and isinstance(output, tuple):
        output = output[0]
    output = getattr(output, "last_hidden_state", output)
    if isinstance(output, Tensor) and output.shape == last.shape:
        return (lambda x: x), output
    if isinstance(output, Tensor) and count and output.shape == last[:, 0].shape:
        return (lambda x: x[:, 0]), output
    return (lambda x: x), None


def _tokens(family: Family, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens as a packed pass makes them."""
    pixels = family.pixels(patches, grid)
    return family.embed(pixels, [tuple(pixels.shape[2:])], keep=False, backend="reference").block(0)


def _called_tokens(family: Family, patches: Tensor, grid: tuple[int, int]) -> Tensor | None:
    try:
        return family.call_embeddings(patches, grid)
    except Exception:  # embeddings that are no modules to call
        return None


def _patches(family: Family, grid: tuple[int, int]) -> Tensor:
    p = family.patch_size
    pixels = _numbers((1, 3, grid[0] * p, grid[1] * p))
    (patches,) = image_to_patches(pixels, [tuple(pixels.shape[2:])], p, layout=family.layout, backend="reference")
    return patches


def _own_grid(family: Family) -> tuple[int, int] | None:
    """The grid that a model was built for."""
    positions = family.positions()
    if positions is None or family.source_grid is not None:
        return family.source_grid
    side = math.isqrt(positions.shape[-2] - family.num_position_prefix)
    return side, side


def _kinds(family: Family) -> dict[tuple[Any, ...], int]:
    """The first block of every kind: by signature, shapes and attributes."""
    kinds: dict[tuple[Any, ...], int] = {}
    for i, block in enumerate(family.blocks):
        shapes = tuple(tuple(p.shape) for p in block.parameters() if not nn.parameter.is_lazy(p))
        attributes = tuple(
            (name, value)
            for module in block.modules()
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, type(None))) and name not in IDLE_ATTRIBUTES
        )
        kinds.setdefault((signature(block, is_bare=True), shapes, attributes), i)
    return kinds


def _is_known(family: Family, block: nn.Module) -> bool:
    """Whether a block has the parts of its family and nothing beside them."""
    try:
        parts = list(left_out(family, block))
    except AttributeError:
        return False
    if not all(nn.parameter.is_lazy(p) or is_plain_tensor(p) for p in block.parameters()):
        return False
    return all(not is_patched(type(m)) if holds else is_inert(m) for m, holds in parts)


def _holds_only(module: nn.Module, part: nn.Module) -> bool:
    """Whether a module is inert but for the ``part`` in it, and the part a plain convolution or product."""
    if is_inert(module) or module is part:
        return type(module) in (nn.Conv2d, nn.Linear) or is_inert(module)
    if any(m is part for m in module.modules()):
        children = (m for m in module.children())
        return not is_patched(type(module)) and all(_holds_only(child, part) for child in children)
    return isinstance(module, nn.Embedding)  # whose weight is the table


def _twin(module: nn.Module, kept: dict[int, list[int]], memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """The stand-in of a module; of the list of blocks only the ``kept`` ones."""
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"its {type(module).__name__} is scripted")
    twin = memo[id(module)] = object.__new__(type(module))
    state = dict(module.__dict__)
    state.pop("forward", None)
    state.update({name: OrderedDict() for name in HOOKS})
    state.update(training=False, _compiled_call_impl=None)
    if "gradient_checkpointing" in state:
        state["gradient_checkpointing"] = False
    state["_parameters"] = {name: _stand_in(p) for name, p in module._parameters.items()}
    state["_buffers"] = {name: _on_cpu(b) for name, b in module._buffers.items()}
    children = module._modules
    if id(module) in kept:
        chosen = list(children.values())
        children = {str(n): chosen[i] for n, i in enumerate(kept[id(module)])}
    twin.__dict__ = state
    state["_modules"] = {name: None if c is None else _twin(c, kept, memo) for name, c in children.items()}
    return twin


def _stand_in(parameter: Tensor | None) -> Tensor | None:
    if parameter is None:
        return None
    if nn.parameter.is_lazy(parameter):
        raise UninitializedError
    if not is_plain_tensor(parameter):
        raise TypeError(f"it has parameters of type {type(parameter).__name__}")
    if not parameter.is_floating_point():
        return _on_cpu(parameter)
    return nn.Parameter(_numbers(tuple(parameter.shape)), requires_grad=False)


def _on_cpu(buffer: Tensor | None) -> Tensor | None:
    if buffer is None:
        return None
    if buffer.device.type == "meta" or nn.parameter.is_lazy(buffer):
        raise UninitializedError
    return buffer.detach().to("cpu", torch.float32 if buffer.is_floating_point() else buffer.dtype, copy=True)


def _numbers(shape: tuple[int, ...]) -> Tensor:
    """Normal numbers: around a half in vectors, and such that matrices keep the size of what they multiply."""
    count = math.prod(shape)
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    values = noise.repeat(count // NOISE + 1)[:count].view(shape)
    if len(shape) < 2:
        return 0.5 + 0.3 * values
    return values if shape[0] == 1 or len(shape) == 3 else values / math.sqrt(count / shape[0])


def _is_near(ours: Tensor | None, theirs: Tensor) -> bool:
    if ours is None or ours.shape != theirs.shape:
        return False
    return float((ours - theirs).abs().max()) <= NEAR * float(theirs.abs().max())


def _refusal(part: str) -> str:
    return (
        f"murf_fast.MultiResolutionEncoder: `model` does otherwise than its kind in {part}: its own forward on a few "
        "patches gives other values (verify=False takes it all the same)"
    )
