"""No Triton kernel without tests that run in the interpreter here and on a GPU where there is one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Kernels whose launchers are tested under another name than their own.
ELSEWHERE = {
    "adaptive_conv": "triton_bilateral",
    "bilateral_kernels": "triton_bilateral",
    "joint_bilateral_upsample": "triton_bilateral",
    "resize_adjoint": "resize",
}
# What launchers share.
SHARED = {"__init__", "launch", "resample", "folded", "bilateral_network"}
KERNELS = sorted(p.stem for p in (TESTS.parent / "kernels").glob("*.py") if p.stem not in SHARED)


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
