"""No Triton kernel without tests that run in the interpreter here and on a GPU where there is one."""

from __future__ import annotations

import ast
import importlib
import typing
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FOLDER = TESTS.parent / "kernels"
# Launchers that are tested under another name than their own.
ELSEWHERE = {
    "adaptive_conv": "bilateral",
    "bilateral_kernels": "bilateral",
    "gaussian_bilateral_upsample_backward": "gaussian_bilateral_upsample",
    "joint_bilateral_upsample": "bilateral",
    "resize_adjoint": "resize",
    "window_attention_backward": "window_attention",
}
# Files without `__all__` are what launchers share.
KERNELS = sorted(p.stem for p in FOLDER.glob("*.py") if "\n__all__ = " in p.read_text())


def on_device(function: ast.FunctionDef) -> bool:
    """Whether a test runs where the fixture `device` says."""
    arguments = {a.arg for a in function.args.args}
    return function.name.startswith("test") and bool(arguments & {"device", "gpu"})


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_is_tested_where_triton_runs(kernel):
    tree = ast.parse((TESTS / f"test_{ELSEWHERE.get(kernel, kernel)}.py").read_text())
    tests = [n for n in tree.body if isinstance(n, ast.FunctionDef) and on_device(n)]
    assert tests, f"no test of {kernel} uses the fixture `device`"


def test_no_test_chooses_its_gpu_by_itself():
    """It would run without the mark, which `pytest -m gpu` goes by."""
    allowed = {"conftest.py", "suite.py", Path(__file__).name}
    own = [p.name for p in sorted(TESTS.glob("*.py")) if "HAS_GPU =" in p.read_text() and p.name not in allowed]
    assert not own


def is_named_tuple(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


@pytest.mark.parametrize("file", sorted(p.stem for p in FOLDER.glob("[!_]*.py")))
def test_arguments_hold_tuples_or_no_tuples(file):
    """What :mod:`murf_fast.kernels.launch` says of nested arguments, which the interpreter would not show."""
    pytest.importorskip("triton")
    module = importlib.import_module(f"murf_fast.kernels.{file}")
    for name, kind in vars(module).items():
        if is_named_tuple(kind):
            fields = [is_named_tuple(field) for field in typing.get_type_hints(kind).values()]
            assert all(fields) or not any(fields), f"{file}.{name} mixes tuples with other fields"
