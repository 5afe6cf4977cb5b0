"""The operations that random cases are drawn for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fuzz import (
    cases_attention,
    cases_bilateral,
    cases_blur,
    cases_head,
    cases_logits,
    cases_patches,
    cases_positions,
    cases_resize,
    cases_rows,
    cases_unify,
    cases_upsample,
)
from fuzz.compare import Comparison
from fuzz.draw import Draw

CASES: dict[str, Callable[[Draw], list[Comparison]]] = {
    function.__name__: function
    for function in (
        cases_resize.resize,
        cases_upsample.upsample_concat,
        cases_upsample.upsample_sum,
        cases_upsample.upsample_mean,
        cases_logits.upsample_argmax,
        cases_logits.upsample_expectation,
        cases_logits.upsample_cross_entropy,
        cases_blur.gaussian_blur,
        cases_patches.image_to_patches,
        cases_patches.patch_embed,
        cases_positions.resample_pos_embed,
        cases_positions.resample_patch_embed,
        cases_bilateral.adaptive_conv,
        cases_bilateral.bilateral_kernels,
        cases_bilateral.joint_bilateral_upsample,
        cases_attention.window_rules,
        cases_attention.window_attention,
        cases_attention.neighborhood_attention,
        cases_unify.feature_unify,
        cases_head.linear_head,
        cases_rows.nearest_distance,
        cases_rows.ivf_index,
        cases_rows.k_center_greedy,
        cases_rows.au_curves,
    )
}


def comparisons(draw: Draw, op: str) -> list[Comparison]:
    """The comparisons of a case, with as many threads as it draws."""
    threads = torch.get_num_threads()
    torch.set_num_threads(draw.choice("threads", (1, 3), (5, 1)))
    try:
        return CASES[op](draw)
    finally:
        torch.set_num_threads(threads)


def failure_of(draw: Draw, op: str) -> str | None:
    """What is wrong with a case, and how to repeat it; None if nothing is."""
    try:
        failures = [text for check in comparisons(draw, op) if (text := check.failure())]
    except Exception as error:
        failures = [f"{type(error).__name__}: {error}"]
    return f"{'; '.join(failures)}\n    {draw.statement()}" if failures else None
