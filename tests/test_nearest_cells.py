"""``NearestIndex(cells=...)``, ``NearestIndex.add`` and inner products: the answers of the plain scan, bit for bit."""

from __future__ import annotations

import importlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from fake_cuda import Operations
from hypothesis import given, settings
from hypothesis import strategies as st

from murf_fast import NearestIndex, nearest_distance, reference
from murf_fast.anomaly import ShardedIndex
from murf_fast.tables import nearest_cells

native = importlib.import_module("murf_fast.native.nearest_distance")
# What a host waits for a device with.
LOOKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "repeat_interleave.Tensor")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def few_queries_are_enough(monkeypatch):
    monkeypatch.setattr(native, "FEW_QUERIES", 0)


def clustered(rows, dim, seed=0, clusters=12, spread=0.05, mean=3.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(clusters, dim, generator=g)[torch.randint(clusters, (rows,), generator=g)]
    return x + spread * torch.randn(rows, dim, generator=g) + mean * torch.randn(dim, generator=g)


def assert_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def assert_same(query, bank, *, k=1, cosine=False, cells=9, **options):
    """The answers of an index with cells are those of one without."""
    index = NearestIndex(bank, cosine=cosine, cells=cells, **options)
    expected = nearest_distance(query, NearestIndex(bank, cosine=cosine, **options), k=k)
    assert_equal(nearest_distance(query, index, k=k), expected)
    return index


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cells_change_no_answer(dtype, precision, cosine):
    x = clustered(1100, 37).to(dtype)
    for k in (1, 5):
        index = assert_same(x[:70], x[70:], k=k, cosine=cosine, cells=12, precision=precision)
        assert 0 < index.searched < 0.5


@given(
    rows=st.integers(1, 150),
    queries=st.integers(0, 60),
    dim=st.integers(1, 20),
    k=st.integers(1, 9),
    cells=st.integers(1, 40),
    cosine=st.booleans(),
    spread=st.sampled_from([0.0, 1e-3, 1.0]),
    precision=st.sampled_from(["float32", "bfloat16"]),
    pays=st.sampled_from([0.5, 2.0]),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(rows, queries, dim, k, cells, cosine, spread, precision, pays):
    """Duplicates, all equal rows, cells of one row, more cells than clusters; with and without falling back."""
    x = clustered(rows + queries, dim, rows, spread=spread)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "PAYS", pays)
        for name, value in (("BANK_BLOCK", 50), ("QUERY_BLOCK", 16), ("CELL_ENTRIES", 20 * cells)):
            patch.setattr(native, name, value)
        assert_same(x[:queries], x[queries:], k=min(k, rows), cells=cells, cosine=cosine, precision=precision)


def test_ties_across_cells_go_to_the_lower_index():
    """Rows of a grid: queries in the middle of its squares have equally near rows in several cells."""
    grid = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0)).flip(0)
    query = torch.cartesian_prod(torch.arange(15.0), torch.arange(15.0)) + 0.5
    index = NearestIndex(grid, cells=40, precision="float32")
    for k in (1, 2, 4):
        distances, indices = nearest_distance(query, index, k=k)
        expected = reference.nearest_distance(query, grid, k)
        assert torch.equal(indices, expected[1])
        assert index.searched < 0.5
        assert torch.equal(distances, torch.full_like(distances, 0.5**0.5))


def test_an_outlier_and_queries_far_away():
    x = clustered(600, 16)
    x[17] = 1e4
    for query in (x[:20], x[:20] + 1e5, x[17:18] * 1.001):
        for k in (1, 3):
            assert_same(query, x, k=k)


def test_random_rows_are_scanned(monkeypatch):
    """No cell can be skipped: a few queries find that out, and the rest goes the plain way."""
    x = torch.rand(2200, 64, generator=torch.Generator().manual_seed(0))
    asked = []
    look_near = native._Search._look_near
    monkeypatch.setattr(
        native._Search, "_look_near", lambda self, numbers: asked.append(len(numbers)) or look_near(self, numbers)
    )
    index = assert_same(x[:200], x[200:], cells=8)
    assert asked == [4]
    assert 1 <= index.searched < 1.1


def test_bounds_hold_and_are_close():
    """No row of a cell is nearer than its bound; and the bounds of most cells would not bear a tenth more."""
    x = clustered(900, 24, spread=0.3).double()
    index = NearestIndex(x[50:].float(), cells=20)
    mean, rows = index.tensors[0].double(), index.bank.double()
    query = x[:50].float().double() - mean
    squared = nearest_cells.squared_distances(query, index.cells)
    lower = nearest_cells.lower_bounds(squared, query.norm(dim=1), index.cells)
    exact = torch.cdist(query, rows[index.cells.rows] - mean, compute_mode="donot_use_mm_for_euclid_dist")
    begins = index.cells.begins.tolist()
    nearest = torch.stack([exact[:, a:b].amin(1) for a, b in pairwise(begins)], 1)
    assert bool((lower <= nearest).all())
    assert float((lower / nearest).clamp(min=0).median()) > 0.5


