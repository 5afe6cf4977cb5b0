"""Every Triton kernel compiles for the supported GPUs, keeps its values in registers, fits the shared memory, and puts
its products on the tensor cores where their dtype and torch's switch for TF32 allow it.
"""

from __future__ import annotations

import offline
import pytest

# Largest shared memory of one block in bytes: CUDA C++ Programming Guide, table of compute capabilities.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Its answers are proven by a bound that counts exact products.
ALWAYS_EXACT = "_nearest_distance"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    return offline.compiled(tmp_path_factory)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_kernel_fits(compiled, arch):
    """A kernel that is missing here needs a call in the `configurations` of its operation's file in benchmarks/."""
    own = [kernel for kernel in compiled if kernel["arch"] == arch]
    assert {kernel["name"] for kernel in own} == offline.launched_kernels()
    for kernel in own:
        assert kernel["stack"] == kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED_LIMIT[arch], kernel


def test_products_use_tensor_cores(compiled):
    """All in half precision, and those in float32 if TF32 is allowed; without that exact, or in three parts."""
    for kernel in compiled:
        allowed = kernel["tf32"] and kernel["name"] != ALWAYS_EXACT
        for dtype, precision in kernel["products"]:
            assert dtype != "f32" or precision in (("tf32",) if allowed else ("ieee", "tf32x3")), kernel
        fast = any(dtype != "f32" or precision != "ieee" for dtype, precision in kernel["products"])
        assert kernel["mma"] == fast, kernel


def test_every_kernel_of_products_follows_the_switch(compiled):
    exact = {k["name"] for k in compiled if ["f32", "ieee"] in k["products"] or ["f32", "tf32x3"] in k["products"]}
    fast = {kernel["name"] for kernel in compiled if ["f32", "tf32"] in kernel["products"]}
    assert exact - fast == {ALWAYS_EXACT}
    assert len(fast) > 5
