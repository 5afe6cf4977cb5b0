"""Training-free anomaly detection on the features of a frozen vision transformer."""

from murf_fast.anomaly.detector import Anomaly, MultiResolutionDetector
from murf_fast.anomaly.metrics import au_pro, au_roc, best_f1
from murf_fast.anomaly.pixel_curves import PixelCurves
from murf_fast.anomaly.scoring import PRESETS, ScoringRules, mean_top, reweighted_score
from murf_fast.anomaly.sharded_index import ShardedIndex

__all__ = [
    "PRESETS",
    "Anomaly",
    "MultiResolutionDetector",
    "PixelCurves",
    "ScoringRules",
    "ShardedIndex",
    "au_pro",
    "au_roc",
    "best_f1",
    "mean_top",
    "reweighted_score",
]
