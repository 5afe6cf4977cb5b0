"""Banks over shards without a cluster: parts of this process, and ranks; the answers of one bank, bit for bit."""

from __future__ import annotations

import importlib
import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing import get_context

from murf_fast import NearestIndex, k_center_greedy, nearest_distance, use_backend
from murf_fast.anomaly import RayWorkers, ShardedIndex, reweighted_score, sharded_k_center_greedy
from murf_fast.anomaly.shards import k_center
from murf_fast.anomaly.shards.k_center import KCenterShard, select
from murf_fast.anomaly.shards.rows import bounds, rows_of
from murf_fast.anomaly.shards.search import SearchShard
from murf_fast.anomaly.shards.transport import Parts
from murf_fast.ops import _random_projection

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Counted(Parts):
    """Parts that count their questions."""

    def __init__(self, *args):
        super().__init__(*args)
        self.questions = 0

    def ask(self, *args):
        self.questions += 1
        return super().ask(*args)


def bank(rows, dim, seed=0, dtype=torch.float32):
    """Some clusters; the second half has rows of the first, so that shards hold equal ones."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, dim, generator=g)[torch.randint(5, (rows,), generator=g)]
    x = x + 0.3 * torch.randn(rows, dim, generator=g)
    x[rows // 2 :] = x[: rows - rows // 2].roll(1, 0)
    return x.to(dtype)


def parts(x, cuts, make):
    ends = [0, *sorted(min(c, len(x)) for c in cuts), len(x)]
    pairs = list(itertools.pairwise(ends))
    return Counted([make(x[a:b], a) for a, b in pairs], [b - a for a, b in pairs])


def selected(shards, count, start=0):
    chosen = torch.full((count,), start, dtype=torch.int64)
    select(shards, rows_of(shards, chosen[:1]), chosen, 1)
    return chosen


@given(
    rows=st.integers(1, 400),
    dim=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 400), min_size=1, max_size=4),
    share=st.floats(0.01, 1),
    start=st.integers(0, 399),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=25, deadline=None)
def test_k_center_is_that_of_one_bank(rows, dim, cuts, share, start, dtype):
    """Shards of any size, none too, and rows that are equal in several of them."""
    x, count = bank(rows, dim, rows, dtype), max(1, int(share * rows))
    found = selected(parts(x, cuts, KCenterShard), count, start % rows)
    assert torch.equal(found, k_center_greedy(x, count=count, start=start % rows))


@pytest.mark.parametrize("farthest", [1, 2, 7])
def test_answers_of_few_rows_take_more_questions(farthest, monkeypatch):
    """Where an answer ends, equal distances are in it and beyond it."""
    monkeypatch.setattr(k_center, "FARTHEST", farthest)
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).repeat(20, 1)
    for x, count in ((corners, 60), (bank(100, 9), 45)):
        shards = parts(x, [33, 57], KCenterShard)
        assert torch.equal(selected(shards, count), k_center_greedy(x, count=count))
    assert shards.questions > 45 / (3 * farthest)


def test_few_questions_serve_many_steps():
    shards = parts(bank(3000, 32), [1000, 2000], KCenterShard)
    selected(shards, 600)
    assert shards.questions < 600 / 8


def test_a_question_asked_twice_changes_nothing():
    """What a worker that was asked again does."""
    x = bank(200, 8)
    shard = KCenterShard(x[:100], 0)
    first = shard.farthest(x[:3], 5)
    again = shard.farthest(x[:3], 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_shard_goes_on_from_distances():
    """A shard that is made anew of what was kept answers as the one that is no more."""
    x = bank(150, 8)
    old = KCenterShard(x, 10)
    old.farthest(x[:20], 1)
    (nearest,) = old.nearest()
    new = KCenterShard(x, 10, nearest)
    for a, b in zip(old.farthest(x[20:23], 9), new.farthest(x[20:23], 9), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["sparse", "linear"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_projected_shards(name, dtype, monkeypatch):
    """Shards that begin at blocks have the projected rows of the whole."""
    module = importlib.import_module("murf_fast.ops.k_center_greedy")
    monkeypatch.setattr(module, "ROWS", 64)
    x = bank(500, 37, dtype=dtype)
    projection = _random_projection.projection(name, len(x), x.shape[1], 0)
    cuts = bounds(len(x), 3, 64)
    assert cuts == [0, 128, 320, 500]
    shards = parts(x, cuts[1:-1], lambda rows, first: KCenterShard(rows, first, None, projection))
    assert torch.equal(selected(shards, 200), k_center_greedy(x, count=200, projection=name))


def test_without_the_extension():
    x = bank(120, 11)
    with use_backend("reference"):
        expected = k_center_greedy(x, count=50)
        assert torch.equal(selected(parts(x, [40, 41], KCenterShard), 50), expected)


def test_float64():
    x = bank(120, 11).double()
    assert torch.equal(selected(parts(x, [40], KCenterShard), 50), k_center_greedy(x, count=50))


def test_rows_that_are_not_finite_are_named():
    x = bank(30, 4)
    x[25, 1] = torch.nan
    with pytest.raises(ValueError, match=r"`features\[20:\]`.*5"):
        parts(x, [20], KCenterShard)


@given(
    rows=st.integers(3, 300),
    dim=st.integers(1, 70),
    cut=st.floats(0.1, 0.9),
    k=st.integers(1, 12),
    metric=st.sampled_from(["l2", "l2sq", "cosine"]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=25, deadline=None)
def test_searches_are_those_of_one_bank(rows, dim, cut, k, metric, dtype):
    x, query = bank(rows, dim, rows, dtype) + 1, bank(40, dim, 7) + 1
    x[:, 0] += 4  # no row of zeros
    query[:5] = x[:5].float()[:5] if rows >= 5 else query[:5]
    cosine, k = metric == "cosine", min(k, rows)
    shards = parts(x, [max(1, int(cut * rows))], lambda r, first: SearchShard(NearestIndex(r, cosine=cosine), first))
    distances, numbers = ShardedIndex._of(shards).search(query, k=k, metric=metric)
    expected, theirs = nearest_distance(query, x, k=k, metric=metric)
    assert torch.equal(distances, expected)
    differ = numbers != theirs
    # Numbers of rows that are as far, in float32, are in the order of their numbers.
    same = torch.stack([(distances == d[:, None]).sum(1) > 1 for d in distances.T], 1)
    assert not bool((differ & ~same).any()) or _at_the_end(distances, differ & ~same, x, query, metric)


def _at_the_end(distances, differ, x, query, metric):
    """Only the last of k may be one of several, others of which are no longer among the k."""
    every, _ = nearest_distance(query, x, k=len(x), metric=metric)
    return bool(((every[:, None] == distances[..., None]).sum(2) > 1)[differ].all())


def test_rows_by_their_numbers():
    x = bank(90, 6)
    index = ShardedIndex._of(parts(x, [10, 50], lambda r, first: SearchShard(NearestIndex(r), first)))
    numbers = torch.tensor([89, 0, 9, 10, 49, 50, 50])
    assert torch.equal(index.rows(numbers), x[numbers])
    assert len(index) == 90


@pytest.mark.parametrize("cosine", [False, True])
def test_patchcore_s_score_over_shards(cosine):
    x, query = bank(200, 16), bank(30, 16, 9)
    whole = NearestIndex(x, cosine=cosine)
    shards = parts(x, [70, 71], lambda r, first: SearchShard(NearestIndex(r, cosine=cosine), first))
    distances, numbers = nearest_distance(query, whole)
    expected = reweighted_score(query, distances[:, 0], numbers[:, 0], whole)
    assert reweighted_score(query, distances[:, 0], numbers[:, 0], ShardedIndex._of(shards)) == expected


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"RayWorkers: needs ray: pip install 'murf-fast\[ray\]'"):
        RayWorkers()


def test_bounds_leave_nobody_without_rows():
    assert bounds(10, 3) == [0, 3, 6, 10]
    assert bounds(2, 5) == [0, 1, 2]
    assert bounds(100, 4, 64) == [0, 64, 100]


def _rank(rank, folder, results):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x = bank(301, 16)
    own = x[:120] if rank == 0 else x[120:]
    chosen = sharded_k_center_greedy(own, count=100, start=200)
    results.put(torch.equal(chosen, k_center_greedy(x, count=100, start=200)))
    index = ShardedIndex(own)
    distances, numbers = nearest_distance(x[5:25] + 0.01, x)
    of_ranks, of_one = (
        reweighted_score(x[5:25] + 0.01, distances[:, 0], numbers[:, 0], i) for i in (index, NearestIndex(x))
    )
    results.put(of_ranks == of_one)
    for options, words in (({"count": 302}, "at most the 301 rows"), ({"count": 3, "start": 301}, "in 0 .. 300")):
        try:
            sharded_k_center_greedy(own, **options)
        except ValueError as error:
            results.put(words in str(error))
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch comes without gloo")
def test_ranks(tmp_path):
    context = get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, str(tmp_path), results)) for rank in range(2)]
    for p in processes:
        p.start()
    assert [results.get(timeout=200) for _ in range(8)] == [True] * 8
    for p in processes:
        p.join(timeout=60)
        assert p.exitcode == 0
