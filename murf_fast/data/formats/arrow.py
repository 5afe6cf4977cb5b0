"""An Arrow IPC file (Feather) for every shard, mapped into memory without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from murf_fast.data.formats._format import Buffer, Fetch, Format
from murf_fast.data.layout import Content, Layout

RECORD = 8 << 20  # bytes of a record batch, and of a row group in Parquet: what one image costs to read, at least


class ArrowFormat(Format):
    """Tables of fixed-shape tensors, uncompressed."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        from murf_fast.data.formats import _tables

        self._tables = _tables

    @property
    def rows(self) -> int:
        """Images of a record batch."""
        return max(1, RECORD // self.layout.bytes_per_image)

    def paths(self, shard: int) -> list[str]:
        return [f"data/{shard:06}.arrow"]

    def pieces(self, shard: int, content: Content) -> Iterator[tuple[str, Iterator[Buffer]]]:
        (path,) = self.paths(shard)
        yield path, iter([self._written(self._tables.table(self.layout, content))])

    def opened(self, shard: int, files: Sequence[memoryview], positions: Sequence[int]) -> Fetch:
        import pyarrow as pa

        try:
            reader = pa.ipc.open_file(pa.py_buffer(files[0]))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            for batch in batches:
                batch.validate(full=True)
        except pa.ArrowException as error:
            raise ValueError(f"it is no Arrow file: {error}") from error
        self._tables.check(reader.schema, sum(map(len, batches)), self.layout, len(positions))
        if any(len(batch) != self.rows for batch in batches[:-1]):
            raise ValueError("its record batches are not of the index")

        def fetch(i: int) -> dict[str, Tensor]:
            return self._tables.row(batches[i // self.rows], i % self.rows, self.layout)

        return fetch

    def _written(self, table: Any) -> memoryview:
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=self.rows)
        return memoryview(sink.getvalue())
