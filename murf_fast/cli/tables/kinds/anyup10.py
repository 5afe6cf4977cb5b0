"""AnyUp's Table 10: upsamplers by the size of their output."""

from __future__ import annotations

from murf_fast.cli.tables import upsampling
from murf_fast.cli.tables.case import Table
from murf_fast.cli.tables.upsamplers import UPSAMPLERS

TABLE = Table(
    title="Upsamplers by output size, as AnyUp's Table 10",
    labels=upsampling.LABELS,
    parts=upsampling.PARTS,
    facts=upsampling.FACTS,
    x="size",
    sizes=(112, 224, 448, 1024),
    models=("bilinear", "jbu", "jafar", "naf", "anyup"),
    size="side of the output in pixels",
    cases=lambda setting: upsampling.cases(setting, [n for n in UPSAMPLERS if n != "jbu-shared"]),
    notes=(
        *upsampling.NOTES,
        "PyTorch: the originals' order of operations on whole maps; AnyUp and NAF by a mask of all queries and "
        "keys, where NATTEN's kernels, which plain PyTorch has not, read windows alone.",
    ),
)
