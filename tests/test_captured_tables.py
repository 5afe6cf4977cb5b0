"""What a captured CUDA graph reads stays where it was, whatever the caches of tables forget."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import murf_fast
from murf_fast.ops import _library
from murf_fast.tables import _table, query_blocks, resize

CPU = torch.device("cpu")


@pytest.fixture
def capturing(monkeypatch):
    """As if the current stream were capturing."""
    monkeypatch.setattr(_table, "_captured", {})
    monkeypatch.setattr(_table, "is_capturing", lambda device: True)


def taken_and_forgotten() -> list[weakref.ref]:
    """Weak references to what launches take, once all caches have forgotten it."""
    taken = [*resize.axis(7, 31).on(CPU), *resize.axis(7, 31).transposed.on(CPU)]
    taken.append(query_blocks.log_multiplicity("full", 5, 3, CPU))
    references = [weakref.ref(t) for t in taken]
    del taken
    resize.axis.cache_clear()
    query_blocks._log_multiplicity.cache_clear()
    gc.collect()
    return references


def test_what_a_capture_takes_is_kept(capturing):
    assert all(reference() is not None for reference in taken_and_forgotten())


def test_what_runs_eagerly_is_forgotten():
    assert all(reference() is None for reference in taken_and_forgotten())


def test_captures_of_the_same_shapes_keep_nothing_more(capturing):
    first = [reference() for reference in taken_and_forgotten()]
    kept = len(_table._captured)
    for _ in range(3):
        assert all(a is b() for a, b in zip(first, taken_and_forgotten(), strict=True))
    assert len(_table._captured) == kept


def test_replay_after_the_tables_were_forgotten(gpu):
    x = torch.randn(1, 3, 9, 9, device=gpu)
    expected = murf_fast.resize(x, (23, 31))  # copies the tables, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = murf_fast.resize(x, (23, 31))
    for cache in (resize.axis, _library.axes_of, _library._axes_of_shapes):
        cache.cache_clear()
    for n in range(40, 340):  # other tables where the old ones would have been
        murf_fast.resize(x, (n, n))
    gc.collect()
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
