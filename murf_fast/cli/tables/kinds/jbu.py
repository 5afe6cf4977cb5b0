"""FeatUp's upsampler by the size of its output."""

from __future__ import annotations

from murf_fast.cli.tables import upsampling
from murf_fast.cli.tables.case import Table

KNOWN = ("bilinear", "jbu", "jbu-shared")

TABLE = Table(
    title="Joint bilateral upsampling by output size",
    labels=upsampling.LABELS,
    parts=upsampling.PARTS,
    facts=upsampling.FACTS,
    x="size",
    sizes=(112, 224, 448, 1024),
    models=KNOWN,
    size="side of the output in pixels",
    cases=lambda setting: upsampling.cases(setting, KNOWN),
    notes=(
        *upsampling.NOTES,
        "PyTorch: FeatUp's order of operations, its extension's convolution as one multiply-add per tap.",
    ),
)
