"""The operations: thin functions over kernels, registered with torch.library."""

from murf_fast.ops._bilateral import BilateralParams
from murf_fast.ops._ivf import IVFIndex
from murf_fast.ops.adaptive_conv import adaptive_conv
from murf_fast.ops.bilateral_kernels import bilateral_kernels
from murf_fast.ops.feature_unify import feature_unify
from murf_fast.ops.gaussian_blur import gaussian_blur
from murf_fast.ops.image_to_patches import image_to_patches
from murf_fast.ops.joint_bilateral_upsample import joint_bilateral_upsample
from murf_fast.ops.k_center_greedy import k_center_greedy
from murf_fast.ops.linear_head import linear_head
from murf_fast.ops.nearest_distance import NearestIndex, nearest_distance
from murf_fast.ops.neighborhood_attention import neighborhood_attention
from murf_fast.ops.patch_embed import PackedTokens, patch_embed
from murf_fast.ops.resample_pos_embed import resample_patch_embed, resample_pos_embed
from murf_fast.ops.resize import resize
from murf_fast.ops.upsample_argmax import upsample_argmax
from murf_fast.ops.upsample_concat import upsample_concat
from murf_fast.ops.upsample_cross_entropy import upsample_cross_entropy
from murf_fast.ops.upsample_expectation import upsample_expectation
from murf_fast.ops.upsample_mean import upsample_mean
from murf_fast.ops.upsample_sum import upsample_sum
from murf_fast.ops.window_attention import window_attention

__all__ = [
    "BilateralParams",
    "IVFIndex",
    "NearestIndex",
    "PackedTokens",
    "adaptive_conv",
    "bilateral_kernels",
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
    "upsample_argmax",
    "upsample_concat",
    "upsample_cross_entropy",
    "upsample_expectation",
    "upsample_mean",
    "upsample_sum",
    "window_attention",
]
