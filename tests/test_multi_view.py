"""Training by multi-view consistency: views against a statement pixel by pixel, downsamplers against unfolded windows,
the loss and the measures against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from guided import LargestTensor, NoWaiting, draw
from util import assert_gradient_within_budget, assert_within_budget, nudged, worst

from murf_fast.nn import (
    AnyUp,
    AttentionDownsampler,
    FeatSharpUpsampler,
    Fidelity,
    JBUStack,
    MultiResolutionEncoder,
    SimpleDownsampler,
    Views,
    consistency_loss,
    downsampled_views,
    over_tiling_error,
    random_views,
)
from murf_fast.nn.guided.training._window_sum import window_sum

F64 = torch.float64
EVERYTHING = {"pad": 0.2, "zoom": 1.7, "flip": 0.5, "rotate": 40.0, "perspective": 0.2}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_views(maps, count, size, seed, *, pad, zoom, flip, rotate, perspective):
    """Pixel by pixel: where each lies in the image, in pixels of it, and the four values around that place."""
    drawn = torch.rand((7, len(maps), count), generator=generator(seed), dtype=F64).tolist()
    (_, channels, height, width), (rows, columns) = maps.shape, size
    result = torch.zeros(len(maps), count, channels, rows, columns, dtype=maps.dtype)
    for b in range(len(maps)):
        for n in range(count):
            of_zoom, of_y, of_x, of_flip, of_angle, of_p, of_q = (d[b][n] for d in drawn)
            z = 1 + (zoom - 1) * of_zoom
            # The crop of the padded image, in shares of the image.
            top, left = ((1 + 2 * pad - 1 / z) * r - pad for r in (of_y, of_x))
            angle = math.radians(rotate * (2 * of_angle - 1))
            for r in range(rows):
                for c in range(columns):
                    v, u = 2 * (r + 0.5) / rows - 1, 2 * (c + 0.5) / columns - 1
                    u = -u if of_flip < flip else u
                    w = 1 + perspective * (2 * of_p - 1) * u + perspective * (2 * of_q - 1) * v
                    # Pixels from the crop's middle.
                    dy, dx = v / w / 2 / z * height, u / w / 2 / z * width
                    y = (top + 0.5 / z) * height + math.sin(angle) * dx + math.cos(angle) * dy - 0.5
                    x = (left + 0.5 / z) * width + math.cos(angle) * dx - math.sin(angle) * dy - 0.5
                    result[b, n, :, r, c] = bilinear(maps[b], mirrored(y, height), mirrored(x, width))
    return result.flatten(0, 1)


def mirrored(at, size):
    """At the image's edges, half a pixel outside of the last centres, and not beyond those."""
    at = (at + 0.5) % (2 * size)
    return min(max(min(at, 2 * size - at) - 0.5, 0), size - 1)


def bilinear(x, row, column):
    (y, v), (c, u) = ((int(at), at - int(at)) for at in (row, column))
    below, right = min(y + 1, x.shape[1] - 1), min(c + 1, x.shape[2] - 1)
    top = (1 - u) * x[:, y, c] + u * x[:, y, right]
    return (1 - v) * top + v * ((1 - u) * x[:, below, c] + u * x[:, below, right])


PLAIN = {"pad": 0.0, "zoom": 1.0, "flip": 0.0, "rotate": 0.0, "perspective": 0.0}


@pytest.mark.parametrize(
    "options", [{"zoom": 2.5}, {"pad": 0.3}, {"rotate": 180.0}, {"perspective": 0.4}, EVERYTHING], ids=str
)
def test_views(options):
    options = {**PLAIN, **options}
    maps = draw(2, 3, 7, 11).double()
    views = random_views(maps, 3, **options, generator=generator())
    # The matrices are float32: the oracle's coordinates are, at most 11 pixels of 1e-7 each, off theirs.
    shift = 16 * 11 * torch.finfo(torch.float32).eps * float(maps.diff(dim=3).abs().max())
    for size in ((7, 11), (5, 4)):
        expected = plain_views(maps, 3, size, 0, **options)
        assert float((views(maps, size) - expected).abs().max()) <= shift
        actual = views(maps.float(), size)
        assert float((actual - expected).abs().max()) <= 4 * shift


