"""What every operation means, in plain PyTorch. Runs in float64; no cleverness."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from murf_fast._discovery import exports

globals().update(exports(__name__, __path__))

if TYPE_CHECKING:  # what is exported, is known when it runs

    def __getattr__(name: str) -> Callable[..., Any]: ...
