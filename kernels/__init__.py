"""Triton kernels and their launchers, with the signatures of :mod:`murf_fast.native`.

Arguments have been checked by the ops. Launchers run on the current stream of the tensors' device, never wait for it,
and allocate at most per-pixel float32 statistics; those of the bilateral ops also work in bands of about 32 MiB.
"""

from murf_fast.kernels.adaptive_conv import (
    adaptive_conv,
    adaptive_conv_backward_kernels,
    adaptive_conv_backward_source,
)
from murf_fast.kernels.bilateral_kernels import bilateral_kernels, bilateral_kernels_backward
from murf_fast.kernels.feature_unify import feature_unify, feature_unify_backward
from murf_fast.kernels.image_to_patches import image_to_patches
from murf_fast.kernels.joint_bilateral_upsample import joint_bilateral_upsample
from murf_fast.kernels.k_center_greedy import k_center_greedy
from murf_fast.kernels.nearest_distance import index_layout, nearest_distance, nearest_index
from murf_fast.kernels.pixel_linear import pixel_linear
from murf_fast.kernels.resize_adjoint import resize_adjoint
from murf_fast.kernels.upsample_argmax import upsample_argmax
from murf_fast.kernels.upsample_concat import upsample_concat
from murf_fast.kernels.upsample_cross_entropy import upsample_cross_entropy, upsample_cross_entropy_backward
from murf_fast.kernels.upsample_expectation import upsample_expectation, upsample_expectation_backward
from murf_fast.kernels.upsample_sum import upsample_sum
from murf_fast.kernels.window_attention import window_attention, window_attention_backward

__all__ = [
    "adaptive_conv",
    "adaptive_conv_backward_kernels",
    "adaptive_conv_backward_source",
    "bilateral_kernels",
    "bilateral_kernels_backward",
    "feature_unify",
    "feature_unify_backward",
    "image_to_patches",
    "index_layout",
    "joint_bilateral_upsample",
    "k_center_greedy",
    "nearest_distance",
    "nearest_index",
    "pixel_linear",
    "resize_adjoint",
    "upsample_argmax",
    "upsample_concat",
    "upsample_cross_entropy",
    "upsample_cross_entropy_backward",
    "upsample_expectation",
    "upsample_expectation_backward",
    "upsample_sum",
    "window_attention",
    "window_attention_backward",
]
