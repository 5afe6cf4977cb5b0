"""Cases of tables of upsamplers: features of a small ViT and an image to features at the image's size."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from murf_fast.cli.tables.case import OURS, PLAIN, YOURS, Case, Setting, Work
from murf_fast.cli.tables.counted import counted
from murf_fast.cli.tables.upsamplers import NAMES, PATCH, UPSAMPLERS, frozen

CHANNELS = 384  # of a small ViT
LABELS = ("size", "method", "code")
PARTS = {"forward": "fwd", "backward": "fwd + bwd"}
FACTS = {"parameters": ("params, M", 1e-6), "operations": ("GFLOP", 1e-9)}
NOTES = (
    f"features: of {CHANNELS} channels unless weights say otherwise, on a grid of a {PATCH}th of the output's sides.",
    "GFLOP: of the forward's products, two for a multiply-add; of plain PyTorch counted, of murf_fast less those "
    "that its windows and its order of operations spare.",
    "bwd: gradients of the parameters (of the features, where there are none); the forward is part of it.",
)


def cases(setting: Setting, known: Sequence[str]) -> list[Case]:
    """Every size with every method, ours and the original's order; a user's own model with each size.

    Raises:
        ValueError: A method is unknown, a size does not fit, or weights do not say for which method they are.
    """
    methods = [name.lower() for name in setting.models]
    unknown = [name for name in methods if name not in known]
    if unknown:
        raise ValueError(f"--models: no {', '.join(unknown)} in this table; there are: {', '.join(known)}")
    least = PATCH * max((UPSAMPLERS[name].least for name in methods), default=1)
    for size in setting.sizes:
        if size % PATCH or size < least:
            raise ValueError(f"--sizes: {size} must be a multiple of the patch of {PATCH} pixels, at least {least}")
    loaded = _loaded(setting, methods)
    own = None if setting.model is None else _own(setting.model)
    found = []
    for size in setting.sizes:
        for name in methods:
            found += _pair(setting, name, size, loaded)
        if own is not None:
            labels = {"size": size, "method": setting.model, "code": YOURS}
            channels = CHANNELS if loaded is None else loaded[1]
            found.append(Case(labels, _build(setting, own, _called, size, channels), dict.fromkeys(FACTS)))
    return found


def _own(name: str) -> Callable[[], object]:
    """Makes the user's upsampler anew; once before anything is measured, so that what is none is refused then."""
    make = imported(name)
    made = make()
    if not callable(made):
        raise ValueError(f"--model: {name} must return a model to call, it returned a {type(made).__name__}")
    return make


def imported(name: str) -> Callable[[], object]:
    """The function that ``module:function`` names; modules of the working directory, too.

    Raises:
        ValueError: The text is none such, or there is no such function.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"--model must be module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model: {name} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"--model: {name} must be a function that makes a model, it is a {type(found).__name__}")
    return found


def _loaded(setting: Setting, methods: Sequence[str]) -> tuple[nn.Module, int] | None:
    """The module that ``--weights`` holds, for the one learned method that was named; and its channels."""
    if setting.weights is None:
        return None
    learned = [name for name in methods if UPSAMPLERS[name].load is not None]
    if len(learned) != 1:
        raise ValueError(f"--weights are of one method: name it by --models, alone or with bilinear, got {methods}")
    module = cast("Callable[..., Any]", UPSAMPLERS[learned[0]].load)(setting.weights)
    inner = getattr(module, "stack", module)
    return module, getattr(inner, "v_dim", None) or getattr(inner, "dim", None) or CHANNELS


def _pair(setting: Setting, name: str, size: int, loaded: tuple[nn.Module, int] | None) -> list[Case]:
    method, grid = UPSAMPLERS[name], (size // PATCH, size // PATCH)
    own = loaded if method.load is not None else None
    channels = CHANNELS if loaded is None else loaded[1]

    def make() -> nn.Module:
        return method.make(channels, grid) if own is None else copy.deepcopy(own[0])

    with torch.device("meta") if own is None else torch.device("cpu"):
        module = make().eval()
    features, image = _inputs(setting, size, channels, "meta")
    module = module.to(setting.dtype)
    forward = counted(lambda m, i, f: frozen(lambda: method.plain(m, i, f))(), module, image, features)
    both = counted(lambda m, i, f: _gradients(m, method.plain, i, f), module, image, features)
    where = (module, channels, grid, (size, size))
    taps = setting.batch * method.elementwise(*where)
    plain = forward.operations + taps
    operations = {OURS: plain - setting.batch * method.saved(*where), PLAIN: plain}
    parameters = sum(p.numel() for p in module.parameters())
    # What our modules keep for their backward: eight maps of 128 channels, and the result with its gradient.
    kept = setting.batch * size * size * setting.dtype.itemsize * (3 * channels + 10 * 128)
    # A backward spares the share that its forward does.
    share = operations[OURS] / plain if plain else 1.0
    total = plain + both.operations + 3 * taps
    works = {OURS: Work(share * total, min(kept, both.bytes)), PLAIN: Work(total, both.bytes)}
    functions = {OURS: _called, PLAIN: method.plain}
    return [
        Case(
            {"size": size, "method": NAMES[name], "code": code},
            _build(setting, make, functions[code], size, channels),
            {"parameters": parameters, "operations": operations[code]},
            works[code],
        )
        for code in (OURS, PLAIN)
    ]


def _called(module: nn.Module, image: Tensor, features: Tensor) -> Tensor:
    return module(image, features)


def _inputs(setting: Setting, size: int, channels: int, device: str) -> tuple[Tensor, Tensor]:
    """Features as they come out of a ViT, channels last, and an image; the same in every dtype but for its rounding."""
    n = size // PATCH
    features = torch.randn(setting.batch, n, n, channels, device=device).permute(0, 3, 1, 2)
    image = torch.randn(setting.batch, 3, size, size, device=device)
    return features.to(setting.dtype), image.to(setting.dtype)


def _build(
    setting: Setting, make: Callable[..., Any], function: Callable[..., Any], size: int, channels: int
) -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Callable[[], object]]:
        torch.manual_seed(0)
        features, image = _inputs(setting, size, channels, setting.device)
        module = make()
        if isinstance(module, nn.Module):
            module = module.eval().to(setting.device, setting.dtype)
        return {
            "forward": frozen(lambda: function(module, image, features)),
            "backward": lambda: _gradients(module, function, image, features),
        }

    return build


def _gradients(module: object, function: Callable[..., Any], image: Tensor, features: Tensor) -> tuple[Any, ...]:
    parameters = [p for p in module.parameters() if p.requires_grad] if isinstance(module, nn.Module) else []
    if not parameters:
        features = features.detach().requires_grad_()
        parameters = [features]
    result = function(module, image, features)
    return torch.autograd.grad(result, parameters, torch.ones_like(result), allow_unused=True)
