"""Triton's interpreter without what it does again at every call, which was a quarter of its time.

For a launch it replaces the functions of ``triton.language`` by its own. It looks through the whole language for them
at every launch, and at every call of a function within a kernel, where all are replaced already. For every array it
makes a table of all dtypes. What is computed stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

ORIGINALS = {name: getattr(interpreter, name) for name in ("_patch_lang", "_patch_builtin", "_get_np_dtype")}


class Patches:
    """``interpreter._patch_lang``: of a launch whole, of the calls within it only what that has left out."""

    def __init__(self) -> None:
        self.done: set[str] = set()

    def __call__(self, function) -> interpreter._LangPatchScope:
        seen = {name for name, lang in (("tl", tl), ("core", tl.core)) if _is_among(lang, function.__globals__)}
        if seen and seen <= self.done:
            return interpreter._LangPatchScope()
        scope = ORIGINALS["_patch_lang"](function)
        self.done |= seen
        return _Scope(scope, self.done)


class _Scope:
    """What a launch undoes at its end."""

    def __init__(self, scope: interpreter._LangPatchScope, done: set[str]) -> None:
        self.scope, self.done = scope, done

    def restore(self) -> None:
        self.done.clear()
        self.scope.restore()


def _is_among(lang: object, names: dict[str, object]) -> bool:
    return any(value is lang for value in names.values())


class Builtins:
    """``interpreter._patch_builtin``, with the functions found once, before any is replaced."""

    def __init__(self) -> None:
        self.found: dict[object, list[tuple[str, object]]] = {}

    def __call__(self, package, builder, scope: interpreter._LangPatchScope) -> None:
        if package not in self.found:
            members = ((name, getattr(package, name)) for name in dir(package))
            self.found[package] = [(name, member) for name, member in members if tl.core.is_builtin(member)]
        for name, member in self.found[package]:
            interpreter._patch_attr(package, name, member, builder, scope)


def numpy_dtypes() -> dict[tl.dtype, np.dtype]:
    found = {}
    for scalar in vars(tl).values():
        if type(scalar) is tl.dtype:
            with contextlib.suppress(KeyError):  # void has none
                found[scalar] = ORIGINALS["_get_np_dtype"](scalar)
    return found


@contextlib.contextmanager
def quick() -> Iterator[None]:
    scalars = numpy_dtypes()

    def numpy_dtype(dtype: tl.dtype) -> np.dtype:
        return np.dtype(np.uint64) if dtype.scalar.is_ptr() else scalars[dtype.scalar]

    replacements = (Patches(), Builtins(), numpy_dtype)
    with mock.patch.multiple(interpreter, **dict(zip(ORIGINALS, replacements, strict=True))):
        yield
