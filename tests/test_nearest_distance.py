from __future__ import annotations

import contextlib
import importlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from originals import golden
from suite import KERNELS, TRITON_DTYPES, check_opcheck, every_kernel

import murf_fast
from murf_fast import NearestIndex, backends, native, nearest_distance, reference
from murf_fast.ops import _nearest_float64

GOLDEN = Path(__file__).parent / "golden"
METRICS = ("l2", "l2sq", "cosine")
PRECISIONS = ("float32", "bfloat16", "float16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def clustered(rows, dim, seed=0, clusters=5, spread=0.05, mean=20.0):
    """Features as of a ViT: few tight clusters around a large common mean, with massive channels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(clusters, dim, generator=g)[torch.randint(clusters, (rows,), generator=g)]
    x = x + spread * torch.randn(rows, dim, generator=g) + mean * torch.randn(dim, generator=g)
    x[:, : max(1, dim // 100)] *= 10
    return x


def on(arguments, device):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def split(x, queries):
    """Bank and queries of one distribution."""
    return x[queries:], x[:queries]


def assert_exact(actual, query, bank, k, metric):
    """The neighbours of the float64 reference; distances within one rounding to float32."""
    expected, indices = reference.nearest_distance(query.double(), bank.double(), k, metric)
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == torch.int64
    assert torch.equal(actual[1], indices)
    # Unit rows lose the last digits of their difference.
    terms = 1e-14 if metric == "cosine" else 0.0
    allowed = torch.finfo(torch.float32).eps * expected.abs() + terms
    assert bool(((actual[0].double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact(dtype, precision, metric):
    bank, query = split(clustered(1500, 131).to(dtype), 70)
    for k in (1, 5):
        actual = nearest_distance(query, bank, k=k, metric=metric, precision=precision, backend="native")
        assert_exact(actual, query, bank, k, metric)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_level(level, precision):
    for metric in METRICS:
        bank, query = split(clustered(1203, 48), 37)
        assert_exact(nearest_distance(query, bank, k=3, metric=metric, precision=precision), query, bank, 3, metric)


@every_kernel
@given(
    rows=st.integers(1, 150),
    queries=st.integers(0, 70),
    dim=st.integers(1, 70),
    k=st.integers(1, 9),
    metric=st.sampled_from(METRICS),
    precision=st.sampled_from(["float32", "float16"]),
    spread=st.sampled_from([0.0, 1e-3, 1.0]),
)
@settings(max_examples=15, deadline=None)
def test_any_shape(backend, device, rows, queries, dim, k, metric, precision, spread):
    bank, query = split(clustered(rows + queries, dim, rows, spread=spread, mean=1.0).to(device), queries)
    k = min(k, rows)
    actual = nearest_distance(query, bank, k=k, metric=metric, precision=precision, backend=backend)
    expected, indices = reference.nearest_distance(query.double(), bank.double(), k, metric)
    # Unit rows that differ in the last digits only are ordered by those of float64, which are not unique.
    if metric != "cosine":
        assert torch.equal(actual[1], indices)
    assert torch.allclose(actual[0].double(), expected, rtol=1e-6, atol=1e-7 if metric == "cosine" else 0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_more_candidates_than_fit(precision):
    """Hundreds of rows that low precision cannot tell apart: candidates overflow and are scored on the way."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(64, generator=g)
    bank = torch.cat([base + 1e-4 * torch.randn(3000, 64, generator=g), torch.randn(100, 64, generator=g)])
    query = base + 1e-4 * torch.randn(20, 64, generator=g)
    for k in (1, 7, 130):
        assert_exact(nearest_distance(query, bank, k=k, precision=precision), query, bank, k, "l2")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_rounding_along_the_difference(dim, precision):
    """Few dimensions: the copy's rounding errors point along the differences and are larger than them."""
    g = torch.Generator().manual_seed(dim)
    sides = 100.0 * (torch.randint(2, (500, 1), generator=g) * 2 - 1)
    bank, query = split(sides + 0.3 * torch.randn(500, dim, generator=g), 100)
    for k in (1, 4):
        assert_exact(nearest_distance(query, bank, k=k, precision=precision), query, bank, k, "l2")


def test_several_blocks_of_queries_and_rows(monkeypatch):
    for name, value in (("BANK_BLOCK", 100), ("QUERY_BLOCK", 7), ("QUERIES", 30)):
        monkeypatch.setattr(importlib.import_module("murf_fast.native.nearest_distance"), name, value)
    bank, query = split(clustered(1001, 20), 65)
    for precision in PRECISIONS:
        for metric in ("l2", "cosine"):
            assert_exact(nearest_distance(query, bank, k=2, metric=metric, precision=precision), query, bank, 2, metric)


@every_kernel
def test_ties_go_to_the_lower_index(backend, device):
    bank = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).repeat(6, 1).to(device)
    query = bank[:9] + 0.01
    distances, indices = nearest_distance(query, bank, k=4, precision="float32", backend=backend)
    assert torch.equal(indices.cpu(), torch.arange(9)[:, None] + torch.arange(0, 200, 50))
    assert torch.equal(distances, distances[:, :1].expand(-1, 4))


