"""Vision transformers of the tables: by size with random weights, by ``--weights``, or a user's own by ``--model``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from murf_fast.cli.tables.case import Setting, Work
from murf_fast.cli.tables.counted import counted
from murf_fast.cli.tables.upsampling import imported
from murf_fast.nn.vit.families import resolved
from murf_fast.nn.vit.families._family import Family, tokens_in

# Channels, blocks and heads of DINOv2's.
SHAPES = {"ViT-S/14": (384, 12, 6), "ViT-B/14": (768, 12, 12), "ViT-L/14": (1024, 24, 16)}
IMAGE, PATCH = 518, 14


@dataclass(frozen=True)
class Vit:
    """A model in eval mode, frozen.

    Attributes:
        meta: It without memory, in the table's dtype.
        make: It on the table's device, in its dtype; made at the first call.
    """

    name: str
    meta: nn.Module
    make: Callable[[], nn.Module]

    @property
    def family(self) -> Family:
        inner, make = resolved(self.meta)
        return make(inner)

    def check(self, sizes: Sequence[int]) -> None:
        """A ValueError where the patch does not divide a size."""
        patch = self.family.patch_size
        for size in sizes:
            if size % patch:
                raise ValueError(f"--sizes: the patch of {patch} pixels of {self.name} does not divide {size}")


def vits(setting: Setting) -> list[Vit]:
    """The models of a setting: the one of ``--weights`` or ``--model``, else those of ``--models``.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        TypeError, ValueError, OSError: A name is unknown, or what was named is no vision transformer that loads.
    """
    if setting.model is not None:
        model = imported(setting.model)()
        if not isinstance(model, nn.Module):
            raise ValueError(f"--model: {setting.model} must return a model, it returned a {type(model).__name__}")
        return [_own(setting.model, model, setting)]
    if setting.weights is not None:
        from murf_fast.cli.anomaly.weights import load

        return [_own(setting.weights, load(setting.weights).model, setting)]
    return [_random(name, setting) for name in setting.models]


def _own(name: str, model: nn.Module, setting: Setting) -> Vit:
    try:
        resolved(model)
    except TypeError as error:
        raise ValueError(f"--model: {name}: {error}") from error
    model = model.eval().requires_grad_(False)
    meta = copy.deepcopy(model).to("meta", setting.dtype)
    return Vit(name, meta, functools.cache(lambda: model.to(setting.device, setting.dtype)))


def _random(name: str, setting: Setting) -> Vit:
    """``S`` and ``vit-s/14`` are ViT-S/14."""
    known = [full for full in SHAPES if name.lower() in (full.lower(), full.lower()[4])]
    if not known:
        raise ValueError(f"--models: no {name!r}; there are: {', '.join(SHAPES)}; others by --weights or --model")
    shape = SHAPES[known[0]]
    with torch.device("meta"):
        meta = _dinov2(*shape).to(setting.dtype)
    return Vit(known[0], meta, functools.partial(_made, shape, setting.device, setting.dtype))


@functools.lru_cache(maxsize=1)
def _made(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _dinov2(*shape).to(device, dtype)


def _dinov2(width: int, blocks: int, heads: int) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, image_size=IMAGE, patch_size=PATCH
    )
    return Dinov2Model(config).eval().requires_grad_(False)


def counted_or_problem(function: Callable[..., Any], vit: Vit, *inputs: Tensor) -> tuple[Work, str | None]:
    """What ``function(model, *inputs)`` takes; or, of a user's model, why its own forward does not do.

    Models whose code does not run without memory are not counted.
    """
    try:
        return counted(function, vit.meta, *inputs), None
    except NotATokenMapError as error:
        return Work(), str(error)
    except NotImplementedError:
        return Work(), None


class NotATokenMapError(ValueError):
    """A forward returns no tokens of patches."""


def own_features(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """The map (B, D, h, w) and the CLS tokens (B, D), if there are any, of the model's own forward of one size.

    Raises:
        NotATokenMapError: It returns no tokens of patches.
    """
    family, output = _own_forward(model, pixels)
    rows, columns = (n // family.patch_size for n in pixels.shape[2:])
    if isinstance(output, dict) and "x_norm_patchtokens" in output:
        tokens, cls = output["x_norm_patchtokens"], output.get("x_norm_clstoken")
    else:
        tokens = getattr(output, "last_hidden_state", None)
        tokens = tokens_in(output) if tokens is None else tokens
        is_known = isinstance(tokens, Tensor) and tokens.ndim == 3
        cls = tokens[:, 0] if is_known and tokens.shape[1] > rows * columns else None
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] < rows * columns:
        raise NotATokenMapError(f"the forward of {type(model).__name__} returns no tokens of patches")
    return _map(tokens, rows, columns), cls


def own_layers(model: nn.Module, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Maps (B, D, h, w) of the outputs of some blocks, in the model's own forward."""
    inner, make = resolved(model)
    blocks, seen = list(make(inner).blocks), {}
    handles = [
        blocks[i].register_forward_hook(lambda module, given, output, i=i: seen.update({i: tokens_in(output)}))
        for i in layers
    ]
    try:
        family, _ = _own_forward(model, pixels)
    finally:
        for handle in handles:
            handle.remove()
    rows, columns = (n // family.patch_size for n in pixels.shape[2:])
    tokens = [seen[i] if family.is_batch_first else seen[i].transpose(0, 1) for i in layers]
    return [_map(t, rows, columns) for t in tokens]


def _own_forward(model: nn.Module, pixels: Tensor) -> tuple[Family, object]:
    """As a family's verification calls it, which takes patches."""
    inner, make = resolved(model)
    family = make(inner)
    p = family.patch_size
    grid = tuple(n // p for n in pixels.shape[2:])
    cut = pixels.unflatten(3, (grid[1], p)).unflatten(2, (grid[0], p))  # B, 3, h, p, w, p
    order = (0, 2, 4, 1, 3, 5) if family.layout == "cyx" else (0, 2, 4, 3, 5, 1)
    patches = cut.permute(order).flatten(3).flatten(1, 2)
    return family, family.call_model(inner, patches, grid)


def _map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    return tokens[:, tokens.shape[1] - rows * columns :].mT.unflatten(2, (rows, columns))
