"""AnyUp's training: losses against a plain statement, crops on whole patches, colours, and runs that lower the loss."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
import torch.nn.functional as F
from guided import draw, seeded
from util import assert_gradient_within_budget, assert_within_budget

from murf_fast.nn import (
    AnyUp,
    augment_colors,
    cosine_mse_loss,
    input_consistency_loss,
    local_crops,
    self_consistency_loss,
)
from murf_fast.nn.guided.training import colors


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photo(*shape, seed=0):
    return torch.rand(shape, generator=generator(seed))


def small():
    return seeded(AnyUp(16, num_heads=2))


def plain_loss(x, t):
    """Pixel by pixel, as AnyUp's code has it: both in units of the target's range, then their squared difference."""
    x, t = (v.permute(0, 2, 3, 1).reshape(-1, v.shape[1]) for v in (x, t))
    cosine = 1 - (x * t).sum(1) / (x.norm(dim=1) * t.norm(dim=1))
    low, high = t.min(1, keepdim=True).values, t.max(1, keepdim=True).values
    x, t = ((v - low) / (high - low + 1e-6) for v in (x, t))
    return cosine.mean() + (x - t).square().mean()


@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (1, 384, 4, 4), (3, 2, 1, 1)])
def test_cosine_mse_loss(shape):
    x, t = draw(*shape), draw(*shape, seed=1)
    results = {}
    for dtype in (torch.float64, torch.float32):
        for name, loss in (("ours", cosine_mse_loss), ("plain", plain_loss)):
            leaf = x.to(dtype, copy=True).requires_grad_()
            value = loss(leaf, t.to(dtype))
            results[name, dtype] = value.detach(), torch.autograd.grad(value, leaf)[0]
    oracle = results["plain", torch.float64]
    for dtype in (torch.float64, torch.float32):
        value, gradient = results["ours", dtype]
        # In float64 both statements round: the oracle's own error is one rounding of its terms, of size one.
        plain = results["plain", dtype] if dtype == torch.float32 else oracle
        assert value.dtype == dtype
        assert_within_budget(value, oracle[0], plain[0], terms=float(x.abs().max()))
        if dtype == torch.float32:
            assert_gradient_within_budget(gradient, oracle[1], plain[1])
        else:
            assert_within_budget(gradient, oracle[1], oracle[1], terms=1 / math.prod(shape[2:]))


def test_a_target_is_reached_at_any_scale_and_has_no_gradient():
    t = draw(2, 5, 3, 3).requires_grad_()
    assert float(cosine_mse_loss(t.detach(), t)) <= 4 * torch.finfo(torch.float32).eps
    x = draw(2, 5, 3, 3, seed=1)
    assert float(cosine_mse_loss(100 * x, 100 * t)) == pytest.approx(float(cosine_mse_loss(x, t)), rel=1e-5)
    leaf = x.clone().requires_grad_()
    cosine_mse_loss(leaf, t).backward()
    assert t.grad is None
    assert float(leaf.grad.norm()) > 0


def test_half_types_are_compared_in_float32():
    x, t = draw(1, 6, 4, 4).bfloat16(), draw(1, 6, 4, 4, seed=1)
    loss = cosine_mse_loss(x, t.half())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cosine_mse_loss(x.float(), t.half().float()))


def test_input_consistency_loss():
    upsampled, features = draw(2, 6, 11, 7).double(), draw(2, 6, 4, 3).double()
    expected = plain_loss(F.adaptive_avg_pool2d(upsampled, (4, 3)), features)
    actual = input_consistency_loss(upsampled, features)
    assert_within_budget(actual, expected, expected, terms=16.0)
    blocks = features.repeat_interleave(3, 2).repeat_interleave(2, 3)
    assert float(input_consistency_loss(blocks, features)) <= 4 * torch.finfo(torch.float64).eps


def test_self_consistency_loss():
    features, image, augmented = draw(1, 6, 4, 4), draw(1, 3, 12, 16), draw(1, 3, 12, 16, seed=1)
    model = small()
    results = {}
    for dtype in (torch.float64, torch.float32):
        model, arguments = model.to(dtype), [x.to(dtype) for x in (image, augmented, features)]
        weight, (i, a, f) = model.image_encoder[0].weight, arguments
        plain = plain_loss(model(a, f, (6, 8)), model(i, f, (6, 8)).detach())
        results[dtype] = torch.autograd.grad(plain, weight)[0]
        loss = self_consistency_loss(model, *arguments, (6, 8))
        actual = torch.autograd.grad(loss, weight)[0]
        assert float(self_consistency_loss(model, i, i, f).detach()) <= 4 * torch.finfo(dtype).eps
    assert_gradient_within_budget(actual, results[torch.float64], results[torch.float32])


def test_every_trainable_parameter_has_a_gradient():
    model = small().train()
    crops = local_crops(photo(2, 3, 24, 32), (12, 16), 4, count=3, generator=generator())
    features, target = draw(2, 6, 3, 4), draw(6, 6, 3, 4, seed=1)
    upsampled = model(crops.guidance, features, crops.grid)
    augmented = augment_colors(crops.guidance, 1e6, generator=generator())
    losses = {
        "reconstruction": cosine_mse_loss(crops.cut(upsampled), target),
        "input": input_consistency_loss(upsampled, features),
        "self": self_consistency_loss(model, crops.guidance, augmented, features),
    }
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, list(trainable.values()), retain_graph=True)
        nothing = [n for n, g in zip(trainable, gradients, strict=True) if not float(g.abs().max()) > 0]
        assert nothing == [], name


@pytest.mark.parametrize(("full", "size", "patch", "count"), [((24, 40), (12, 20), 4, 3), ((21, 21), 21, 7, 2)])
def test_crops_lie_on_whole_patches(full, size, patch, count):
    # Every pixel knows its image, row and column; a patch's mean is what a backbone of one patch makes of it.
    rows, columns = torch.meshgrid(*(torch.arange(float(n)) for n in full), indexing="ij")
    images = torch.stack([torch.stack([torch.full(full, float(i)), rows, columns]) for i in range(2)])

    def encode(x):
        return F.avg_pool2d(x, patch)

    crops = local_crops(images, size, patch, count=count, generator=generator())
    height, width = (size, size) if isinstance(size, int) else size
    assert crops.crops.shape == (2 * count, 3, height, width)
    assert crops.guidance.shape == (2, 3, height, width)
    assert crops.grid == (full[0] // patch, full[1] // patch)
    assert torch.equal(crops.cut(encode(images)), encode(crops.crops))
    assert crops.crops[:, 0].flatten(1).amax(1).tolist() == [float(i // count) for i in range(2 * count)]
    expected = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    torch.testing.assert_close(crops.guidance, expected)


def test_crops_reach_every_patch_and_follow_their_seed():
    images = photo(1, 3, 12, 16)
    corners = local_crops(images, (8, 8), 4, count=200, generator=generator()).corners
    assert set(corners) == {(y, x) for y in range(2) for x in range(3)}
    assert corners == local_crops(images, (8, 8), 4, count=200, generator=generator()).corners
    assert corners != local_crops(images, (8, 8), 4, count=200, generator=generator(1)).corners
    empty = local_crops(images[:0], (8, 8), 4)
    assert empty.crops.shape == (0, 3, 8, 8)


def test_a_cut_passes_gradients():
    crops = local_crops(photo(2, 3, 8, 8), 4, 2, count=3, generator=generator())
    maps = draw(2, 5, 4, 4).requires_grad_()
    crops.cut(maps).sum().backward()
    covered = torch.zeros(2, 4, 4)
    for i, (y, x) in enumerate(crops.corners):
        covered[i // 3, y : y + 2, x : x + 2] += 1
    assert torch.equal(maps.grad, covered[:, None].expand_as(maps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_colours(dtype):
    images = photo(6, 3, 9, 11).to(dtype)
    before = images.clone()
    result = augment_colors(images, generator=generator())
    assert torch.equal(images, before)
    assert result.shape == images.shape
    assert result.dtype == dtype
    assert 0 <= float(result.min()) <= float(result.max()) <= 1
    assert torch.equal(result, augment_colors(images, generator=generator()))
    assert not torch.equal(result, augment_colors(images, generator=generator(1)))
    assert torch.equal(augment_colors(images, 1e-3, generator=generator()), images)  # 0.6 ** 1000
    assert augment_colors(images[:0]).shape == (0, 3, 9, 11)


def test_steps_come_with_their_probabilities(monkeypatch):
    counted = [0] * len(colors.STEPS)

    def counting(i):
        def step(x, random):
            counted[i] += len(x)
            return x

        return step

    chances = [chance for chance, _ in colors.STEPS]
    monkeypatch.setattr(colors, "STEPS", tuple((chance, counting(i)) for i, chance in enumerate(chances)))
    drawn = 4000
    images = torch.zeros(drawn, 3, 3, 3)
    for strength in (1.0, 2.0):
        counted[:] = [0] * len(chances)
        augment_colors(images, strength, generator=generator())
        for count, chance in zip(counted, chances, strict=True):
            expected = chance ** (1 / strength)
            assert abs(count / drawn - expected) <= 5 * math.sqrt(expected * (1 - expected) / drawn)


@pytest.mark.parametrize("index", range(len(colors.STEPS)))
def test_a_step_stays_in_place(index):
    """What it does at one pixel depends on that pixel, on its neighbours, and on sums over the image."""
    step = colors.STEPS[index][1]
    x = photo(2, 3, 12, 14).double()
    flipped = step(x.flip(3), colors._Random(x, 2, generator())).flip(3)
    straight = step(x, colors._Random(x, 2, generator()))
    if step is colors._noise:
        noise = straight - x
        assert float((noise.mean() / noise.std()).abs()) < 0.2
        assert float(noise.std()) == pytest.approx(0.03, rel=0.1)
    else:
        torch.testing.assert_close(flipped, straight, rtol=0, atol=1e-12)
        assert float((straight - x).abs().max()) > 1e-3


def test_the_recipe_s_steps():
    x = photo(1, 3, 8, 9).double()
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    steps = list(colors.STEPS)
    drawn = [(0.5, colors._jitter), (0.25, colors._distort), (0.25, colors._reorder)]
    assert steps[:3] == drawn
    assert (steps[4], steps[10]) == ((0.35, colors._blur), (0.6, colors._noise))
    fixed = [
        (0.1, colors.grey(x).expand_as(x)),
        (0.2, (x - low) / (high - low)),
        (0.2, colors.sharpened(x, 1.5)),
        (0.1, ((x * 255).byte() & 0b11111000).double() / 255),
        (0.05, torch.where(x < 0.9, x, 1 - x)),
        (0.02, 1 - x),
    ]
    for (chance, step), (expected_chance, expected) in zip([steps[3], *steps[5:10]], fixed, strict=True):
        assert chance == expected_chance
        torch.testing.assert_close(step(x, None), expected, rtol=0, atol=1e-12)


def test_colour_formulas():
    x = photo(2, 3, 6, 7).double()
    factor = torch.tensor([0.5, 1.3], dtype=torch.float64)[:, None, None, None]
    r, g, b = x.unbind(1)
    luma = (0.299 * r + 0.587 * g + 0.114 * b)[:, None]
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(colors.grey(x), luma, **close)
    mean = luma.mean((2, 3), keepdim=True)
    torch.testing.assert_close(colors.contrasted(x, factor), factor * x + (1 - factor) * mean, **close)
    torch.testing.assert_close(colors.saturated(x, factor), factor * x + (1 - factor) * luma, **close)
    # A third of the circle permutes the channels, in the direction in which a hue grows: red, green, blue.
    third = torch.full((2, 1, 1, 1), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(colors.turned(x, third), x.roll(1, 1), **close)
    pure = torch.tensor([1.0, 0, 0], dtype=torch.float64)[None, :, None, None]
    hue = colorsys.rgb_to_hsv(*colors.turned(pure, third[:1] / 2).flatten().tolist())[0]
    assert hue == pytest.approx(1 / 6)
    kernel = torch.ones(3, 1, 3, 3, dtype=torch.float64)
    kernel[:, :, 1, 1] = 5
    smooth = F.conv2d(x, kernel / 13, groups=3)
    sharp = colors.sharpened(x, 1.5)
    torch.testing.assert_close(sharp[:, :, 1:-1, 1:-1], 1.5 * x[:, :, 1:-1, 1:-1] - 0.5 * smooth, **close)
    assert torch.equal(sharp[:, :, 0], x[:, :, 0])
    for image, sigma in zip(x, (0.4, 1.2), strict=True):
        taps = torch.exp(-torch.arange(-2.0, 3).double().square() / (2 * sigma**2))
        window = (taps[:, None] * taps / taps.sum() ** 2).expand(3, 1, 5, 5)
        expected = F.conv2d(F.pad(image[None], [2] * 4, mode="reflect"), window, groups=3)
        actual = colors.blurred(image[None], torch.tensor(sigma, dtype=torch.float64).view(1, 1, 1, 1))
        torch.testing.assert_close(actual, expected, **close)


MAP = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cosine_mse_loss(MAP, MAP[:, :2]), ValueError, r"`target` must have the shape of `features`"),
        (lambda: cosine_mse_loss(None, MAP), TypeError, "`features` must be a tensor"),
        (lambda: cosine_mse_loss(MAP, MAP.int()), TypeError, "`target` must have one of the dtypes"),
        (lambda: input_consistency_loss(MAP, MAP[:, :2]), ValueError, "`upsampled` must have batch and channels"),
        (lambda: self_consistency_loss(None, MAP, MAP[:, :, 1:], MAP), ValueError, "`augmented` must have the shape"),
        (lambda: local_crops(MAP, 4, 3), ValueError, r"sides of `images` must be multiples of `patch_size`, 3"),
        (lambda: local_crops(MAP, 5, 4), ValueError, r"sides of `size` must be multiples of `patch_size`, 4"),
        (lambda: local_crops(MAP, 12, 4), ValueError, r"`size` must be within the images, \(8, 8\), got \(12, 12\)"),
        (lambda: local_crops(MAP, 4, 0), ValueError, "`patch_size` must be at least 1"),
        (lambda: local_crops(MAP, 4, 4, count=0), ValueError, "`count` must be at least 1"),
        (lambda: local_crops(MAP, 4, 4).cut(MAP), ValueError, r"batch and grid of the images, \(1, 2, 2\)"),
        (lambda: local_crops(MAP, 4, 4, generator=0), TypeError, "`generator` must be None or a torch.Generator .* 0"),
        (lambda: augment_colors(MAP, generator=0), TypeError, "`generator` must be None or a torch.Generator .* got 0"),
        (lambda: augment_colors(MAP, 0), ValueError, "`strength` must be above 0"),
        (lambda: augment_colors(MAP, "much"), TypeError, "`strength` must be a number"),
        (lambda: augment_colors(MAP[:, :2]), ValueError, "`images` must have 3 channels"),
        (lambda: augment_colors(MAP.byte()), TypeError, "`images` must have one of the dtypes"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
