"""Training-free anomaly detection on the features of a frozen vision transformer."""

from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.anomaly.metrics import au_pro, au_roc
from murf_fast.anomaly.normal_range import NormalRange
from murf_fast.anomaly.result import Anomaly
from murf_fast.anomaly.scoring import PRESETS, ScoringRules, mean_top, reweighted_score
from murf_fast.anomaly.sharded_index import ShardedIndex

__all__ = [
    "PRESETS",
    "Anomaly",
    "MultiResolutionDetector",
    "NormalRange",
    "ScoringRules",
    "ShardedIndex",
    "au_pro",
    "au_roc",
    "mean_top",
    "reweighted_score",
]