@every_kernel
def test_a_row_of_the_bank_is_at_distance_zero(backend, device):
    bank = clustered(200, 33).to(device)
    distances, indices = nearest_distance(bank[::7], bank, precision="float32", backend=backend)
    assert torch.equal(indices[:, 0].cpu(), torch.arange(0, 200, 7))
    assert float(distances.abs().max()) == 0


def test_strides_and_mixed_dtypes():
    bank, query = split(clustered(400, 24), 30)
    expected = nearest_distance(query, bank)
    for b in (bank.T.contiguous().T, torch.cat([bank, bank], 1)[:, :24]):
        for q in (query.T.contiguous().T, query.repeat_interleave(2, 0)[::2]):
            actual = nearest_distance(q, b)
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert_exact(nearest_distance(query, bank.half()), query, bank.half(), 1, "l2")


def test_prepared_index_and_memory_mapped_bank(tmp_path):
    bank, query = split(clustered(700, 24), 30)
    np.save(tmp_path / "bank.npy", bank.numpy())
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    expected = nearest_distance(query, bank, k=2)
    for index in (NearestIndex(bank), NearestIndex(mapped), NearestIndex(mapped, precision="float32")):
        assert len(index) == 670
        for a, e in zip(nearest_distance(query, index, k=2), expected, strict=True):
            assert torch.equal(a, e)


def test_empty_queries():
    for dtype in (torch.float32, torch.float64):
        distances, indices = nearest_distance(torch.empty(0, 7, dtype=dtype), torch.ones(9, 7), k=2)
        assert distances.shape == indices.shape == (0, 2)
        assert distances.dtype == dtype


def assert_exact_float64(actual, query, bank, k, metric):
    """The neighbours of the float64 reference, but for those that its roundings cannot tell apart."""
    expected, indices = reference.nearest_distance(query, bank, k, metric)
    distances, found = actual
    assert distances.dtype == torch.float64
    roundings = torch.finfo(torch.float64).eps * (query.shape[1] + 8)
    # Unit rows lose the last digits of their difference.
    allowed = roundings * expected.abs() + (roundings if metric == "cosine" else 0)
    assert bool(((distances - expected).abs() <= allowed).all())
    own = bank[found].double() - query[:, None].double()
    if metric == "l2":
        assert bool(((own.square().sum(2).sqrt() - distances).abs() <= allowed).all())
    gap = (expected[:, 1:] - expected[:, :-1]) > 2 * allowed[:, 1:]
    clear = torch.nn.functional.pad(gap, (1, 0), value=True) & torch.nn.functional.pad(gap, (0, 1), value=False)
    assert torch.equal(found[clear], indices[clear])
    assert all(len(set(row)) == k for row in found.tolist())


