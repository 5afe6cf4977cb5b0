"""Triton kernels and their launchers, with the signatures of :mod:`murf_fast.native`.

Arguments have been checked by the ops. Launchers run on the current stream of the tensors' device, never wait for it,
and allocate at most per-pixel float32 statistics; those of the bilateral ops also work in bands of about 32 MiB.
"""

from murf_fast._discovery import exports

globals().update(exports(__name__, __path__))
