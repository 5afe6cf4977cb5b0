"""Every Triton kernel compiles for the supported GPUs, keeps its values in registers and fits the shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("triton_compile_all.py")
# Largest shared memory of one block in bytes: CUDA C++ Programming Guide, table of compute capabilities.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
KERNELS = {
    "_feature_unify",
    "_feature_unify_grad_basis",
    "_feature_unify_grad_features",
    "_adaptive_conv",
    "_adaptive_conv_backward_kernels",
    "_bilateral_kernels",
    "_bilateral_kernels_backward",
    "_fold",
    "_image_to_patches",
    "_k_center_step",
    "_nearest_distance",
    "_pixel_linear",
    "_row_value_gradients",
    "_unfold",
    "_upsample_argmax",
    "_upsample_cross_entropy",
    "_upsample_cross_entropy_backward",
    "_upsample_expectation",
    "_upsample_expectation_backward",
    "_upsample_sum",
    "_window_attention",
    "_window_delta",
    "_window_grad_bias",
    "_window_grad_k",
    "_window_grad_q",
    "_window_grad_v",
    "_window_softmax",
}
# Compilations of kernels of matrix products that use tensor cores: both half dtypes do, float32 does without.
TENSOR_CORES = {
    "_nearest_distance": 8,
    "_window_attention": 8,
    "_window_delta": 8,
    "_window_grad_bias": 8,
    "_window_grad_k": 8,
    "_window_grad_q": 8,
    "_window_grad_v": 8,
    "_window_softmax": 16,
}


def missing_tools() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return "triton is not installed"
    tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    missing = [name for name in ("ptxas", "cuobjdump") if not (tools / name).exists()]
    return f"this triton comes without {' and '.join(missing)}" if missing else None


@pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))
def test_every_kernel_compiles_without_spills(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    processes = {
        arch: subprocess.Popen(
            [sys.executable, SCRIPT, str(arch)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arch in SHARED_LIMIT
    }
    for arch, process in processes.items():
        out, error = process.communicate(timeout=1500)
        assert process.returncode == 0, f"sm_{arch}: {error}"
        compiled = [json.loads(line) for line in out.splitlines()]
        assert {kernel["name"] for kernel in compiled} == KERNELS
        for kernel in compiled:
            assert kernel["stack"] == kernel["local"] == 0, f"sm_{arch} spills: {kernel}"
            assert kernel["shared"] <= SHARED_LIMIT[arch], f"sm_{arch}: {kernel}"
        for name, expected in TENSOR_CORES.items():
            assert sum(kernel["mma"] for kernel in compiled if kernel["name"] == name) == expected, f"sm_{arch}: {name}"
