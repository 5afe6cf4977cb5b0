"""A file of safetensors for every shard: one tensor (M, ...) per array; names in the header's metadata."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from murf_fast._files import LARGEST_JSON
from murf_fast.data.formats._format import Buffer, Fetch, Format, row
from murf_fast.data.layout import DTYPES, Content

NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint8": "U8",
    "int16": "I16",
    "int32": "I32",
}
ALIGNED = 64  # bytes; the format asks for 8


class SafetensorsFormat(Format):
    """Written and read here, in the layout of the library: bytes that follow from the content alone, and mapped."""

    has_bfloat16 = True

    def paths(self, shard: int) -> list[str]:
        return [f"data/{shard:06}.safetensors"]

    def pieces(self, shard: int, content: Content) -> Iterator[tuple[str, Iterator[Buffer]]]:
        (path,) = self.paths(shard)
        yield path, self._bytes(content)

    def opened(self, shard: int, files: Sequence[memoryview], positions: Sequence[int]) -> Fetch:
        (data,) = files
        if len(data) < 8 or (length := struct.unpack("<Q", data[:8])[0]) > min(len(data) - 8, LARGEST_JSON):
            raise ValueError("its header is longer than the file")
        header = json.loads(bytes(data[8 : 8 + length]))
        told = header.pop("__metadata__", {})
        expected, end = self._entries(len(positions))
        if told.get("fingerprint") != self.layout.fingerprint or header != expected or len(data) != 8 + length + end:
            raise ValueError("its header is not that of the index")
        arrays = {}
        for array in self.layout.arrays:
            first = 8 + length + expected[array.name]["data_offsets"][0]
            count = len(positions) * array.bytes_per_image // DTYPES[array.dtype].itemsize
            values = torch.frombuffer(data, dtype=DTYPES[array.dtype], count=count, offset=first)
            arrays[array.name] = values.view(len(positions), *array.shape)
        return functools.partial(row, arrays)

    def _entries(self, images: int) -> tuple[dict[str, dict[str, Any]], int]:
        """The header without metadata, and the bytes behind it."""
        entries, end = {}, 0
        for array in self.layout.arrays:
            begin, end = end, end + images * array.bytes_per_image
            shape = [images, *array.shape]
            entries[array.name] = {"dtype": NAMES[array.dtype], "shape": shape, "data_offsets": [begin, end]}
        return entries, end

    def _bytes(self, content: Content) -> Iterator[Buffer]:
        told = {"format": "pt", "fingerprint": self.layout.fingerprint, "names": json.dumps(list(content.names))}
        text = json.dumps({"__metadata__": told, **self._entries(len(content.names))[0]}).encode()
        text += b" " * (-(len(text) + 8) % ALIGNED)
        yield struct.pack("<Q", len(text)) + text
        for array in self.layout.arrays:
            yield memoryview(content.arrays[array.name].flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
