"""Which attention a call takes, and that one launch for all sequences is the attention of each by itself.

xFormers cannot be installed beside a torch without CUDA. A stand-in has the names of its public interface, checks what
it is given and computes the masked attention densely; that the package itself does so is not tested here.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch
from fake_cuda import CUDA, fake_cuda, moved
from test_multi_resolution_encoder import SIZES, dinov2, dinov3, hub, model_of

from murf_fast.nn import MultiResolutionEncoder
from murf_fast.nn.vit import _attention

pytestmark = pytest.mark.filterwarnings("ignore:.*without `mean` and `std`:UserWarning")

VARLEN = "torch.nn.attention.varlen"


class BlockDiagonalMask:
    def __init__(self, lengths, device):
        self.lengths, self.device = lengths, device

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert isinstance(q_seqlen, list)
        assert all(type(n) is int and n > 0 for n in q_seqlen)
        assert kv_seqlen is None
        return cls(q_seqlen, device)

    def dense(self):
        owner = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        return torch.where(owner[:, None] == owner, 0.0, -torch.inf)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    assert isinstance(attn_bias, BlockDiagonalMask)
    assert torch.device(attn_bias.device) == query.device
    assert query.shape == key.shape == value.shape
    assert query.shape[:2] == (1, sum(attn_bias.lengths))
    assert all(t.stride(-1) == 1 for t in (query, key, value))
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    scores = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale) + attn_bias.dense()
    return (scores.softmax(-1) @ v).transpose(1, 2)


class Operator:
    SUPPORTED_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})

    @classmethod
    def is_available(cls):
        return True


@pytest.fixture
def forgotten():
    """What was found out about this installation is found out again, before and after."""
    caches = (_attention._has_varlen, _attention._xformers_dtypes, _attention._block_diagonal)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def xformers(monkeypatch, forgotten):
    names = ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    operators = types.SimpleNamespace(FwOp=Operator)
    modules["xformers.ops.fmha"].cutlass = modules["xformers.ops.fmha"].flash = operators
    modules["xformers.ops.fmha.attn_bias"].BlockDiagonalMask = BlockDiagonalMask
    modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention


@pytest.mark.parametrize("build", [dinov2, dinov3, hub], ids=lambda f: f.__name__)
def test_xformers_takes_the_packed_buffer(build, xformers, monkeypatch):
    monkeypatch.setattr(_attention, "reasons_against", lambda *_: [])
    calls = []
    monkeypatch.setattr(
        sys.modules["xformers.ops"],
        "memory_efficient_attention",
        lambda *args, **options: (calls.append(1), memory_efficient_attention(*args, **options))[1],
    )
    model, images = model_of(build), torch.rand(2, 3, 30, 26)
    expected = MultiResolutionEncoder(model, SIZES, attention="sdpa")(images).tokens[0].tokens
    encoder = MultiResolutionEncoder(model, SIZES, attention="xformers")
    torch.testing.assert_close(encoder(images).tokens[0].tokens, expected)
    assert len(calls) == 3  # of three blocks
    torch.testing.assert_close(encoder.requires_grad_(True)(images).tokens[0].tokens, expected)


@pytest.mark.parametrize("tiles", [None, [1, 2, 1]])
def test_starts_are_those_of_the_sequences(tiles):
    encoder = MultiResolutionEncoder(model_of(dinov2), [(24, 24), (48, 48), (24, 24)], tiles=tiles)
    packed = encoder.embed(torch.rand(2, 3, 48, 48))
    starts = _attention.starts(_attention.runs(packed, [None] * 3), torch.device("cpu"))
    assert starts.dtype == torch.int32
    assert torch.equal(starts, packed.cu_seqlens)


@pytest.mark.parametrize("kind", ["varlen", "xformers"])
def test_empty_batches(kind, monkeypatch, forgotten):
    """They need neither."""
    monkeypatch.setattr(_attention, "reasons_against", lambda *_: [])
    monkeypatch.setitem(sys.modules, VARLEN, None)
    features = MultiResolutionEncoder(model_of(dinov2), SIZES, attention=kind)(torch.rand(0, 3, 24, 24))
    assert [m.shape[:2] for m in features.maps] == [(0, 24)] * 3


def test_xformers_is_refused_with_every_reason(forgotten):
    encoder = MultiResolutionEncoder(model_of(dinov2).double(), SIZES, attention="xformers")
    with pytest.raises(ValueError, match=r'"xformers"` cannot be used: .*CUDA device.*not installed'):
        encoder(torch.rand(1, 3, 24, 24))


def test_xformers_without_operators(xformers, monkeypatch):
    monkeypatch.setattr(Operator, "is_available", classmethod(lambda cls: False))
    assert _attention.reasons_against("xformers", CUDA, torch.float32, 64) == [
        "this build of xformers has no operator for torch.float32"
    ]
    sys.modules["xformers.ops.fmha"].cutlass = None
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", None)
    _attention._xformers_dtypes.cache_clear()
    assert "xformers cannot be imported" in _attention.reasons_against("xformers", CUDA, torch.float32, 64)[0]


CASES = {
    "half, both": (torch.bfloat16, (8, 0), {VARLEN, "xformers"}, 64, "varlen"),
    "half, before Ampere": (torch.float16, (7, 5), {VARLEN, "xformers"}, 64, "xformers"),
    "half, before Ampere, torch alone": (torch.float16, (7, 5), {VARLEN}, 64, "sdpa"),
    "half, old torch": (torch.bfloat16, (9, 0), {"xformers"}, 64, "xformers"),
    "float32": (torch.float32, (9, 0), {VARLEN, "xformers"}, 64, "xformers"),
    "float32, torch alone": (torch.float32, (9, 0), {VARLEN}, 64, "sdpa"),
    "heads of 12": (torch.bfloat16, (9, 0), {VARLEN, "xformers"}, 12, "sdpa"),
    "nothing": (torch.bfloat16, (9, 0), set(), 64, "sdpa"),
}


@pytest.mark.parametrize("name", CASES)
def test_none_chooses(name, xformers, monkeypatch):
    dtype, capability, installed, width, expected = CASES[name]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    varlen = types.ModuleType(VARLEN)
    varlen.varlen_attn = None
    monkeypatch.setitem(sys.modules, VARLEN, varlen if VARLEN in installed else None)
    if "xformers" not in installed:
        monkeypatch.delitem(sys.modules, "xformers")
    assert _attention.chosen(CUDA, dtype, width) == expected
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
    assert _attention.chosen(CUDA, dtype, width) == "sdpa"


def test_none_follows_the_model(forgotten, monkeypatch):
    monkeypatch.setattr(_attention, "_has_varlen", lambda: True)
    encoder = MultiResolutionEncoder(model_of(dinov2), SIZES)
    assert "attention=None ('sdpa' now)" in repr(encoder)
    assert "attention='varlen'" in repr(MultiResolutionEncoder(encoder.model, SIZES, attention="varlen"))
    assert encoder._attention_for(encoder.family) == "sdpa"
    with fake_cuda():
        moved(encoder.model, torch.bfloat16)
        assert encoder._attention_for(encoder.family) == "varlen"
        assert "attention=None ('varlen' now)" in repr(encoder)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"`attention` must be None or one of \('sdpa', 'varlen', 'xformers'\)"):
        MultiResolutionEncoder(model_of(dinov2), SIZES, attention="flash")
