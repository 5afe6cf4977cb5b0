"""One Zarr group (version 3), whose arrays have a row for every planned image and a file for every shard.

Rows of images without features hold the fill value, NaN or 0. The files are what zarr-python's own codecs make; they
are put in place as the other formats' are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from murf_fast.data.formats._format import Buffer, Fetch, Format
from murf_fast.data.layout import DTYPES, Content, Layout

GROUP = "features.zarr"


class ZarrFormat(Format):
    """Shards of the sharding codec, in which every image is a chunk: uncompressed, mapped, read one by one.

    What the folder says of codecs is for other readers: this one takes them from the layout, so that no codec is run
    that a folder names.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        import zarr

        self._zarr = zarr

    def common(self) -> dict[str, bytes]:
        return {f"{GROUP}/{key}": value.to_bytes() for key, value in sorted(self._arrays()[0].items())}

    def paths(self, shard: int) -> list[str]:
        return [f"{GROUP}/{key}" for key in self._keys(shard)]

    def pieces(self, shard: int, content: Content) -> Iterator[tuple[str, Iterator[Buffer]]]:
        stored, arrays = self._arrays()
        first, planned = shard * self.layout.shard, self.layout.planned(shard)
        for (name, array), key in zip(arrays.items(), self._keys(shard), strict=True):
            values = np.full((planned, *array.shape[1:]), array.fill_value, array.dtype)
            values[list(content.positions)] = content.arrays[name].numpy()
            array[first : first + planned] = values
            yield f"{GROUP}/{key}", iter([memoryview(stored.pop(key).as_numpy_array()).cast("B")])

    def opened(self, shard: int, files: Sequence[memoryview], positions: Sequence[int]) -> Fetch:
        from zarr.core.buffer.cpu import Buffer as ZarrBuffer

        stored, arrays = self._arrays()
        for key, data in zip(self._keys(shard), files, strict=True):
            stored[key] = ZarrBuffer.from_array_like(np.frombuffer(data, np.uint8))
        first = shard * self.layout.shard

        def fetch(i: int) -> dict[str, Tensor]:
            found = {}
            for array in self.layout.arrays:
                values = np.ascontiguousarray(arrays[array.name][first + positions[i]])
                found[array.name] = torch.from_numpy(values).to(DTYPES[array.dtype]).view(array.shape)
            return found

        fetch(0)  # a header that is none of a shard raises here, not in the middle of an epoch
        return fetch

    def _keys(self, shard: int) -> list[str]:
        return [f"{a.name}/c/{shard}" + "/0" * len(a.shape) for a in self.layout.arrays]

    def _arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The group in memory: its files by their keys, and its arrays."""
        files: dict[str, Any] = {}
        store = self._zarr.storage.MemoryStore(files)
        attributes = {"murf_fast fingerprint": self.layout.fingerprint}
        group = self._zarr.create_group(store, zarr_format=3, attributes=attributes)
        arrays = {}
        for a in self.layout.arrays:
            arrays[a.name] = group.create_array(
                a.name,
                shape=(self.layout.images, *a.shape),
                chunks=(1, *a.shape),
                shards=(self.layout.shard, *a.shape),
                dtype=a.dtype,
                compressors=None,
                fill_value=float("nan") if a.dtype.startswith("float") else 0,
            )
        return files, arrays
