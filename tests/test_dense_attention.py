"""Attention within sequences: the kernel of every level against the definition in float64, and where an
encoder takes it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from util import assert_within_budget

from murf_fast import _extension, use_backend
from murf_fast.backends import native_problems
from murf_fast.nn.vit import _attention
from murf_fast.nn.vit._attention import Run
from murf_fast.ops import _dense_attention
from murf_fast.ops._dense_attention import LEAST_TOKENS, dense_attention

pytestmark = pytest.mark.skipif(bool(native_problems()), reason="needs the C++ extension")

# Sequences, tokens, heads, channels: one, under, at and over a block of queries and a run of keys; channels that fill
# no block, and several.
SHAPES = (
    (1, 1, 1, 8),
    (2, 31, 3, 24),
    (1, 32, 2, 64),
    (1, 33, 1, 72),
    (1, 512, 1, 32),
    (2, 513, 2, 40),
    (1, 1100, 1, 130),
)


class Watching(TorchDispatchMode):
    """A user's mode, which may change what torch's own operations do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def draw(shape, dtype=torch.bfloat16, seed=0, scale=1.0):
    """q, k, v as a fused projection gives them: views of one tensor."""
    sequences, tokens, heads, dim = shape
    fused = torch.randn(sequences, tokens, 3, heads, dim, generator=torch.Generator().manual_seed(seed)) * scale
    return fused.to(dtype).unbind(2)


def definition(q, k, v, scale):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2)


def check(q, k, v, scale):
    actual = dense_attention(q, k, v, scale)
    oracle = definition(*(t.double() for t in (q, k, v)), scale)
    same = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale).transpose(1, 2)
    assert_within_budget(actual, oracle, same)
    assert actual.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@DTYPES
def test_native(shape, dtype, level_of_layers):
    check(*draw(shape, dtype), shape[3] ** -0.5)


@pytest.mark.parametrize("scale", [4.0, 0.0, -1.0])
@DTYPES
def test_scales(scale, dtype, level_of_layers):
    """Of weights that are nearly all or nothing, all the same, and those of the least likely."""
    check(*draw((1, 600, 1, 64), dtype, seed=1), scale)


@DTYPES
def test_largest_score_comes_last(dtype, level_of_layers):
    """What was summed before it counts for nothing then."""
    q, k, v = (t.clone() for t in draw((1, 1100, 1, 32), dtype, seed=2))
    k[:, -1] = 40 * q[:, 5].sign()
    check(q, k, v, 1.0)


@DTYPES
def test_layouts(dtype):
    q, k, v = draw((2, 70, 2, 16), dtype, seed=3)
    apart = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    assert torch.equal(dense_attention(*apart, 0.25), dense_attention(q, k, v, 0.25))
    same = q[:, :, :1].expand_as(q)
    assert torch.equal(dense_attention(same, k, v, 0.25), dense_attention(same.contiguous(), k, v, 0.25))


@DTYPES
def test_threads_change_nothing(dtype, three_threads):
    q, k, v = draw((1, 1500, 2, 32), dtype, seed=4)
    of_three = dense_attention(q, k, v, 0.2)
    torch.set_num_threads(1)
    assert torch.equal(of_three, dense_attention(q, k, v, 0.2))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@DTYPES
def test_what_is_not_finite_stays_where_it_is(wrong, dtype, level_of_layers):
    q, k, v = (t.clone() for t in draw((1, 700, 2, 32), dtype, seed=5))
    q[0, 3, 1, 7] = wrong
    bad = dense_attention(q, k, v, 0.2).isnan()
    assert bad[0, 3, 1].all()
    bad[0, 3, 1] = False
    assert not bad.any()
    v[0, 650, 0, 2] = torch.nan
    assert dense_attention(q, k, v, 0.2)[0, :, 0, 2].isnan().all()


def test_no_sequences():
    empty = torch.empty(0, 5, 2, 8, dtype=torch.bfloat16)
    assert dense_attention(empty, empty, empty, 1.0).shape == empty.shape


class TestOfAnEncoder:
    """Runs of at least so many tokens, in a type that the level is fast in, where nothing wants a derivative."""

    run = Run(0, 2, LEAST_TOKENS + 9, None)

    def draw(self, dtype=torch.float32):
        q, k, v = draw((1, 2 * (LEAST_TOKENS + 9), 2, 32), dtype, seed=6)
        return q[0], k[0], v[0]

    def plain(self, q, k, v):
        q, k, v = (t.unflatten(0, (2, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    def own(self, q, k, v):
        return dense_attention(*(t.unflatten(0, (2, -1)) for t in (q, k, v)), 32**-0.5).flatten(0, 1)

    @DTYPES
    @pytest.mark.parametrize("level", ["amx", "avx512", "avx2", "baseline"])
    def test_is_taken(self, level, dtype, monkeypatch):
        if level not in _extension.available_levels():
            pytest.skip(f"this processor has no {level}")
        monkeypatch.setenv("MURF_FAST_CPU", level)
        q, k, v = self.draw(dtype)
        own, plain = self.own(q, k, v), self.plain(q, k, v)
        assert not torch.equal(own, plain)  # so that the next line can fail
        is_taken = level == "amx" or (dtype == torch.float32 and level != "baseline")
        assert torch.equal(_attention.attend(q, k, v, self.run), own if is_taken else plain)

    def test_is_not_taken(self):
        q, k, v = self.draw()
        with use_backend("reference"):
            assert torch.equal(_attention.attend(q, k, v, self.run), self.plain(q, k, v))
        assert not _dense_attention.pays(*(t.double()[None] for t in (q, k, v)))
        short = [t[None, : LEAST_TOKENS - 1] for t in (q, k, v)]
        assert not _dense_attention.pays(*short)
        with Watching():
            assert torch.equal(_attention.attend(q, k, v, self.run), self.plain(q, k, v))
        q = q.requires_grad_()
        out = _attention.attend(q, k, v, self.run)
        assert torch.equal(out, self.plain(q, k, v))
        out.sum().backward()
        assert q.grad.abs().sum() > 0
