"""Modules whose weights are read and whose forward is not called: what they were made of, and whether they still are.

Hooks, a replaced ``forward`` and replaced submodules have no say there, so a module that has them is refused.
Parametrizations are honoured: weights are read as attributes, which replicas of ``nn.DataParallel`` have too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

Form = tuple[type, tuple]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def weights_of(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors behind dotted names, as attributes."""
    return {name: functools.reduce(getattr, name.split("."), module) for name in names}


def form_of(module: nn.Module) -> Form:
    """Its class, and the options that torch.nn names as constants (strides, groups, eps, ...)."""
    kind = type(module).__base__ if is_parametrized(module) else type(module)
    return kind, tuple(getattr(module, name, None) for name in getattr(kind, "__constants__", ()))


def forms_of(module: nn.Module) -> dict[str, Form]:
    """Of all submodules, by name."""
    return {name: form_of(m) for name, m in _named(module)}


def peculiarity(module: nn.Module) -> str | None:
    """What about a module is lost if only its weights are read, or None."""
    if any(getattr(module, name) for name in _HOOKS):
        return "has hooks"
    return "has a forward of its own" if "forward" in vars(module) else None


def refuse_changed(what: str, module: nn.Module, forms: Mapping[str, Form]) -> None:
    """Raises where a submodule is not what it was made as, or has something that would not be called.

    Raises:
        ValueError: The message names the submodule.
    """
    for name, submodule in _named(module):
        reason = peculiarity(submodule)
        if reason is None and name in forms and form_of(submodule) != forms[name]:
            reason = f"is another module than the {forms[name][0].__name__} it was made as"
        if reason is not None:
            raise ValueError(
                f"murf_fast.{what}: `{name}` {reason}, which would do nothing: only the weights of this module are "
                "read. Hooks and changes of the whole module, and parametrizations of weights, work"
            )


def _named(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Submodules by name, without those that belong to parametrizations."""
    for name, child in module.named_children():
        if name != "parametrizations":
            yield f"{prefix}{name}", child
            yield from _named(child, f"{prefix}{name}.")
