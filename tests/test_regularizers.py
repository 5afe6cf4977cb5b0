"""Regularizers and measures of upsampled features: total variation, CRF and MMD against statements pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from guided import LargestTensor, NoWaiting, draw
from util import assert_gradient_within_budget, assert_within_budget, nudged, worst

from murf_fast import reference
from murf_fast.nn import crf_loss, mmd_loss, total_variation_loss
from murf_fast.nn.guided.training import _pairs

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=[5, 1024])
def block(request, monkeypatch):
    """Several blocks, the last one shorter, and one."""
    monkeypatch.setattr(_pairs, "BLOCK", request.param)
    return request.param


def derived(loss, *maps):
    leaves = [m.detach().clone().requires_grad_() for m in maps]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def check(ours, plain, stated, *maps):
    """``plain`` in float64 is the oracle, ``stated``, the reference's order of sums, errs in float32 as it may."""
    oracle = derived(plain, *(m.double() for m in maps))
    for actual, expected in zip(derived(ours, *(m.double() for m in maps)), oracle, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    others = [derived(stated, *(nudged(m, seed) for m in maps)) for seed in range(4)]
    for i, (actual, expected) in enumerate(zip(derived(ours, *maps), oracle, strict=True)):
        within = assert_gradient_within_budget if i else assert_within_budget
        within(actual, expected, worst([o[i] for o in others], expected), str(i))


def plain_variation(x, power=2, magnitudes=False):
    x = x.square().sum(1, keepdim=True).sqrt() if magnitudes else x
    total = torch.zeros((), dtype=x.dtype)
    for dy, dx in ((1, 0), (0, 1)):
        terms = [
            (x[:, :, i, j] - x[:, :, i - dy, j - dx]).abs() ** power
            for i in range(dy, x.shape[2])
            for j in range(dx, x.shape[3])
        ]
        total = total + (torch.stack(terms).mean() if terms else 0)
    return total


@pytest.mark.parametrize("options", [{}, {"power": 1}, {"magnitudes": True}, {"power": 1, "magnitudes": True}], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 4, 7), (1, 3, 1, 6), (2, 4, 5, 1)], ids=str)
def test_total_variation(shape, options):
    def ours(x):
        return total_variation_loss(x, **options)

    def plain(x):
        return plain_variation(x, **options)

    check(ours, plain, plain, draw(*shape))


def test_total_variation_of_nothing():
    assert float(total_variation_loss(torch.ones(1, 3, 5, 4))) == 0
    assert float(total_variation_loss(torch.ones(2, 3, 1, 1))) == 0
    assert float(total_variation_loss(torch.ones(0, 3, 4, 4))) == 0
    zero = torch.zeros(1, 3, 4, 4).requires_grad_()
    total_variation_loss(zero, magnitudes=True).backward()
    assert not bool(zero.grad.any())
    assert torch.autograd.gradcheck(total_variation_loss, draw(1, 2, 3, 4).double().requires_grad_())
    x = draw(1, 4, 5, 5).bfloat16()
    assert torch.equal(total_variation_loss(x), total_variation_loss(x.float()))


CRF = {"appearance": 2.0, "smoothness": 0.7, "far": 0.4, "color": 0.8, "near": 0.15}


def plain_crf(features, images, *, appearance, smoothness, far, color, near):
    """Pair by pair; images of the features' size."""
    total, (height, width) = 0, features.shape[2:]
    places = [(y, x) for y in range(height) for x in range(width)]
    for f, image in zip(features, images, strict=True):
        for y, x in places:
            for v, u in places:
                apart = ((y - v) ** 2 + (x - u) ** 2) / max(height, width) ** 2
                unlike = ((image[:, y, x] - image[:, v, u]) ** 2).sum()
                weight = appearance * torch.exp(-apart / (2 * far**2) - unlike / (2 * color**2))
                weight = weight + smoothness * math.exp(-apart / (2 * near**2))
                total = total + weight * ((f[:, y, x] - f[:, v, u]) ** 2).mean()
    return total / (len(features) * len(places) * (len(places) - 1))


def stated_crf(features, images):
    height, width = features.shape[2:]
    rows, columns = (torch.arange(n, dtype=features.dtype) / max(height, width) for n in (height, width))
    positions = torch.cartesian_prod(rows, columns).expand(len(features), -1, -1)
    options = (CRF["appearance"], CRF["smoothness"]), (CRF["far"], CRF["color"], CRF["near"])
    return reference.crf_loss(features.flatten(2).mT, positions, images.flatten(2).mT, *options)


def test_crf(block):
    features, images = draw(2, 6, 4, 3), draw(2, 3, 4, 3)
    check(
        lambda f: crf_loss(f, images.to(f.dtype), samples=None, **CRF),
        lambda f: plain_crf(f, images.double(), **CRF),
        lambda f: stated_crf(f, images),
        features,
    )


