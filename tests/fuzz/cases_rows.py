"""``nearest_distance`` and ``k_center_greedy`` by brute force in float64."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor

from fuzz.compare import Comparison, arithmetic, derived, exact, unit
from fuzz.draw import Draw
from fuzz.maps import values
from murf_fast import IVFIndex, NearestIndex
from murf_fast.ops import _random_projection

__all__ = ["au_curves", "ivf_index", "k_center_greedy", "nearest_distance"]

KINDS = ("normal", "offset", "large", "small", "subnormal", "integers")


def drawn_rows(d: Draw, name: str, rows: int, dim: int, kind: str, dtype: torch.dtype) -> Tensor:
    """(rows, dim) in a drawn layout, some rows equal to others."""
    d.note(name, (rows, dim))
    x = values(d, name, (rows, dim), dtype, (kind,))
    if rows > 1 and d.chance(f"{name}.repeated", 0.5):
        again = torch.randint(0, rows, (max(1, rows // 3), 2), generator=d.generator)
        x[again[:, 0]] = x[again[:, 1]]
    layout = d.choice(f"{name}.layout", ("contiguous", "transposed", "strided", "sliced", "negative", "expanded"))
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "strided":
        return x.repeat_interleave(2, 1)[:, ::2]
    if layout == "sliced":
        return torch.cat([x.new_full((rows, 3), torch.nan), x], 1)[:, 3:]
    if layout == "negative":
        return torch._neg_view(-x)
    if layout == "expanded" and rows:
        return x[:1].expand(rows, dim)
    return x


def squares(query: Tensor, bank: Tensor) -> Tensor:
    return (query[:, None] - bank[None]).square().sum(2)


def nearest_distance(d: Draw) -> list[Comparison]:
    small = d.interpreted
    dim = d.choice("dim", (1, 2, 3, 7, 8, 16, 17, 33, 64) if not small else (1, 3, 8))
    many = (1, 2, 3, 15, 16, 17, 33, 64, 127, 200) if not small else (1, 3, 9)
    rows, queries = d.choice("rows", many), d.choice("queries", (0, *many) if not small else many)
    kind = d.choice("kind", KINDS, (5, 3, 1, 1, 1, 3))
    query_type, bank_type = d.dtype("query.dtype"), d.dtype("bank.dtype")
    if d.chance("one dtype", 0.6):
        bank_type = query_type
    d.note("bank.dtype", bank_type)
    query = drawn_rows(d, "query", queries, dim, kind, query_type)
    bank = drawn_rows(d, "bank", rows, dim, kind, bank_type)
    if queries and d.chance("queries from the bank", 0.3):
        picked = torch.randint(0, rows, (queries,), generator=d.generator)
        query = bank[picked].to(query_type).nan_to_num()  # some overflow
    metric = d.choice("metric", (None, "l2", "l2sq", "cosine", "ip"))
    if metric == "cosine":
        # Rows of zeros have no direction.
        query, bank = (torch.where((x == 0).all(1, keepdim=True), torch.ones_like(x), x) for x in (query, bank))
    k = min(rows, d.choice("k", (1, 2, 3, 5, 16, 1000)))
    precision = d.choice("precision", ("auto", "float32", "bfloat16", "float16"))
    if precision == "float16" and kind in ("large", "offset"):
        precision = "float32"
    given = bank
    if d.chance("NumPy bank", 0.2) and bank.dtype != torch.bfloat16:
        given = bank.resolve_neg().numpy()
    prepared = d.chance("prepared", 0.3) and torch.float64 not in (query_type, bank_type)
    if prepared:
        index = {} if d.backend is None else {"backend": d.backend}
        if metric == "ip":
            index["ip"] = True
        elif d.backend in (None, "native") and d.chance("cells", 0.5):
            index["cells"] = d.integer("count of cells", 1, 20)
        given = NearestIndex(given, cosine=metric == "cosine", precision=precision, **index)
        options = {}
    else:
        options = {"precision": precision}
    distances, indices = d.call("nearest_distance", query, given, k=d.as_number("k", k), metric=metric, **options)
    dtype = torch.float64 if torch.float64 in (query_type, bank_type) else torch.float32
    assert tuple(distances.shape) == tuple(indices.shape) == (queries, k)
    assert indices.dtype == torch.int64
    if not queries:
        return []
    assert bool(((indices >= 0) & (indices < rows)).all()), f"indices from {indices.min()} to {indices.max()}"
    q, b = query.double(), bank.double()
    if metric == "cosine":
        # Scaled by the largest entry first, whose square a float64 holds.
        directions = [x / x.abs().amax(1, keepdim=True) for x in (q, b)]
        right = squares(*(x / x.norm(dim=1, keepdim=True) for x in directions)) / 2
        # Half the square of a difference of unit rows, or one less a product.
        doubt, order = (2 * dim + 8) * unit(dtype), (2 * dim + 8) * unit(torch.float64)
    elif metric == "ip":
        right, doubt = -(q @ b.T), 0.0
        # A sum of terms that cancel.
        order = (dim + 4) * unit(torch.float64) * (q.abs() @ b.abs().T)
    else:
        right, doubt, order = squares(q, b), 0.0, 0.0
    # float64 decides which is nearer, and is not exact itself.
    order = (order + (dim + 4) * unit(torch.float64) * right).amax(1, keepdim=True)
    best = right.sort(dim=1).values[:, :k]
    ordered = _tied_in_order(q, b, indices) & _distinct(indices)
    value = best.sqrt() if metric in (None, "l2") else -best if metric == "ip" else best
    allowed = 4 * (dim + 8) * unit(dtype) * value.abs() + doubt + 64 * torch.finfo(torch.float32).tiny
    if metric == "ip":
        allowed = allowed + order
    return [
        derived("rank", right.gather(1, indices), best, order.expand_as(best), torch.float64),
        exact("equal rows in order, none twice", ordered.double(), torch.ones(queries)),
        derived("distances", distances, value, allowed, dtype),
    ]


def ivf_index(d: Draw) -> list[Comparison]:
    """``IVFIndex``: exact where all clusters are searched; else distances of real rows, none too small."""
    if d.interpreted or importlib.util.find_spec("faiss") is None:
        return []
    dim, rows, queries = (
        d.choice("dim", (1, 3, 8, 17)),
        d.choice("rows", (1, 2, 17, 64)),
        d.choice("queries", (1, 3, 17)),
    )
    kind = d.choice("kind", ("normal", "integers"))
    query = drawn_rows(d, "query", queries, dim, kind, d.dtype("query.dtype"))
    bank = drawn_rows(d, "bank", rows, dim, kind, d.dtype("bank.dtype"))
    cosine = d.chance("cosine", 0.3)
    if cosine:
        query, bank = (torch.where((x == 0).all(1, keepdim=True), torch.ones_like(x), x) for x in (query, bank))
    clusters = d.integer("nlist", 1, max(1, rows // 8))
    searched = d.integer("nprobe", 1, clusters)
    k, metric = d.integer("k", 1, rows), "cosine" if cosine else d.choice("metric", (None, "l2", "l2sq"))
    index = IVFIndex(bank, nlist=clusters, nprobe=searched, cosine=cosine)
    distances, indices = d.call("nearest_distance", query, index, k=k, metric=metric)
    assert tuple(distances.shape) == tuple(indices.shape) == (queries, k)
    # faiss works in float32, by direct differences or a product with the squared norms.
    q, b = query.float().double(), bank.float().double()
    if cosine:
        q, b = (x / x.norm(dim=1, keepdim=True) for x in (q, b))
    terms = q.square().sum(1, keepdim=True) + b.square().sum(1).max()
    found = indices >= 0
    right = squares(q, b)
    chosen = right.gather(1, indices.clamp(min=0))
    squared = distances.double() if metric in ("l2sq", "cosine") else distances.double().square()
    squared = 2 * squared if cosine else squared
    doubt = ((dim + 8) * 2 * unit(torch.float32) * terms).expand(queries, k)
    checks = [derived("squared distances", squared[found], chosen[found], doubt[found], torch.float64)]
    assert bool((found | distances.isinf()).all())
    if searched == clusters:
        assert bool(found.all())
        best = right.sort(dim=1).values[:, :k]
        checks.append(derived("rank", chosen, best, 2 * doubt, torch.float64))
    return checks


def _distinct(indices: Tensor) -> Tensor:
    rising = indices.sort(1).values
    return (rising[:, 1:] != rising[:, :-1]).all(1)


def _tied_in_order(q: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    """Whether neighbours that are the same row come in order, and no copy before one is left out."""
    same = (b[:, None] == b[None]).all(2)
    ok = torch.ones(len(q), dtype=torch.bool)
    for i, row in enumerate(indices.tolist()):
        seen = set()
        for j in row:
            earlier = same[j].nonzero().flatten()
            if any(int(e) < j and int(e) not in seen for e in earlier):
                ok[i] = False
            seen.add(j)
    return ok


def k_center_greedy(d: Draw) -> list[Comparison]:
    small = d.interpreted
    dim = d.choice("dim", (1, 2, 3, 8, 17, 64) if not small else (1, 3))
    rows = d.choice("rows", (1, 2, 3, 16, 17, 64, 150) if not small else (1, 3, 7))
    dtype = d.dtype()
    features = drawn_rows(d, "features", rows, dim, d.choice("kind", KINDS), dtype)
    start = d.integer("start", 0, rows - 1)
    include = d.chance("include_start", 0.7)
    most = rows if include else rows - 1
    if most == 0:
        return []
    if d.chance("fraction", 0.3):
        fraction = d.number("fraction", 0.01, 1.0) or 0.5
        wanted = max(1, int(fraction * rows))
        if wanted > most:
            return []
        given = {"fraction": d.as_number("fraction", fraction)}
    else:
        wanted = d.integer("count", 1, most)
        given = {"count": d.as_number("count", wanted)}
    projection, matrix, x, slack = None, None, features.double(), 0.0
    named = d.choice("projection", (None, None, None, "given", "sparse", "linear"))
    if named is not None:
        seed = d.integer("seed", 0, 2**40)
        if named == "given":
            projection = matrix = drawn_rows(
                d, "projection", d.choice("projected", (1, 3, 8)), dim, "normal", d.dtype("projection.dtype")
            )
        else:
            projection, matrix = named, _random_projection.projection(named, rows, dim, seed)
            given["seed"] = d.as_number("seed", seed)
        # Distances are those of the product, in float32 at least.
        wide = arithmetic(dtype)
        p = matrix.to(wide).double()
        slack = ((dim + 2) * unit(wide) * (x.abs() @ p.abs().T)).norm(dim=1)
        x = x @ p.T
    first = [start]
    if wanted > 3 and include and projection is None and d.chance("continued", 0.3):
        first = d.call("k_center_greedy", features, count=3, start=start).tolist()
    begin = torch.tensor(first) if len(first) > 1 or d.chance("start as tensor", 0.2) else d.as_number("start", start)
    chosen = d.call("k_center_greedy", features, start=begin, include_start=include, projection=projection, **given)
    assert chosen.dtype == torch.int64
    assert tuple(chosen.shape) == (wanted,), f"{tuple(chosen.shape)} rows, right {wanted}"
    path = chosen.tolist() if include else [*first, *chosen.tolist()]
    assert all(0 <= i < rows for i in path), f"rows {path}"
    assert path[: len(first)] == first[: len(path)], f"begins with {path[: len(first)]}, right {first}"
    nearest = torch.full((rows,), torch.inf, dtype=torch.float64)
    right, got, doubts = [], [], []
    for step, i in enumerate(path):
        if step >= len(first):
            best = nearest.max()
            doubt = (dim + 4) * 2 * unit(torch.float64) * best
            if isinstance(slack, Tensor):
                doubt = doubt + 4 * float(slack.max()) * (best.sqrt() + float(slack.max()))
            first_of_equals = int((nearest == best).nonzero()[0])
            right.append(best)
            got.append(nearest[i])
            doubts.append(doubt)
            same = bool((x[i] == x[first_of_equals]).all()) and first_of_equals < i
            if same and not isinstance(slack, Tensor):
                raise AssertionError(f"step {step} takes row {i}, the same row {first_of_equals} comes first")
        nearest = torch.minimum(nearest, (x - x[i]).square().sum(1))
    if not right:
        return []
    return [derived("squared radius", torch.stack(got), torch.stack(right), torch.as_tensor(doubts), torch.float64)]


def au_curves(d: Draw) -> list[Comparison]:
    """``anomaly.metrics.au_pro``, ``au_roc`` and ``best_f1``: every score as a threshold."""
    from murf_fast.anomaly import metrics

    if d.interpreted:
        return []
    maps, masks = [], []
    for i in range(d.integer("images", 1, 3)):
        shape = d.grid(f"image{i}", 17)
        dtype = d.choice(f"scores{i}.dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16))
        kind = d.choice(f"scores{i}.kind", ("normal", "integers", "coarse"))
        s = values(d, f"scores{i}", shape, torch.float64, ("integers" if kind == "integers" else "normal",))
        s = (s.mul(2).round() / 2 if kind == "coarse" else s).to(dtype)
        layout = d.choice(f"scores{i}.layout", ("contiguous", "transposed", "negative"), (4, 1, 1))
        maps.append(
            s.mT.contiguous().mT if layout == "transposed" else torch._neg_view(-s) if layout == "negative" else s
        )
        mask = torch.rand(shape, generator=d.generator) < d.choice(f"defects{i}", (0.05, 0.3, 0.7))
        masks.append(mask.to(d.choice(f"mask{i}.dtype", (torch.bool, torch.uint8, torch.float32, torch.int64))))
    every = torch.cat([m.flatten().bool() for m in masks])
    scores = torch.cat([m.double().flatten() for m in maps])
    if not bool(every.any()) or bool(every.all()) or bool((scores == scores[0]).all()):
        return []
    limit = d.choice("limit", (0.05, 0.3, 1.0, 1, 0.01, 0.5))
    form, bound = d.choice("form", ("tensors", "arrays")), d.as_number("limit", limit)
    given = maps
    if form == "arrays":
        given = [(m.float() if m.dtype == torch.bfloat16 else m).resolve_neg().numpy() for m in maps]
    checks = []
    for name in ("au_pro", "au_roc"):
        got = getattr(metrics, name)(given, masks if form == "tensors" else [m.numpy() for m in masks], bound)
        got = torch.tensor(got, dtype=torch.float64)
        got = d.change(got[None])[0] if d.change else got
        want = torch.tensor(_area(maps, masks, limit, name == "au_pro"), dtype=torch.float64)
        checks.append(derived(name, got, want, 64 * len(scores) * unit(torch.float64), torch.float64))
    got = torch.tensor(metrics.best_f1(iter(given), masks), dtype=torch.float64)
    got = d.change(got) if d.change else got
    found = scores[None] >= scores[:, None]  # by threshold
    f1 = 2 * (found & every).sum(1) / (found.sum(1) + every.sum()).double()
    want = torch.stack([f1.max(), scores[f1 == f1.max()].max()])
    checks.append(derived("best_f1", got, want, unit(torch.float64), torch.float64))
    return checks


def _regions(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """8-connected regions, by a flood from every pixel not seen before."""
    left, regions = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}, []
    while left:
        front, region = [left.pop()], []
        while front:
            y, x = front.pop()
            region.append((y, x))
            for near in [(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    front.append(near)
        regions.append(region)
    return regions


def _area(maps: list[Tensor], masks: list[Tensor], limit: float, by_region: bool) -> float:
    scores = [m.double().resolve_neg().numpy() for m in maps]
    defects = [m.numpy() != 0 for m in masks]
    groups = []
    for s, mask in zip(scores, defects, strict=True):
        groups += [np.array([s[at] for at in region]) for region in _regions(mask)]
    if not by_region:
        groups = [np.concatenate(groups)]
    others = np.concatenate([s[~m] for s, m in zip(scores, defects, strict=True)])
    x, y = [0.0], [0.0]
    for t in sorted(set(np.concatenate([s.ravel() for s in scores]).tolist()), reverse=True):
        x.append(float((others >= t).mean()))
        y.append(float(np.mean([(g >= t).mean() for g in groups])))
    area = 0.0
    for i in range(1, len(x)):
        if x[i] <= limit:
            area += (x[i] - x[i - 1]) * (y[i] + y[i - 1]) / 2
            continue
        at = y[i - 1] + (y[i] - y[i - 1]) * (limit - x[i - 1]) / (x[i] - x[i - 1])
        area += (limit - x[i - 1]) * (at + y[i - 1]) / 2
        break
    return area / limit