@given(
    rows=st.integers(1, 150),
    queries=st.integers(1, 40),
    dim=st.integers(1, 70),
    k=st.integers(1, 9),
    metric=st.sampled_from(METRICS),
    spread=st.sampled_from([0.0, 1e-9, 1e-3, 1.0]),
    mean=st.sampled_from([0.0, 1.0, 1e6]),
    waiting=st.sampled_from([0, 1 << 17]),
    dtypes=st.sampled_from(
        [(torch.float64, torch.float64), (torch.float64, torch.float16), (torch.float32, torch.float64)]
    ),
)
@settings(max_examples=60, deadline=None)
def test_float64_of_any_shape(rows, queries, dim, k, metric, spread, mean, waiting, dtypes):
    bank, query = split(clustered(rows + queries, dim, rows, spread=spread, mean=mean).double(), queries)
    if torch.float16 in dtypes:
        bank = bank / bank.abs().max()
    query, bank = query.to(dtypes[0]), bank.to(dtypes[1])
    k = min(k, rows)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("VALUES", 300), ("QUERIES", 7), ("WAITING", waiting)):
            patch.setattr(_nearest_float64, name, value)
        assert_exact_float64(nearest_distance(query, bank, k=k, metric=metric), query, bank, k, metric)


@pytest.mark.parametrize("waiting", [0, 50, 1 << 17])
def test_float64_ties_go_to_the_lower_index(waiting, monkeypatch):
    monkeypatch.setattr(_nearest_float64, "WAITING", waiting)
    monkeypatch.setattr(_nearest_float64, "VALUES", 500)
    bank = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat(6, 1)
    distances, indices = nearest_distance(bank[:9] + 0.01, bank, k=4)
    assert torch.equal(indices, torch.arange(9)[:, None] + torch.arange(0, 200, 50))
    assert torch.equal(distances, distances[:, :1].expand(-1, 4))


def test_float64_of_prepared_banks(tmp_path):
    bank, query = split(clustered(300, 24), 30)
    np.save(tmp_path / "bank.npy", bank.double().numpy())
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    for index, q in (
        (NearestIndex(bank), query.double()),
        (NearestIndex(bank, precision="bfloat16"), query.double()),
        (NearestIndex(bank.double()), query),
        (NearestIndex(mapped), query.double().numpy()),
    ):
        assert_exact_float64(nearest_distance(q, index, k=3), query.double(), bank.double(), 3, "l2")
    for asked in (NearestIndex(bank.double(), backend="reference"), bank.double()):
        found = nearest_distance(query.double(), asked, k=3, backend="reference")
        expected = reference.nearest_distance(query.double(), bank.double(), 3)
        assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))
    for where in (bank, NearestIndex(bank)):
        with pytest.raises(backends.BackendUnavailableError, match=r"'native' was asked for.*float64"):
            nearest_distance(query.double(), where, backend="native")


@pytest.mark.parametrize("metric", METRICS)
def test_float64_refuses_what_it_cannot_square(metric):
    good = torch.randn(9, 4, dtype=torch.float64)
    words = "finite, rows" if metric == "cosine" else "finite with norms up to 1e150, rows"
    for value in (torch.nan, torch.inf, *([] if metric == "cosine" else [1e160])):
        bad = good.clone()
        bad[[2, 5]] = value
        for name, arguments in (("query", (bad, good)), ("bank", (good, bad))):
            with pytest.raises(ValueError, match=rf"`{name}` must be {words} \[2, 5\] are not"):
                nearest_distance(*arguments, metric=metric)
    if metric == "cosine":
        good[3] = 0
        with pytest.raises(ValueError, match=r"nonzero rows, `bank` has \[3\]"):
            nearest_distance(good[:2], good, metric=metric)


