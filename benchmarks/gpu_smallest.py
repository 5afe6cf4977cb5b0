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


def jbu_params() -> list[torch.Tensor]:
    """Of three guides, eight keys and 3 x 3 taps."""
    shapes = [(), (), (8, 3), (8,), (8, 8), (8,), (9, 12), (9,), (9, 9), (9,)]
    return [torch.ones(shape, device="cuda") if not shape else torch.randn(shape, device="cuda") for shape in shapes]


def bilateral(function) -> None:
    """``function`` of a source, guidance and parameters, and all their gradients."""
    leaves = [torch.randn(1, 19, 3, 2, device="cuda"), torch.randn(1, 3, 6, 5, device="cuda"), *jbu_params()]
    leaves = [t.requires_grad_() for t in leaves]
    function(leaves[0], leaves[1], murf_fast.BilateralParams(*leaves[2:])).square().sum().backward()
    assert all(t.grad is None or t.grad.isfinite().all() for t in leaves)


def attention(function, size: tuple[int, int]) -> None:
    """``function`` of queries of ``size`` and keys and values on a grid of 3 x 4, and all their gradients."""
    q, k, v = (torch.randn(1, 20, *grid, device="cuda", requires_grad=True) for grid in (size, (3, 4), (3, 4)))
    function(q, k, v).square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


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
    "bilateral_kernels": lambda: bilateral(lambda _, g, p: murf_fast.bilateral_kernels(g, p, radius=1)),
    "adaptive_conv": lambda: bilateral(
        lambda s, g, _: murf_fast.adaptive_conv(s, g.repeat(1, 3, 1, 1), mode="bicubic")
    ),
    "joint_bilateral_upsample": lambda: murf_fast.joint_bilateral_upsample(
        maps()[0], torch.randn(1, 3, 6, 5, device="cuda"), murf_fast.BilateralParams(*jbu_params()), radius=1
    ),
    "window_attention": lambda: attention(
        lambda q, k, v: murf_fast.window_attention(
            q, k, v, windows=murf_fast.windows.ratio((7, 9), (3, 4), 0.3), num_heads=2
        ),
        (7, 9),
    ),
    "neighborhood_attention": lambda: attention(
        lambda q, k, v: murf_fast.neighborhood_attention(
            *(x.unflatten(1, (2, -1)).permute(0, 3, 4, 1, 2) for x in (q, k, v)), kernel_size=3
        ),
        (3, 4),
    ),
    "feature_unify": lambda: differentiated(
        lambda m: murf_fast.feature_unify(m[0], torch.randn(8, 1, 3, 3, device="cuda"))
    ),
    "anyup": lambda: (
        murf_fast.nn.AnyUp(qk_dim=32).cuda().requires_grad_(False)(torch.randn(1, 3, 9, 8, device="cuda"), maps()[0])
    ),
    "nearest_distance": lambda: murf_fast.nearest_distance(
        torch.randn(5, 19, device="cuda"), murf_fast.NearestIndex(torch.randn(37, 19, device="cuda")), k=3
    ),
    "k_center_greedy": lambda: murf_fast.k_center_greedy(torch.randn(37, 19, device="cuda"), count=5),
    "gaussian_blur": lambda: murf_fast.gaussian_blur(maps()[0], sigma=1.0),
    "image_to_patches": lambda: murf_fast.image_to_patches(
        torch.zeros(1, 3, 9, 8, dtype=torch.uint8, device="cuda"), [(6, 7)], 3
    ),
}

if __name__ == "__main__":
    SMALLEST[sys.argv[1]]()
    torch.cuda.synchronize()
