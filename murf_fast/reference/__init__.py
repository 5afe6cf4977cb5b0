"""What every operation means, in plain PyTorch. Runs in float64; no cleverness."""

from murf_fast.reference.resize import resize
from murf_fast.reference.upsample_concat import upsample_concat
from murf_fast.reference.upsample_sum import upsample_sum

__all__ = ["resize", "upsample_concat", "upsample_sum"]
