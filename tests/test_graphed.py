"""MuRF in one CUDA graph.

Without a GPU the capture is that of a stand-in, which records PyTorch's operations and runs them again on the tensors
they were recorded with: whatever the host read or decided during the capture is as stale in it as in a graph. And the
path of a GPU runs on fake tensors, where reads by the host and copies between the devices are refused.
"""

from __future__ import annotations

import contextlib
import copy
import importlib

import pytest
import torch
from fake_cuda import CUDA, fake_cuda, moved
from test_multi_resolution_encoder import MEAN, SIZES, STD, clip, dinov2, dinov3, hub_registers, model_of, siglip
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import murf_fast
from murf_fast.nn import DepthHead, SegmentationHead
from murf_fast.nn.vit import graphed
from murf_fast.tables import _table

METHODS = ("features", "tokens", "segment", "depth")
SHAPE = (2, 3, 30, 26)


class Tape(TorchDispatchMode):
    """Stands in for ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.steps.append((function, arguments, options or {}, result))
        return result

    def replay(self) -> None:
        for function, arguments, options, result in self.steps:
            again = function(*arguments, **options)
            if any(r.alias_info is not None for r in function._schema.returns):
                continue  # a view, or written in place
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


class Stream:
    def wait_stream(self, other) -> None:
        pass


@pytest.fixture
def on_the_host(monkeypatch):
    """Captures work on CPU tensors."""
    capturing = []

    @contextlib.contextmanager
    def graph(tape, stream):
        assert isinstance(stream, Stream)
        capturing.append(True)
        with tape:
            yield
        capturing.pop()

    cuda = {"CUDAGraph": Tape, "graph": graph, "Stream": Stream, "current_stream": Stream}
    cuda |= {"stream": contextlib.nullcontext, "device": contextlib.nullcontext}
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(importlib.import_module("murf_fast.nn.vit.murf"), "check_capturable", lambda images: None)
    for module in (importlib.import_module("murf_fast.ops.resample_pos_embed"), _table):
        monkeypatch.setattr(module, "is_capturing", lambda device: bool(capturing))
    monkeypatch.setattr(_table, "_captured", {})


def murf_of(build=dinov2, method="features", **options):
    torch.manual_seed(5)
    columns = len(SIZES) * 24
    head = {"segment": SegmentationHead(columns, 5), "depth": DepthHead(columns, 16, depth_range=(0.1, 10.0))}
    return murf_fast.MuRF(model_of(build), SIZES, head.get(method), mean=MEAN, std=STD, **options).eval()


def images_of(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, SHAPE, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("build", [dinov2, dinov3, siglip], ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_replays_do_what_the_method_does(method, build, on_the_host):
    murf = murf_of(build, method)
    call = murf.graphed(images_of(), method)
    results = [call(images_of(seed)) for seed in (1, 2)]
    for seed, result in zip((1, 2), results, strict=True):  # the first is not overwritten by the second
        expected = getattr(murf, method)(images_of(seed))
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()
        assert not result.requires_grad
    assert not torch.equal(*results) or method == "segment"


def test_options_and_layouts(on_the_host):
    murf = murf_of()
    call = murf.graphed(images_of(), grid=(5, 9), mode="bicubic")
    strided = images_of(1).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    with torch.inference_mode():
        result = call(strided)
    assert torch.equal(result, murf.features(images_of(1), (5, 9), mode="bicubic"))


@pytest.mark.parametrize("method", ["segment", "depth", "features"])
def test_the_method_is_that_of_the_head(method, on_the_host):
    murf = murf_of(method=method)
    assert torch.equal(murf.graphed(images_of())(images_of(1)), getattr(murf, method)(images_of(1)))


@pytest.mark.parametrize("keep", [False, True, "checked"])
def test_weights_written_in_place_are_seen(keep, on_the_host):
    murf = murf_of(keep_positions=keep)
    call = murf.graphed(images_of())
    before = call(images_of(1))
    with torch.no_grad():
        for x in murf.parameters():
            x.mul_(1.5)
    after = call(images_of(1))
    assert not torch.equal(before, after)
    assert torch.equal(after, murf.features(images_of(1)))


def replaced_parameter(murf) -> str:
    norm = murf.encoder.family.final_norm
    norm.weight = nn.Parameter(norm.weight.detach().clone())
    return r"norm\.weight` was replaced or moved"


def moved_data(murf) -> str:
    norm = murf.encoder.family.final_norm
    norm.bias.data = norm.bias.data.clone()
    return r"norm\.bias` was replaced or moved"


def replaced_buffer(murf) -> str:
    murf.head.norm.running_mean = murf.head.norm.running_mean.clone()
    return r"`head\.norm\.running_mean` was replaced or moved"


def replaced_module(murf) -> str:
    blocks = murf.encoder.family.blocks
    blocks[1] = copy.deepcopy(blocks[1])
    return r"\.1` is another module"


@pytest.mark.parametrize("change", [replaced_parameter, moved_data, replaced_buffer, replaced_module])
def test_another_model_is_refused(change, on_the_host):
    murf = murf_of(method="segment")
    call = murf.graphed(images_of())
    call(images_of(1))
    words = change(murf)
    with pytest.raises(ValueError, match=words):
        call(images_of(1))


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        ([1], TypeError, "`images` must be a tensor, got list"),
        (torch.zeros(SHAPE), TypeError, "`images` must be torch.uint8 as those of the capture, got torch.float32"),
        (torch.zeros(1, 3, 30, 26, dtype=torch.uint8), ValueError, r"must be \(2, 3, 30, 26\) on cpu .*\(1, 3, 30, 26"),
        (torch.zeros(SHAPE, dtype=torch.uint8, device="meta"), ValueError, r"on cpu .*got \(2, 3, 30, 26\) on meta"),
    ],
)
def test_other_images_are_refused(images, error, words, on_the_host):
    call = murf_of().graphed(images_of())
    with pytest.raises(error, match=words):
        call(images)


def test_refusals_before_a_capture(monkeypatch):
    murf = murf_of()
    with pytest.raises(ValueError, match="must be on a CUDA device, whose launches a graph holds; got cpu"):
        murf.graphed(images_of())
    with pytest.raises(ValueError, match=r"`method` must be one of .*'pca'"):
        murf.graphed(images_of(), "pca")
    with pytest.raises(ValueError, match="`out` cannot be given"):
        murf.graphed(images_of(), out=torch.zeros(1))
    with pytest.raises(ValueError, match=r"MuRF.graphed: `images` must be \(B, 3, H, W\)"):
        murf.graphed(images_of()[0])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
    with fake_cuda(), pytest.raises(ValueError, match="autocast keeps"):
        murf.graphed(torch.empty(SHAPE, device=CUDA))
    monkeypatch.undo()
    with fake_cuda(capture=True), pytest.raises(ValueError, match="being captured already"):
        graphed.check_capturable(torch.empty(SHAPE, device=CUDA))


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize("build", [dinov2, dinov3, siglip, hub_registers, clip], ids=lambda f: f.__name__)
def test_the_path_of_a_gpu_can_be_captured(build, attention):
    if attention == "varlen":
        pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen attention")
    for method in METHODS if build is dinov2 else ("segment",):
        murf = murf_of(build, method, attention=attention)
        with fake_cuda(capture=True) as operations, torch.no_grad():
            moved(murf, torch.bfloat16)
            result = getattr(murf, method)(torch.empty(SHAPE, dtype=torch.uint8, device=CUDA))
            assert result.device == CUDA
        launches = sum(n for name, n in operations.counts.items() if "varlen" in name)
        assert launches == (3 if attention == "varlen" else 0), operations.counts  # one in each block


def test_positions_are_resized_in_every_capture():
    murf = murf_of(keep_positions=True)
    with fake_cuda(capture=True) as operations, torch.no_grad():
        moved(murf, torch.bfloat16)
        for _ in range(2):
            murf.features(torch.empty(SHAPE, dtype=torch.uint8, device=CUDA))
    assert operations.counts["murf_fast::resize_out"] == 2 * 2  # the third grid is the table's own


def test_what_no_graph_holds_is_noticed():
    with fake_cuda(capture=True):
        x = torch.empty(3, device=CUDA)
        with pytest.raises(AssertionError, match="cannot hold"):
            torch.empty(3).to(CUDA)
        with pytest.raises(AssertionError, match="cannot hold"):
            x.cpu()
        for read in (lambda: float(x.sum()), lambda: x.nonzero(), lambda: bool((x > 0).all())):
            with pytest.raises(RuntimeError, match=r"aten|not linked with support for cuda"):
                read()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["sdpa", None])
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(method, attention):
    murf = murf_of(method=method, attention=attention).to("cuda", torch.bfloat16)
    call = murf.graphed(images_of().cuda(), method)
    results = [call(images_of(seed).cuda()) for seed in (1, 2)]
    for seed, result in zip((1, 2), results, strict=True):
        torch.testing.assert_close(result, getattr(murf, method)(images_of(seed).cuda()))
