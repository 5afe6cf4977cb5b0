"""What Ray costs beside the plain loop of `murf-fast extract`: processor seconds per image, one worker each.

``python benchmarks/extract_overhead.py IMAGES --weights FOLDER [--write]`` prints docs/guides/extract.md's table, or
puts it there. Counted is the time that processors spend (user and system) on the whole tree of processes, decoders and
Ray's own servers too, from when the first shard's record is in the folder to when the last one's is, as the driver of
Ray hears of them late. Other work on the machine changes that far less
than it changes the clock; rounds are in turns, so that it meets both. Ray's servers take time by the clock, whether
there is work or not: they are counted apart, as a busy machine has more of the clock for the same work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
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
BEGIN, END = "<!-- benchmarks/extract_overhead.py -->\n", "<!-- end of overhead -->\n"
GOAL = 5  # per cent that Ray may cost
PLAIN, RAY = "plain loop", "Ray, 1 worker"
WATCH = 0.05  # seconds between two looks at the folder


@dataclass
class Run:
    """Images after the first shard's, and what they took: seconds of the clock, and of processors in those that work
    (model and decoders) and in those that serve (the driver of Ray and its servers)."""

    images: int
    seconds: float
    work: float
    serve: float


def processor_seconds(ray: bool) -> tuple[float, float]:
    """Of this process and those below it, ended ones included: what works, what serves."""
    own, work, serve = psutil.Process(), 0.0, 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds = times.user + times.system + times.children_user + times.children_system
            words = " ".join(process.cmdline())
            if not ray or "MapWorker" in words or "_reader_process" in words:
                work += seconds
            else:
                serve += seconds
    return work, serve


def measured(source: Path, recipe: Recipe, batch: int, *, ray: bool) -> Run:
    """One extraction, a batch a shard, into a folder that is removed."""
    seen: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as out:
        machines = Machines(torch.device("cpu"), 1, ray, None, 1 if ray else None, 1)
        options, opened, folder = Options(batch=batch, shard=batch), open_source(str(source)), Path(out, "o")
        shards = -(-len(opened.items) // batch)
        watch = threading.Thread(target=watched, args=(folder, shards, ray, seen), daemon=True)
        watch.start()
        extract(opened, folder, recipe, options, machines)
        watch.join()
    return Run(len(opened.items) - batch, *(b - a for a, b in zip(*seen, strict=True)))


def watched(folder: Path, shards: int, ray: bool, seen: list[tuple[float, float, float]]) -> None:
    """Notes the clock and the processors when the first record is there, and when the last is."""
    for record in (0, shards - 1):
        while not (folder / _records.RECORDS / _records.record_name(record)).exists():
            time.sleep(WATCH)
        seen.append((time.perf_counter(), *processor_seconds(ray)))


def paragraph(rows: dict[str, list[Run]], sizes: str, images: int, batch: int) -> str:
    """A table of every round, and what follows from the medians."""
    work = {name: [r.work / r.images for r in runs] for name, runs in rows.items()}
    middle = {name: statistics.median(each) for name, each in work.items()}
    serve = [r.serve / r.seconds for r in rows[RAY]]
    text = (
        f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores shared with other work, ViT-S/14 at "
        f"{sizes}, {images} images, batches and shards of {batch}, one thread a model, {len(rows[RAY])} rounds in "
        "turns; processor seconds per image (user and system) of the processes that work, and of Ray's driver and "
        "servers per second of the clock:\n\n"
        "| | median | every round | driver and servers, per second | images/s by the clock |\n|---|---:|---|---|---|\n"
    )
    for name, runs in rows.items():
        each, clock = (", ".join(f"{x:.2f}" for x in xs) for xs in (work[name], [r.images / r.seconds for r in runs]))
        served = ", ".join(f"{x:.3f}" for x in serve) if name == RAY else "none"
        text += f"| {name} | {middle[name]:.2f} | {each} | {served} | {clock} |\n"
    more, server = 100 * (middle[RAY] / middle[PLAIN] - 1), 100 * statistics.median(serve)
    own = max(more, 0)  # less than nothing is noise, and pays for nothing
    threads = math.ceil(server / (GOAL - own)) if own < GOAL else None
    goal = f"under {GOAL} % in all from {threads} busy threads on" if threads else f"more than {GOAL} %, the goal"
    return text + (
        f"\nThe worker takes {more:+.1f} % beside the plain loop, driver and servers {server:.1f} % of one core: for "
        f"one worker of one thread that has a core to itself {own + server:+.1f} % together, and "
        f"{goal}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--sizes", default="266,518,784")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--plain", action="store_true", help="one run without Ray, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe(given.weights, tuple((int(n), int(n)) for n in given.sizes.split(",")))
    if given.plain:
        print(json.dumps(vars(measured(given.images, recipe, given.batch, ray=False))))
        return
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    command = [sys.executable, __file__, *sys.argv[1:], "--plain"]
    rows: dict[str, list[Run]] = {PLAIN: [], RAY: []}
    with contextlib.suppress(KeyboardInterrupt):  # what is whole by then counts
        for _ in range(given.rounds):
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            plain = Run(**json.loads(found.splitlines()[-1]))
            of_ray = measured(given.images, recipe, given.batch, ray=True)
            rows[PLAIN].append(plain)
            rows[RAY].append(of_ray)
            print(plain, of_ray, file=sys.stderr, flush=True)
    text = paragraph(rows, given.sizes, len(open_source(str(given.images)).items), given.batch)
    if not given.write:
        print(text, end="")
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
