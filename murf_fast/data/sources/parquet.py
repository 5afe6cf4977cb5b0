"""The images of Parquet tables: a column of encoded images, or of structs with ``bytes`` as `datasets` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from murf_fast._image_paths import shown
from murf_fast.data.sources.item import PARQUET, Item, Source

USUAL = ("image", "img", "bytes", "jpg", "jpeg", "png", "webp")


def source(files: Sequence[Path], column: str | None) -> Source:
    """Raises an OSError or a ValueError that names the table, or its columns if none or several hold bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    items, told = [], []
    for file in files:
        try:
            table = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise ValueError(f"SOURCE {file} is no Parquet table: {error}") from error
        with table:
            column = _column(file, table.schema_arrow, column)
            rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        places = ((group, row) for group, count in enumerate(rows) for row in range(count))
        named = ((f"{shown(file.name)}/{i:09}", *place) for i, place in enumerate(places))
        items += [Item(name, PARQUET, str(file), group, row) for name, group, row in named]
        told.append((file.name, file.stat().st_size))
    return Source(items, column=column, told=told)


def _column(file: Path, schema: Any, wanted: str | None) -> str:
    """The column of images: ``wanted``, or the only one that can be, or the only one with a usual name."""
    able = [field.name for field in schema if _holds_bytes(field.type)]
    if wanted is not None:
        if wanted not in able:
            raise ValueError(f"--column: {file} has no column {wanted!r} of bytes; there are: {', '.join(able) or '-'}")
        return wanted
    usual = [name for name in able if name in USUAL]
    found = able if len(able) == 1 else usual
    if len(found) != 1:
        raise ValueError(
            f"SOURCE {file} has {len(able)} columns of bytes ({', '.join(able) or '-'}): name one by --column"
        )
    return found[0]


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


class Rows:
    """Encoded images of tables, a row group at a time; for one thread."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._at: tuple[str, int] | None = None
        self._group: Any = None

    def read(self, item: Item) -> bytes:
        """Raises an OSError or a ValueError where there is none."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._at != (item.path, item.at):
            try:
                with pq.ParquetFile(item.path) as table:
                    found = table.read_row_group(item.at, columns=[self._column]).column(0).combine_chunks()
            except pa.ArrowException as error:
                raise ValueError(f"{item.name}: its row group cannot be read: {error}") from error
            self._group, self._at = found, (item.path, item.at)
        value = self._group[item.count].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if value is None:
            raise ValueError(f"{item.name} is empty: a path alone is not followed")
        return value