def test_mapped_and_float64_banks(tmp_path):
    x = clustered(800, 24)
    np.save(tmp_path / "bank.npy", x[30:].numpy())
    assert_same(x[:30], np.load(tmp_path / "bank.npy", mmap_mode="r"), k=3)
    for query, bank in ((x[:30].double(), x[30:]), (x[:30], x[30:].double())):
        index = assert_same(query, bank, k=3)
        assert index.searched == 1
    index = assert_same(x[:30], x[30:], k=3, backend="reference")
    assert index.searched == 1


def test_what_pads_a_product_changes_nothing(monkeypatch):
    """Memory that is no number: products read past the end of a row, where NaN times zero is NaN."""
    empty = native.empty
    monkeypatch.setattr(
        native, "empty", lambda shape, dtype: empty(shape, dtype).fill_(torch.nan if dtype.is_floating_point else 0)
    )
    monkeypatch.setattr(native, "PAYS", 2.0)
    x = clustered(1500, 384, clusters=12, spread=0.5)
    for precision in ("float32", "bfloat16"):
        assert_same(x[:300], x[300:], k=2, cells=12, precision=precision)


def test_few_queries_scan(monkeypatch):
    monkeypatch.setattr(native, "FEW_QUERIES", 21)
    x = clustered(900, 20)
    assert assert_same(x[:20], x[30:]).searched == 1
    assert assert_same(x[:21], x[30:]).searched < 0.5


@pytest.mark.parametrize("cosine", [False, True])
def test_rows_added_to_a_triton_index(cosine, device):
    x = clustered(70, 11).to(device)
    index = NearestIndex(x[:40], cosine=cosine, precision="float32", backend="triton")
    index.add(x[40:])
    expected = nearest_distance(x[::9], NearestIndex(x, cosine=cosine, precision="float32", backend="triton"), k=3)
    assert_equal(nearest_distance(x[::9], index, k=3), expected)
    assert NearestIndex(x, cells="auto", backend="triton").cells is None
    values, indices = products(x[::9].cpu(), x.cpu(), 3)
    found = nearest_distance(x[::9], x, k=3, metric="ip", backend="triton")
    assert torch.equal(found[1].cpu(), indices)
    assert torch.allclose(found[0].cpu().double(), values, rtol=1e-6)


@pytest.fixture(params=[1, 3], ids=["one program for a list", "three programs for a list"])
def small_tiles(request, device, monkeypatch):
    """Tiles of 16 queries and blocks of 16 rows, and every call is searched in cells. In the interpreter, whose
    searches take seconds, cells are made by native ones.
    """
    engine = pytest.importorskip("murf_fast.kernels.nearest_cells")
    tile = engine.ProductTile(16, 16, 16, 32, 4, 2, 255)
    monkeypatch.setattr(engine, "cells_tile", lambda *_: tile)
    monkeypatch.setattr(engine, "splits_of", lambda *_: request.param)
    monkeypatch.setattr(importlib.import_module("murf_fast.kernels.nearest_distance"), "FEW_QUERIES", 0)
    if device == "cpu":
        monkeypatch.setattr(NearestIndex, "_nearest", lambda _, *pair: nearest_distance(*pair, backend="native"))
    return device


@pytest.mark.parametrize(("cosine", "precision", "k"), [(False, "float32", 1), (True, "float16", 3)])
def test_cells_on_a_gpu_change_no_answer(cosine, precision, k, small_tiles):
    """Of queries in several blocks, whose last tile is partly there, and of rows that are added."""
    x = clustered(230, 9).to(small_tiles)
    query, options = x[:30], {"cosine": cosine, "precision": precision, "backend": "triton"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("murf_fast.kernels.nearest_distance"), "CELL_ENTRIES", 9 * 20)
        index = assert_same(query, x[30:200], k=k, cells=9, **options)
    assert 0 < index.searched < 0.9
    index.add(x[200:])
    expected = nearest_distance(query, NearestIndex(x[30:], **options), k=k)
    assert_equal(nearest_distance(query, index, k=k), expected)