@pytest.mark.parametrize(("backend", "device"), [(None, "cpu"), ("reference", "cpu"), *KERNELS])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_cosine_of_rows_of_any_length(dtype, backend, device):
    """Of rows near the smallest and largest numbers of their dtype, subnormal ones included."""
    if dtype == torch.float64 and backend not in (None, "reference"):
        pytest.skip("float64 has its own blocks")
    if backend == "triton" and dtype not in TRITON_DTYPES:
        pytest.skip("the interpreter takes subnormal bfloat16 numbers for others")
    bank, query = split(torch.randn(216, 16, generator=torch.Generator().manual_seed(0)), 16)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    lengths = torch.tensor(
        [64 * smallest, 1e3 * smallest, torch.finfo(dtype).smallest_normal, 1.0], dtype=torch.float64
    )
    bank = (bank.double() * lengths.repeat(50)[:, None]).to(dtype)
    query = (query.double() * lengths.repeat(4)[:, None]).to(dtype)
    b, q = (x.double() * 2.0**600 if dtype == torch.float64 else x.double() for x in (bank, query))
    b, q = (x / x.abs().amax(1, keepdim=True) for x in (b, q))
    exact = 1 - (q @ b.T) / (q.norm(dim=1)[:, None] * b.norm(dim=1))
    expected, indices = exact.topk(3, largest=False)
    distances, found = (
        x.cpu() for x in nearest_distance(query.to(device), bank.to(device), k=3, metric="cosine", backend=backend)
    )
    # Of the oracle's own roundings, and of those of the plain reference.
    terms = 16 if backend == "reference" or dtype == torch.float64 else 1
    allowed = torch.finfo(distances.dtype).eps * (expected + terms)
    assert bool(((distances.double() - expected).abs() <= allowed).all())
    if backend != "reference":
        assert torch.equal(found, indices)


def test_less_precise_float32_products_change_nothing():
    """On processors that offer it, torch multiplies float32 in bfloat16 when told to."""
    bank, query = split(clustered(900, 64), 40)
    torch.set_float32_matmul_precision("medium")
    try:
        assert_exact(nearest_distance(query, bank, precision="float32"), query, bank, 1, "l2")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_threads():
    bank, query = split(clustered(1300, 40), 50)
    index = NearestIndex(bank)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = nearest_distance(query, index, k=3)
        torch.set_num_threads(3)
        results = [nearest_distance(query, index, k=3)]
    finally:
        torch.set_num_threads(threads)
    workers = [threading.Thread(target=lambda: results.append(nearest_distance(query, index, k=3))) for _ in range(3)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(results) == 4
    for result in results:
        assert all(torch.equal(a, e) for a, e in zip(result, expected, strict=True))


def test_registration_and_compile():
    bank, query = split(clustered(300, 20), 11)
    op = torch.ops.murf_fast.nearest_distance.default
    for precision in PRECISIONS:
        index = NearestIndex(bank, precision=precision)
        check_opcheck(op, query, bank, index.tensors, 2, "l2", precision, "native")
    check_opcheck(op, query.T.contiguous().T, bank.T.contiguous().T, [], 2, "cosine", "auto", "native")
    check_opcheck(op, query.double(), bank, [], 2, "l2", "auto", "native")
    for where in (index, bank, bank.double()):
        compiled = torch.compile(lambda q, where: nearest_distance(q * 2, where, k=2)[0] + 1, fullgraph=True)
        assert torch.equal(compiled(query, where), nearest_distance(query * 2, where, k=2)[0] + 1)


def test_golden_of_float64_and_faiss():
    data = {k: torch.from_numpy(v) for k, v in golden("nearest").items()}
    for precision in PRECISIONS:
        _, indices = nearest_distance(data["query"], data["bank"], k=9, metric="l2sq", precision=precision)
        assert torch.equal(indices, data["indices"])


def test_golden_of_anomalydino():
    data = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "anomaly__knn.npz").items()}
    bank, query = data["bank"], data["query"]
    for precision in PRECISIONS:
        squared, indices = nearest_distance(query, bank, k=5, metric="l2sq", precision=precision)
        assert torch.equal(indices, data["l2.indices.f64"])
        assert torch.allclose(squared, data["l2.squared.f64"], rtol=1e-5, atol=0)
        cosine, _ = nearest_distance(query, bank, k=5, metric="cosine", precision=precision)
        assert torch.allclose(cosine[:, 0], data["cosine_distance.f64.k1"], rtol=0, atol=2e-6)
        assert torch.allclose(cosine.mean(1), data["cosine_distance.f64.k5_mean"], rtol=0, atol=2e-6)


