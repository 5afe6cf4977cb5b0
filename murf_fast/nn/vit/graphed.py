"""A method of MuRF as one CUDA graph, for images of one shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Calls before the capture: kernels are compiled, tables copied and the libraries' handles made in the first, and the
# second finds all of it there.
WARM_UP = 2


class GraphedCall:
    """What :meth:`MuRF.graphed` returns: a call with images like those of the capture replays its launches.

    The graph reads the model's parameters and buffers where they were: values written into them in place are seen, and
    a call after they were replaced or moved, or modules were, is refused. What else the model is told later (hooks,
    sizes, switches) is not: capture again. One call at a time: all share the memory of the graph.

    Args:
        images: As in the capture: shape, dtype and device.

    Returns:
        A new tensor, on the current stream.

    Raises:
        TypeError, ValueError: The images are others, or the model is; the message names what.

    Memory: a copy of the images, the result, and what the captured method takes, all kept as long as this object.
    """

    def __init__(self, model: nn.Module, call: Callable[[Tensor], Tensor], images: Tensor) -> None:
        self._places = _Places(model)
        # Outside of inference mode, so that it may be called there and elsewhere.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(images.device):
            self._images = images.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    call(self._images)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self._result = call(self._images)

    def __call__(self, images: Tensor) -> Tensor:
        check_like(images, self._images)
        self._places.check()
        with torch.no_grad(), torch.cuda.device(self._images.device):
            self._images.copy_(images)
            self._graph.replay()
            return self._result.clone()


class _Places:
    """Where every parameter and buffer of a model lies, and which modules hold them."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors, self._modules = [], []
        for path, module in model.named_modules():
            dot = "." if path else ""
            for held in (module._parameters, module._buffers):
                self._tensors += [(held, n, path + dot + n, _place(x)) for n, x in held.items()]
            self._modules += [(module._modules, n, path + dot + n, child) for n, child in module._modules.items()]

    def check(self) -> None:
        """Raises where one is not what it was; a third of a microsecond for each."""
        for held, name, path, child in self._modules:
            if held.get(name) is not child:
                raise ValueError(_changed(path, "is another module"))
        for held, name, path, place in self._tensors:
            if _place(held.get(name)) != place:
                raise ValueError(_changed(path, "was replaced or moved"))


def _place(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x.data_ptr(), x.dtype)


def _changed(path: str, what: str) -> str:
    return f"murf_fast.MuRF.graphed: `{path}` {what} since the capture, whose graph reads the old one; capture again"


def check_like(images: object, captured: Tensor) -> None:
    """Images are what the graph takes."""
    if not isinstance(images, Tensor):
        raise TypeError(f"murf_fast.MuRF.graphed: `images` must be a tensor, got {type(images).__name__}")
    if images.dtype != captured.dtype:
        raise TypeError(
            f"murf_fast.MuRF.graphed: `images` must be {captured.dtype} as those of the capture, got {images.dtype}"
        )
    if images.shape != captured.shape or images.device != captured.device:
        raise ValueError(
            f"murf_fast.MuRF.graphed: `images` must be {tuple(captured.shape)} on {captured.device} as those of the "
            f"capture, got {tuple(images.shape)} on {images.device}"
        )


def check_capturable(images: Tensor) -> None:
    """A graph can be captured here."""
    device = images.device
    if device.type != "cuda":
        raise ValueError(
            f"murf_fast.MuRF.graphed: `images` must be on a CUDA device, whose launches a graph holds; got {device}"
        )
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            "murf_fast.MuRF.graphed: autocast keeps casted weights from call to call, which a graph would read after "
            "they are gone; give the model the dtype instead, and leave autocast"
        )
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("murf_fast.MuRF.graphed: this stream is being captured already")
