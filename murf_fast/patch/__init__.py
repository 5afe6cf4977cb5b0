"""Makes installed packages use this library, without editing them."""

from murf_fast.patch._anomalib import anomalib
from murf_fast.patch._anyup import anyup
from murf_fast.patch._featup import featup
from murf_fast.patch._replacements import unpatch

__all__ = ["anomalib", "anyup", "featup", "unpatch"]