def test_against_faiss():
    faiss = pytest.importorskip("faiss")
    x = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0))
    bank, query = split(x, 100)
    flat = faiss.IndexFlatL2(64)
    flat.add(bank.numpy())
    squared, indices = flat.search(query.numpy(), 4)
    actual = nearest_distance(query, bank, k=4, metric="l2sq")
    assert torch.equal(actual[1], torch.from_numpy(indices))
    assert torch.allclose(actual[0], torch.from_numpy(squared), rtol=1e-4)


def test_inverted_file():
    pytest.importorskip("faiss")
    bank, query = split(clustered(3000, 16, clusters=30, spread=0.2, mean=0.0), 50)
    exact, _ = nearest_distance(query, bank, k=3)
    for metric in METRICS:
        index = murf_fast.IVFIndex(bank, nlist=16, nprobe=16, cosine=metric == "cosine")
        everywhere, found = nearest_distance(query, index, k=3, metric=metric)
        expected, nearest = nearest_distance(query, bank, k=3, metric=metric)
        assert torch.equal(found, nearest)
        assert torch.allclose(everywhere, expected, atol=1e-3)
    few, _ = nearest_distance(query, murf_fast.IVFIndex(bank, nlist=16, nprobe=2), k=3)
    assert bool((few >= exact - 1e-3).all())
    tiny = murf_fast.IVFIndex(1e-42 * bank, nlist=16, nprobe=16, cosine=True)
    expected, _ = nearest_distance(1e-42 * query, 1e-42 * bank, k=3, metric="cosine")
    assert torch.allclose(nearest_distance(1e-42 * query, tiny, k=3)[0], expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"`query` must be finite and not zero, rows \[0\] are not"):
        nearest_distance(0 * query[:1], tiny, k=3)
    with pytest.raises(ValueError, match=r"`bank` must be finite in float32, rows \[0\] are not"):
        murf_fast.IVFIndex(torch.full((20, 4), 1e200, dtype=torch.float64)[:1], nlist=1, nprobe=1)
    with pytest.raises(ValueError, match="1 <= `nprobe` <= `nlist` <= rows"):
        nearest_distance(query, bank[:100], index="ivf")


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="resident memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_matrix():
    from murf_fast.cli.meter import observed

    bank, query = split(torch.randn(42048, 256, generator=torch.Generator().manual_seed(0)), 2048)
    index = NearestIndex(bank, precision="float32")
    nearest_distance(query, index)
    rise = observed(lambda: nearest_distance(query, index))[1]
    assert rise < 64 << 20 < 2048 * 40000 * 4
    query, bank = query[:100].double(), bank.double()
    nearest_distance(query, bank[:1000])
    assert observed(lambda: nearest_distance(query, bank))[1] < 64 << 20 < bank.nbytes


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *KERNELS])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": [1.0]}, TypeError, "`query` must be a tensor, got list"),
        ({"query": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "`query` must be floating point"),
        ({"query": torch.ones(4)}, ValueError, r"`query` must be \(rows, columns\)"),
        ({"query": torch.ones(3, 5)}, ValueError, "`query` must have the 4 columns of the bank, got 5"),
        ({"query": torch.tensor([[1.0] * 4, [torch.nan] * 4])}, ValueError, r"`query` must be finite.* rows \[1\]"),
        ({"bank": torch.ones(0, 4)}, ValueError, "`bank` must have rows"),
        ({"bank": torch.eye(9)[:, :4] / torch.tensor(0.0)}, ValueError, r"`bank` must be finite.* and 4 more"),
        ({"bank": torch.eye(6)[:, :4], "metric": "cosine"}, ValueError, r"nonzero rows, `bank` has \[4, 5\]"),
        ({"k": 0}, ValueError, "`k` must be at least 1, got 0"),
        ({"k": 7}, ValueError, "`k` must be at most the 6 rows of the bank, got 7"),
        ({"k": 1.5}, TypeError, "`k` must be an integer, got 1.5"),
        ({"metric": "l1"}, ValueError, "`metric` must be one of"),
        ({"precision": "int8"}, ValueError, "`precision` must be one of"),
        ({"index": "hnsw"}, ValueError, "`index` must be one of"),
        ({"query": torch.ones(3, 4, requires_grad=True)}, ValueError, "has no gradient"),
    ],
)
def test_bad_input(backend, device, change, error, words):
    arguments = {"query": torch.ones(3, 4), "bank": torch.ones(6, 4) + torch.eye(6)[:, :4], **change}
    with pytest.raises(error, match=words):
        nearest_distance(**on(arguments, device), backend=backend)


