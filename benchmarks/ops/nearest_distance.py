"""Nearest rows of a large bank."""

from __future__ import annotations

import importlib.util

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
    if device == "cpu" and importlib.util.find_spec("faiss"):
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
)
def nearest_auto(device, dtype):
    return nearest(device, dtype, "auto")


@case(
    "nearest_distance",
    'the same, precision="float32"',
    targets=(Target("faiss", 1.0),),
    memory_target=(1.0, "64 MB beside the index"),
)
def nearest_float32(device, dtype):
    return nearest(device, dtype, "float32")


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
