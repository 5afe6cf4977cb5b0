"""Encodings on a CUDA stream of their own: the next images are encoded while those before them are searched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from murf_fast.anomaly._patches import LookedAt, Patches

Encode = Callable[[Sequence[LookedAt]], list[list[Patches]]]
Encoded = list[tuple[LookedAt, list[Patches]]]


def encoded(groups: Iterable[Sequence[LookedAt]], encode: Encode, device: torch.device) -> Iterator[Encoded]:
    """The images of every group and their patches, on the stream that is current when they are asked for.

    On a GPU the encoding of a group has been handed to the device before the group before it is given out, unless its
    source may take its time with the next image. Whoever empties the list that he is given holds no more than two
    groups alive.
    """
    if not has_streams(device):
        for group in groups:
            yield list(zip(group, encode(group), strict=True))
        return
    groups, side, waiting = iter(groups), torch.cuda.Stream(device), None
    try:
        while True:
            following, error = None, None
            try:
                group = next(groups, None)
                if group is not None:
                    following = _Encoding(group, encode, side, device)
            except Exception as found:
                error = found  # whose turn has not come while a group waits
            if waiting is not None:
                yield waiting.taken()
                waiting = None
            if error is not None:
                raise error
            if following is None:
                return
            if following.ahead:
                waiting = following
            else:
                yield following.taken()
    finally:
        # The weights' memory goes to whoever is next on this stream.
        torch.cuda.current_stream(device).wait_stream(side)


def has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


class _Encoding:
    """One group's, handed to the stream ``side``."""

    def __init__(self, group: Sequence[LookedAt], encode: Encode, side: torch.cuda.Stream, device: torch.device):
        self._device, self.ahead = device, group[-1].ahead
        side.wait_stream(torch.cuda.current_stream(device))  # which has the images, and may have made the weights
        with torch.cuda.stream(side):
            self._pairs: Encoded = list(zip(group, encode(group), strict=True))
            self._done = side.record_event()
        # Memory of one stream that another one reads must not go to others before that is over.
        for looked in group:
            _lend([looked.pixels, *looked.kept], side)

    def taken(self) -> Encoded:
        """The pairs, once, for the current stream."""
        here = torch.cuda.current_stream(self._device)
        here.wait_event(self._done)
        for _, of_image in self._pairs:
            _lend([patches.rows for patches in of_image], here)
        pairs, self._pairs = self._pairs, []
        return pairs


def _lend(tensors: Iterable[Tensor | None], stream: torch.cuda.Stream) -> None:
    for tensor in tensors:
        if tensor is not None:
            tensor.record_stream(stream)