def test_ties_across_cells_on_a_gpu(small_tiles):
    grid = torch.cartesian_prod(torch.arange(12.0), torch.arange(8.0)).flip(0).to(small_tiles)
    query = (torch.cartesian_prod(torch.arange(11.0), torch.arange(3.0)) + 0.5).to(small_tiles)
    index = NearestIndex(grid, cells=12, precision="float32", backend="triton")
    distances, indices = nearest_distance(query, index, k=4)
    assert torch.equal(indices, reference.nearest_distance(query, grid, 4)[1])
    assert torch.equal(distances, torch.full_like(distances, 0.5**0.5))
    assert index.searched < 0.8


def test_no_pair_is_looked_at_twice_on_a_gpu(small_tiles):
    """Not even where no cell can be skipped."""
    x = torch.rand(130, 40, generator=torch.Generator().manual_seed(0)).to(small_tiles)
    index = assert_same(x[:30], x[30:], cells=5, precision="float32", backend="triton")
    assert index.searched == 1


def test_unproven_answers_of_cells(small_tiles, monkeypatch):
    """Rows that half precision cannot tell apart are all scored, by the numbers that they have in the bank."""
    module = importlib.import_module("murf_fast.kernels.nearest_distance")
    again, search = [], module._search_again
    monkeypatch.setattr(module, "_search_again", lambda *a: again.append(len(a[1])) or search(*a))
    g = torch.Generator().manual_seed(0)
    bank = torch.cat([1 + 1e-4 * torch.randn(90, 16, generator=g), torch.randn(40, 16, generator=g)])
    bank = bank[torch.randperm(130, generator=g)].to(small_tiles)
    query = torch.cat([1 + 1e-4 * torch.randn(8, 16, generator=g), torch.randn(9, 16, generator=g)]).to(small_tiles)
    index = NearestIndex(bank, cells=6, precision="float16", backend="triton")
    found = nearest_distance(query, index, k=2)
    assert torch.equal(found[1], reference.nearest_distance(query.double(), bank.double(), 2)[1])
    assert sum(again) >= 8


def test_neighbours_in_other_cells_on_a_gpu(small_tiles):
    """On a line, where the nearest rows of most queries lie in two or three cells."""
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(150, 1, generator=g), torch.linspace(0, 1, 40)[:, None]]).to(small_tiles)
    query, bank = x[150:], x[:150]
    index = NearestIndex(bank, cells=12, precision="float32", backend="triton")
    found = nearest_distance(query, index, k=9)
    assert torch.equal(found[1], reference.nearest_distance(query.double(), bank.double(), 9)[1])


def test_the_host_waits_for_nothing_while_cells_are_chosen(small_tiles):
    """No operation whose result, or its size, the host would have to look at."""
    in_cells = importlib.import_module("murf_fast.kernels.nearest_in_cells")
    x = clustered(80, 5).to(small_tiles)
    index = NearestIndex(x[20:], cells=4, precision="float32", backend="triton")
    own = torch.empty(20, 1), torch.empty(20, 1, dtype=torch.int64), torch.empty(20, dtype=torch.float64)
    own = [t.to(small_tiles) for t in (*own, torch.empty(20, dtype=torch.int8))]
    with Operations() as operations:
        search = in_cells.Search(x[:20], index.bank, index.tensors, index.cells, 1, "l2")
        pairs = search.run(*own)
    assert "aten::topk" in operations.counts
    assert not {f"aten::{name}" for name in LOOKS} & operations.counts.keys()
    assert 0 < float(pairs) <= 20 * 60
    assert torch.equal(own[1], nearest_distance(x[:20], x[20:], backend="triton")[1])


def test_refused_queries_of_cells_are_named(small_tiles):
    x = clustered(60, 5).to(small_tiles)
    index = NearestIndex(x, cells=4, precision="float32", backend="triton")
    query = x[:20].clone()
    query[17, 2] = torch.nan
    with pytest.raises(ValueError, match=r"`query` must be finite with norms up to 1e18, rows \[17\] are not"):
        nearest_distance(query, index)
    assert nearest_distance(query[:0], index)[0].shape == (0, 1)


