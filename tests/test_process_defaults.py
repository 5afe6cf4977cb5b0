"""The process's default dtype and device are the user's: results are the same whatever they are.

Memory that follows a default is of another size, or on another device, than the kernel that is given its address walks.
Every operation, every module and the detector run under each.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from murf_fast import nn, ops, windows
from murf_fast.anomaly import MultiResolutionDetector, au_pro
from murf_fast.backends import native_problems

pytestmark = pytest.mark.skipif(bool(native_problems()), reason="needs the C++ extension")
ROOT = Path(__file__).parents[1]


def draw(*shape):
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float32, device="cpu", generator=generator)


def with_gradients(f, *inputs: Tensor):
    """The result of ``f`` and the gradients of its sum of squares."""

    def run():
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        result = f(*leaves)
        return result, torch.autograd.grad(result.float().square().sum(), leaves)

    return run


def params(guides=3, keys=4, taps=9):
    shapes = ((), (), (keys, guides), (keys,), (keys, keys), (keys,))
    shapes += ((taps, taps + guides), (taps,), (taps, taps), (taps,))
    return [draw(*s).abs() + 0.1 for s in shapes]


def op_calls() -> dict[str, list]:
    """By the name of an operation, calls that take all its ways to memory."""
    x, y, guide = draw(2, 8, 5, 6), draw(2, 8, 3, 4), draw(1, 3, 12, 14)
    logits, values, bias = draw(1, 4, 5, 6), draw(4), draw(4)
    target = torch.randint(4, (1, 9, 9), generator=torch.Generator().manual_seed(0))
    rows, bank, numpy_bank = draw(40, 16), draw(300, 16), draw(300, 16).numpy()
    network = ops.BilateralParams(*params())
    kernels, source = draw(1, 9, 12, 14), draw(1, 4, 6, 7)
    images, weight = torch.randint(0, 256, (2, 3, 30, 26), dtype=torch.uint8), draw(8, 3 * 16)
    q, k, v = draw(1, 8, 9, 10), draw(1, 8, 4, 5), draw(1, 6, 4, 5)
    tokens, slopes = draw(1, 6, 7, 2, 4), (draw(2), draw(2))
    table, attention = draw(1 + 16, 8), {"windows": windows.ratio((9, 10), (4, 5)), "num_heads": 2}
    norm = torch.nn.BatchNorm2d(16)
    widths = [draw(1, 1, 6, 7).abs() + 1 for _ in range(4)]
    return {
        "adaptive_conv": [with_gradients(lambda s, k: ops.adaptive_conv(s, k), source, kernels)],
        "bilateral_kernels": [
            with_gradients(lambda g, *p: ops.bilateral_kernels(g, ops.BilateralParams(*p), radius=1), guide, *network)
        ],
        "feature_unify": [with_gradients(ops.feature_unify, x, draw(5, 1, 3, 3))],
        "gaussian_bilateral_upsample": [
            with_gradients(lambda f, g, *m: ops.gaussian_bilateral_upsample(f, g, *m, radius=2), source, guide, *widths)
        ],
        "gaussian_blur": [lambda: ops.gaussian_blur(x, 1.5), lambda: ops.gaussian_blur(x.double(), 1.5)],
        "image_to_patches": [lambda: ops.image_to_patches(images, [16, (24, 20)], 4, mean=[0.5] * 3, std=[0.2] * 3)],
        "joint_bilateral_upsample": [
            lambda: ops.joint_bilateral_upsample(source, guide, network, radius=1),
            with_gradients(lambda s: ops.joint_bilateral_upsample(s, guide, network, radius=1), source),
        ],
        "k_center_greedy": [
            lambda: ops.k_center_greedy(bank, count=9),
            lambda: ops.k_center_greedy(bank, fraction=0.03, start=torch.tensor([5, 7], device="cpu")),
            lambda: ops.k_center_greedy(bank, count=9, progress=lambda *_: None),
            lambda: ops.k_center_greedy(bank.double(), count=9),
            lambda: ops.k_center_greedy(numpy_bank, count=9, projection=draw(6, 16)),
        ],
        "linear_head": [
            lambda: ops.linear_head([x, y], draw(4, 16), bias[:4], size=9, via=6),
            lambda: ops.linear_head([x, y], draw(4, 16), size=9, norm=norm.train()),
        ],
        "nearest_distance": [
            *(
                lambda metric=metric, precision=precision: ops.nearest_distance(
                    rows, bank, k=3, metric=metric, precision=precision
                )
                for metric in ("l2", "l2sq", "cosine")
                for precision in ("float32", "bfloat16", "float16")
            ),
            lambda: ops.nearest_distance(rows, ops.NearestIndex(numpy_bank, cosine=True)),
            lambda: ops.nearest_distance(rows.double(), bank.double(), k=2),
            lambda: ops.nearest_distance(rows.bfloat16(), bank.half(), k=2),
        ],
        "neighborhood_attention": [
            lambda: ops.neighborhood_attention(tokens, tokens, tokens, kernel_size=3, bias=slopes)
        ],
        "patch_embed": [
            lambda: ops.patch_embed(
                images,
                [16, 24],
                weight,
                draw(8),
                table,
                patch_size=4,
                flavor="dinov2-hub",
                num_prefix_tokens=1,
                prefix=draw(1, 8),
            )
        ],
        "resample_patch_embed": [lambda: ops.resample_patch_embed(draw(4, 3, 6, 6), 4)],
        "resample_pos_embed": [
            *(
                lambda flavor=flavor: ops.resample_pos_embed(
                    table, [(3, 5), (6, 6)], flavor=flavor, num_prefix_tokens=1
                )
                for flavor in (
                    "dinov2-hub",
                    "dinov2-hf",
                    "dinov2-reg",
                    "clip",
                    "open-clip",
                    "siglip",
                    "siglip2",
                    "timm",
                )
            )
        ],
        "resize": [
            with_gradients(lambda x: ops.resize(x, (9, 10), mode="bicubic", antialias=True), x),
            lambda: ops.resize(x, scale_factor=1.7),
            lambda: ops.resize(x.double(), (9, 10), via=(4, 4)),
        ],
        "upsample_argmax": [lambda: ops.upsample_argmax([logits], (9, 9), bias=bias, return_values=True)],
        "upsample_confusion": [lambda: ops.upsample_confusion([logits], target, bias=bias)],
        "upsample_concat": [with_gradients(lambda x, y: ops.upsample_concat([x, y], (9, 10)), x, y)],
        "upsample_cross_entropy": [
            with_gradients(
                lambda x, b: ops.upsample_cross_entropy([x], target, bias=b, weight=values.abs(), label_smoothing=0.1),
                logits,
                bias,
            ),
            with_gradients(lambda x: ops.upsample_cross_entropy([x], target), logits.bfloat16()),
        ],
        "upsample_expectation": [
            with_gradients(lambda x, v, b: ops.upsample_expectation([x], (9, 9), v, bias=b), logits, values, bias),
            with_gradients(lambda x, v: ops.upsample_expectation([x], (9, 9), v, norm="linear"), logits, values),
        ],
        "upsample_mean": [
            lambda: ops.upsample_mean([x, y, y], (9, 10), [1.0, 2.0, 0.5]),
            lambda: ops.upsample_mean([x, y], (9, 10), draw(2).abs()),
        ],
        "upsample_sum": [with_gradients(lambda x, y, b: ops.upsample_sum([x, y], (9, 10), bias=b), x, y, draw(8))],
        "window_attention": [
            with_gradients(lambda q, k, v: ops.window_attention(q, k, v, **attention), q, k, v),
            with_gradients(
                lambda q, k, v, a, b: ops.window_attention(
                    q, k, v, windows=windows.full(), num_heads=2, values="split", bias=(a, b)
                ),
                q,
                k,
                v,
                draw(2, 9, 4),
                draw(2, 10, 5),
            ),
            lambda: ops.window_attention(q, k, v, **attention, return_lse=True),
        ],
        "window_attention_argmax": [
            lambda: ops.window_attention_argmax(q, k, v, **attention),
            lambda: ops.window_attention_argmax(q, k, v, **attention, values="split", class_bias=draw(v.shape[1] // 2)),
        ],
    }


def backbone():
    transformers = pytest.importorskip("transformers", reason="needs transformers for a vision transformer")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=4, image_size=24
    )
    return transformers.Dinov2Model(config).eval()


def module_calls() -> dict[str, object]:
    """By the name of a module, a call of one that was made under the usual defaults."""
    torch.manual_seed(0)
    x, y, guide = draw(1, 8, 4, 5), draw(1, 8, 6, 6), draw(1, 3, 16, 20)
    image = torch.rand(1, 3, 24, 28)
    target = torch.randint(3, (1, 9, 9))
    model = backbone()
    segmentation, depth = nn.SegmentationHead(16, 3).eval(), nn.DepthHead(16, 8, depth_range=(0.1, 10.0)).eval()
    other_depth = nn.DepthHead(16, 8, depth_range=(0.1, 10.0)).eval()
    jbu, level, sharp = nn.JBUStack(8).eval(), nn.JBULevel().eval(), nn.FeatSharpJBU(2).eval()
    trained_level = nn.JBULevel().train()
    anyup, naf, jafar = nn.AnyUp(16).eval(), nn.NAF(16, kernel_size=3).eval(), nn.JAFAR(8, qk_dim=16).eval()
    split = nn.AnyUp(16, values="split", image_range=(-1, 1), lfu_dim=8).eval()
    upsampler, block = nn.FeatSharpUpsampler(8, 2, num_heads=4).eval(), nn.FeatSharpBlock(16, 8, num_heads=4).eval()
    phis, bias, conditional = nn.PHIS.fit([y]), nn.BiasBuffer(8, 5, 5), nn.ConditionalBias(8, 4)
    whole = nn.FeatSharp(model, 2, size=16, num_heads=8, bias_buffer=nn.BiasBuffer(16, 4, 4)).eval()
    simple, attentive = nn.SimpleDownsampler(3), nn.AttentionDownsampler(8, 3).eval()
    views = nn.random_views(y, 2)
    encoder, murf, s2 = nn.MultiResolutionEncoder(model, [24, 16]), nn.MuRF(model, (16, 24)), nn.S2(model, [1, 2])

    head = draw(3, 8)

    def of_upsampler(model):
        return [
            lambda: model(guide, x),
            lambda: model(guide, x, region=(1, 2, 3, 4)),
            lambda: model.predict(guide, x, head, reduce="argmax"),
            lambda: model.attention_map(guide, x, (1, 2)),
        ]

    def trained():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return trained_level(x, guide)

    def drawn():
        generator = torch.Generator("cpu").manual_seed(3)
        loss = nn.crf_loss(y, guide, samples=20, generator=generator) + nn.mmd_loss(x, y) + nn.total_variation_loss(y)
        return nn.random_views(y, 2, generator=generator).matrices, loss

    return {
        "UpsampleAnything": [lambda: nn.UpsampleAnything(steps=2, radius=2)(guide, x)],
        "JAFAR": [*of_upsampler(jafar), with_gradients(lambda f: jafar(guide, f, (10, 12)), x)],
        "NAF": [*of_upsampler(naf), with_gradients(lambda f: naf(guide, f, (10, 12)), x)],
        "AnyUp": [
            *of_upsampler(anyup),
            *of_upsampler(split),
            with_gradients(lambda f: anyup(guide, f, (10, 12)), x),
        ],
        "S2": [lambda: s2(image)],
        "DepthHead": [lambda: depth.predict([x, y], (9, 9)), lambda: other_depth([x, y], (9, 9))],
        "SegmentationHead": [
            lambda: segmentation.predict([x, y], (9, 9)),
            lambda: segmentation([x, y], (9, 9)),
            lambda: segmentation.loss([x, y], target),
        ],
        "JBUStack": [lambda: jbu(x[:, :, :2, :3], draw(1, 3, 32, 48))],
        "JBULevel": [lambda: level(x, guide), trained],
        "FeatSharpJBU": [lambda: sharp(x, guide)],
        "FeatSharp": [lambda: whole(image), with_gradients(lambda g: whole(image) * g, draw(1))],
        "FeatSharpUpsampler": [with_gradients(lambda f: upsampler(f, guide, draw(1, 8, 8, 10)), x)],
        "FeatSharpBlock": [lambda: block(draw(1, 16, 4, 5)), with_gradients(block, draw(1, 16, 4, 5))],
        "PHIS": [lambda: phis(x), lambda: phis.inverse(x), lambda: list(nn.PHIS.fit([x]).buffers())],
        "ConditionalBias": [with_gradients(conditional, x)],
        "BiasBuffer": [with_gradients(bias, x)],
        "FixedJBU": [lambda: nn.FixedJBU(1.0, 0.3)(x, guide), with_gradients(nn.FixedJBU(1.0, 0.3), x, guide)],
        "GuidedFilter": [lambda: nn.GuidedFilter(1, 0.1)(x, guide), with_gradients(nn.GuidedFilter(1, 0.1), x, guide)],
        "SimpleDownsampler": [with_gradients(lambda f: simple(f, 3), y)],
        "AttentionDownsampler": [with_gradients(lambda f: attentive(f, 3), y)],
        "Views": [with_gradients(views, y), drawn, with_gradients(lambda f: nn.mmd_loss(x, f), y)],
        "Fidelity": [lambda: nn.Fidelity().update(x, x + 1).value()],
        "MultiResolutionEncoder": [lambda: encoder(image).maps],
        "MuRF": [lambda: murf(image), lambda: murf.pca(image)],
    }


def detector_calls() -> list:
    model, images = backbone(), [torch.rand(3, 16, 20, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    foreground = np.ones((16, 20), bool)
    masks = [np.zeros((16, 20), bool), np.tri(16, 20, dtype=bool)]
    options = {"layers": (0, 1), "scales": (0.5, 1.0), "pixels": None}

    def fitted(**more):
        def run():
            detector = MultiResolutionDetector(model, **options, **more).fit(images)
            result = detector.score(images[1])
            return [*detector.banks_, *(getattr(result, f.name) for f in dataclasses.fields(result))]

        return run

    return [
        fitted(rules="patchcore"),
        fitted(rules="anomaly-dino"),
        fitted(index="coreset"),
        fitted(references=0.5, shorter_side=12, norm=True),
        fitted(foreground=lambda _: foreground),
        lambda: au_pro([draw(16, 20), draw(16, 20)], masks),
    ]


def flat(result) -> list:
    if dataclasses.is_dataclass(result):
        return flat([getattr(result, f.name) for f in dataclasses.fields(result)])
    if isinstance(result, (list, tuple)):
        return [x for entry in result for x in flat(entry)]
    return [result]


@contextlib.contextmanager
def default(name: str):
    """bfloat16, float16, float64, or "meta" for another device."""
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@functools.cache
def usual(call) -> list:
    """The result under the usual defaults."""
    return flat(call())


def check(calls: list, name: str) -> None:
    for i, call in enumerate(calls):
        expected = usual(call)
        with default(name):
            actual = flat(call())
        assert len(actual) == len(expected) > 0
        for a, e in zip(actual, expected, strict=True):
            if isinstance(e, Tensor):
                assert (a.dtype, a.device, a.shape) == (e.dtype, e.device, e.shape), f"call {i}"
                assert torch.equal(a, e), f"call {i}"
            else:
                assert a == e, f"call {i}"


DEFAULTS = ("bfloat16", "float16", "float64", "meta")
OPS = sorted(n for n in ops.__all__ if callable(getattr(ops, n)) and not isinstance(getattr(ops, n), type))
RESULTS = (
    "CellKernels",
    "DepthScores",
    "EncodedImage",
    "GraphedCall",
    "ImageStatistics",
    "LocalCrops",
    "MultiResolutionFeatures",
    "NormalScores",
    "SegmentationScores",
)
MODULES = sorted(n for n in nn.__all__ if isinstance(getattr(nn, n), type) and n not in RESULTS)


@pytest.fixture(scope="module")
def calls():
    return op_calls()


@pytest.fixture(scope="module")
def modules():
    return module_calls()


def test_everything_is_called(calls, modules):
    assert sorted(calls) == OPS
    assert set(modules) >= set(MODULES)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("op", OPS)
def test_operations(op, name, calls):
    # Small for a kernel's grain, but what is allocated for it does not know that.
    check(calls[op], name)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("module", MODULES)
def test_modules(module, name, modules):
    check(modules[module], name)


@pytest.fixture(scope="module")
def detectors():
    return detector_calls()


@pytest.mark.parametrize("name", DEFAULTS)
def test_detector(name, detectors):
    check(detectors, name)


# Where torch takes the process's defaults.
FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn"}
FACTORIES |= {"asarray", "empty_strided", "normal", "randperm", "scalar_tensor", "tensor", "zeros"}
# Parameters of new modules are of the default dtype on the default device, as everywhere in torch; demo and benchmarks
# make their own inputs.
OWN_CHOICE = ("murf_fast/cli", "murf_fast/nn")


def test_allocations_name_dtype_and_device():
    unnamed = []
    for path in [*ROOT.glob("murf_fast/**/*.py"), *ROOT.glob("kernels/*.py")]:
        place = path.relative_to(ROOT).as_posix()
        if place.startswith(OWN_CHOICE):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES
            ):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
                continue
            given = {k.arg for k in node.keywords}
            # **options stand for both; what converts keeps the dtype of what it is given.
            wanted = {"device"} if node.func.attr in ("as_tensor", "asarray") else {"dtype", "device"}
            if None not in given and not given >= wanted:
                unnamed.append(f"{place}:{node.lineno}: torch.{node.func.attr}")
    assert not unnamed, unnamed
