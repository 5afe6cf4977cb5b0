"""MuRF in one call against the original's order of operations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_multi_resolution_encoder import MEAN, SIZES, STD, dinov2, dinov3, model_of, original, siglip
from util import assert_labels_within_budget, assert_within_budget
from whole_graphs import needs_graph_of_murf

import murf_fast
from murf_fast.nn import DepthHead, MultiResolutionEncoder, SegmentationHead
from murf_fast.nn.vit.principal import principal_axes

CLASSES, WIDTH = 11, 24


def maps_of(build, model, images, norm=True, layer=2):
    prefix = {siglip: 0, dinov2: 1, dinov3: 3}[build]
    grids = [(h // 4, w // 4) for h, w in SIZES]
    tokens = [original(build, model, images, size, layer, norm) for size in SIZES]
    return [t[:, prefix:].mT.unflatten(2, g) for t, g in zip(tokens, grids, strict=True)], [t[:, 0] for t in tokens]


def up(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def randomized(head):
    torch.manual_seed(5)
    with torch.no_grad():
        for tensor in [*head.parameters(), *head.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
    return head.eval()


def images_of(batch=2):
    return torch.randint(0, 256, (batch, 3, 30, 26), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("build", [dinov2, dinov3, siglip], ids=lambda f: f.__name__)
def test_features_and_tokens(build):
    model, images = model_of(build), images_of()
    murf = murf_fast.MuRF(model, SIZES, mean=MEAN, std=STD)
    oracle = maps_of(build, copy.deepcopy(model).double(), images)[0]
    same = maps_of(build, model, images)[0]
    for grid in [None, (13, 9), 7]:
        size = (8, 7) if grid is None else (grid, grid) if isinstance(grid, int) else grid
        expected, plain = (torch.cat([up(m, size) for m in maps], 1) for maps in (oracle, same))
        result = murf.features(images, grid)
        assert_within_budget(result, expected, plain)
        assert torch.equal(murf(images, grid), result)
        if grid is None:
            tokens = murf.tokens(images)
            assert_within_budget(tokens, expected.flatten(2).mT, plain.flatten(2).mT)
            assert tokens.is_contiguous()


@pytest.mark.parametrize("cls", [False, True])
def test_segment(cls):
    model, images = model_of(dinov2), images_of()
    head = randomized(SegmentationHead((2 if cls else 1) * 3 * WIDTH, CLASSES))
    murf = murf_fast.MuRF(model, SIZES, head, mean=MEAN, std=STD)

    def logits(model, head):
        maps, tokens = maps_of(dinov2, model, images)
        parts = [
            torch.cat([m, t[:, :, None, None].expand(-1, -1, *m.shape[2:])], 1) if cls else m
            for m, t in zip(maps, tokens, strict=True)
        ]
        fused = torch.cat([up(m, (8, 7)) for m in parts], 1)
        return up(head.classifier(head.norm(fused)), (30, 26))

    oracle = logits(copy.deepcopy(model).double(), copy.deepcopy(head).double())
    labels = murf.segment(images)
    assert labels.shape == (2, 30, 26)
    assert_labels_within_budget(labels, oracle, logits(model, head))
    assert murf.segment(images, (9, 5)).shape == (2, 9, 5)
    assert murf.segment(images.permute(0, 2, 3, 1)).equal(labels)


def test_depth():
    model, images = model_of(dinov2), images_of()
    head = randomized(DepthHead(2 * 3 * WIDTH, 16, depth_range=(1e-3, 10.0)))
    murf = murf_fast.MuRF(model, SIZES, head, layers=[1], norm=False, mean=MEAN, std=STD)

    def depth(model, head):
        maps, tokens = maps_of(dinov2, model, images, norm=False, layer=1)
        parts = [
            torch.cat([m, t[:, :, None, None].expand(-1, -1, *m.shape[2:])], 1)
            for m, t in zip(maps, tokens, strict=True)
        ]
        logits = head.classifier(torch.cat([up(m, (8, 7)) for m in parts], 1))
        values = head.values().to(logits.dtype)
        return up((logits.softmax(1) * values.view(1, -1, 1, 1)).sum(1, keepdim=True), (30, 26))[:, 0]

    oracle = depth(copy.deepcopy(model).double(), copy.deepcopy(head).double())
    assert_within_budget(murf.depth(images), oracle, depth(model, head))


def test_murf_rounding_is_that_of_the_depth_code():
    """ceil of the scaled size, then the convolution drops what is no whole patch."""
    model = model_of(dinov2)
    images = torch.rand(1, 3, 30, 26)
    murf = murf_fast.MuRF(model, scales=[0.5, 1.0, 1.5], rounding="murf")
    expected = []
    for scale in (0.5, 1.0, 1.5):
        size = (math.ceil(30 * scale), math.ceil(26 * scale))
        tokens = model(images if scale == 1 else up(images, size)).last_hidden_state[:, 1:]
        expected.append(tokens.mT.unflatten(2, (size[0] // 4, size[1] // 4)))
    for map_, plain in zip(murf.encode(images).maps, expected, strict=True):
        torch.testing.assert_close(map_, plain)


def test_pca():
    model, images = model_of(dinov2), images_of()
    murf = murf_fast.MuRF(model, SIZES)
    fused = murf.features(images).double()
    tokens = fused.permute(0, 2, 3, 1).flatten(0, 2)
    centred = tokens - tokens.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:4].T
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    projected = (centred @ (axes * signs)).unflatten(0, (2, 8, 7)).permute(0, 3, 1, 2)
    result = murf.pca(images, (30, 26), 4)
    torch.testing.assert_close(result.double(), up(projected, (30, 26)), rtol=1e-3, atol=1e-3 * projected.abs().max())
    assert murf.pca(images).shape == (2, 3, 30, 26)
    mean, leading = principal_axes(fused, 4)
    torch.testing.assert_close(leading.T @ leading, torch.eye(4).double())
    torch.testing.assert_close(mean, tokens.mean(0))


def test_takes_an_encoder():
    encoder = MultiResolutionEncoder(model_of(dinov2), SIZES)
    images = torch.rand(1, 3, 30, 26)
    assert torch.equal(murf_fast.MuRF(encoder)(images), murf_fast.MuRF(encoder.model, SIZES)(images))
    with pytest.raises(ValueError, match="sizes, norm"):
        murf_fast.MuRF(encoder, SIZES, norm=False)


def test_gradients_reach_a_head_and_not_the_frozen_model():
    head = SegmentationHead(3 * WIDTH, CLASSES)
    murf = murf_fast.MuRF(model_of(dinov2), SIZES, head)
    features = murf.encode(torch.rand(2, 3, 30, 26))
    head.loss(features.maps, torch.randint(0, CLASSES, (2, 30, 26))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert all(p.grad is None for p in murf.encoder.parameters())


@pytest.mark.parametrize(
    ("head", "call", "error", "message"),
    [
        (None, "segment", ValueError, "SegmentationHead, this model has none"),
        (SegmentationHead(72, 3), "depth", ValueError, "DepthHead, this model has SegmentationHead"),
        (SegmentationHead(70, 3), "segment", ValueError, "72 columns"),
        (torch.nn.Linear(72, 3), "segment", TypeError, "Linear"),
    ],
)
def test_bad_heads(head, call, error, message):
    with pytest.raises(error, match=message):
        getattr(murf_fast.MuRF(model_of(dinov2), SIZES, head), call)(torch.rand(1, 3, 30, 26))


@pytest.mark.parametrize(
    ("components", "error", "words"),
    [
        (0, ValueError, "`components` must be at least 1, got 0"),
        (73, ValueError, "`components` must be at most 72, got 73"),
        (1.5, TypeError, "`components` must be an integer, got 1.5"),
    ],
)
def test_bad_components(components, error, words):
    with pytest.raises(error, match=words):
        murf_fast.MuRF(model_of(dinov2), SIZES).pca(torch.rand(1, 3, 30, 26), components=components)


@pytest.mark.parametrize("method", ["features", "tokens", "pca"])
def test_bad_images(method):
    with pytest.raises(ValueError, match="images"):
        getattr(murf_fast.MuRF(model_of(dinov2), SIZES), method)(torch.rand(3, 30, 26))


@needs_graph_of_murf
@pytest.mark.parametrize(("build", "method"), [(dinov2, "segment"), (dinov3, "depth")])
def test_one_graph_for_varying_sizes(build, method):
    """A second size compiles a graph for all of them, and a third runs in it; the compiler behind plays no part."""
    columns = 2 * WIDTH
    heads = {"segment": SegmentationHead(columns, CLASSES), "depth": DepthHead(columns, 16, depth_range=(0.1, 10.0))}
    options = {"scales": [0.5, 1.0], "layers": [0], "mean": MEAN, "std": STD}
    call = getattr(murf_fast.MuRF(model_of(build), head=randomized(heads[method]), **options), method)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        stances = ("default", "default", "fail_on_recompile")
        for size, stance in zip(((2, 3, 30, 26), (3, 3, 44, 36), (4, 3, 52, 60)), stances, strict=True):
            images = torch.rand(size, generator=torch.Generator().manual_seed(1))
            with torch.compiler.set_stance(stance):
                result = compiled(images)
            expected = call(images)
            if method == "segment":
                assert (result == expected).double().mean() > 0.99
            else:
                torch.testing.assert_close(result, expected)
