"""The throughput model of docs/guides/extract.md: operations and bytes of an image, by the library's own counters.

``python benchmarks/extract_costs.py`` prints its table; ``--write`` puts it into the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from murf_fast.cli.tables.case import Setting
from murf_fast.cli.tables.counted import counted
from murf_fast.cli.tables.vits import PATCH, SHAPES, vits

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guides" / "extract.md"
BEGIN, END = "<!-- benchmarks/extract_costs.py -->\n", "<!-- end -->\n"
SETS = ((224,), (518,), (224, 448), (266, 518, 784))
HEAD = (
    "| model | sizes | GFLOP an image | `concat` on the largest grid | float32 | float16 |\n"
    "|---|---|---:|---|---:|---:|\n"
)


def row(name: str, sizes: tuple[int, ...]) -> str:
    """Products of the model at every size, and what is stored of the fused map."""
    (vit,) = vits(Setting("cpu", torch.float32, 1, sizes, (name,), None, None, None))
    operations = sum(counted(vit.meta, torch.empty(1, 3, size, size, device="meta")).operations for size in sizes)
    columns, grid = len(sizes) * SHAPES[name][0], max(sizes) // PATCH
    numbers = columns * grid * grid
    stored = " | ".join(f"{numbers * width / 1e6:.2f} MB" for width in (4, 2))
    return (
        f"| {name} | {', '.join(map(str, sizes))} | {operations / 1e9:.1f} | {columns} x {grid} x {grid} | {stored} |\n"
    )


def table() -> str:
    return HEAD + "".join(row(name, sizes) for name in SHAPES for sizes in SETS)


def main() -> None:
    if "--write" not in sys.argv[1:]:
        print(table(), end="")
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
