"""Modules that load the checkpoints of the original code bases and run on the operations of this library."""

from murf_fast.nn.depth_head import DepthHead
from murf_fast.nn.featsharp_jbu import FeatSharpJBU
from murf_fast.nn.jbu_level import JBULevel
from murf_fast.nn.jbu_stack import JBUStack
from murf_fast.nn.multi_resolution_encoder import MultiResolutionEncoder, MultiResolutionFeatures
from murf_fast.nn.segmentation_head import SegmentationHead

__all__ = [
    "DepthHead",
    "FeatSharpJBU",
    "JBULevel",
    "JBUStack",
    "MultiResolutionEncoder",
    "MultiResolutionFeatures",
    "SegmentationHead",
]
