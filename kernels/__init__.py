"""Triton kernels and their launchers, with the signatures of :mod:`murf_fast.native`.

Arguments have been checked by the ops. Launchers run on the current stream of the tensors' device, do not wait for it
(but for searches and coresets, whose host looks at what they find), and allocate at most per-pixel float32 statistics;
those of the bilateral ops also work in bands of about 32 MiB, window attention of many keys in 128 MB.

Functions that the host launches are under :func:`assembler.kernel`, those that they call under ``triton.jit``.
"""

from murf_fast._discovery import exports

globals().update(exports(__name__, __path__))
