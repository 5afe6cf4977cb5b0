"""Every Triton kernel compiles for the supported GPUs, keeps its values in registers, fits the shared memory, and puts
its products on the tensor cores where their dtype and torch's switch for TF32 allow it.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("triton_compile_all.py")
FOLDER = Path(__file__).resolve().parents[1] / "kernels"
# Largest shared memory of one block in bytes: CUDA C++ Programming Guide, table of compute capabilities.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# What each is asked for: float32 everywhere; a half dtype, whose kernels differ by a conversion; TF32.
REQUESTS = ("90:float32", "80:float32", "100:float32", "90:float16", "80:bfloat16", "100:bfloat16", "90:float32:tf32")
# Its answers are proven by a bound that counts exact products.
ALWAYS_EXACT = "_nearest_distance"


def missing_tools() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return "triton is not installed"
    tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    missing = [name for name in ("ptxas", "cuobjdump") if not (tools / name).exists()]
    return f"this triton comes without {' and '.join(missing)}" if missing else None


def launched_kernels() -> set[str]:
    """Functions under @triton.jit that no other of them calls."""
    functions = [
        node
        for path in FOLDER.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    called = {node.id for f in functions for node in ast.walk(f) if isinstance(node, ast.Name)}
    return {f.name for f in functions} - called


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    if missing_tools():
        pytest.skip(missing_tools())
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT, *REQUESTS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_kernel_fits(compiled, arch):
    """A kernel that is missing here needs a call in the `configurations` of its operation's file in benchmarks/."""
    own = [kernel for kernel in compiled if kernel["arch"] == arch]
    assert {kernel["name"] for kernel in own} == launched_kernels()
    for kernel in own:
        assert kernel["stack"] == kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED_LIMIT[arch], kernel


def test_products_use_tensor_cores(compiled):
    """All in half precision, and those in float32 if TF32 is allowed; without that they are exact."""
    for kernel in compiled:
        allowed = kernel["tf32"] and kernel["name"] != ALWAYS_EXACT
        for dtype, precision in kernel["products"]:
            assert dtype != "f32" or precision == ("tf32" if allowed else "ieee"), kernel
        fast = any(dtype != "f32" or precision == "tf32" for dtype, precision in kernel["products"])
        assert kernel["mma"] == fast, kernel


def test_every_kernel_of_products_follows_the_switch(compiled):
    exact = {kernel["name"] for kernel in compiled if ["f32", "ieee"] in kernel["products"]}
    fast = {kernel["name"] for kernel in compiled if ["f32", "tf32"] in kernel["products"]}
    assert exact - fast == {ALWAYS_EXACT}
    assert len(fast) > 5
