"""What a format does: bytes of a shard's files from its arrays, and an image's arrays from its mapped files."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from murf_fast.data.layout import Content, Layout

Buffer = bytes | memoryview
Fetch = Callable[[int], dict[str, Tensor]]


class Format(abc.ABC):
    """Files of one layout.

    Args:
        layout: What they hold.

    Raises:
        ModuleNotFoundError: The format's library is not installed.
        ValueError: It has no such dtype; the message names the array.
    """

    has_bfloat16 = False

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        unable = [a for a in layout.arrays if a.dtype == "bfloat16"]
        if unable and not self.has_bfloat16:
            name = type(self).__name__.removesuffix("Format").lower()
            raise ValueError(f"--format {name} has no bfloat16, in which `{unable[0].name}` is: take float16")

    def common(self) -> dict[str, bytes]:
        """Files that all shards share, by their paths in the folder."""
        return {}

    @abc.abstractmethod
    def paths(self, shard: int) -> list[str]:
        """The files of a shard that holds an image: relative, with slashes, always the same."""

    @abc.abstractmethod
    def pieces(self, shard: int, content: Content) -> Iterator[tuple[str, Iterator[Buffer]]]:
        """Every file of a shard and its bytes: the same for the same content, whoever writes it."""

    @abc.abstractmethod
    def opened(self, shard: int, files: Sequence[memoryview], positions: Sequence[int]) -> Fetch:
        """What gives the arrays of a shard's ``i``-th image with features, copies, from the bytes of its files.

        Raises:
            ValueError: A header is not that of the layout, or of another length.
        """


def row(arrays: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    """Copies: what a training loop does to them must not be seen by the next epoch."""
    return {name: values[i].clone() for name, values in arrays.items()}
