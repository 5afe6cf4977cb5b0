"""Training-free anomaly detection on the features of a frozen vision transformer."""

from murf_fast.anomaly.metrics import au_pro, au_roc

__all__ = ["au_pro", "au_roc"]
