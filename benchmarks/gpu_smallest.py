"""The smallest case of one operation on a GPU, for compute-sanitizer: `python benchmarks/gpu_smallest.py OP`."""

from __future__ import annotations

import sys

import torch

import murf_fast


def maps(gradient: bool = False) -> list[torch.Tensor]:
    return [torch.randn(1, 19, h, w, device="cuda", requires_grad=gradient) for h, w in ((3, 2), (2, 5))]


def differentiated(function) -> None:
    leaves = maps(gradient=True)
    function(leaves).sum().backward()
    assert all(m.grad.isfinite().all() for m in leaves)


TARGET = [[0, 18, -100, 7, 3], [5, 5, 5, 1, 2], [9, 9, 0, 0, 0]]

SMALLEST = {
    "upsample_concat": lambda: differentiated(lambda m: murf_fast.upsample_concat(m, (7, 9))),
    "upsample_sum": lambda: differentiated(lambda m: murf_fast.upsample_sum(m, (7, 9))),
    "upsample_mean": lambda: differentiated(lambda m: murf_fast.upsample_mean(m, (7, 9))),
    "resize": lambda: differentiated(lambda m: murf_fast.resize(m[0], (7, 9), mode="bicubic")),
    "upsample_argmax": lambda: murf_fast.upsample_argmax(maps(), (7, 9)),
    "upsample_expectation": lambda: differentiated(
        lambda m: murf_fast.upsample_expectation(m, (7, 9), torch.linspace(0, 1, 19, device="cuda"))
    ),
    "upsample_cross_entropy": lambda: differentiated(
        lambda m: murf_fast.upsample_cross_entropy(m, torch.tensor([TARGET], device="cuda"))
    ),
    "linear_head": lambda: differentiated(
        lambda m: murf_fast.linear_head(m, torch.randn(4, 38, device="cuda"), size=(7, 9))
    ),
    "resample_pos_embed": lambda: (
        murf_fast.resample_pos_embed(
            torch.randn(1, 10, 19, device="cuda", requires_grad=True), (4, 2), flavor="dinov2-hub", num_prefix_tokens=1
        )
        .sum()
        .backward()
    ),
    "patch_embed": lambda: murf_fast.patch_embed(
        torch.zeros(1, 9, 8, 3, dtype=torch.uint8, device="cuda"),
        [(6, 9)],
        torch.randn(5, 27, device="cuda"),
        patch_size=3,
        prefix=torch.randn(2, 5, device="cuda"),
    ),
    "image_to_patches": lambda: murf_fast.image_to_patches(
        torch.zeros(1, 3, 9, 8, dtype=torch.uint8, device="cuda"), [(6, 7)], 3
    ),
}

if __name__ == "__main__":
    SMALLEST[sys.argv[1]]()
    torch.cuda.synchronize()
