"""CUDA graphs of steps that repeat, whose launches would take the host longer than the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


def may_capture(device: torch.device) -> bool:
    """Not within the capture of somebody else, whose graph takes the launches themselves."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def captured(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """``step`` as a graph. It has run before, so that nothing is compiled, and the graph must outlive its replays.

    :func:`torch.cuda.graph` would empty the caches of the whole process first.
    """
    with torch.cuda.device(device):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
    return graph
