"""The launchers of both kinds of kernel: the same names, the same arguments, one file per operation."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

pytest.importorskip("triton")

from murf_fast import kernels, native
from murf_fast._discovery import exports

# What only one of the two has, and why.
NATIVE_ONLY = {
    "dense_attention": "on a GPU torch's own attention does it",
    "has_bf16_products": "a GPU's tensor cores always multiply in bfloat16",
    "stream_fill": "a GPU's write rate is measured with torch's own fill",
}
NATIVE, TRITON = (exports(package.__name__, package.__path__) for package in (native, kernels))


def test_the_same_names():
    assert NATIVE.keys() - TRITON.keys() == NATIVE_ONLY.keys()
    assert TRITON.keys() <= NATIVE.keys()


@pytest.mark.parametrize("name", sorted(TRITON))
def test_the_same_arguments(name):
    def parameters(launcher) -> list[tuple]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(launcher).parameters.values()]

    assert parameters(NATIVE[name]) == parameters(TRITON[name])


@pytest.mark.parametrize("name", sorted(TRITON))
def test_the_same_files(name):
    """A backward may have a file of its own."""

    def file(launcher) -> str:
        return Path(inspect.getfile(launcher)).stem.removesuffix("_backward")

    assert file(NATIVE[name]) == file(TRITON[name])


@pytest.mark.parametrize("name", sorted(NATIVE))
def test_native_launchers_are_described(name):
    assert NATIVE[name].__doc__
