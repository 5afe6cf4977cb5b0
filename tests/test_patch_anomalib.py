"""murf_fast.patch.anomalib: anomalib's own functions before and after, on a stand-in and on the real package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import textwrap

import numpy as np
import pytest
import stand_in_anomalib
import stand_in_torchvision
import torch
from torch import nn
from util import assert_within_budget

from murf_fast import patch
from murf_fast.patch import _anomalib


def forget() -> None:
    patch.unpatch()
    for name in [n for n in sys.modules if n.split(".")[0] == "anomalib"]:
        del sys.modules[name]


INSTALLED = ["installed"] if importlib.util.find_spec("anomalib") else []


@pytest.fixture(params=["2.1.0", "2.7.0", *INSTALLED])
def anomalib(request, tmp_path, monkeypatch):
    """A package `anomalib`: the stand-in as it was at a version, or the real one."""
    if request.param == "installed":
        yield stand_in_torchvision.imported("anomalib.models") and importlib.import_module("anomalib")
        patch.unpatch()
        return
    pytest.importorskip("tqdm")
    installed = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "anomalib"}
    forget()
    for path, text in stand_in_anomalib.FILES.items():
        file = tmp_path / "anomalib" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text).replace("{version}", request.param))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield importlib.import_module("anomalib")
    forget()
    sys.modules.update(installed)


def found(name: str, module: str):
    return getattr(importlib.import_module(f"anomalib.models.{module}"), name)


def patchcore(bank):
    options = {"layers": ["layer1"], "backbone": "resnet18", "pre_trained": False, "num_neighbors": 3}
    model = found("PatchcoreModel", "image.patchcore.torch_model")(**options)
    model.memory_bank = bank
    return model


def rows(n, dim, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(9, dim, generator=g)[torch.randint(9, (n,), generator=g)] + torch.randn(n, dim, generator=g)


def before_and_after(function):
    before = function()
    patch.anomalib()
    after = function()
    patch.unpatch()
    return before, after


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_search(anomalib, dtype):
    """Also rows of the bank itself, at distance 0, and more queries than anomalib takes at once."""
    bank = rows(60, 24).to(dtype)
    query = torch.cat([bank[5:15], rows(1100, 24, 1).to(dtype)])
    model = patchcore(bank)
    exact = torch.cdist(query.double(), bank.double()).sort(stable=True)
    for k in (1, 3):
        before, after = before_and_after(lambda k=k: model.nearest_neighbors(query, k))
        expected = [x[:, 0] if k == 1 else x[:, :k] for x in exact]
        assert after[0].dtype == dtype
        assert_within_budget(after[0], expected[0], before[0])
        assert torch.equal(after[1], expected[1])
        assert dtype == torch.float16 or torch.equal(after[1], before[1])


def test_a_bank_that_changes(anomalib):
    bank, query = rows(30, 8), rows(7, 8, 1)
    model = patchcore(bank)
    patch.anomalib()

    def is_right():
        indices = torch.cdist(query.double(), model.memory_bank.double()).argmin(1)
        assert torch.equal(model.nearest_neighbors(query, 1)[1], indices)
        return len(_anomalib._indices[model][1]) if model in _anomalib._indices else 0

    assert is_right() == 1
    index = next(iter(_anomalib._indices[model][1].values()))
    assert is_right() == 1
    assert next(iter(_anomalib._indices[model][1].values())) is index  # prepared once
    model.memory_bank[torch.arange(30)] = rows(30, 8, 2)
    is_right()
    model.memory_bank = rows(40, 8, 3)
    is_right()
    model.memory_bank.data = rows(40, 8, 4)
    is_right()
    with torch.inference_mode():
        model.memory_bank = rows(40, 8, 5)
        is_right()
        model.memory_bank.copy_(rows(40, 8, 6))
        is_right()


def test_several_banks(anomalib):
    """SuperADD: one bank per layer, batches of queries."""
    try:
        model = found("SuperADDModel", "image.super_add.torch_model")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    model = model.__new__(model)
    nn.Module.__init__(model)
    model.memory_bank, query = torch.stack([rows(30, 8, 3), rows(30, 8, 4)]), rows(14, 8, 1).view(2, 7, 8)
    for layer in (0, 1):
        bank = model.memory_bank[layer]
        before, after = before_and_after(lambda b=bank: model.nearest_neighbors(query, b, 2))
        order = before[0].argsort(-1)
        oracle = torch.cdist(query.double(), bank.double()).topk(2, largest=False)[0]
        assert_within_budget(after[0], oracle, before[0].gather(-1, order))
        assert torch.equal(after[1], before[1].gather(-1, order))
    assert len(_anomalib._indices[model][1]) == 2  # one per layer, prepared once
    for keys, normalize in ((bank, True), (query[0], False)):
        before, after = before_and_after(lambda b=keys, n=normalize: model.nearest_neighbors(query, b, 2, normalize=n))
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("shape", [(300, 24), (60, 3, 4)])
def test_coreset(anomalib, shape, capsys):
    kind = found("KCenterGreedy", "components.sampling.k_center_greedy")
    embedding = rows(shape[0], 24)[:, : int(np.prod(shape[1:]))].reshape(shape)
    states = []

    def select():
        torch.manual_seed(3)
        np.random.seed(3)
        chosen = kind(embedding, 0.15).select_coreset_idxs()
        states.append(torch.get_rng_state())
        return chosen

    before, after = before_and_after(select)
    assert after == before
    assert all(type(i) is int for i in after)
    assert torch.equal(*states)
    assert f"{len(after)}/{len(after)}" in capsys.readouterr().err.rpartition("\r")[2]


def test_coresets_that_are_left_to_anomalib(anomalib):
    """All rows, where the first one is drawn and not kept: the last step finds no other row."""
    kind = found("KCenterGreedy", "components.sampling.k_center_greedy")

    def select():
        torch.manual_seed(3)
        np.random.seed(3)
        return kind(rows(12, 5), 1.0).select_coreset_idxs()

    before, after = before_and_after(select)
    assert after == before


@pytest.mark.parametrize(
    "options",
    [
        {"sigma": 4.0},
        {"sigma": 1.23456, "channels": 3},
        {"sigma": 4.0, "kernel_size": 5},
        {"sigma": 2.0, "padding": "valid"},
        {"sigma": 2.0, "border_type": "replicate"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blur(anomalib, options, dtype):
    blur = found("GaussianBlur2d", "components.filters.blur")(**options)
    x = torch.rand(2, options.get("channels", 1), 37, 41).to(dtype)
    oracle = blur.double()(x.double())
    blur = found("GaussianBlur2d", "components.filters.blur")(**options).to(dtype)
    before, after = before_and_after(lambda: blur(x))
    assert after.dtype == dtype
    assert_within_budget(after, oracle, before)
    assert torch.equal(after, before) == (len({"kernel_size", "padding", "border_type"} & options.keys()) == 1)


@pytest.mark.parametrize("change", [lambda k: k[:, :, 3:4].mul_(1.001), lambda k: k[:1].mul_(1.001)])
def test_kernels_that_are_no_gaussian(anomalib, change):
    """One row of the taps, or one channel, is a little larger."""
    blur = found("GaussianBlur2d", "components.filters.blur")(sigma=2.0, channels=2)
    blur.kernel = blur.kernel.clone()
    change(blur.kernel)
    x = torch.rand(1, 2, 30, 30)
    before, after = before_and_after(lambda: blur(x))
    assert torch.equal(after, before)


def test_a_kernel_that_changes(anomalib):
    blur, x = found("GaussianBlur2d", "components.filters.blur")(sigma=2.0), torch.rand(1, 1, 30, 30)
    patch.anomalib()
    assert not torch.equal(blur(x), torch.zeros_like(x))
    blur.kernel = blur.kernel.clone()
    blur.kernel.zero_()
    assert torch.equal(blur(x), torch.zeros_like(x))


@pytest.mark.parametrize("grid", [(7, 5), (28, 28)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_map(anomalib, grid, dtype):
    kind = found("AnomalyMapGenerator", "image.patchcore.anomaly_map")
    scores = (100 * torch.rand(2, 1, *grid)).to(dtype)
    for size in ((61, 56), torch.Size((100, 40)), None):
        if size is None and min(grid) <= 16:
            continue
        oracle, generator = kind().double()(scores.double(), size), kind().to(dtype)
        before, after = before_and_after(lambda size=size, g=generator: g(scores, size))
        assert after.dtype == dtype
        assert_within_budget(after, oracle, before)
        assert not torch.equal(after, before)


def test_a_blur_with_a_hook(anomalib):
    generator = found("AnomalyMapGenerator", "image.patchcore.anomaly_map")()
    generator.blur.register_forward_hook(lambda module, inputs, output: output + 1)
    before, after = before_and_after(lambda: generator(torch.zeros(1, 1, 7, 7), (40, 40)))
    assert torch.equal(after, before)
    assert torch.equal(after, torch.ones(1, 1, 40, 40))


def test_small_maps_are_refused_as_by_anomalib(anomalib):
    blur = found("GaussianBlur2d", "components.filters.blur")(sigma=4.0)
    patch.anomalib()
    with pytest.raises(RuntimeError, match=r"[Pp]adding size"):
        blur(torch.rand(1, 1, 16, 40))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_exports_and_gradients_are_anomalibs(anomalib):
    blur, model = found("GaussianBlur2d", "components.filters.blur")(sigma=2.0), patchcore(rows(30, 8))
    x, query = torch.rand(1, 1, 30, 30), rows(7, 8, 1)
    patch.anomalib()
    traced = [
        torch.jit.trace(blur, x),
        torch.jit.trace(lambda q: model.nearest_neighbors(q, 1), query),
        torch.export.export(blur, (x,)),
    ]
    for graph in (traced[0].inlined_graph, traced[1].inlined_graph, traced[2].graph):
        assert "murf_fast" not in str(graph)
    (gradient,) = torch.autograd.grad(blur(x.requires_grad_()).square().sum(), x)
    assert gradient.abs().min() > 0


def test_unpatch(anomalib):
    kinds = {
        found("PatchcoreModel", "image.patchcore.torch_model"): "nearest_neighbors",
        found("AnomalyMapGenerator", "image.patchcore.anomaly_map"): "compute_anomaly_map",
        found("GaussianBlur2d", "components.filters.blur"): "forward",
        found("KCenterGreedy", "components.sampling.k_center_greedy"): "select_coreset_idxs",
    }
    before = {kind: dict(vars(kind)) for kind in kinds}
    patch.anomalib()
    first = {kind: dict(vars(kind)) for kind in kinds}
    patch.anomalib()  # a second time changes nothing
    assert all(first[kind] == dict(vars(kind)) for kind in kinds)
    assert all(getattr(kind, name).__module__ == "murf_fast.patch._anomalib" for kind, name in kinds.items())
    patch.unpatch()
    assert all(before[kind] == dict(vars(kind)) for kind in kinds)


@pytest.mark.parametrize("anomalib", ["installed"], indirect=True)
def test_a_whole_model(anomalib):
    """PatchCore itself, from images to scores."""
    torch.manual_seed(0)
    model, images = patchcore(torch.empty(0)).eval(), torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        features = model.feature_extractor(images[:1])["layer1"]
        model.memory_bank = model.reshape_embedding(features)[::3].contiguous()
        before, after = before_and_after(lambda: model(images))
        oracle = model.double()(images.double())
    for name in ("pred_score", "anomaly_map"):
        assert_within_budget(getattr(after, name), getattr(oracle, name), getattr(before, name), name)


def test_without_anomalib(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(ModuleNotFoundError, match="the package anomalib is not installed"):
        patch.anomalib()


@pytest.mark.parametrize("anomalib", ["2.7.0"], indirect=True)
def test_old_versions_are_refused(anomalib, monkeypatch):
    monkeypatch.setattr(anomalib, "__version__", "1.2.0")
    with pytest.raises(ValueError, match=r"must be version 2.1 or later, got 1.2.0"):
        patch.anomalib()
