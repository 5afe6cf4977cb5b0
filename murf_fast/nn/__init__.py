"""Modules that load the checkpoints of the original code bases and run on the operations of this library."""

from murf_fast.nn.anyup import AnyUp
from murf_fast.nn.depth_head import DepthHead
from murf_fast.nn.featsharp_jbu import FeatSharpJBU
from murf_fast.nn.jafar import JAFAR
from murf_fast.nn.jbu_level import JBULevel
from murf_fast.nn.jbu_stack import JBUStack
from murf_fast.nn.multi_resolution_encoder import MultiResolutionEncoder, MultiResolutionFeatures
from murf_fast.nn.murf import MuRF
from murf_fast.nn.naf import NAF
from murf_fast.nn.s2 import S2
from murf_fast.nn.segmentation_head import SegmentationHead
from murf_fast.nn.siglip_hd import fine_to_coarse_loss, multi_scale_target

__all__ = [
    "JAFAR",
    "NAF",
    "S2",
    "AnyUp",
    "DepthHead",
    "FeatSharpJBU",
    "JBULevel",
    "JBUStack",
    "MuRF",
    "MultiResolutionEncoder",
    "MultiResolutionFeatures",
    "SegmentationHead",
    "fine_to_coarse_loss",
    "multi_scale_target",
]