def test_the_simplest_views():
    maps = draw(2, 3, 6, 5)
    still, flipped = (random_views(maps, 2, **{**PLAIN, "flip": p}) for p in (0.0, 1.0))
    torch.testing.assert_close(still(maps), maps.repeat_interleave(2, 0))
    torch.testing.assert_close(flipped(maps), maps.flip(3).repeat_interleave(2, 0))
    assert torch.equal(random_views(maps[:0])(maps[:0]), maps[:0])


def test_views_are_the_same_at_every_resolution():
    """A plane stays one: its view is of the same values, of whatever resolution, where nothing is beyond the border."""
    coarse, fine = (
        torch.stack(torch.meshgrid(*((torch.arange(n, dtype=F64) + 0.5) / n for n in s), indexing="ij"))[None]
        for s in ((16, 8), (48, 40))
    )
    options = {**EVERYTHING, "pad": 0.0, "zoom": 3.0}
    views = random_views(coarse, 20, **options, generator=generator())
    seen, finer = views(coarse, 6), views(fine, 6)
    inside = ((finer > 1 / 16) & (finer < 1 - 1 / 16))[:, :1] & ((finer > 1 / 8) & (finer < 1 - 1 / 8))[:, 1:]
    assert 0.5 < float(inside.double().mean()) < 1
    difference = (seen - finer).abs() * inside
    assert float(difference.max()) <= 1e-12


def test_crops_stay_within_the_padded_image_and_reach_its_edges():
    options = {**PLAIN, "pad": 0.1, "zoom": 2.0, "flip": 0.5}
    views = random_views(torch.zeros(2, 3, 8, 8), 1000, **options, generator=generator())
    corners = torch.tensor([[-1.0, -1, 1], [1, 1, 1]])
    at = corners @ views.matrices.mT
    assert float(at[..., :2].abs().max()) <= 1.2 + 1e-6
    assert float(at[..., :2].abs().max()) > 1.15
    share = views.matrices[..., 1, 1]
    assert 0.5 <= float(share.min()) < 0.51
    assert 0.99 < float(share.max()) <= 1
    mirrored_ones = float((views.matrices[..., 0, 0] < 0).double().mean())
    assert abs(mirrored_ones - 0.5) <= 5 * math.sqrt(0.25 / 2000)


def test_views_follow_their_seed_and_come_one_by_one():
    maps = draw(2, 3, 9, 7)
    views = random_views(maps, 3, generator=generator())
    assert torch.equal(views.matrices, random_views(maps, 3, generator=generator()).matrices)
    assert not torch.equal(views.matrices, random_views(maps, 3, generator=generator(1)).matrices)
    parts = [view(maps) for view in views.split()]
    assert torch.equal(views(maps), torch.stack(parts, 1).flatten(0, 1))
    assert len(views.matrices.flatten(0, 1).unique(dim=0)) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_views_of_half_maps_have_whole_coordinates(dtype):
    maps = draw(1, 4, 33, 29).to(dtype)
    views = random_views(maps, 2, **EVERYTHING)
    assert views.matrices.dtype == torch.float32
    assert torch.equal(views(maps), views(maps.float()).to(dtype))


def test_views_pass_gradients():
    maps = draw(2, 2, 4, 3).double().requires_grad_()
    views = random_views(maps, 2, **EVERYTHING)
    assert torch.autograd.gradcheck(lambda m: views(m, (3, 5)), maps)


KERNELS = [(2, 2), (7, 2), (1, 4), ((4, 3), (2, 4))]  # windows, pixels of a cell
GRID = (4, 3)


def fine(stride, dtype=F64, channels=4):
    down, right = (stride, stride) if isinstance(stride, int) else stride
    return draw(2, channels, GRID[0] * down, GRID[1] * right).to(dtype)


def windows(x, kernel, size):
    """(B, C, h, w, rows, columns): about the middle of every cell, from the mirrored map."""
    for dim, k, n in ((2, kernel[0], size[0]), (3, kernel[1], size[1])):
        length = x.shape[dim]
        stride = length // n
        starts = torch.arange(n) * stride + math.floor((stride - k) / 2 + 0.5)
        index = (starts[:, None] + torch.arange(k)).abs()
        index = torch.where(index >= length, 2 * (length - 1) - index, index)
        x = x.index_select(dim, index.flatten()).unflatten(dim, (n, k))
        x = x.movedim(dim + 1, -1)
    return x


