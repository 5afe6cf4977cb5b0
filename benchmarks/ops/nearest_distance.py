"""Nearest rows of a large bank."""

from __future__ import annotations

import importlib.util
from unittest import mock

import torch
from inputs import features
from registry import Contenders, Target, case, classes, configurations, side, smallest

import murf_fast


def nearest(device, dtype, precision: str) -> Contenders:
    queries, width = side(2048), classes(768)
    x = features(device, dtype, queries + side(100_000), width)
    query, bank = x[:queries].clone(), x[queries:].clone()
    index = murf_fast.NearestIndex(bank, precision=precision)

    def chunked():
        return torch.cat([torch.cdist(part, bank).amin(1).square() for part in query.split(256)])

    def oracle():
        double = bank.double()
        for begin in range(0, queries, 64):
            part = slice(begin, begin + 64)
            rows = query[part].double()
            _, nearest = (double.square().sum(1) - 2 * rows @ double.T).min(1)
            yield part, (rows - double[nearest]).square().sum(1)

    others = {"eager cdist in chunks": chunked}
    if device == "cpu" and dtype == torch.float32 and importlib.util.find_spec("faiss"):
        import faiss

        flat = faiss.IndexFlatL2(width)
        flat.add(bank.numpy())
        faiss.omp_set_num_threads(torch.get_num_threads())
        others["faiss IndexFlatL2"] = lambda: torch.from_numpy(flat.search(query.numpy(), 1)[0][:, 0])
    return Contenders(
        lambda: murf_fast.nearest_distance(query, index, metric="l2sq")[0][:, 0],
        others,
        oracle,
        64 << 20,
        operations=2 * queries * len(bank) * width,
    )


@case(
    "nearest_distance",
    "2048 queries, bank 100k x 768 prepared",
    targets=(Target("faiss", 2.0),),
    memory_target=(1.0, "64 MB beside the index"),
    capturable=False,  # refuses what has no norm, and searches again what is not proven: the host has to look
)
def nearest_auto(device, dtype):
    return nearest(device, dtype, "auto")


@case(
    "nearest_distance",
    'the same, precision="float32"',
    targets=(Target("faiss", 1.0),),
    memory_target=(1.0, "64 MB beside the index"),
    capturable=False,  # refuses what has no norm, and searches again what is not proven: the host has to look
)
def nearest_float32(device, dtype):
    return nearest(device, dtype, "float32")


def by_cells(
    device: str, dtype: torch.dtype, spread: float | None, rows: int = 60_000, cells: str | int = "auto"
) -> Contenders:
    """Rows about 300 centres, or uniform ones, of which nothing can be skipped; against the index without cells."""
    queries, rows, width = side(2048), side(rows), classes(384)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(queries + rows, width, generator=generator)
    if spread is not None:
        centres = 3 * torch.randn(300, width, generator=generator)
        x = centres[torch.randint(300, (len(x),), generator=generator)] + spread * (x - 0.5)
    query, bank = x[:queries].to(device, dtype), x[queries:].to(device, dtype)
    plain, index = murf_fast.NearestIndex(bank), murf_fast.NearestIndex(bank, cells=cells)

    def oracle():
        double = bank.double()
        for begin in range(0, queries, 64):
            part = slice(begin, begin + 64)
            yield part, torch.cdist(query[part].double(), double).amin(1).square()

    return Contenders(
        lambda: murf_fast.nearest_distance(query, index, metric="l2sq")[0][:, 0],
        {"without cells": lambda: murf_fast.nearest_distance(query, plain, metric="l2sq")[0][:, 0]},
        oracle,
        64 << 20,
        operations=2 * queries * len(bank) * width,
    )


@case(
    "nearest_distance",
    '2048 queries, bank 60k x 384 in clusters, cells="auto"',
    targets=(Target("without cells", 1.0),),
    devices=("cpu",),
)
def clusters(device, dtype):
    return by_cells(device, dtype, 1.4)


@case(
    "nearest_distance",
    'the same, uniform: nothing to skip, cells="auto"',
    targets=(Target("without cells", 0.91),),
    devices=("cpu",),
)
def uniform(device, dtype):
    return by_cells(device, dtype, None)


# "auto" makes no cells on a GPU until these have been measured there. The bank is larger, as a scan of 60k rows takes
# a fraction of a millisecond. Predictions count what preparing the index launches, too; measurements do not.
@case(
    "nearest_distance",
    "2048 queries, bank 400k x 384 in clusters, cells=256",
    targets=(Target("without cells", 1.0),),
    devices=("cuda",),
    capturable=False,
)
def clusters_of_a_gpu(device, dtype):
    return by_cells(device, dtype, 1.4, rows=400_000, cells=256)


@case(
    "nearest_distance",
    "the same, uniform: nothing to skip, cells=256",
    targets=(Target("without cells", 0.91),),
    devices=("cuda",),
    capturable=False,
)
def uniform_on_a_gpu(device, dtype):
    return by_cells(device, dtype, None, rows=400_000, cells=256)


@smallest("nearest_distance")
def tiny(device: str) -> None:
    bank = murf_fast.NearestIndex(torch.randn(37, 19, device=device))
    murf_fast.nearest_distance(torch.randn(5, 19, device=device), bank, k=3)


@configurations("nearest_distance")
def shapes(device: str, dtype: torch.dtype) -> None:
    """The width is a constant of the product, the metric one of what follows: the narrowest, and that of ViT-B."""
    for width, metric in ((64, "l2sq"), (768, "l2"), (768, "cosine")):
        rows = torch.ones(300, width, device=device, dtype=dtype)
        index = murf_fast.NearestIndex(rows, cosine=metric == "cosine", precision=str(dtype).removeprefix("torch."))
        murf_fast.nearest_distance(rows[:200], index, k=3, metric=metric)
    if index.backend == "triton":
        # Cells are made of what a search finds, which is nothing where kernels are not launched.
        with mock.patch.object(murf_fast.NearestIndex, "_nearest", lambda _, q, c: torch.cdist(q, c).topk(1)):
            index = murf_fast.NearestIndex(rows, cosine=True, precision=index.precision, cells=2)
        murf_fast.nearest_distance(rows[:256], index, k=3)
