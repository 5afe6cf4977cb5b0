"""murf_fast: fast, exact kernels for dense features of frozen vision transformers at many resolutions."""

from murf_fast import windows
from murf_fast.backends import BackendUnavailableError, use_backend
from murf_fast.ops import *  # noqa: F403
from murf_fast.ops import __all__ as _ops  # isort: split

from murf_fast.nn import MuRF

__version__ = "0.1.0"
__all__ = ["BackendUnavailableError", "MuRF", "use_backend", "windows", *_ops]