def plain_simple(model, x, size):
    kernel = model.kernel.abs() / model.kernel.abs().sum()
    return (windows(x, model.kernel_size, size) * kernel).sum((-2, -1))


def plain_attention(model, x, size):
    """The blurred map, the saliency of every pixel of every window, and their sum."""
    if model.sigma is not None:
        taps = torch.exp(-torch.arange(-2, 3, dtype=x.dtype).square() / (2 * model.sigma**2))
        blur = (taps[:, None] * taps / taps.sum() ** 2).expand(x.shape[1], 1, 5, 5)
        x = F.conv2d(F.pad(x, [2] * 4, mode="reflect"), blur, groups=x.shape[1])
    seen = windows(x, model.kernel_size, size)
    saliency = torch.einsum("bchwij,c->bhwij", seen, model.saliency.weight.flatten()) + model.saliency.bias
    kernels = (saliency * model.weight + model.bias).flatten(3).softmax(3).view_as(saliency)
    return (seen * kernels[:, None]).sum((-2, -1))


def random_weights(model):
    for i, p in enumerate(model.parameters()):
        p.data = draw(*p.shape, seed=i).to(p.dtype)
    return model


def derived(call, model, x):
    """The result, and its gradients to the features and every parameter in a few directions."""
    model, x = model.to(x.dtype), x.detach().requires_grad_()
    result = call(model, x)
    leaves = [x, *model.parameters()]
    gradients = [
        torch.autograd.grad(result, leaves, draw(*result.shape, seed=s).to(result.dtype), retain_graph=True)
        for s in range(2)
    ]
    model.to(torch.float32)
    return result.detach(), [torch.stack(g) for g in zip(*gradients, strict=True)]


def check_downsampler(model, plain, stride):
    x = fine(stride, torch.float32)
    oracle = derived(lambda m, t: plain(m, t, GRID), model, x.double())
    exact = derived(lambda m, t: m(t, GRID), model, x.double())
    others = [derived(lambda m, t: plain(m, t, GRID), model, nudged(x, s)) for s in range(6)]
    ours = derived(lambda m, t: m(t, GRID), model, x)
    assert_within_budget(ours[0], oracle[0], worst([o[0] for o in others], oracle[0]))
    for i, expected in enumerate(oracle[1]):
        # A gradient that is zero by a symmetry is a sum of terms that are not.
        torch.testing.assert_close(exact[1][i], expected, rtol=1e-10, atol=1e-10)
        if float(expected.abs().max()) > 1e-9:
            assert_gradient_within_budget(ours[1][i], expected, worst([o[1][i] for o in others], expected), str(i))


@pytest.mark.parametrize(("kernel", "stride"), KERNELS, ids=str)
def test_simple_downsampler(kernel, stride):
    check_downsampler(random_weights(SimpleDownsampler(kernel)), plain_simple, stride)


@pytest.mark.parametrize("sigma", [None, 1.0])
@pytest.mark.parametrize(("kernel", "stride"), KERNELS, ids=str)
def test_attention_downsampler(kernel, stride, sigma):
    check_downsampler(random_weights(AttentionDownsampler(4, kernel, sigma=sigma)).eval(), plain_attention, stride)


def test_a_fresh_downsampler_is_a_mean():
    x = fine(4)
    for model in (SimpleDownsampler(4), AttentionDownsampler(4, 4, sigma=None).eval()):
        model.double()
        if isinstance(model, AttentionDownsampler):
            model.saliency.weight.data.zero_()
        torch.testing.assert_close(model(x, GRID), F.avg_pool2d(x, 4))


def test_noise_in_training():
    x = fine(4, torch.float32)
    model = random_weights(AttentionDownsampler(4, 4))
    results = [model.train()(x, GRID) for _ in range(2)]
    assert not torch.equal(*results)
    assert torch.equal(*[model.eval()(x, GRID) for _ in range(2)])
    quiet = random_weights(AttentionDownsampler(4, 4, dropout=0.0))
    assert torch.equal(quiet.train()(x, GRID), quiet.eval()(x, GRID))


