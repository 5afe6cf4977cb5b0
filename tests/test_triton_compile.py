"""Every Triton kernel compiles for the supported GPUs, keeps its values in registers, fits the shared memory, and puts
its products on the tensor cores where their dtype and torch's switch for TF32 allow it.
"""

from __future__ import annotations

import warnings

import compiled_record
import offline
import pytest

pytestmark = pytest.mark.long

# Largest shared memory of one block in bytes: CUDA C++ Programming Guide, table of compute capabilities.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# For one chip, in whose shared memory its weights stay.
ONLY_ON = {"_pixel_linear_resident": 90}
# Its answers are proven by a bound for the sum of three products of TF32, whatever torch allows.
ALWAYS_SPLIT = ("_nearest_cells", "_nearest_distance", "_nearest_within")
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
    "_pixel_linear_resident",
    "_weighted_argmax",
    "_weighted_values",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    found, known = offline.compiled(tmp_path_factory), compiled_record.read()
    behind = sum(kernel["hash"] not in known for kernel in found)
    if behind:
        warnings.warn(
            f"{behind} of {len(found)} kernels have changed since they were recorded, and were compiled: "
            "python tests/triton_compile_all.py --record",
            stacklevel=2,
        )
    return found


def test_the_record_is_right(tmp_path_factory):
    """Of one operation, compiled here: the same hashes have the same facts."""
    if offline.missing_tools():
        pytest.skip(offline.missing_tools())
    known = compiled_record.read()
    for kernel in offline.compiled_now(["80:float16:only=upsample_argmax"], tmp_path_factory):
        facts = {name: value for name, value in kernel.items() if name not in compiled_record.ASKED}
        assert known.get(kernel["hash"], facts) == facts


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_kernel_fits(compiled, arch):
    """A kernel that is missing here needs a call in the `configurations` of its operation's file in benchmarks/."""
    own = [kernel for kernel in compiled if kernel["arch"] == arch]
    in_whole = any(int(request.split(":")[0]) == arch for request in compiled_record.WHOLE)
    expected = offline.launched_kernels() if in_whole else {k["name"] for k in compiled if k["products"]}
    assert {kernel["name"] for kernel in own} == {name for name in expected if ONLY_ON.get(name, arch) == arch}
    for kernel in own:
        assert kernel["stack"] == kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED_LIMIT[arch], kernel


def test_products_of_warp_groups_read_shared_memory(compiled):
    """On an H200 the gradient of q was wrong where ptxas had lost the address of the keys."""
    found = [kernel["strays"] for kernel in compiled if "strays" in kernel]
    assert len(found) > 100
    assert not any(found), [kernel for kernel in compiled if kernel.get("strays")]


def test_products_use_tensor_cores(compiled):
    """All in half precision, and those in float32 if TF32 is allowed; without that exact, or in three parts."""
    for kernel in compiled:
        expected = {"tf32"} if kernel["tf32"] or kernel["name"] in IN_PARTS else {"ieee", "tf32x3"}
        if kernel["name"] in ALWAYS_SPLIT:
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
    assert exact - {*ALWAYS_SPLIT} == fast - IN_PARTS
    assert len(fast) > 5