@every_kernel
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_strides_and_prepared_index(dtype, metric, backend, device):
    """Rows that lie apart in memory, searched with and without a prepared index."""
    wide = clustered(90, 2 * 21).to(device, dtype)
    bank, query = split(wide[:, ::2], 17)
    expected, indices = reference.nearest_distance(query.double(), bank.double(), 2, metric)
    index = NearestIndex(bank, cosine=metric == "cosine", precision="float32", backend=backend)
    for searched in (index, bank):
        distances, found = nearest_distance(query, searched, k=2, metric=metric, precision="float32", backend=backend)
        assert torch.equal(found, indices)
        assert torch.allclose(distances.double(), expected, rtol=1e-6, atol=1e-7 if metric == "cosine" else 0)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_tiles_of_every_architecture(precision, architecture, device, monkeypatch):
    """Two groups of lanes at once, or one; a bank of several tiles, the last of which is partly there."""
    launch = pytest.importorskip("murf_fast.kernels.launch")
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    monkeypatch.setattr(importlib.import_module("murf_fast.kernels.nearest_search"), "splits_of", lambda *_: 2)
    bank, query = split(clustered(700, 9, clusters=40).to(device), 3)
    actual = nearest_distance(query, bank, k=4, precision=precision, backend="triton")
    assert_exact([x.cpu() for x in actual], query.cpu(), bank.cpu(), 4, "l2")


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_bank_in_pieces(metric, device, monkeypatch):
    """As a bank in host memory is searched: chunk by chunk, and its candidates brought to the queries."""
    module = pytest.importorskip("murf_fast.kernels.nearest_distance")

    def chunks(low, _, step):
        step = min(step, 40)
        yield from ((begin, low[begin : begin + step]) for begin in range(0, len(low), step))

    brought, bring = [], module._brought

    def listed(*arguments):
        where, found = bring(*arguments)
        brought.append(len(where.rows))
        return where, found

    monkeypatch.setattr(module, "_chunks", chunks)
    monkeypatch.setattr(module, "_listed", listed)
    bank, query = split(clustered(140, 11, clusters=9).to(device), 4)
    actual = nearest_distance(query, bank, k=3, metric=metric, precision="float32", backend="triton")
    assert_exact([x.cpu() for x in actual], query.cpu(), bank.cpu(), 3, metric)
    assert 3 <= sum(brought) < 4 * 32


def test_chunks_from_host_memory(monkeypatch):
    """Two buffers in turn: rows are copied once who used their buffer is done, and used once they have come."""
    module = pytest.importorskip("murf_fast.kernels.nearest_distance")
    log = []

    class Stream:
        def __init__(self, device=None):
            self.copied = 0

        def wait_stream(self, other):
            log.append("copies wait" if self is copies else "the end waits")

        def wait_event(self, number):
            log.append(f"wait for {number}")

        def record_event(self):
            self.copied += 1
            return self.copied - 1

    here, copies = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    low = torch.arange(2 * 11.0).view(11, 2)
    monkeypatch.setattr(module, "CHUNK", 4 * low.stride(0) * low.element_size())
    where = set()
    for begin, rows in module._chunks(low, torch.device("cpu", 0), len(low)):
        log.append(f"use {begin}")
        where.add(rows.data_ptr())
        assert torch.equal(rows, low[begin : begin + 4])
    assert log == [
        *("copies wait", "copies wait", "wait for 0", "use 0"),
        *("copies wait", "wait for 1", "use 4"),
        *("wait for 2", "use 8"),
        "the end waits",
    ]
    assert len(where) == 2


