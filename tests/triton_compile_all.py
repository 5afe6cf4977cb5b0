"""Compiles every Triton kernel for one GPU architecture, without a GPU, exactly as the launchers call it.

The launchers run on CPU tensors under a stand-in for the driver; each kernel is specialized and compiled for the
architecture on the command line instead of being launched. Prints one JSON line per compiled kernel: its name, bytes
of shared memory, whether it uses tensor cores, and bytes of local memory and stack per thread (register spills) as
cuobjdump reports them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from murf_fast import kernels
from murf_fast.kernels.nearest_distance import launch_nearest
from murf_fast.ops._library import axes_of, axes_of_maps, empty_map
from murf_fast.tables.folded import folded_axis

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class OfflineDriver:
    """As much of a driver as compilation asks for."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def main(arch: int) -> None:
    compiled: dict[str, object] = {}
    driver.set_active(OfflineDriver(arch))
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = kernel
        return kernel

    JITFunction.run = compile_only
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        launch_everything(dtype)
    for kernel in compiled.values():
        mma = any(word in kernel.asm["ptx"] for word in ("mma.sync", "wgmma", "tcgen05.mma"))
        print(json.dumps({"name": kernel.name, "shared": kernel.metadata.shared, "mma": mma, **resources(kernel)}))


def launch_everything(dtype: torch.dtype) -> None:
    """Every launcher in the layouts, widths and options that change what is compiled."""
    patches(dtype)
    attention(dtype)
    unify(dtype)
    pixels(dtype)
    adaptive(dtype)
    bilateral(dtype)
    nearest(dtype)
    for channels_last in (True, False):
        maps = [empty_map(torch.zeros(1, dtype=dtype), (1, 768, n, n), channels_last) for n in (5, 9)]
        few = [m[:, :19] for m in maps]
        bilinear, bicubic = (axes_of_maps(maps, (23, 300), mode, False, None) for mode in ("bilinear", "bicubic"))
        out = empty_map(maps[0], (1, 1536, 23, 300), channels_last)
        bias, per_class = torch.zeros(1, 768), torch.ones(19)
        kernels.upsample_concat(maps, bilinear, out)
        kernels.upsample_sum(maps, bicubic, bias, out[:, :768])
        kernels.resize_adjoint(out[:, :768], bilinear[0], maps[0])
        # What a reduction does with a layout does not depend on the dtype.
        if channels_last or dtype == torch.float32:
            reductions(few, bilinear, None, per_class)
        if channels_last and dtype == torch.bfloat16:
            reductions(maps, bicubic, bias, torch.ones(768))
            reductions(few, axes_of_maps(few, (3, 3), "area", False, None), bias[:, :19].contiguous(), per_class)


def patches(dtype: torch.dtype) -> None:
    for images in (torch.zeros(2, 3, 20, 30, dtype=torch.uint8), torch.zeros(2, 3, 20, 30, dtype=dtype)):
        for channels_first in (True, False):
            out = torch.zeros(2, 6, 588, dtype=dtype)
            axes = axes_of(20, 30, (28, 42), "bilinear", False)
            kernels.image_to_patches(images, axes, 14, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), channels_first, out)


def attention(dtype: torch.dtype) -> None:
    """Blocks of 16 and 64 queries, few and many channels, with and without bias; layouts are strides."""
    for rule, side, heads, depth, channels in (("ratio 0.1", 42, 4, 128, 384), ("neighborhood 3 1 1", 12, 2, 32, 32)):
        n = 6 if side == 42 else side
        q, k, v = (
            empty_map(torch.zeros(1, dtype=dtype), (1, c, s, s), True)
            for c, s in ((depth, side), (depth, n), (channels, n))
        )
        out, lse = empty_map(q, (1, channels, side, side), True), torch.zeros(1, heads, side, side)
        for mean, bias in ((True, None), (False, torch.zeros(heads, side, n))):
            call = (q, k, v, bias, bias, (rule, rule), heads, mean, 0.1)
            kernels.window_attention(*call, out, lse)
            results = [torch.zeros_like(x) for x in (q, k, v)] + [torch.zeros(0) if bias is None else bias] * 2
            kernels.window_attention_backward(out, lse, *call, 1, results)


def unify(dtype: torch.dtype) -> None:
    features, basis = torch.zeros(1, 384, 3, 4, dtype=dtype), torch.zeros(128, 1, 5, 5)
    out = torch.zeros(1, 128, 3, 4, dtype=dtype)
    for released in (True, False):
        kernels.feature_unify(features, basis, released, out)
        kernels.feature_unify_backward(out, features, basis, released, 1, [features, basis])


