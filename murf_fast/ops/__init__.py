"""The operations: thin functions over kernels, registered with torch.library.

Dtypes, one rule for all: the maps (or queries; for ``patch_embed`` the weight) have one dtype, which is
that of the result. The arithmetic is done in the result's dtype, but never below float32, and every result is rounded
once. All other floating-point tensors (bias, values, weights, masks, parameters, basis, a bank) may have any
floating-point dtype: they are taken at their value, in the dtype of the arithmetic. Where such a tensor has a say in
the unit of the result it has one in its dtype: an expectation has the promoted dtype of features and values, a
distance that of query and bank (float32 at least), a cross-entropy is float32 or, for float64 features, float64.
Large companions (the kernels of ``adaptive_conv``, the guidance of ``joint_bilateral_upsample``) have the maps' dtype
or, beside a half one, float32; others are refused rather than copied. Dense products (``linear_head``,
``patch_embed``) are torch's, in the dtype of their operands. Integers, booleans (but for dropout's masks) and complex
numbers are refused.

Derivatives: reverse mode where a docstring says differentiable, second derivatives of all those (of nonlinear ops
through the reference, at its memory), forward mode (``torch.func.jvp``, dual numbers) of the linear ops: resizes,
sums, means, heads, blurs, patches and ``adaptive_conv``. What has no derivative raises, naming the op.
"""

from murf_fast.ops._bilateral import BilateralParams
from murf_fast.ops._ivf import IVFIndex
from murf_fast.ops.adaptive_conv import adaptive_conv
from murf_fast.ops.bilateral_kernels import bilateral_kernels
from murf_fast.ops.feature_unify import feature_unify
from murf_fast.ops.gaussian_bilateral_upsample import gaussian_bilateral_upsample
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
from murf_fast.ops.upsample_confusion import upsample_confusion
from murf_fast.ops.upsample_cross_entropy import upsample_cross_entropy
from murf_fast.ops.upsample_expectation import upsample_expectation
from murf_fast.ops.upsample_mean import upsample_mean
from murf_fast.ops.upsample_sum import upsample_sum
from murf_fast.ops.window_attention import window_attention
from murf_fast.ops.window_attention_argmax import window_attention_argmax

__all__ = [
    "BilateralParams",
    "IVFIndex",
    "NearestIndex",
    "PackedTokens",
    "adaptive_conv",
    "bilateral_kernels",
    "feature_unify",
    "gaussian_bilateral_upsample",
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
    "upsample_confusion",
    "upsample_cross_entropy",
    "upsample_expectation",
    "upsample_mean",
    "upsample_sum",
    "window_attention",
    "window_attention_argmax",
]
