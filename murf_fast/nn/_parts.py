"""Modules whose weights are read and whose forward is not called: what they were made of, and whether they still are.

Hooks, a replaced ``forward`` and replaced submodules have no say there, so a module that has them is refused.
Parametrizations are honoured: weights are read as attributes, which replicas of ``nn.DataParallel`` have too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from murf_fast.nn._signatures import has_global_hooks, is_customized

Form = tuple[type, tuple[Any, ...]]


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is a ``kind`` and nothing beside it is called with it."""
    return form_of(module)[0] is kind and peculiarity(module) is None


def weights_of(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors behind dotted names, as attributes."""
    return {name: functools.reduce(getattr, name.split("."), cast("Any", module)) for name in names}


def form_of(module: nn.Module) -> Form:
    """Its class, and the options that torch.nn names as constants (strides, groups, eps, ...)."""
    kind: Any = type(module).__base__ if is_parametrized(module) else type(module)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return kind, ()  # a probability is an option of a call, and heeded
    return kind, tuple(getattr(module, name, None) for name in getattr(kind, "__constants__", ()))


def forms_of(module: nn.Module) -> dict[str, Form]:
    """Of all submodules, by name."""
    return {name: form_of(m) for name, m in submodules_of(module).items()}


def peculiarity(module: nn.Module) -> str | None:
    """What about a module is lost if only its weights are read, or None."""
    return "has hooks or a forward of its own" if is_customized(module) else None


def is_as_made(module: nn.Module, forms: Mapping[str, Form]) -> bool:
    """Whether all submodules are those whose ``forms`` were noted, and nothing is lost if only weights are read."""
    found = submodules_of(module)
    return not has_global_hooks() and all(
        peculiarity(m) is None and form_of(m) == forms.get(name) for name, m in found.items()
    )


def refuse_peculiar(what: str, modules: Mapping[str, nn.Module], forms: Mapping[str, Form] | None = None) -> None:
    """Raises where one of the modules has something that would not be called, or is not what it was made as.

    Raises:
        ValueError: The message names the module.
    """
    for name, module in modules.items():
        reason = peculiarity(module)
        if reason is None and forms is not None and form_of(module) != forms.get(name):
            made = f", not the {forms[name][0].__name__} it was made as" if name in forms else " of somebody else's"
            reason = f"is a {type(module).__name__}{made}"
        if reason is not None:
            raise ValueError(
                f"murf_fast.{what}: `{name}` {reason}, which would do nothing: only its weights are read. Hooks on the "
                "whole model and parametrizations of weights work"
            )


def unlike(name: str, network: nn.Module, kinds: Sequence[type[nn.Module]]) -> str | None:
    """What tells ``network`` from a sequence of plain ``kinds``, convolutions being 1x1 and GELU exact; or None."""
    layers = {name: network, **{f"{name}.{i}": layer for i, layer in network.named_children()}}
    if len(layers) != 1 + len(kinds):
        return f"`{name}` has {len(layers) - 1} layers, not {len(kinds)}"
    for (path, layer), kind in zip(layers.items(), [nn.Sequential, *kinds], strict=True):
        if reason := peculiarity(layer):
            return f"`{path}` {reason}"
        if form_of(layer)[0] is not kind:
            return f"`{path}` is a {type(layer).__name__}, not a {kind.__name__}"
        if isinstance(layer, nn.Conv2d) and (layer.kernel_size, layer.stride, layer.groups) != ((1, 1), (1, 1), 1):
            return f"`{path}` is not a 1x1 convolution"
        if kind is nn.GELU and layer.approximate != "none":
            return f"`{path}` is approximate"
    return None


def is_as_written(module: nn.Module, packages: Sequence[str]) -> bool:
    """Whether all submodules are torch.nn's or those of ``packages``, without hooks, forwards of their own and
    parametrizations."""
    return all(
        peculiarity(m) is None
        and not is_parametrized(m)
        and (type(m).__module__.startswith("torch.nn.modules.") or type(m).__module__.split(".")[0] in packages)
        for m in submodules_of(module).values()
    )


def submodules_of(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """All submodules by name, without those that belong to parametrizations."""
    found = {}
    for name, child in module.named_children():
        if name != "parametrizations":
            found[f"{prefix}{name}"] = child
            found.update(submodules_of(child, f"{prefix}{name}."))
    return found