def pixels(dtype: torch.dtype) -> None:
    """The layers of AnyUp's encoders."""
    x, image = torch.zeros(300, 128, dtype=dtype), torch.zeros(3, 300, dtype=dtype).T
    weight, row, norm = torch.zeros(128, 128, dtype=dtype), torch.zeros(128), (torch.zeros(128), torch.zeros(128))
    angles = (torch.zeros(10, 2, 128), torch.zeros(30, 2, 128))
    kernels.pixel_linear(image, x, weight=weight[:3], statistics=True)
    kernels.pixel_linear(x, x, norm=norm, weight=weight, statistics=True)
    kernels.pixel_linear(x, x, norm=norm, weight=weight, residual=x, statistics=True)
    kernels.pixel_linear(x, x, norm=norm, weight=weight, residual=x, rotation=angles)
    kernels.pixel_linear(x, x, weight=weight, residual=x)
    kernels.pixel_linear(x, x, norm=norm)
    kernels.pixel_linear(x, x, unit_eps=1e-7, weight=weight, bias=row)


def adaptive(dtype: torch.dtype) -> None:
    """FeatUp's doubling and its own function; planar maps, SimFeatUp's radius and FeatSharp's tripling."""
    adaptive_case(dtype, True, 3, 2, "bicubic")
    adaptive_case(dtype, True, 3, 1, None)
    # What the rest changes does not depend on the dtype.
    if dtype == torch.float32:
        adaptive_case(dtype, False, 3, 2, "bicubic")
        adaptive_case(dtype, False, 3, 1, None)
        adaptive_case(dtype, True, 5, 2, "bicubic")
        adaptive_case(dtype, True, 3, 3, "bilinear")


def adaptive_case(dtype: torch.dtype, channels_last: bool, radius: int, factor: int, mode: str | None) -> None:
    taps, size = 2 * radius + 1, 12 * factor
    read = 12 if mode else size + 2 * radius
    axes = (folded_axis(read, size, taps, mode, "reflect" if mode else None),) * 2
    source = empty_map(torch.zeros(1, dtype=dtype), (2, 384, read, read), channels_last)
    out = empty_map(source, (2, 384, size, size), channels_last)
    weights = empty_map(source, (2, taps**2, size, size), True, torch.float32 if mode else dtype)
    kernels.adaptive_conv(source, weights, torch.zeros(384), axes, out)
    kernels.adaptive_conv(source, weights, None, axes, out)
    kernels.adaptive_conv_backward_source(out, weights, axes, source)
    kernels.adaptive_conv_backward_kernels(out, source, axes, weights)


def bilateral(dtype: torch.dtype) -> None:
    """FeatUp's level, FeatSharp's without a fix-up, and SimFeatUp's radius."""
    for radius, fixup in ((3, True), (3, False), (5, True)):
        taps = (2 * radius + 1) ** 2
        guidance = torch.zeros(2, 3, 24, 24, dtype=dtype)
        shapes = [(), (), (32, 3), (32,), (32, 32), (32,)]
        shapes += [(taps, taps + 3), (taps,), (taps, taps), (taps,)] if fixup else []
        params = [torch.zeros(shape) for shape in shapes]
        out = empty_map(guidance, (2, taps, 24, 24), True)
        kernels.bilateral_kernels(guidance, params, None, None, radius, out)
        kernels.bilateral_kernels_backward(out, guidance, params, None, None, radius)


def nearest(dtype: torch.dtype) -> None:
    """The widths of ViT-S, B and L, and the narrowest."""
    for width in (384, 768, 1024, 64):
        rows, norms = torch.zeros(300, width, dtype=dtype), torch.zeros(300)
        launch_nearest(rows[:200], norms[:200], rows, norms)
        kernels.k_center_greedy(rows, torch.zeros(1, dtype=torch.int64), 1, None)


def reductions(maps, axes, bias, per_class) -> None:
    size = (axes[0][0].out_size, axes[0][1].out_size)
    pixels = torch.zeros(1, *size)
    gradients = [empty_map(m, m.shape, True, torch.float32) for m in maps]
    target = torch.zeros(1, *size, dtype=torch.int64)
    for labels, values in ((torch.uint8, None), (torch.int16, pixels.to(maps[0].dtype)), (torch.int32, None)):
        kernels.upsample_argmax(maps, axes, bias, pixels.to(labels), values)
    for softmax in (True, False):
        kernels.upsample_expectation(maps, axes, bias, per_class, softmax, pixels)
        rows = torch.zeros(size[0], len(per_class))
        kernels.upsample_expectation_backward(maps, axes, bias, per_class, softmax, pixels, gradients, rows)
    for weight, smoothing in ((None, 0.0), (per_class, 0.1)):
        options = (maps, axes, bias, target, weight, -100, smoothing)
        kernels.upsample_cross_entropy(*options, pixels, pixels)
        kernels.upsample_cross_entropy_backward(*options, pixels, pixels, gradients)


def resources(kernel) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name.lower(): int(re.search(rf"\b{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL")}


if __name__ == "__main__":
    main(int(sys.argv[1]))
