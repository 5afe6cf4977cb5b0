"""Modules that load the checkpoints of the original code bases and run on the operations of this library."""

from murf_fast.nn.featsharp.baselines import blend_tiles
from murf_fast.nn.featsharp.bias_buffer import BiasBuffer
from murf_fast.nn.featsharp.block import FeatSharpBlock
from murf_fast.nn.featsharp.conditional_bias import ConditionalBias
from murf_fast.nn.featsharp.feat_sharp import FeatSharp
from murf_fast.nn.featsharp.phis import PHIS
from murf_fast.nn.featsharp.tiles import merge_tiles, split_tiles
from murf_fast.nn.featsharp.upsampler import FeatSharpUpsampler
from murf_fast.nn.guided._encoded import EncodedImage, ImageStatistics
from murf_fast.nn.guided.anyup import AnyUp
from murf_fast.nn.guided.featsharp_jbu import FeatSharpJBU
from murf_fast.nn.guided.fixed_jbu import FixedJBU
from murf_fast.nn.guided.guided_filter import GuidedFilter
from murf_fast.nn.guided.jafar import JAFAR
from murf_fast.nn.guided.jbu_level import JBULevel
from murf_fast.nn.guided.jbu_stack import JBUStack
from murf_fast.nn.guided.naf import NAF
from murf_fast.nn.guided.training.colors import augment_colors
from murf_fast.nn.guided.training.consistency import consistency_loss, downsampled_views
from murf_fast.nn.guided.training.crf import crf_loss
from murf_fast.nn.guided.training.crops import LocalCrops, local_crops
from murf_fast.nn.guided.training.downsamplers import AttentionDownsampler, SimpleDownsampler
from murf_fast.nn.guided.training.fidelity import Fidelity
from murf_fast.nn.guided.training.losses import cosine_mse_loss, input_consistency_loss, self_consistency_loss
from murf_fast.nn.guided.training.mmd import mmd_loss
from murf_fast.nn.guided.training.total_variation import total_variation_loss
from murf_fast.nn.guided.training.views import Views, random_views
from murf_fast.nn.guided.upsample_anything import CellKernels, UpsampleAnything
from murf_fast.nn.heads.depth_head import DepthHead
from murf_fast.nn.heads.depth_losses import log_gradient_loss, scale_invariant_log_loss
from murf_fast.nn.heads.scores import (
    DepthScores,
    NormalScores,
    SegmentationScores,
    depth_scores,
    normal_scores,
    segmentation_scores,
)
from murf_fast.nn.heads.segmentation_head import SegmentationHead
from murf_fast.nn.vit.graphed import GraphedCall
from murf_fast.nn.vit.multi_resolution_encoder import MultiResolutionEncoder, MultiResolutionFeatures
from murf_fast.nn.vit.murf import MuRF
from murf_fast.nn.vit.over_tiling import over_tiling_error
from murf_fast.nn.vit.s2 import S2
from murf_fast.nn.vit.siglip_hd import fine_to_coarse_loss, multi_scale_target

__all__ = [
    "JAFAR",
    "NAF",
    "PHIS",
    "S2",
    "AnyUp",
    "AttentionDownsampler",
    "BiasBuffer",
    "CellKernels",
    "ConditionalBias",
    "DepthHead",
    "DepthScores",
    "EncodedImage",
    "FeatSharp",
    "FeatSharpBlock",
    "FeatSharpJBU",
    "FeatSharpUpsampler",
    "Fidelity",
    "FixedJBU",
    "GraphedCall",
    "GuidedFilter",
    "ImageStatistics",
    "JBULevel",
    "JBUStack",
    "LocalCrops",
    "MuRF",
    "MultiResolutionEncoder",
    "MultiResolutionFeatures",
    "NormalScores",
    "SegmentationHead",
    "SegmentationScores",
    "SimpleDownsampler",
    "UpsampleAnything",
    "Views",
    "augment_colors",
    "blend_tiles",
    "consistency_loss",
    "cosine_mse_loss",
    "crf_loss",
    "depth_scores",
    "downsampled_views",
    "fine_to_coarse_loss",
    "input_consistency_loss",
    "local_crops",
    "log_gradient_loss",
    "merge_tiles",
    "mmd_loss",
    "multi_scale_target",
    "normal_scores",
    "over_tiling_error",
    "random_views",
    "scale_invariant_log_loss",
    "segmentation_scores",
    "self_consistency_loss",
    "split_tiles",
    "total_variation_loss",
]