def test_crf_is_differentiable_twice(block):
    features, images = draw(1, 2, 2, 3).double().requires_grad_(), draw(1, 3, 2, 3).double()

    def loss(f):
        return crf_loss(f, images, samples=4, **CRF, generator=generator())

    assert torch.autograd.gradcheck(loss, features)
    assert torch.autograd.gradgradcheck(loss, features)


def test_crf_of_samples():
    features, images = draw(2, 5, 8, 6), draw(2, 3, 32, 12)
    whole = float(crf_loss(features, images, samples=None, **CRF))
    coarse = F.adaptive_avg_pool2d(images, (8, 6))
    assert whole == pytest.approx(float(crf_loss(features, coarse, samples=48, **CRF)), rel=1e-6)
    draws = torch.stack([crf_loss(features, images, samples=12, **CRF, generator=generator(i)) for i in range(200)])
    error = float(draws.std() / math.sqrt(len(draws)))
    assert abs(float(draws.mean()) - whole) <= 5 * error
    assert error < 0.05 * whole
    assert float(draws[0]) == float(crf_loss(features, images, samples=12, **CRF, generator=generator(0)))
    # No pixel comes twice.
    picked = features.clone().requires_grad_()
    crf_loss(picked, images, samples=12, generator=generator()).backward()
    assert (picked.grad.abs().amax(1).flatten(1) > 0).sum(1).tolist() == [12, 12]


def test_every_image_has_pixels_of_its_own():
    """Else two equal images would be one."""
    features, images = (torch.randn(1, c, 9, 8, generator=generator(c)).expand(2, -1, -1, -1) for c in (4, 3))
    leaf = features.clone().requires_grad_()
    crf_loss(leaf, images, samples=12, generator=generator()).backward()
    seen = leaf.grad.abs().sum(1) > 0
    assert seen.flatten(1).any(1).all()
    assert not torch.equal(seen[0], seen[1])


def test_crf_knows_edges():
    """Features that follow the image's edge cost less than those that cross it."""
    image = torch.zeros(1, 3, 8, 8)
    image[..., 4:] = 1
    along, across = image.clone(), image.mT.clone()
    assert float(crf_loss(along, image, samples=None)) < 0.5 * float(crf_loss(across, image, samples=None))


