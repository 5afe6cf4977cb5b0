"""A shard as an Arrow table: the column ``name``, and one of fixed-shape tensors per array."""

from __future__ import annotations

import pyarrow as pa
import torch
from torch import Tensor

from murf_fast.data.layout import DTYPES, Array, Content, Layout

FINGERPRINT = b"murf_fast fingerprint"


def schema(layout: Layout) -> pa.Schema:
    columns = [pa.field("name", pa.string(), nullable=False)]
    columns += [pa.field(a.name, _kind(a), nullable=False) for a in layout.arrays]
    return pa.schema(columns, {FINGERPRINT: layout.fingerprint.encode()})


def table(layout: Layout, content: Content) -> pa.Table:
    """Without copies of the arrays."""
    columns = [pa.array(list(content.names), pa.string())]
    for array in layout.arrays:
        values = content.arrays[array.name].flatten().numpy()
        kind = _kind(array)
        stored = pa.FixedSizeListArray.from_arrays(pa.array(values, kind.value_type), kind.storage_type.list_size)
        columns.append(pa.ExtensionArray.from_storage(kind, stored))
    return pa.Table.from_arrays(columns, schema=schema(layout))


def check(found: pa.Schema, rows: int, layout: Layout, images: int) -> None:
    """Raises a ValueError where a file holds another table."""
    if rows != images or not found.equals(schema(layout)) or (found.metadata or {}).get(FINGERPRINT) is None:
        raise ValueError("its header is not that of the index")
    if found.metadata[FINGERPRINT] != layout.fingerprint.encode():
        raise ValueError("its header is not that of the index")


def row(batch: pa.RecordBatch, i: int, layout: Layout) -> dict[str, Tensor]:
    """The arrays of a row, copies."""
    found = {}
    for array in layout.arrays:
        stored = batch.column(array.name).storage
        size = stored.type.list_size
        values = stored.values.slice((stored.offset + i) * size, size).to_numpy(zero_copy_only=True)
        found[array.name] = torch.tensor(values, dtype=DTYPES[array.dtype], device="cpu").view(array.shape)
    return found


def _kind(array: Array) -> pa.FixedShapeTensorType:
    return pa.fixed_shape_tensor(getattr(pa, array.dtype)(), array.shape)