def test_few_queries_scan_cells_on_a_gpu(small_tiles, monkeypatch):
    monkeypatch.setattr(importlib.import_module("murf_fast.kernels.nearest_distance"), "FEW_QUERIES", 8)
    x = clustered(90, 7).to(small_tiles)
    assert assert_same(x[:7], x[10:], cells=6, precision="float32", backend="triton").searched == 1


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 70])
def test_blocks_of_tiles(rows, monkeypatch):
    """Every row of a wanted cell lies in a listed block, and every listed block has one; each is listed once."""
    engine = pytest.importorskip("murf_fast.kernels.nearest_cells")
    generator = torch.Generator().manual_seed(rows)
    owner = torch.randint(max(1, rows // 6), (rows,), generator=generator).unique(return_inverse=True)[1].sort().values
    count = int(owner.max()) + 1
    begins = torch.nn.functional.pad(torch.bincount(owner).cumsum(0), (1, 0))
    cells = nearest_cells.Cells(torch.arange(rows), begins, *[torch.zeros(0)] * 5)
    tile = engine.ProductTile(128, 16, 16, 64, 4, 2, 255)
    monkeypatch.setattr(engine, "cells_tile", lambda *_: tile)
    launcher = engine.Launcher(torch.zeros(rows, 64, dtype=torch.float16), 300)
    lanes, queries = tile.lanes, tile.queries
    wanted = torch.rand(300, count, generator=generator) < 0.002
    active = launcher.active(wanted, cells)
    blocks = launcher.listed(active)
    pairs = 0
    for t in range(3):
        of_tile = wanted[t * queries : (t + 1) * queries]
        mine = (torch.arange(rows)[of_tile.any(0)[owner]] // lanes).unique()
        assert torch.equal(blocks.numbers[t, : blocks.counts[t]].long(), mine)
        pairs += sum(len(of_tile) * (min(rows, (b + 1) * lanes) - b * lanes) for b in mine.tolist())
    assert float(launcher.looked_at(active)) == pairs
    counts = blocks.counts[blocks.order.long()]
    assert torch.equal(counts, blocks.counts.sort(descending=True).values)


def test_centres_follow_near_ones():
    x = clustered(900, 24, clusters=30, spread=0.5)
    centres = NearestIndex(x, cells=30).cells.centres
    steps = (centres[1:] - centres[:-1]).norm(dim=1).mean()
    assert float(steps) < 0.8 * float(torch.pdist(centres).mean())


def test_a_sharded_index_in_cells(tmp_path):
    import torch.distributed as dist

    x = clustered(400, 9)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        index = ShardedIndex(x[40:], cells=9)
        assert_equal(index.search(x[:40], k=3), nearest_distance(x[:40], x[40:], k=3))
        assert index.local.searched < 0.6
    finally:
        dist.destroy_process_group()


def test_auto_and_few_rows():
    assert NearestIndex(torch.ones(500, 3), cells="auto").cells is None
    x = clustered(8192 + 64, 8, clusters=40)
    index = assert_same(x[:64], x[64:], cells="auto")
    assert len(index.cells.centres) == 16
    assert index.searched < 0.3
    assert NearestIndex(x).searched == 1
    assert NearestIndex(x[:50], cells=2).searched is None


def test_threads_and_levels(level):
    x = clustered(700, 20)
    expected = nearest_distance(x[:50], x[50:], k=2)
    index = NearestIndex(x[50:], cells=9)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert_equal(nearest_distance(x[:50], index, k=2), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cells", [None, 7])
@pytest.mark.parametrize("cosine", [False, True])
def test_added_rows(cells, cosine, precision, monkeypatch):
    """Searches of a bank that grew are those of a fresh one; the added rows are unlike the others."""
    monkeypatch.setattr(native, "BANK_BLOCK", 60)
    x = torch.cat([clustered(400, 19), clustered(171, 19, seed=9, spread=2.0)])
    query = x[::9] + 0.01
    index = NearestIndex(x[:300], cosine=cosine, cells=cells, precision=precision)
    for begin, end in ((300, 301), (301, 301), (301, 571)):
        index.add(x[begin:end])
        assert len(index) == end
        expected = nearest_distance(query, NearestIndex(x[:end], cosine=cosine, precision=precision), k=4)
        assert_equal(nearest_distance(query, index, k=4), expected)


def test_added_rows_are_checked():
    index = NearestIndex(clustered(50, 6), cells=4)
    with pytest.raises(TypeError, match=r"`rows` must be torch\.float32 as the bank"):
        index.add(torch.ones(3, 6, dtype=torch.float16))
    with pytest.raises(ValueError, match="`rows` must have 6 columns on cpu as the bank"):
        index.add(torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"`rows` must be finite.* rows \[1\]"):
        index.add(torch.tensor([[1.0] * 6, [torch.nan] * 6]))
    assert len(index) == 50
    reference = NearestIndex(torch.eye(4), backend="reference")
    reference.add(2 * torch.eye(4))
    assert nearest_distance(3 * torch.eye(4), reference, k=1)[1].tolist() == [[4], [5], [6], [7]]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"cells": 0}, ValueError, "`cells` must be at least 1, got 0"),
        ({"cells": 2.5}, TypeError, "`cells` must be an integer"),
        ({"cells": 3, "ip": True}, ValueError, "`cells` bound distances; they exclude `ip`"),
        ({"cosine": True, "ip": True}, ValueError, "`cosine` and `ip` exclude each other"),
        ({"cells": 3, "device": "cuda:0"}, ValueError, "`cells` need the bank where the search runs, on cuda:0, got"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        NearestIndex(torch.ones(5, 2), **options)


def products(query, bank, k):
    """The k largest inner products in float64, equal ones by rising row."""
    values, indices = (query.double() @ bank.double().T).sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_inner_products(dtype, precision):
    x = clustered(900, 41, spread=0.5, mean=1.0).to(dtype)
    query, bank = x[:60], x[60:]
    for k in (1, 6):
        values, indices = products(query, bank, k)
        index = NearestIndex(bank, ip=True, precision=precision)
        found = nearest_distance(query, index, k=k)
        assert_equal(found, nearest_distance(query, bank, k=k, metric="ip", precision=precision))
        assert torch.equal(found[1], indices)
        eps = torch.finfo(found[0].dtype).eps
        terms = eps * (query.double().norm(dim=1)[:, None] * bank.double().norm(dim=1).max())
        # Of one rounding to float32, or of sums in float64.
        allowed = eps * values.abs() if dtype != torch.float64 else 41 * terms
        assert bool(((found[0].double() - values).abs() <= allowed).all())


@given(
    rows=st.integers(1, 150),
    queries=st.integers(1, 40),
    dim=st.integers(1, 40),
    k=st.integers(1, 9),
    scale=st.sampled_from([2.0**-60, 1.0, 2.0**50]),
    precision=st.sampled_from(["float32", "bfloat16"]),
)
@settings(max_examples=30, deadline=None)
def test_inner_products_of_any_shape(rows, queries, dim, k, scale, precision):
    """Whole numbers, whose products and sums are exact: rows, ties and values are known."""
    g = torch.Generator().manual_seed(rows)
    x = torch.randint(-3, 4, (rows + queries, dim), generator=g) * torch.tensor(scale)
    query, bank = x[:queries], x[queries:]
    k = min(k, rows)
    values, indices = products(query, bank, k)
    found = nearest_distance(query, bank, k=k, metric="ip", precision=precision)
    assert torch.equal(found[1], indices)
    assert torch.equal(found[0].double(), values)


def test_inner_products_of_faiss():
    faiss = pytest.importorskip("faiss")
    x = torch.randn(700, 32, generator=torch.Generator().manual_seed(0))
    flat = faiss.IndexFlatIP(32)
    flat.add(x[50:].numpy())
    values, indices = flat.search(x[:50].numpy(), 3)
    found = nearest_distance(x[:50], x[50:], k=3, metric="ip")
    assert torch.equal(found[1], torch.from_numpy(indices))
    assert torch.allclose(found[0], torch.from_numpy(values), rtol=1e-5)


def test_inner_products_of_added_rows_and_the_reference():
    x = clustered(200, 9)
    index = NearestIndex(x[:90], ip=True)
    index.add(x[90:])
    expected = nearest_distance(x, x, k=3, metric="ip")
    assert_equal(nearest_distance(x, index, k=3), expected)
    plain = nearest_distance(x.double(), x.double(), k=3, metric="ip", backend="reference")
    assert torch.equal(plain[1], expected[1])
    assert bool((plain[0][:, :-1] >= plain[0][:, 1:]).all())
    with pytest.raises(ValueError, match="prepared with cosine=False and ip=True"):
        nearest_distance(x, index, metric="l2")


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_cells_reach_as_far_as_the_rows_that_were_added(dim):
    """Far rows lie beyond every bound of the first ones."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        bank = torch.randn(3000, dim, generator=generator)
        more = 3 * torch.randn(300, dim, generator=generator)
        index = NearestIndex(bank, cells=60, precision="float32")
        index.add(more)
        found = nearest_distance(more, index, k=2)
        expected = nearest_distance(more, torch.cat([bank, more]), k=2, precision="float32")
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1e-18, 1e-20, 1e-22, 1e-30])
def test_tiny_rows(size, precision):
    """Their squares are below float32's numbers."""
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(40, 16, generator=generator)
    near = [centres[torch.randint(40, (n,), generator=generator)] for n in (3000, 300)]
    bank, query = (size * (x + 0.1 * torch.randn(x.shape, generator=generator)) for x in near)
    apart = torch.cdist(query.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist")
    for cells in (None, 40):
        _, found = nearest_distance(query, NearestIndex(bank, cells=cells, precision=precision))
        chosen = apart.gather(1, found)[:, 0]
        assert float((chosen / apart.amin(1)).max()) < 1 + 1e-6
