"""Images per second of `murf-fast extract`: one process, two, and Ray's workers, which run the same code.

``python benchmarks/extract_speed.py IMAGES --weights FOLDER [--write]`` prints docs/guides/extract.md's table, or puts
it there. Time runs from the first shard of every worker to the last, by when their records were written, so neither the
start of processes is in it nor how late the driver hears of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from murf_fast.cli.extract.model import Recipe
from murf_fast.data import _records
from murf_fast.data.extraction import Machines, extract
from murf_fast.data.settings import Options
from murf_fast.data.sources import open_source

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guides" / "extract.md"
BEGIN, END = "<!-- benchmarks/extract_speed.py -->\n", "<!-- end of speed -->\n"
BATCH = SHARD = 8


@dataclass
class Run:
    """Images, and seconds for them."""

    images: int
    seconds: float


def measured(source: Path, recipe: Recipe, *, ray: bool = False, workers: int | None = None) -> Run:
    """One extraction into a folder that is removed."""
    with tempfile.TemporaryDirectory() as out:
        machines = Machines(torch.device("cpu"), 1, ray, None, workers, 1)
        folder = Path(out, "o")
        records = extract(open_source(str(source)), folder, recipe, Options(batch=BATCH, shard=SHARD), machines)
        places = [folder / _records.RECORDS / _records.record_name(r.shard) for r in records]
        ends = sorted((p.stat().st_mtime, len(r.names)) for p, r in zip(places, records, strict=True))
    # When the first shard of every worker is there, so that none is begun whose seconds would not count.
    first = (workers or 1) - 1
    return Run(sum(images for _, images in ends[first + 1 :]), ends[-1][0] - ends[first][0])


def in_processes(lists: list[Path], arguments: list[str]) -> Run:
    """Plain runs beside each other, one for every list."""
    command = [sys.executable, __file__, *arguments, "--child"]
    processes = [subprocess.Popen([*command, str(path)], stdout=subprocess.PIPE, text=True) for path in lists]
    runs = [Run(**json.loads(process.communicate()[0].splitlines()[-1])) for process in processes]
    return Run(sum(r.images for r in runs), sum(r.seconds for r in runs) / len(runs))


def lists_of(images: Path, folder: Path) -> list[Path]:
    """A list of all images, and two of every other."""
    paths = [item.path for item in open_source(str(images)).items]
    lists = [folder / f"{i}.txt" for i in range(3)]
    for path, chosen in zip(lists, (paths, paths[::2], paths[1::2]), strict=True):
        path.write_text("".join(f"{Path(p).resolve()}\n" for p in chosen))
    return lists


def table(rows: dict[str, list[Run]], sizes: str, images: int) -> str:
    """Every round, so that their spread is seen."""
    text = (
        f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores shared with other work, ViT-S/14 at "
        f"{sizes}, {images} images, batches and shards of {BATCH}, one thread a model, "
        "rounds in turns:\n\n"
        "| | images/s, every round |\n|---|---|\n"
    )
    for name, runs in rows.items():
        text += f"| {name} | {', '.join(f'{r.images / r.seconds:.2f}' for r in runs)} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--sizes", default="224")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", type=Path, help="of two processes: the list of one")
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe(given.weights, tuple((int(n), int(n)) for n in given.sizes.split(",")))
    if given.child is not None:
        print(json.dumps(vars(measured(given.child, recipe))))
        return
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    arguments = [str(given.images), "--weights", given.weights, "--sizes", given.sizes]
    rows: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder:
        lists = lists_of(given.images, Path(folder))
        for _ in range(given.rounds):
            for name, call in (
                ("1 process", lambda: in_processes(lists[:1], arguments)),
                ("Ray, 1 worker", lambda: measured(given.images, recipe, ray=True, workers=1)),
                ("2 processes, half of the images each", lambda: in_processes(lists[1:], arguments)),
                ("Ray, 2 workers", lambda: measured(given.images, recipe, ray=True, workers=2)),
            ):
                rows.setdefault(name, []).append(call())
                print(name, rows[name][-1], file=sys.stderr, flush=True)
    text = table(rows, given.sizes, len(open_source(str(given.images)).items))
    if not given.write:
        print(text, end="")
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