def test_more_rows_as_near_than_candidates(device):
    """Most rows are within the bound of half precision: the search says so and looks at all of them."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(16, generator=g)
    bank, query = (base + 1e-4 * torch.randn(n, 16, generator=g) for n in (150, 2))
    far = torch.randn(20, 16, generator=g)
    bank = torch.cat([bank, far]).to(device)
    query = query.to(device)
    for k in (1, 40):
        actual = nearest_distance(query, bank, k=k, precision="float16", backend="triton")
        assert_exact([x.cpu() for x in actual], query.cpu(), bank.cpu(), k, "l2")


def test_lists_that_are_too_short(device, monkeypatch):
    """Queries with more near rows than their list holds take another pass, in which no list can be too short."""
    module = pytest.importorskip("murf_fast.kernels.nearest_distance")
    monkeypatch.setattr(module, "LISTED", 60)
    monkeypatch.setattr(module, "AT_LAST", 2)
    searched, search = [], module._search_again

    def counted(query, some, *others):
        missed = search(query, some, *others)
        searched.append((len(some), len(missed)))
        return missed

    monkeypatch.setattr(module, "_search_again", counted)
    g = torch.Generator().manual_seed(0)
    near, far = 1 + 1e-4 * torch.randn(160, 16, generator=g), torch.randn(20, 16, generator=g)
    bank = torch.cat([near, far]).to(device)
    query = torch.cat([near[:3] + 1e-4, far[:2]]).to(device)
    for k in (1, 70):
        actual = nearest_distance(query, bank, k=k, precision="float16", backend="triton")
        assert_exact([x.cpu() for x in actual], query.cpu(), bank.cpu(), k, "l2")
        first, *rest = searched
        assert first[1] >= 3
        assert sum(n for n, _ in rest) == first[1]
        assert all(n <= 2 and missed == 0 for n, missed in rest)
        searched.clear()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_refused_queries_are_named_after_the_search(metric, device, monkeypatch):
    """In the second block of queries, too; a row of zeros is refused of angles only."""
    monkeypatch.setattr(pytest.importorskip("murf_fast.kernels.nearest_distance"), "QUERIES", 4)
    bank, query = split(clustered(30, 5).to(device), 7)
    query[5, 2] = torch.nan
    with pytest.raises(ValueError, match=r"`query` must be finite with norms up to 1e18, rows \[5\] are not"):
        nearest_distance(query, bank, metric=metric, precision="float32", backend="triton")
    query[5] = 0
    if metric == "cosine":
        with pytest.raises(ValueError, match=r"needs nonzero rows, `query` has \[5\]"):
            nearest_distance(query, bank, metric=metric, precision="float32", backend="triton")
    else:
        actual = nearest_distance(query, bank, precision="float32", backend="triton")
        assert_exact([x.cpu() for x in actual], query.cpu(), bank.cpu(), 1, "l2")


def test_many_rows_are_as_near(device, monkeypatch):
    """More than the selection looks at together, no two in one lane of the search, which would keep only one."""
    monkeypatch.setattr(importlib.import_module("murf_fast.kernels.nearest_search"), "splits_of", lambda *_: 3)
    module = importlib.import_module("murf_fast.kernels.nearest_distance")
    monkeypatch.setattr(module, "_search_again", lambda *_: pytest.fail("one pass is enough"))
    near = (torch.arange(600) % 256 < 128).to(device)
    bank = torch.where(near[:, None], 1.0, 9.0).expand(-1, 3)
    distances, indices = nearest_distance(2 * bank[:1], bank, k=300, precision="float16", backend="triton")
    assert torch.equal(indices[0], near.nonzero().flatten()[:300])
    assert torch.equal(distances, torch.full_like(distances, 3**0.5))


def split_product(a, b):
    """What "tf32x3" makes of ``a @ b.T`` at its worst: every sum is cut to 24 bits, and small parts to 11."""

    def cut(x, bits):
        mantissa, exponent = torch.frexp(x.double())
        return torch.ldexp(torch.trunc(mantissa * 2.0**bits), exponent - bits)

    def halves(x):
        mantissa, exponent = torch.frexp(x.double())
        high = torch.ldexp(torch.round(mantissa * 2.0**11), exponent - 11)
        return high, cut(x.double() - high, 11)

    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for begin in range(0, a.shape[1], 32):
        part = torch.zeros_like(total)
        for x, y in ((a_low, b_high), (a_high, b_low), (a_high, b_high)):
            for d in range(begin, min(begin + 32, a.shape[1])):
                part = cut(part + x[:, d, None] * y[:, d], 24)
        total = cut(total + part, 24)
    return total


@pytest.mark.parametrize("dim", [1, 2, 33, 257])
@pytest.mark.parametrize("kind", ["random", "same sign", "longest mantissas", "tiny"])
def test_bound_of_split_products(kind, dim):
    """The bound that answers are proven by holds for "tf32x3", which the interpreter computes in float32."""
    candidates = pytest.importorskip("murf_fast.kernels.nearest_candidates")
    a, b = torch.randn(2, 9, dim, generator=torch.Generator().manual_seed(dim)).unbind()
    if kind == "same sign":
        a, b = a.abs(), b.abs()
    if kind == "longest mantissas":  # halfway between two numbers of eleven bits, and all bits set behind them
        a, b = (2.0 ** torch.randint(-1, 2, x.shape) * (1 + 2.0**-11 - 2.0**-23) for x in (a, b))
    if kind == "tiny":
        a, b = a.abs() * 2.0**-55, b.abs() * 2.0**-55
    norms = [x.double().square().sum(1).float().double() for x in (a, b)]
    s = norms[0][:, None] + norms[1]
    exact = (a.double()[:, None] - b.double()).square().sum(2)
    error = ((s - 2 * split_product(a, b)) - exact).abs()
    assert bool((error <= candidates.product_error(s, dim)).all())
    # The float32 arithmetic that follows rounds three times, by at most half of 2^-23 of 2 s.
    assert bool((error + 3 * 2.0**-23 * s <= candidates.product_error(s, dim)).all())
    if kind == "longest mantissas":
        assert bool((error > 2.0**-22 * s).any())


def test_index_of_another_kind():
    bank = clustered(20, 5)
    with pytest.raises(ValueError, match="prepared with cosine=True"):
        nearest_distance(bank, NearestIndex(bank, cosine=True), metric="l2")
    assert_exact(nearest_distance(bank, NearestIndex(bank, cosine=True)), bank, bank, 1, "cosine")
    with pytest.raises(ValueError, match="that float16 cannot hold"):
        NearestIndex(clustered(20, 5) * 1e6, precision="float16")


def test_index_of_another_backend(device):
    if device != "cpu":
        pytest.skip("the native backend searches on CPUs only")
    bank = clustered(20, 5)
    with pytest.raises(ValueError, match="prepared for backend 'native'"):
        nearest_distance(bank, NearestIndex(bank, backend="native"), backend="triton")


def test_extension_says_what_the_processor_has():
    assert native.has_bf16_products() in (True, False)


def test_a_graph_cannot_hold_a_search(monkeypatch):
    module = importlib.import_module("murf_fast.ops.nearest_distance")
    monkeypatch.setattr(module, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: the host refuses"):
        nearest_distance(torch.randn(3, 4), torch.randn(5, 4), backend="native")


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    """An index for "cuda" refused a bank on cuda:0, and queries there an index of a bank in host memory."""
    module = importlib.import_module("murf_fast.ops.nearest_distance")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert module._device("cuda") == torch.device("cuda:2")
    assert module._device("cuda:1") == torch.device("cuda:1")
    assert module._device("cpu") == torch.device("cpu")
