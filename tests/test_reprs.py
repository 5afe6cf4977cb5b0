"""What objects say of themselves: enough to tell from a log how a result was made."""

from __future__ import annotations

import pytest
import torch

import murf_fast
from murf_fast.anomaly import MultiResolutionDetector, ScoringRules
from murf_fast.nn import JAFAR, NAF, AnyUp, FeatSharp, JBUStack, MultiResolutionEncoder, SegmentationHead


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers", reason="needs transformers for a vision transformer")
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, patch_size=4, image_size=24
    )
    return transformers.Dinov2Model(config).eval()


def says(module, *words):
    shown = repr(module)
    for word in (type(module).__name__, *words):
        assert word in shown, (word, shown)


def test_encoder_and_murf(model):
    encoder = MultiResolutionEncoder(model, [16, 24], layers=[0, 2], norm=False)
    says(encoder, "sizes=[(16, 16), (24, 24)]", "layers=[0, 2]", "norm=False", "attention=None")
    says(MultiResolutionEncoder(model, scales=[0.5, 1.0]), "scales=[0.5, 1.0]", "norm=True")
    says(murf_fast.MuRF(encoder), "channels=96, head=None", "sizes=[(16, 16), (24, 24)]")
    with_head = murf_fast.MuRF(encoder, head=SegmentationHead(96, 5))
    says(with_head, "channels=96\n", "SegmentationHead")
    assert "head=None" not in repr(with_head)


def test_upsamplers():
    says(AnyUp(qk_dim=16, num_heads=2, window_ratio=0.2), "qk_dim=16", "num_heads=2", "window_ratio=0.2")
    says(JBUStack(5), "dim=5", "shared=False")
    says(NAF(dim=32, num_heads=2, kernel_size=5), "dim=32, num_heads=2, kernel_size=5")
    says(JAFAR(v_dim=7, qk_dim=16, num_heads=2), "v_dim=7, qk_dim=16, num_heads=2")


def test_featsharp_names_an_encoder_that_is_no_module(model):
    def encode(views):
        return views

    says(FeatSharp(encode, 2, channels=16, size=32), "encoder=encode, factor=(2, 2), size=(32, 32)")
    shown = repr(FeatSharp(model, (2, 1), num_heads=2, size=24))
    assert "factor=(2, 1), size=(24, 24)" in shown
    assert "(encoder): MultiResolutionEncoder(" in shown


@pytest.mark.parametrize("backend", ["reference", None])
def test_index(backend):
    index = murf_fast.NearestIndex(torch.randn(40, 6), cosine=True, precision="float32", backend=backend)
    says(index, "40 rows of 6, torch.float32", "metrics=('cosine',)", "precision='float32'", "cells=None", "'cpu'")
    index.add(torch.randn(3, 6))
    says(index, "43 rows of 6", f"backend={index.backend!r}")


def test_index_with_cells():
    if murf_fast.backends.reasons_against("native", "cpu"):
        pytest.skip("needs the C++ extension")
    says(murf_fast.NearestIndex(torch.randn(400, 6), cells=4), "metrics=('l2', 'l2sq')", "cells=4")


def test_detector(model):
    pytest.importorskip("safetensors")
    detector = MultiResolutionDetector(model, layers=(0, 2), scales=(0.5, 1.0), pixels=None, rules="patchcore")
    says(detector, "Dinov2Model, layers=[0, 2], scales=[0.5, 1.0], index='exact', pixels=None, rules='patchcore'")
    says(detector, "not fitted")
    fitted = detector.fit([torch.zeros(3, 16, 24, dtype=torch.uint8)] * 2)
    rows = sum(len(bank) for bank in fitted.banks_)
    says(fitted, f"{rows} rows of 2 images in 4 banks")
    says(MultiResolutionDetector(model, layers=(0,), rules=ScoringRules(k=3)), "rules=ScoringRules(", "k=3")
