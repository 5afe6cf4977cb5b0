from __future__ import annotations

import contextlib
import threading
import warnings

import pytest
import torch

import murf_fast
from murf_fast import _extension, backends

X = torch.ones(1, 2, 3, 4)


def chosen(device="cpu", dtype=torch.float32, request=None):
    return backends.resolve(request, device, dtype)


def test_default_choice():
    assert chosen() == "native"
    assert chosen(dtype=torch.float64) == "reference"


def test_argument_beats_context_beats_environment(monkeypatch):
    monkeypatch.setenv("MURF_FAST_BACKEND", "reference")
    assert chosen() == "reference"
    with murf_fast.use_backend("native"):
        assert chosen() == "native"
        assert chosen(request="reference") == "reference"
    assert chosen() == "reference"


def test_use_backend_is_per_thread():
    seen = []
    with murf_fast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
        assert chosen() == "reference"
    assert seen == ["native"]


def test_request_that_cannot_be_met_gives_every_reason(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(murf_fast.BackendUnavailableError, match="interpreter"):
        murf_fast.resize(X, 5, backend="triton")
    with pytest.raises(murf_fast.BackendUnavailableError, match=r"float64 .*; Triton takes CPU tensors"):
        murf_fast.resize(X.double(), 5, backend="triton")
    assert len(backends.reasons_against("native", "cuda", torch.float64)) == 2


def test_fallback_is_told_once(monkeypatch):
    monkeypatch.setattr(backends, "native_problems", lambda: ["the extension went on holiday"])
    backends._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="holiday"):
        murf_fast.resize(X, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        murf_fast.resize(X, 6)


def test_unknown_backend():
    with pytest.raises(ValueError, match="must be one of"), murf_fast.use_backend("fast"):
        pass


@pytest.mark.parametrize("source", ["argument", "context", "environment"])
@pytest.mark.parametrize("name", ["fast", "triton"])
def test_an_error_says_who_asked(source, name, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    error = ValueError if name == "fast" else murf_fast.BackendUnavailableError
    words = {
        "argument": "`backend`",
        "context": "`use_backend`",
        "environment": "environment variable MURF_FAST_BACKEND",
    }
    if source == "environment":
        monkeypatch.setenv("MURF_FAST_BACKEND", name)
    context = murf_fast.use_backend(name) if source == "context" else contextlib.nullcontext()
    with pytest.raises(error, match=words[source]), context:
        murf_fast.resize(X, 5, backend=name if source == "argument" else None)


def test_level_can_be_forced(monkeypatch):
    monkeypatch.setenv("MURF_FAST_CPU", "baseline")
    assert _extension.current_level() == "baseline"
    monkeypatch.setenv("MURF_FAST_CPU", "avx1024")
    with pytest.raises(RuntimeError, match="avx1024 cannot run here; available: baseline"):
        murf_fast.resize(X, 5)


def test_meta_tensors_give_shapes():
    x = torch.empty(2, 3, 4, 5, device="meta")
    assert murf_fast.upsample_concat([x, x], 7).shape == (2, 6, 7, 7)
    assert murf_fast.upsample_argmax([x], 7).dtype == torch.uint8


def test_modes_of_autograd_and_autocast():
    x = torch.randn(1, 3, 4, 5, requires_grad=True)
    with torch.no_grad():
        assert not murf_fast.resize(x, 7).requires_grad
    with torch.inference_mode():
        assert murf_fast.resize(x, 7).is_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert murf_fast.resize(x.bfloat16(), 7).dtype == torch.bfloat16
        assert murf_fast.resize(x, 7).dtype == torch.float32
