"""Training-free anomaly detection on the features of a frozen vision transformer."""

from murf_fast.anomaly.datasets import Category, Sample, categories
from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.anomaly.methods import METHODS, Method
from murf_fast.anomaly.metrics import au_pro, au_roc, best_f1
from murf_fast.anomaly.normal_range import NormalRange
from murf_fast.anomaly.pixel_curves import PixelCurves
from murf_fast.anomaly.ray_workers import RayWorkers
from murf_fast.anomaly.result import Anomaly
from murf_fast.anomaly.scoring import PRESETS, ScoringRules, mean_top, reweighted_score
from murf_fast.anomaly.sharded_index import ShardedIndex
from murf_fast.anomaly.shards.k_center import sharded_k_center_greedy
from murf_fast.anomaly.subsets import Subset, subset_scores, subsets_of

__all__ = [
    "METHODS",
    "PRESETS",
    "Anomaly",
    "Category",
    "Method",
    "MultiResolutionDetector",
    "NormalRange",
    "PixelCurves",
    "RayWorkers",
    "Sample",
    "ScoringRules",
    "ShardedIndex",
    "Subset",
    "au_pro",
    "au_roc",
    "best_f1",
    "categories",
    "mean_top",
    "reweighted_score",
    "sharded_k_center_greedy",
    "subset_scores",
    "subsets_of",
]