def test_window_sums_are_differentiable_twice():
    x, weights = draw(1, 2, 5, 4).double().requires_grad_(), draw(1, 3, 2, 2, 2).double().requires_grad_()
    call = lambda *a: window_sum(*a, (2, 2))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weights))
    assert torch.autograd.gradgradcheck(call, (x, weights))
    assert torch.autograd.gradcheck(call, (x, weights), check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_features_are_weighed_in_float32(dtype):
    x = fine(2, dtype)
    for model in (random_weights(SimpleDownsampler(4)), random_weights(AttentionDownsampler(4, 4)).eval()):
        with torch.autocast("cpu", torch.bfloat16):
            actual = model(x, GRID)
        assert torch.equal(actual, model(x.float(), GRID).to(dtype))


def test_no_windows_in_memory():
    x = draw(1, 32, 24, 24).requires_grad_()
    model = AttentionDownsampler(32, 7)
    with LargestTensor() as largest:
        model(x, (12, 12)).square().mean().backward()
    assert largest.elements <= 32 * (24 + 9) ** 2  # mirrored by 9 pixels together; unfolded, 12 times the map


def pooled(images, cell):
    return F.avg_pool2d(images, cell)


def test_features_that_are_consistent():
    """A backbone that averages cells of an image, and the image as upsampled features: no view disagrees."""
    images = draw(2, 5, 12, 8).double()
    views = random_views(images, 3, **EVERYTHING, generator=generator())
    loss = consistency_loss(images, pooled(views(images), 4), views, SimpleDownsampler(4).double())
    assert float(loss.detach()) <= 1e-28
    others = random_views(images, 3, **EVERYTHING, generator=generator(1))
    loss = consistency_loss(images, pooled(others(images), 4), views, SimpleDownsampler(4).double())
    assert float(loss.detach()) > 0.01


@pytest.mark.parametrize(("scale", "recompute"), [(None, True), (1, False), (5, False)])
def test_consistency_loss(scale, recompute):
    upsampled, targets = draw(2, 5, 12, 8), draw(6, 5, 6, 4)
    views = random_views(upsampled, 3, **EVERYTHING, generator=generator())
    model = random_weights(AttentionDownsampler(5, 3, dropout=0.0))
    log_scale = None if scale is None else draw(6, scale, 6, 4, seed=3)

    def plain(x, t, s):
        total = 0
        for b in range(2):
            for n in range(3):
                seen = Views(views.matrices[b : b + 1, n : n + 1])(x[b : b + 1])
                squared = (model(seen, (6, 4)) - t[3 * b + n]) ** 2
                if s is not None:
                    deviation = s[3 * b + n].exp()
                    squared = squared / (2 * deviation**2) + deviation.log()
                total = total + squared.mean() / 6
        return total

    def ours(x, t, s):
        return consistency_loss(x, t, views, model, log_scale=s, recompute=recompute)

    def derived_from(loss, dtype, seed=None):
        model.to(dtype)
        inputs = [None if t is None else t.to(dtype) for t in (upsampled, targets, log_scale)]
        inputs[0] = inputs[0] if seed is None else nudged(inputs[0], seed)
        leaves = [t.requires_grad_() for t in (inputs[0], inputs[2]) if t is not None] + list(model.parameters())
        value = loss(*inputs)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    oracle, actual = derived_from(plain, F64), derived_from(ours, torch.float32)
    others = [derived_from(plain, torch.float32, seed) for seed in range(6)]
    for i, expected in enumerate(oracle):
        theirs = worst([o[i] for o in others], expected)
        check = assert_gradient_within_budget if i else assert_within_budget
        check(actual[i], expected, theirs, str(i))


def test_targets_have_no_gradient_and_views_can_be_made_again():
    upsampled, targets = draw(1, 3, 8, 8).requires_grad_(), draw(2, 3, 4, 4).requires_grad_()
    views = random_views(upsampled, 2)
    model = AttentionDownsampler(3, 2)  # with noise, which must be the same one
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        loss = consistency_loss(upsampled, targets, views, model, recompute=recompute)
        gradients.append(torch.autograd.grad(loss, [upsampled, *model.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    loss.detach()
    consistency_loss(upsampled, targets, views, model).backward()
    assert targets.grad is None
    assert consistency_loss(upsampled.bfloat16(), targets, views, model).dtype == torch.float32


UPSAMPLERS = {
    "JBUStack": (lambda: JBUStack(None).up1, lambda level, f, image: level(f, image)),
    "AnyUp": (lambda: AnyUp(16, num_heads=2), lambda model, f, image: model(image, f, (8, 8))),
    "FeatSharp": (
        lambda: FeatSharpUpsampler(8, 2, num_heads=4),
        lambda model, f, image: model(f, image, draw(2, 8, 8, 8)),
    ),
}


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_any_upsampler_can_be_trained(name):
    build, upsample = UPSAMPLERS[name]
    upsampler, down, image = build(), AttentionDownsampler(8, 2), draw(2, 3, 16, 16)
    views = random_views(image, 2, generator=generator())
    loss = consistency_loss(upsample(upsampler, draw(2, 8, 4, 4), image), draw(4, 8, 4, 4), views, down)
    parameters = [p for p in (*upsampler.parameters(), *down.parameters()) if p.requires_grad]
    assert all(float(g.abs().max()) > 0 for g in torch.autograd.grad(loss, parameters))


def test_a_step_waits_for_nothing():
    upsampled, targets, model = draw(2, 5, 12, 8).requires_grad_(), draw(4, 5, 6, 4), AttentionDownsampler(5, 4)
    fidelity = Fidelity()
    with NoWaiting():
        views = random_views(upsampled, 2, generator=generator())
        consistency_loss(upsampled, targets, views, model, recompute=True).backward()
        fidelity.update(downsampled_views(upsampled, views, model, (6, 4)), targets).value()
        with pytest.raises(AssertionError):
            float(upsampled.sum())


def test_a_step_is_one_graph():
    upsampled, targets, model = draw(2, 5, 8, 8).requires_grad_(), draw(4, 5, 4, 4), AttentionDownsampler(5, 4).eval()
    views = random_views(upsampled, 2, generator=generator())

    def step(x, t):
        return consistency_loss(x, t, views, model)

    graph = torch.compile(step, fullgraph=True, backend="eager")
    value, expected = graph(upsampled, targets), step(upsampled, targets)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, upsampled)[0] for v in (value, expected)))


def plain_fidelity(x, y):
    y_mean = y.mean((0, 2, 3), keepdim=True)
    return F.mse_loss(y_mean.expand_as(y), y) / F.mse_loss(x, y)


def test_fidelity():
    y = 3 * draw(5, 7, 4, 3) + draw(1, 7, 1, 1)
    x = y + draw(5, 7, 4, 3, seed=1)
    expected = plain_fidelity(x.double(), y.double())
    whole = Fidelity().update(x, y).value()
    parts = Fidelity()
    for part in (slice(0, 1), slice(1, 1), slice(1, 4), slice(4, 5)):
        parts.update(x[part], y[part])
    for value in (whole, parts.value()):
        assert value.dtype == F64
        assert_within_budget(value, expected, expected)
    basis = torch.linalg.qr(draw(7, 7).double())[0]
    turned = [torch.einsum("bchw,dc->bdhw", t.double(), 5 * basis) + 1 for t in (x, y)]
    torch.testing.assert_close(Fidelity().update(*turned).value(), expected, rtol=1e-12, atol=0)
    assert float(Fidelity().update(y, y).value()) == math.inf
    constant = y.double().mean((0, 2, 3), keepdim=True).expand_as(y)
    assert float(Fidelity().update(constant, y.double()).value()) == pytest.approx(1, rel=1e-12)


def tiny():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Dinov2Model(config).eval().requires_grad_(False)


def plain_over_tiling(model, images, levels):
    """Image by image and tile by tile."""

    def maps(x):
        return MultiResolutionEncoder(model, [tuple(x.shape[2:])], verify=False)(x).maps[0]

    errors = []
    for n in levels:
        image = F.interpolate(images, (28 * n, 56 * n), mode="bilinear")
        tiles = [torch.cat([maps(t) for t in row.chunk(n, 3)], 3) for row in image.chunk(n, 2)]
        errors.append((maps(image) - torch.cat(tiles, 2)).square().mean((1, 2, 3)))
    return torch.stack(errors, 1)


def test_over_tiling_error():
    model, images, levels = tiny(), draw(2, 3, 84, 168), (1, 2, 3)
    actual = over_tiling_error(model, images, levels)
    others = [plain_over_tiling(model, nudged(images, seed), levels) for seed in range(4)]
    alone = over_tiling_error(model, images, [2], size=(28, 56))
    oracle = plain_over_tiling(model.double(), images.double(), levels)
    assert bool((oracle[:, 1:] > 1e-4).all())
    assert_within_budget(actual, oracle, worst(others, oracle))
    assert torch.equal(actual[:, 0], torch.zeros(2))
    assert torch.equal(alone, actual[:, 1:2])


MAP, VIEWS = torch.zeros(2, 3, 8, 8), random_views(torch.zeros(2, 3, 8, 8), 2)
TARGETS, SIMPLE = torch.zeros(4, 3, 4, 4), SimpleDownsampler(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random_views(MAP[0]), ValueError, r"`images` must be \(B, C, H, W\)"),
        (lambda: random_views(MAP, 0), ValueError, "`count` must be at least 1"),
        (lambda: random_views(MAP, zoom=0.9), ValueError, "`zoom` must be at least 1, got 0.9"),
        (lambda: random_views(MAP, pad=-0.1), ValueError, "`pad` must be from 0 to 1, got -0.1"),
        (lambda: random_views(MAP, flip=1.5), ValueError, "`flip` must be from 0 to 1"),
        (lambda: random_views(MAP, rotate="much"), TypeError, "`rotate` must be a number"),
        (lambda: random_views(MAP, perspective=0.5), ValueError, "`perspective` must be from 0 to 0.49"),
        (lambda: random_views(MAP, generator=0), TypeError, "`generator` must be None or a torch.Generator"),
        (lambda: VIEWS(MAP[:1]), ValueError, "`maps` must be of the 2 images of the views, got 1"),
        (lambda: VIEWS(MAP, 0), ValueError, "`size` must be positive"),
        (lambda: SimpleDownsampler(0), ValueError, "`kernel_size` must be positive"),
        (lambda: SIMPLE(MAP, 3), ValueError, r"`size` must divide that of `features`, \(8, 8\), got \(3, 3\)"),
        (lambda: SIMPLE(MAP.int(), 4), TypeError, "`features` must have one of the dtypes"),
        (lambda: SimpleDownsampler(18)(MAP, 4), ValueError, "`features` of .* are too small for windows"),
        (lambda: AttentionDownsampler(4)(MAP, 4), ValueError, "`features` must have 4 channels, got 3"),
        (lambda: AttentionDownsampler(0), ValueError, "`channels` must be at least 1"),
        (lambda: AttentionDownsampler(3, dropout=1), ValueError, "`dropout` must be at least 0 and below 1"),
        (lambda: AttentionDownsampler(3, sigma=0), ValueError, "`sigma` must be above 0 or None"),
        (lambda: consistency_loss(MAP[:1], TARGETS, VIEWS, SIMPLE), ValueError, "`upsampled` must be of the 2 images"),
        (lambda: consistency_loss(MAP, TARGETS[:2], VIEWS, SIMPLE), ValueError, r"`targets` must have .* \(4, 3\)"),
        (lambda: consistency_loss(MAP, TARGETS, None, SIMPLE), TypeError, "`views` must be Views, got NoneType"),
        (
            lambda: consistency_loss(MAP, TARGETS, VIEWS, SIMPLE, log_scale=MAP),
            ValueError,
            r"`log_scale` must have shape \(4, 1, 4, 4\) or",
        ),
        (
            lambda: downsampled_views(MAP, VIEWS, SIMPLE, 4, recompute=1),
            TypeError,
            "`recompute` must be True or False",
        ),
        (lambda: Fidelity().value(), ValueError, "`update` must come before `value`"),
        (lambda: Fidelity().update(MAP, TARGETS), ValueError, "`predictions` must have the shape of `targets`"),
        (
            lambda: Fidelity().update(MAP, MAP).update(MAP[:, :2], MAP[:, :2]),
            ValueError,
            "`targets` must have the channels of the batches before, 3, got 2",
        ),
        (lambda: over_tiling_error(None, MAP, ()), TypeError, "`levels` must be a non-empty list"),
        (lambda: over_tiling_error(None, MAP, (0,)), ValueError, "`levels` must be at least 1"),
        (lambda: over_tiling_error(None, MAP, (1, 3)), ValueError, "`size` is needed for images of .* 3"),
        (lambda: over_tiling_error(None, MAP, (1, 2), layers=[1, 2]), ValueError, "`layers` must be one layer"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
