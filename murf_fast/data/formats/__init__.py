"""How features lie on disk: safetensors, Zarr, Parquet or Arrow."""

from __future__ import annotations

from murf_fast.data.formats._format import Format
from murf_fast.data.formats.arrow import ArrowFormat
from murf_fast.data.formats.parquet import ParquetFormat
from murf_fast.data.formats.safetensors import SafetensorsFormat
from murf_fast.data.formats.zarr import ZarrFormat

FORMATS: dict[str, type[Format]] = {
    "safetensors": SafetensorsFormat,
    "zarr": ZarrFormat,
    "parquet": ParquetFormat,
    "arrow": ArrowFormat,
}
