"""Every Triton kernel compiles for the supported GPUs, keeps its values in registers, fits the shared memory, and puts
its products on the tensor cores where their dtype and torch's switch for TF32 allow it.
"""

from __future__ import annotations

import offline
import pytest

# Largest shared memory of one block in bytes: CUDA C++ Programming Guide, table of compute capabilities.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Its answers are proven by a bound for the sum of three products of TF32, whatever torch allows.
ALWAYS_SPLIT = "_nearest_distance"
# Their float32 products are three of TF32 parts, which have the same digits (kernels/products.py).
IN_PARTS = {
    "_adaptive_conv",
    "_adaptive_conv_backward_kernels",
    "_feature_unify",
    "_gaussian_bilateral_upsample",
    "_gaussian_statistics",
    "_gaussian_to_maps",
    "_gaussian_to_values",
    "_feature_unify_grad_patches",
    "_feature_unify_grad_basis",
    "_pixel_linear",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    return offline.compiled(tmp_path_factory)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_kernel_fits(compiled, arch):
    """A kernel that is missing here needs a call in the `configurations` of its operation's file in benchmarks/."""
    own = [kernel for kernel in compiled if kernel["arch"] == arch]
    in_whole = any(int(request.split(":")[0]) == arch for request in offline.WHOLE)
    expected = offline.launched_kernels() if in_whole else {k["name"] for k in compiled if k["products"]}
    assert {kernel["name"] for kernel in own} == expected
    for kernel in own:
        assert kernel["stack"] == kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED_LIMIT[arch], kernel


def test_products_use_tensor_cores(compiled):
    """All in half precision, and those in float32 if TF32 is allowed; without that exact, or in three parts."""
    for kernel in compiled:
        expected = {"tf32"} if kernel["tf32"] or kernel["name"] in IN_PARTS else {"ieee", "tf32x3"}
        if kernel["name"] == ALWAYS_SPLIT:
            expected = {"tf32x3"}
        for dtype, precision in kernel["products"]:
            assert dtype != "f32" or precision in expected, kernel
        fast = any(dtype != "f32" or precision != "ieee" for dtype, precision in kernel["products"])
        assert kernel["mma"] == fast, kernel


def test_every_kernel_of_products_follows_the_switch(compiled):
    for name in IN_PARTS:
        own = [k for k in compiled if (k["name"], k["arch"], k["dtype"]) == (name, 90, "float32")]
        single, parts = ([kernel["dots"] for kernel in own if kernel["tf32"] == tf32] for tf32 in (True, False))
        assert sorted(parts) == sorted(3 * n for n in single)
        assert any(single)
    exact = {k["name"] for k in compiled if ["f32", "ieee"] in k["products"] or ["f32", "tf32x3"] in k["products"]}
    fast = {kernel["name"] for kernel in compiled if ["f32", "tf32"] in kernel["products"]}
    assert exact - {ALWAYS_SPLIT} == fast - IN_PARTS
    assert len(fast) > 5
