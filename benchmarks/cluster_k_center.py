"""Greedy k-center over shards: how many steps a question serves, what one costs, and one process against two workers.

``python benchmarks/cluster_k_center.py IMAGES --weights FOLDER [--write]`` prints the tables of docs/guides/cluster.md,
or puts them there. Rows are features of the images' patches. Processor seconds are those of all who work.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from murf_fast import k_center_greedy
from murf_fast._pillow import read
from murf_fast.anomaly.shards import k_center
from murf_fast.anomaly.shards.k_center import KCenterShard, select
from murf_fast.anomaly.shards.rows import bounds, rows_of
from murf_fast.anomaly.shards.transport import Parts
from murf_fast.cli.anomaly.weights import load

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guides" / "cluster.md"
BEGIN, END = "<!-- benchmarks/cluster_k_center.py -->\n", "<!-- end of k-center -->\n"
ANSWERS = (1, 8, 32, 64, 128)
SHARE, SHARDS, ROUNDS = 0.1, 2, 3


class Counted(Parts):
    """Parts of this process that count their questions."""

    questions = 0

    def ask(self, question: str, *args: object) -> list:
        self.questions += question == "farthest"
        return super().ask(question, *args)


def features(images: Path, weights: str, size: int) -> Tensor:
    """(N, D): the last layer's patches of every image at ``size`` x ``size``."""
    vit = load(weights)
    encoder, found = vit.encoder([vit.blocks - 1], [1.0]), []
    for path in sorted(images.iterdir()):
        image = torch.from_numpy(read(path)).permute(2, 0, 1)[None].float() / 255
        image = torch.nn.functional.interpolate(image, (size, size), mode="bilinear")
        found.append(encoder(image).maps[0][0].flatten(1).T.contiguous())
    return torch.cat(found)


def cuts(rows: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(bounds(rows, SHARDS)))


def in_parts(x: Tensor, count: int, farthest: int) -> tuple[Tensor, int]:
    """The selection over parts of this process, and how many questions it took."""
    k_center.FARTHEST = farthest
    parts = Counted([KCenterShard(x[a:b], a) for a, b in cuts(len(x))], [b - a for a, b in cuts(len(x))])
    return over(parts, count), parts.questions


def over(shards, count: int) -> Tensor:
    chosen = torch.zeros(count, dtype=torch.int64)
    select(shards, rows_of(shards, chosen[:1]), chosen, 1)
    return chosen


def measured(call: Callable[[], Tensor], others: list[psutil.Process]) -> tuple[float, float, Tensor]:
    """Seconds of the clock, of processors in this process and ``others``, and the result."""

    def processor() -> float:
        return sum(sum(p.cpu_times()[:2]) for p in (psutil.Process(), *others))

    start, before = time.perf_counter(), processor()
    result = call()
    return time.perf_counter() - start, processor() - before, result


def over_ray(x: Tensor, count: int, rounds: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]], float]:
    """Clock and processor seconds of every round: one process, and workers of Ray that hold the rows already; and the
    median seconds of a question that nothing is to be done for."""
    import ray

    from murf_fast.anomaly.shards._ray import Pool, RayShards

    ray.init(num_cpus=SHARDS, include_dashboard=False, log_to_driver=False)
    pool = Pool(SHARDS, 1, 0)
    alone, workers = [], []
    counts = [b - a for a, b in cuts(len(x))]
    for i in range(rounds):
        clock, processor, expected = measured(lambda: k_center_greedy(x, count=count), [])
        alone.append((clock, processor))
        shards = RayShards(
            pool,
            f"rows {i}",
            counts,
            lambda n: (KCenterShard, (x[slice(*cuts(len(x))[n])].clone(), cuts(len(x))[n][0])),
        )
        rows_of(shards, torch.zeros(1, dtype=torch.int64))  # they are there
        others = [p for p in psutil.Process().children(recursive=True) if "ray::_Worker" in "".join(p.cmdline())]
        clock, processor, found = measured(lambda shards=shards: over(shards, count), others)
        workers.append((clock, processor))
        if not torch.equal(found, expected):
            raise SystemExit("the selections differ")
        empty = torch.zeros(0, x.shape[1])
        latency = []
        for _ in range(50):
            start = time.perf_counter()
            shards.ask("rows", empty[:0, 0].long())
            latency.append(time.perf_counter() - start)
        shards.close()
        print(alone[-1], workers[-1], statistics.median(latency), file=sys.stderr, flush=True)
    ray.shutdown()
    return alone, workers, statistics.median(latency)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--size", type=int, default=770)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    default = k_center.FARTHEST
    with torch.no_grad():
        x = features(given.images, given.weights, given.size)
    count = int(SHARE * len(x))
    expected = k_center_greedy(x, count=count)
    text = (
        f"{len(x)} rows of {x.shape[1]}, features of {len(list(given.images.iterdir()))} images, {count} of them "
        f"chosen, {SHARDS} shards:\n\n| rows of an answer | questions | steps a question |\n|---:|---:|---:|\n"
    )
    for farthest in ANSWERS:
        found, questions = in_parts(x, count, farthest)
        if not torch.equal(found, expected):
            raise SystemExit("the selections differ")
        text += f"| {farthest} | {questions} | {count / questions:.1f} |\n"
        print(text.splitlines()[-1], file=sys.stderr, flush=True)
    k_center.FARTHEST = default
    alone, workers, latency = over_ray(x, count, ROUNDS)
    columns = [
        "; ".join(f"{n:.1f}" for n in numbers) for runs in (alone, workers) for numbers in zip(*runs, strict=True)
    ]
    text += (
        f"\n| | seconds by the clock, every round | processor seconds |\n|---|---|---|\n"
        f"| one process, one thread | {columns[0]} | {columns[1]} |\n"
        f"| {SHARDS} workers of Ray, one thread each | {columns[2]} | {columns[3]} |\n\n"
        f"A question for which nothing is to be done takes {1000 * latency:.1f} ms by the clock. {psutil.cpu_count()} "
        "cores shared with other work.\n"
    )
    if not given.write:
        print(text, end="")
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
