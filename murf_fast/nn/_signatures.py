"""Whether a module does what its class says and no more, so that its parts may be taken and its call left out.

The packed pass never calls a block, an attention or the embeddings of a model: it calls their parts. It may do so only
as long as nobody has put anything into those calls: hooks, a ``forward`` of the instance, another class, checkpointing.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from murf_fast._torch_versions import has_any_global_hook

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Ends of names of classes that do nothing in evaluation.
INERT = ("DropPath", "PatchDropout", "PatchDropoutWithIndices")

Signature = tuple[Any, ...]  # (class, its forward, ((name, signature) of each child))


def signature(module: nn.Module, *, is_bare: bool = False) -> Signature | None:
    """Classes and forwards of a module and its descendants; None if one of them is more than its class.

    With ``is_bare`` what was put into the instances is not looked at. A microsecond a module.
    """
    shell = shell_of(module, is_bare=is_bare)
    if shell is None:
        return None
    children = []
    for name, child in module.__dict__["_modules"].items():
        if child is None:
            continue
        found = signature(child, is_bare=is_bare)
        if found is None:
            return None
        children.append((name, found))
    return (*shell, tuple(children))


def shell_of(module: nn.Module, *, is_bare: bool = False) -> Signature | None:
    """The signature of a module by itself, whatever its children are."""
    if not is_bare and is_customized(module):
        return None
    kind = type(module)
    return kind, kind.forward


def is_customized(module: nn.Module) -> bool:
    """Whether this instance, its children apart, has hooks or a call of its own, or is to be checkpointed."""
    state = module.__dict__
    if "forward" in state or state.get("_compiled_call_impl") is not None:
        return True
    for name in HOOKS:
        hooks = state.get(name)
        if hooks and not all(_is_idle(hook) for hook in hooks.values()):
            return True
    return bool(state.get("gradient_checkpointing")) and state["training"] and torch.is_grad_enabled()


def has_global_hooks() -> bool:
    """Whether hooks on every module are in place."""
    return bool(has_any_global_hook())


def is_patched(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class was put in its place by another module than the one that defines the class."""
    owner = next((c for c in kind.__mro__ if "forward" in c.__dict__), nn.Module)
    forward = inspect.unwrap(owner.__dict__.get("forward", nn.Module.forward))
    return owner is not nn.Module and getattr(forward, "__module__", None) != owner.__module__


def is_inert(module: nn.Module) -> bool:
    """Whether a module does nothing in evaluation: identities, dropout (of patches too) and stochastic depth."""
    kinds = (nn.Identity, nn.Dropout)
    return type(module) in kinds or type(module).__name__.endswith(INERT)


def is_plain_tensor(parameter: torch.Tensor) -> bool:
    """Whether a parameter is of torch's own types: others (of quantized weights, say) say what an operation does."""
    return type(parameter) in (nn.Parameter, torch.Tensor)


def trains(module: nn.Module) -> bool:
    """Whether a parameter of a module or a descendant needs its gradient; those of DataParallel's replicas as well."""
    state = module.__dict__
    parameters = [*state["_parameters"].values(), *state.get("_former_parameters", {}).values()]
    if any(p is not None and p.requires_grad for p in parameters):
        return True
    return any(child is not None and trains(child) for child in state["_modules"].values())


def _is_idle(hook: object) -> bool:
    """transformers leaves hooks on every block once it was asked for hidden states; they only act in its own calls."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