def plain_mmd(x, y, gamma):
    total = 0
    for a, b in zip(x.flatten(2).mT, y.flatten(2).mT, strict=True):
        within = [((p - q) ** 2).sum() for i, p in enumerate(a) for j, q in enumerate(a) if i < j]
        g = 1 / sorted(float(d.detach()) for d in within)[(len(within) - 1) // 2] if gamma is None else gamma
        k_aa = torch.stack([(-g * d).exp() for d in within]).mean()
        k_bb = torch.stack(
            [(-g * ((p - q) ** 2).sum()).exp() for i, p in enumerate(b) for j, q in enumerate(b) if i < j]
        ).mean()
        k_ab = torch.stack([(-g * ((p - q) ** 2).sum()).exp() for p in a for q in b]).mean()
        total = total + k_aa + k_bb - 2 * k_ab
    return total / len(x)


@pytest.mark.parametrize("gamma", [None, 0.1])
def test_mmd(gamma, block):
    x, y = draw(2, 5, 2, 3) + 1, 0.7 * draw(2, 5, 3, 4) + 1.5
    check(
        lambda x, y: mmd_loss(x, y, gamma=gamma),
        lambda x, y: plain_mmd(x, y, gamma),
        lambda x, y: reference.mmd_loss(x, y, gamma),
        x,
        y,
    )


def test_mmd_is_differentiable_twice(block):
    x, y = (draw(1, 2, 2, n).double().requires_grad_() for n in (3, 4))
    for inputs in ((x, y), (x.detach(), y), (x, y.detach())):
        assert torch.autograd.gradcheck(lambda a, b: mmd_loss(a, b, gamma=0.3), inputs)
        assert torch.autograd.gradgradcheck(lambda a, b: mmd_loss(a, b, gamma=0.3), inputs)


@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_mmd_of_features_that_lie_far_away(offset):
    """Distances do not suffer from where both maps, or one of them, lie."""
    x = 0.01 * torch.randn(1, 16, 6, 6, generator=generator())
    y = (1.1 * x + offset).requires_grad_()
    loss = mmd_loss(x, y)
    (gradient,) = torch.autograd.grad(loss, y)
    exact = y.detach().double().requires_grad_()
    oracle = reference.mmd_loss(x.double(), exact, None)
    (expected,) = torch.autograd.grad(oracle, exact)
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_mmd_tells_distributions_apart():
    x = draw(1, 8, 16, 16)
    same, other = draw(1, 8, 32, 32, seed=1), 1.5 * draw(1, 8, 32, 32, seed=1)
    values = [float(mmd_loss(x, y)) for y in (same, other, other + 1)]
    assert abs(values[0]) < 0.003 < values[1] < values[2]
    # Of one scale, whatever the features' is.
    assert float(mmd_loss(100 * x, 100 * other)) == pytest.approx(values[1], rel=1e-3)


def test_mmd_of_equal_features_is_nothing():
    x, y = torch.ones(1, 4, 3, 3), torch.ones(1, 4, 5, 5).requires_grad_()
    loss = mmd_loss(x, y)
    loss.backward()
    assert abs(float(loss.detach())) <= torch.finfo(torch.float32).eps
    assert not bool(y.grad.any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_features_are_compared_in_float32(dtype):
    x, y, images = draw(1, 4, 3, 3).to(dtype), draw(1, 4, 5, 5).to(dtype).requires_grad_(), draw(1, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        results = mmd_loss(x, y), crf_loss(y, images)
    assert torch.equal(results[0], mmd_loss(x.float(), y.float()))
    assert torch.equal(results[1], crf_loss(y.float(), images))
    assert torch.autograd.grad(sum(results), y)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("count", [2, 3, 4, 11, 12, 13])
def test_the_median_is_exact(count, dtype, block):
    x = draw(count, 3).to(dtype)
    x[count // 2] = x[0]  # a distance of zero
    distances = _pairs.squared_distances(x, x)
    first, second = torch.triu_indices(count, count, 1)
    expected = distances[first, second].abs().median()
    actual = _pairs.median_squared_distance(x)
    if block > count:
        assert torch.equal(actual, expected)  # of the same product
    torch.testing.assert_close(actual, expected)


def test_no_pair_is_in_memory(monkeypatch):
    monkeypatch.setattr(_pairs, "BLOCK", 32)
    monkeypatch.setattr(_pairs, "_DIGIT", 8)  # as many counters as a block has pairs, of which there are 1024 here
    x, y, images = draw(1, 4, 16, 16), draw(1, 4, 24, 24).requires_grad_(), draw(1, 3, 24, 24)
    with LargestTensor() as largest:
        mmd_loss(x, y).backward()
    assert largest.elements <= 4 * 24 * 24  # the larger map; the matrix has 144 times as many
    with LargestTensor() as largest:
        crf_loss(y, images, samples=None).backward()
    assert largest.elements <= 32 * 24 * 24


def test_they_wait_for_nothing():
    x, y, images = draw(1, 4, 3, 3), draw(1, 4, 5, 5).requires_grad_(), draw(1, 3, 5, 5)
    with NoWaiting():
        loss = mmd_loss(x, y) + crf_loss(y, images, samples=9) + total_variation_loss(y)
        loss.backward()


def test_they_are_one_graph():
    x, y, images = draw(1, 4, 3, 3), draw(1, 4, 5, 5), draw(1, 3, 5, 5)

    def loss(y):
        return mmd_loss(x, y) + crf_loss(y, images, samples=None) + total_variation_loss(y)

    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="eager")(y), loss(y))
    torch.testing.assert_close(torch.func.grad(loss)(y), derived(loss, y)[1])


MAP, IMAGE, DOT = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 1, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: total_variation_loss(MAP[0]), ValueError, r"`features` must be \(B, C, H, W\)"),
        (lambda: total_variation_loss(MAP, power=3), ValueError, "`power` must be at most 2"),
        (lambda: total_variation_loss(MAP, magnitudes=1), TypeError, "`magnitudes` must be True or False"),
        (lambda: crf_loss(MAP, IMAGE[:, :2]), ValueError, r"`images` must be \(B, 3, H, W\) with the batch"),
        (lambda: crf_loss(MAP, IMAGE[:1]), ValueError, "`images` must be .*, 2, got"),
        (lambda: crf_loss(DOT, IMAGE), ValueError, "`features` must be of one image and two pixels at least"),
        (lambda: crf_loss(MAP[:0], IMAGE[:0]), ValueError, "`features` must be of one image and two pixels at least"),
        (lambda: crf_loss(MAP, IMAGE, samples=1), ValueError, "`samples` must be at least 2"),
        (lambda: crf_loss(MAP, IMAGE, far=0), ValueError, "`far` must be above 0, got 0"),
        (lambda: crf_loss(MAP, IMAGE, smoothness=-1), ValueError, "`smoothness` must be at least 0, got -1"),
        (lambda: crf_loss(MAP, IMAGE, generator=0), TypeError, "`generator` must be None or a torch.Generator"),
        (lambda: mmd_loss(DOT, MAP), ValueError, r"`features` must have two places at least, got \(1, 1\)"),
        (lambda: mmd_loss(MAP, DOT), ValueError, "`upsampled` must have two places at least"),
        (lambda: mmd_loss(MAP, MAP[:, :2]), ValueError, "`upsampled` must have batch and channels of `features`"),
        (lambda: mmd_loss(MAP[:0], MAP[:0]), ValueError, "`features` must be of one image at least"),
        (lambda: mmd_loss(MAP, MAP, gamma=0), ValueError, "`gamma` must be above 0 or None, got 0"),
        (lambda: mmd_loss(MAP, MAP.int()), TypeError, "`upsampled` must have one of the dtypes"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
