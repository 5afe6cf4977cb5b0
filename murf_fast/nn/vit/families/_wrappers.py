"""The vision transformer in what it comes in: compiled and parallel modules, models with heads or a text tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

PARALLEL = (nn.DataParallel, DistributedDataParallel)


def unwrapped(model: Any, holders: Mapping[str, str]) -> nn.Module:
    """The module that computes the tokens: none of its wrappers is called by a packed pass.

    Args:
        holders: By names of classes, the attribute in which they hold a supported model.
    """
    seen = set()
    while id(model) not in seen:
        seen.add(id(model))
        if type(model).__name__ == "OptimizedModule":
            model = model._orig_mod
        elif isinstance(model, PARALLEL):
            model = model.module
        else:
            attribute = next((holders[k.__name__] for k in type(model).__mro__ if k.__name__ in holders), "")
            model = getattr(model, attribute, model) if attribute else model
    return model


def check_wrapper(model: nn.Module) -> None:
    """Refuses wrappers that do work for the parameters, which a packed pass would leave undone."""
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    if any(p.requires_grad for wrapper in wrappers for p in wrapper.parameters()):
        raise ValueError(
            "murf_fast.MultiResolutionEncoder: `model` must be frozen inside of DistributedDataParallel, whose call "
            "would synchronise its gradients, got parameters that require them: pass `model.module`, and wrap what you "
            "train around the encoder"
        )


def hint(model: nn.Module, is_supported: Callable[[nn.Module], bool]) -> str:
    """Where in a model that is not supported the outermost supported ones are."""
    found: list[str] = []
    for name, module in model.named_modules():
        if name and not any(name.startswith(f"{outer}.") for outer in found) and is_supported(module):
            found.append(name)
    if not found:
        return ""
    return f"; it holds one: pass {' or '.join(f'`model.{name}`' for name in found)}"
