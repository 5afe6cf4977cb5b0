from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from suite import TRITON_DTYPES, check_opcheck, every_kernel

from murf_fast import k_center_greedy, reference
from murf_fast.ops import _random_projection

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def small_pools(request, monkeypatch):
    """Tests have few rows, of which a pool of all would leave none outside."""
    if importlib.util.find_spec("triton") and "gpu" not in request.fixturenames:
        monkeypatch.setattr(importlib.import_module("murf_fast.kernels.k_center_greedy"), "POOL", 16)


def rows(n, dim, seed=0, mean=3.0):
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(7, dim, generator=g)
    return centers[torch.randint(7, (n,), generator=g)] + 0.2 * torch.randn(n, dim, generator=g) + mean


def plain(features, count, start=0):
    return reference.k_center_greedy(features.double(), count, torch.tensor([start], device=features.device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_selection_as_the_definition(level, dtype):
    for n, dim in ((1, 3), (2, 1), (257, 63), (300, 64), (301, 65)):
        features = rows(n, dim).to(dtype)
        count = max(1, n // 3)
        assert torch.equal(k_center_greedy(features, count=count), plain(features, count))


@every_kernel
@given(
    n=st.integers(1, 70),
    dim=st.integers(1, 70),
    share=st.floats(0.01, 1),
    start=st.integers(0, 69),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
@settings(max_examples=12, deadline=None)
def test_any_shape(backend, device, n, dim, share, start, scale):
    features = rows(n, dim, n).to(device) * scale
    count = max(1, int(share * n))
    chosen = k_center_greedy(features, fraction=share, start=start % n, backend=backend)
    assert torch.equal(chosen, plain(features, count, start % n))


@every_kernel
def test_ties_go_to_the_lower_index(backend, device):
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).repeat(20, 1).to(device)
    chosen = k_center_greedy(corners, count=6, backend=backend)
    assert chosen.tolist() == [0, 3, 1, 2, 0, 0]


@every_kernel
def test_goes_on_from_an_earlier_selection(backend, device):
    features = rows(150, 20).to(device)
    whole = k_center_greedy(features, count=12, start=5, backend=backend)
    part = k_center_greedy(features, count=4, start=5, backend=backend)
    assert torch.equal(k_center_greedy(features, count=12, start=part, backend=backend), whole)
    assert torch.equal(k_center_greedy(features, count=2, start=part, backend=backend), whole[:2])


@every_kernel
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_strides(dtype, backend, device):
    features = rows(70, 2 * 19).to(device, dtype)[:, ::2]
    assert torch.equal(k_center_greedy(features, count=9, backend=backend), plain(features, 9))


@every_kernel
def test_progress_tells_and_changes_nothing(backend, device):
    features, told = rows(200, 8).to(device), []
    chosen = k_center_greedy(features, count=9, progress=lambda *pair: told.append(pair), backend=backend)
    assert torch.equal(chosen, k_center_greedy(features, count=9))
    assert told[-1] == (9, 9)
    assert told == sorted(told)


@pytest.mark.parametrize("pool", [1, 4, 13])
@pytest.mark.parametrize("scale", [1e-21, 1.0, 1e18])
def test_pools(pool, scale, device, monkeypatch):
    """Rows outside a pool may be as far or farther; squares that float32 does not hold say nothing."""
    module = pytest.importorskip("murf_fast.kernels.k_center_greedy")
    monkeypatch.setattr(module, "POOL", pool)
    features, told = rows(60, 5).to(device) * scale, []
    features[30:40] = features[:10]
    chosen = k_center_greedy(features, count=19, progress=lambda *pair: told.append(pair), backend="triton")
    assert torch.equal(chosen, plain(features, 19))
    assert told[-1] == (19, 19)
    assert all(1 <= b - a <= pool for (a, _), (b, _) in itertools.pairwise([(1, 19), *told]))


def test_more_equal_rows_than_a_pool_holds(device, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("murf_fast.kernels.k_center_greedy"), "POOL", 8)
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).repeat(20, 1).to(device)
    told = []
    chosen = k_center_greedy(corners, count=30, progress=lambda *pair: told.append(pair), backend="triton")
    assert chosen.tolist() == [0, 3, 1, 2, *[0] * 26]
    assert len(told) < 6


def test_a_coreset_of_many_rows(gpu):
    features = rows(20_000, 96).to(gpu)
    assert torch.equal(k_center_greedy(features, count=1100), plain(features, 1100))


def test_progress_may_interrupt():
    def stop(done, wanted):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        k_center_greedy(rows(200, 8), count=150, progress=stop)


@every_kernel
def test_goes_on_after_an_interruption(backend, device, monkeypatch):
    features, out = rows(40, 5).to(device), torch.full((30,), 7, device=device)
    whole = k_center_greedy(features, count=30, start=3, backend=backend)

    def stop(done, wanted):
        if done >= 4:
            raise KeyboardInterrupt

    if backend == "triton":
        monkeypatch.setattr(pytest.importorskip("murf_fast.kernels.k_center_greedy"), "POOL", 4)
    with pytest.raises(KeyboardInterrupt):
        k_center_greedy(features, count=30, start=3, progress=stop, out=out, backend=backend)
    selected = out[out >= 0]
    assert 4 <= len(selected) < 30
    assert torch.equal(out, torch.cat([whole[: len(selected)], whole.new_full((30 - len(selected),), -1)]))
    for start in (selected, 3):
        assert k_center_greedy(features, count=30, start=start, out=out, backend=backend) is out
        assert torch.equal(out, whole)


def met_by(backend, monkeypatch):
    """Centers that all rows meet from here on, one entry for each time."""
    found = []
    if backend == "native":
        module = importlib.import_module("murf_fast.native.k_center_greedy")
        steps = module._steps
        monkeypatch.setattr(module, "_steps", lambda *a: found.extend(range(a[5], a[6])) or steps(*a))
    else:
        module = importlib.import_module("murf_fast.kernels.k_center_greedy")
        meet = module._meet
        monkeypatch.setattr(module, "_meet", lambda *a: found.extend(range(a[3], a[4])) or meet(*a))
    return found


@every_kernel
@pytest.mark.parametrize("projection", [None, "linear"])
@pytest.mark.parametrize("stops", [(1,), (3, 4, 9)])
def test_goes_on_from_distances(backend, device, stops, projection, monkeypatch):
    """Interrupted, again and again: no row meets a center twice but for the last, and the result is the same."""
    features, options = rows(60, 5).to(device), {"count": 30, "backend": backend, "projection": projection}
    if backend == "triton":
        monkeypatch.setattr(pytest.importorskip("murf_fast.kernels.k_center_greedy"), "POOL", 4)
    whole = k_center_greedy(features, start=3, **options)
    met = met_by(backend, monkeypatch)
    out = torch.full((30,), -1, device=device)
    nearest = torch.full((60,), torch.inf, dtype=torch.float64, device=device)
    start = torch.tensor([3], device=device)
    for after in stops:

        def stop(done, _, after=after):
            if done >= after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            k_center_greedy(features, start=start, out=out, nearest=nearest, progress=stop, **options)
        start = out[out >= 0].clone()
        assert torch.equal(start, whole[: len(start)])
    told, before = [], len(start)
    again = k_center_greedy(
        features, start=start, out=out, nearest=nearest, progress=lambda done, _: told.append(done), **options
    )
    assert again is out
    assert torch.equal(out, whole)
    assert told == sorted(told)
    assert told[-1] == 30
    assert min(told) >= before
    assert met == sorted(met)
    assert len(met) <= 29 + len(stops)  # what one call takes, and the last of each other once more


@every_kernel
def test_more_rows_from_distances(backend, device, monkeypatch):
    """After a call that finished: a longer selection begins with a shorter one."""
    features = rows(60, 5).to(device)
    nearest = torch.full((60,), torch.inf, dtype=torch.float64, device=device)
    part = k_center_greedy(features, count=12, nearest=nearest, backend=backend)
    exact = (features.double()[:, None] - features[part].double()).square().sum(2)
    met = {"native": 11, "triton": int((nearest[part] == 0).long().cumprod(0).sum())}[backend]
    # Sums of D squares, none negative, each way by itself: D additions, a product and a difference.
    rtol = (features.shape[1] + 2) * torch.finfo(torch.float64).eps
    torch.testing.assert_close(nearest, exact[:, :met].amin(1), rtol=rtol, atol=0)
    found = met_by(backend, monkeypatch)
    more = k_center_greedy(features, count=20, start=part, nearest=nearest, backend=backend)
    assert torch.equal(more, plain(features, 20))
    assert min(found) == met


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_goes_on_from_distances(dtype, monkeypatch):
    features = rows(40, 5).to(dtype)
    nearest = torch.full((40,), torch.inf, dtype=torch.float64)
    part = k_center_greedy(features, count=7, nearest=nearest, backend="reference")
    compared, minimum = [], torch.minimum
    monkeypatch.setattr(torch, "minimum", lambda *a, **k: compared.append(len(a[0])) or minimum(*a, **k))
    more = k_center_greedy(features, count=12, start=part, nearest=nearest, backend="reference")
    assert sum(compared) == 40 * 5
    assert torch.equal(more, k_center_greedy(features, count=12, backend="reference"))


@every_kernel
def test_equal_rows_from_distances(backend, device):
    """Everything is at 0 before the end, and so is who has not been met."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).repeat(20, 1).to(device)
    nearest = torch.full((80,), torch.inf, dtype=torch.float64, device=device)
    part = k_center_greedy(corners, count=5, nearest=nearest, backend=backend)
    assert part.tolist() == [0, 3, 1, 2, 0]
    more = k_center_greedy(corners, count=8, start=part, nearest=nearest, backend=backend)
    assert more.tolist() == [0, 3, 1, 2, 0, 0, 0, 0]


@pytest.mark.parametrize(("backend", "start"), [("reference", 3), ("native", 3), ("native", torch.arange(4))])
def test_out_is_the_result(backend, start):
    """Also of a call that has nothing to do."""
    features, out = rows(40, 5), torch.full((4,), 7)
    expected = k_center_greedy(features, count=4, start=start)
    assert k_center_greedy(features, count=4, start=start, out=out, backend=backend) is out
    assert torch.equal(out, expected)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of one process to itself")
def test_ctrl_c_is_heard():
    """Without a progress function, too: a selection of minutes ends between two pieces of a fifth of a second."""
    features, out = torch.randn(100_000, 32), torch.full((100_000,), -1)
    sent = []

    def interrupt():
        deadline = time.monotonic() + 60
        while out[9] < 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of the tests may ignore it
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            k_center_greedy(features, count=100_000, out=out)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - sent[0] < 10
    assert out[0] == 0
    assert out[-1] == -1


def test_threads():
    features = rows(1000, 33)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = k_center_greedy(features, count=50)
        torch.set_num_threads(3)
        assert torch.equal(k_center_greedy(features, count=50), expected)
    finally:
        torch.set_num_threads(threads)


def test_golden_of_anomalib():
    data = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "k_center.npz").items()}
    chosen = k_center_greedy(data["features"], fraction=0.1, start=int(data["start"]), include_start=False)
    assert torch.equal(chosen, data["indices"])


@pytest.mark.parametrize(("name", "include_start"), [("indices_2_7", True), ("indices_2_1", False)])
def test_golden_of_anomalib_with_projection(name, include_start):
    data = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "anomaly__kcenter.npz").items()}
    chosen = k_center_greedy(
        data["embedding"],
        fraction=0.12,
        start=int(data["start"]),
        include_start=include_start,
        projection=data["projection"],
    )
    assert torch.equal(chosen, data[name])


@every_kernel
@pytest.mark.parametrize("name", ["sparse", "linear"])
def test_projection_by_name(name, backend, device):
    features = rows(60, 21).to(device)
    matrix = _random_projection.projection(name, 60, 21, 5).to(device)
    chosen = k_center_greedy(features, count=9, projection=name, seed=5, backend=backend)
    assert torch.equal(chosen, k_center_greedy(features, count=9, projection=matrix, backend=backend))
    assert torch.equal(chosen, plain(features @ matrix.T, 9))
    assert not torch.equal(chosen, k_center_greedy(features, count=9, projection=name, seed=6, backend=backend))
    random = k_center_greedy(features, count=9, start="random", seed=6, backend=backend)
    assert torch.equal(random, k_center_greedy(features, count=9, start=int(random[0]), backend=backend))
    firsts = {int(k_center_greedy(features, count=1, start="random", seed=seed)) for seed in range(20)}
    assert len(firsts) > 10


def test_projections_are_those_of_the_originals():
    """The number of columns of anomalib (facts of its formula), the share and size of its entries; Linear(d, 128)."""
    assert [_random_projection.components(n) for n in (1, 2, 1000, 220_000, 1_000_000, 5_200_000)] == [
        1, 17, 170, 303, 341, 381,
    ]  # fmt: skip
    sparse = _random_projection.projection("sparse", 1_000_000, 1024, 0)
    assert sparse.shape == (341, 1024)
    assert sparse.dtype == torch.float32
    size = float(np.sqrt(32) / np.sqrt(341))
    torch.testing.assert_close(sparse.unique(), torch.tensor([-size, 0.0, size]))
    # Five standard deviations of as many draws.
    draws = sparse.numel()
    assert abs(float((sparse != 0).double().mean()) - 1 / 32) < 5 * np.sqrt(1 / 32 / draws)
    assert abs(float(sparse.sign().double().mean())) < 5 * np.sqrt(1 / 32 / draws)
    linear = _random_projection.projection("linear", 10, 400, 0)
    assert linear.shape == (128, 400)
    assert 0.049 < float(linear.abs().max()) <= 0.05
    assert abs(float(linear.double().mean())) < 5 * 0.05 / np.sqrt(3 * linear.numel())
    # What is drawn stays what it is: coresets of a seed can be had again.
    assert hashlib.sha256(sparse.sign().char().numpy().tobytes()).hexdigest()[:16] == "07bb58636b7d0b2f"
    assert _random_projection.first_row(1_000_000, 0).item() == 136044


def test_halves_are_projected_in_float32(monkeypatch):
    """A few rows at a time, to the same result."""
    features = rows(60, 21).bfloat16()
    chosen = k_center_greedy(features, count=9, projection="linear")
    assert torch.equal(chosen, k_center_greedy(features.float(), count=9, projection="linear"))
    monkeypatch.setattr(importlib.import_module("murf_fast.ops.k_center_greedy"), "ROWS", 7)
    assert torch.equal(chosen, k_center_greedy(features, count=9, projection="linear"))


def test_registration_and_compile():
    features = rows(100, 10)
    op = torch.ops.murf_fast.k_center_greedy.default
    check_opcheck(op, features, torch.tensor([3]), 5, "native")
    check_opcheck(op, features.T.contiguous().T, torch.tensor([3, 4]), 5, "native")
    compiled = torch.compile(lambda x: k_center_greedy(x * 2, count=5, start=3) + 1, fullgraph=True)
    assert torch.equal(compiled(features), k_center_greedy(features * 2, count=5, start=3) + 1)
    drawn = {"count": 5, "start": "random", "projection": "sparse", "seed": 4}
    compiled = torch.compile(lambda x: k_center_greedy(x, **drawn), fullgraph=True, backend="eager")
    assert torch.equal(compiled(features), k_center_greedy(features, **drawn))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"features": [1.0]}, TypeError, "`features` must be a tensor"),
        ({"features": torch.ones(0, 4)}, ValueError, "`features` must have rows"),
        ({"features": torch.tensor([[1.0], [torch.inf]])}, ValueError, r"`features` must be finite.* rows \[1\]"),
        ({"count": None}, ValueError, "either `count` or `fraction`"),
        ({"fraction": 0.5}, ValueError, "either `count` or `fraction`"),
        ({"count": None, "fraction": 0.0}, ValueError, r"`fraction` must be in \(0, 1\], got 0.0"),
        ({"count": 0}, ValueError, "`count` must be at least 1"),
        ({"count": 7}, ValueError, "`count` must be at most the 6 rows, got 7"),
        ({"count": 6, "include_start": False}, ValueError, "must leave a row for `start`"),
        ({"start": 6}, ValueError, r"`start` must be in 0 .. 5, got \[6\]"),
        ({"start": torch.tensor([0.5])}, TypeError, "`start` must be an integer or int64"),
        ({"start": "first"}, ValueError, "`start` must be"),
        ({"projection": "dense"}, ValueError, "`projection` must be"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0"),
        ({"out": torch.empty(2)}, TypeError, "`out` must have the dtype of `start`, torch.int64"),
        ({"out": torch.empty(3, dtype=torch.int64)}, ValueError, r"`out` must have shape \(2,\)"),
        ({"out": torch.empty(2, dtype=torch.int64), "include_start": False}, ValueError, "include_start=True"),
        ({"nearest": [0.0]}, TypeError, "`nearest` must be a tensor, got list"),
        ({"nearest": torch.ones(6)}, TypeError, r"`nearest` must be torch\.float64"),
        ({"nearest": torch.ones(5, dtype=torch.float64)}, ValueError, r"`nearest` must be contiguous \(6,\) on cpu"),
        ({"nearest": torch.full((6,), torch.nan, dtype=torch.float64)}, ValueError, "not below 0 and no NaN"),
        ({"nearest": torch.ones(6, dtype=torch.float64)}, ValueError, "`nearest` must be infinite or of `start`"),
        ({"projection": torch.ones(2, 5)}, ValueError, r"`projection` must be \(P, 4\)"),
        ({"features": torch.ones(6, 4, requires_grad=True)}, ValueError, "has no gradient"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        k_center_greedy(**{"features": torch.rand(6, 4), "count": 2, **change})


@pytest.mark.parametrize("name", ["out", "nearest", "progress"])
def test_what_is_written_by_the_way_has_no_graph(name):
    given = {
        "out": torch.empty(2, dtype=torch.int64),
        "nearest": torch.full((6,), torch.inf).double(),
        "progress": print,
    }

    class Selection(torch.nn.Module):
        def forward(self, features):
            return k_center_greedy(features, count=2, **{name: given[name]})

    with pytest.raises(ValueError, match="`out`, `nearest` and `progress` are of eager calls, no graph holds them"):
        torch.export.export(Selection(), (torch.rand(6, 4),), strict=False)
