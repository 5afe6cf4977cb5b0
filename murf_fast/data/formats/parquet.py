"""A Parquet file for every shard, read a row group at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from murf_fast.data.formats._format import Fetch
from murf_fast.data.formats.arrow import ArrowFormat


class ParquetFormat(ArrowFormat):
    """Tables of fixed-shape tensors, uncompressed: floats of features do not shrink by more than they cost."""

    def paths(self, shard: int) -> list[str]:
        return [f"data/{shard:06}.parquet"]

    def opened(self, shard: int, files: Sequence[memoryview], positions: Sequence[int]) -> Fetch:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(pa.BufferReader(pa.py_buffer(files[0])))
            lengths = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"it is no Parquet file: {error}") from error
        self._tables.check(table.schema_arrow, sum(lengths), self.layout, len(positions))
        if any(length != self.rows for length in lengths[:-1]):
            raise ValueError("its row groups are not of the index")
        last: list[Any] = [None, None]  # the row group that was read last: neighbours are asked for together

        def fetch(i: int) -> dict[str, Tensor]:
            group, place = divmod(i, self.rows)
            if last[0] != group:
                last[:] = group, table.read_row_group(group).combine_chunks().to_batches()[0]
            return self._tables.row(last[1], place, self.layout)

        return fetch

    def _written(self, table: Any) -> memoryview:
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=self.rows, compression="NONE", use_dictionary=False)
        return memoryview(sink.getvalue())
