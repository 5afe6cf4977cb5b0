"""What every operation means, in plain PyTorch. Runs in float64; no cleverness."""

from murf_fast.reference.adaptive_conv import adaptive_conv
from murf_fast.reference.bilateral_kernels import bilateral_kernels
from murf_fast.reference.feature_unify import feature_unify
from murf_fast.reference.gaussian_blur import gaussian_blur
from murf_fast.reference.image_to_patches import image_to_patches
from murf_fast.reference.joint_bilateral_upsample import joint_bilateral_upsample
from murf_fast.reference.k_center_greedy import k_center_greedy
from murf_fast.reference.linear_head import linear_head
from murf_fast.reference.nearest_distance import nearest_distance
from murf_fast.reference.neighborhood_attention import neighborhood_attention
from murf_fast.reference.patch_embed import patch_embed
from murf_fast.reference.resample_pos_embed import resample_patch_embed, resample_pos_embed
from murf_fast.reference.resize import resize
from murf_fast.reference.resize_gram import resize_gram
from murf_fast.reference.upsample_argmax import upsample_argmax
from murf_fast.reference.upsample_concat import upsample_concat
from murf_fast.reference.upsample_cross_entropy import upsample_cross_entropy
from murf_fast.reference.upsample_expectation import distribution, upsample_expectation
from murf_fast.reference.upsample_mean import upsample_mean
from murf_fast.reference.upsample_sum import upsample_sum
from murf_fast.reference.window_attention import window_attention

__all__ = [
    "adaptive_conv",
    "bilateral_kernels",
    "distribution",
    "feature_unify",
    "gaussian_blur",
    "image_to_patches",
    "joint_bilateral_upsample",
    "k_center_greedy",
    "linear_head",
    "nearest_distance",
    "neighborhood_attention",
    "patch_embed",
    "resample_patch_embed",
    "resample_pos_embed",
    "resize",
    "resize_gram",
    "upsample_argmax",
    "upsample_concat",
    "upsample_cross_entropy",
    "upsample_expectation",
    "upsample_mean",
    "upsample_sum",
    "window_attention",
]
