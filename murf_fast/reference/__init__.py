"""What every operation means, in plain PyTorch. Runs in float64; no cleverness."""

from murf_fast._discovery import exports

globals().update(exports(__name__, __path__))
