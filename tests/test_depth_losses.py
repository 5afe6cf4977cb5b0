"""The losses of depth heads: against DINOv2's own (`tests/golden/`), a statement in loops, and the plain order."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from util import assert_gradient_within_budget, assert_within_budget, nudged, worst

from murf_fast import _extension, reference
from murf_fast.nn import DepthHead, log_gradient_loss, scale_invariant_log_loss

GOLDEN = Path(__file__).parent / "golden" / "dinov2__depth_losses.npz"
EPS = 1e-3


def plain_sig(depth, target, valid, warm_up=False, mean_weight=0.15):
    """DINOv2's statement, of the pixels that count."""
    g = (depth[valid] + EPS).log() - (target[valid] + EPS).log()
    return ((0 if warm_up else g.var()) + mean_weight * g.mean() ** 2).sqrt()


def plain_gradient(depth, target, valid, strides=(1, 2, 4, 6)):
    """Pair by pair."""
    g = (depth + EPS).log() - (target.where(valid, 1) + EPS).log()
    total = 0
    for s in strides:
        rows, columns = range(0, g.shape[1], s), range(0, g.shape[2], s)
        count = sum(bool(valid[b, y, x]) for b in range(len(g)) for y in rows for x in columns)
        for b in range(len(g)):
            for y in rows:
                for x in columns:
                    for v, u in ((y + 2 * s, x), (y, x + 2 * s)):
                        if v < g.shape[1] and u < g.shape[2] and valid[b, y, x] and valid[b, v, u]:
                            total = total + (g[b, y, x] - g[b, v, u]).abs() / count
    return total


def derived(loss, depth):
    """A loss and its gradient."""
    leaf = depth.detach().clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def check(loss, plain, depth, target, oracle=None):
    """Within the error of the plain statement in float32, whose input is nudged: one scalar may be right by chance."""
    oracle = oracle or derived(lambda d: plain(d, target.double()), depth.double())
    others = [derived(lambda d: plain(d, target), nudged(depth, seed)) for seed in range(4)]
    value, gradient = derived(lambda d: loss(d, target), depth)
    assert_within_budget(value, oracle[0], worst([o[0] for o in others], oracle[0]))
    assert_gradient_within_budget(gradient, oracle[1], worst([o[1] for o in others], oracle[1]))
    with torch.no_grad():
        assert torch.equal(loss(depth, target), value)


@pytest.mark.parametrize("max_depth", [None, 6.0])
def test_golden(max_depth):
    arrays = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN).items()}
    depth, target, suffix = arrays["depth"], arrays["target"], "" if max_depth is None else ".max6"

    def original(name):
        name += suffix + ".f64"
        return arrays[name].double(), arrays[f"grad.{name}"].double()

    def valid(t):
        return (t > 0) & (t <= (max_depth or torch.inf))

    for name, warm_up in (("sig", False), ("sig_warm_up", True)):
        check(
            lambda d, t, w=warm_up: scale_invariant_log_loss(d, t, max_depth=max_depth, warm_up=w),
            lambda d, t, w=warm_up: plain_sig(d, t, valid(t), w),
            depth,
            target,
            original(name),
        )
    for i in range(2):
        value, gradient = original(f"gradient{i}")
        check(
            lambda d, t: log_gradient_loss(d, t, max_depth=max_depth),
            lambda d, t: reference.log_gradient_loss(d, t, valid(t)),
            depth[i : i + 1],
            target[i : i + 1],
            (value, gradient[i : i + 1]),
        )


def draw(*shape, dtype=torch.float32, seed=0):
    """Depth, a target a fifth of which is unknown, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    depth = torch.rand(shape, generator=generator) * 8 + 0.1
    target = depth * (0.5 + torch.rand(shape, generator=generator))
    target[torch.rand(shape, generator=generator) < 0.2] = 0
    return depth.to(dtype), target.to(dtype), torch.rand(shape, generator=generator) < 0.8


SHAPES = [(2, 7, 11), (1, 13, 5), (3, 2, 3), (1, 1, 17), (2, 9, 1)]


@pytest.mark.parametrize("strides", [(1, 2, 4, 6), (3,)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_loss(shape, strides):
    depth, target, mask = draw(*shape)
    check(
        lambda d, t: log_gradient_loss(d, t, mask=mask, max_depth=7, strides=strides),
        lambda d, t: plain_gradient(d, t, (t > 0) & (t <= 7) & mask, strides) + 0 * d.sum(),
        depth,
        target,
    )


@pytest.mark.parametrize("options", [{}, {"warm_up": True}, {"mean_weight": 0.0}, {"mean_weight": 1.5}])
@pytest.mark.parametrize("shape", SHAPES)
def test_scale_invariant_loss(shape, options):
    depth, target, mask = draw(*shape)
    check(
        lambda d, t: scale_invariant_log_loss(d, t, mask=mask, max_depth=7, **options),
        lambda d, t: plain_sig(d, t, (t > 0) & (t <= 7) & mask, **options),
        depth,
        target,
    )


LOSSES = {
    "sig": scale_invariant_log_loss,
    "warm-up": lambda *a, **k: scale_invariant_log_loss(*a, warm_up=True, **k),
    "gradient": log_gradient_loss,
}
EACH = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(loss, dtype):
    """Half depth is computed on in float32, beside a target of any dtype."""
    depth, target, _ = draw(2, 7, 11, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    value, gradient = derived(lambda d: loss(d, target.double()), depth)
    expected, of_wide = derived(lambda d: loss(d, target.double()), depth.to(wide))
    assert value.dtype == wide
    assert torch.equal(value, expected)
    assert torch.equal(gradient, of_wide.to(dtype))


@EACH
def test_derivatives(loss):
    depth, target, mask = draw(2, 5, 7, dtype=torch.float64)

    def of(d):
        return loss(d, target, mask=mask)

    leaf = depth.requires_grad_()
    assert torch.autograd.gradcheck(of, leaf)
    assert torch.autograd.gradgradcheck(of, leaf)
    torch.testing.assert_close(torch.func.grad(of)(depth), derived(of, depth)[1])
    assert torch.autograd.gradcheck(of, leaf, check_forward_ad=True)


@EACH
def test_compile(loss):
    depth, target, mask = draw(2, 5, 7)
    torch.compiler.reset()
    compiled = torch.compile(lambda d: loss(d, target, mask=mask), fullgraph=True, backend="aot_eager")
    for a, b in zip(derived(compiled, depth), derived(lambda d: loss(d, target, mask=mask), depth), strict=True):
        torch.testing.assert_close(a, b)


@EACH
def test_what_does_not_count(loss):
    """Whatever stands where a target is unknown, infinite or masked out, neither loss nor gradient sees it."""
    depth, target, mask = draw(2, 7, 11)
    expected, gradient = derived(lambda d: loss(d, target.where(mask, 0)), depth)
    assert expected > 0
    wild = torch.tensor([torch.nan, torch.inf, -torch.inf, -3.0])
    for value in wild:
        for bad in (
            derived(lambda d, v=value: loss(d, target.where(mask, v)), depth),
            derived(lambda d: loss(d, target, mask=mask), depth.where(mask & (target > 0), value)),
        ):
            assert torch.equal(bad[0], expected)
            assert torch.equal(bad[1], gradient)


@EACH
@pytest.mark.parametrize("valid", ["none", "one", "right", "no image"])
def test_where_the_original_is_nan(loss, valid):
    depth, target, _ = draw(2, 7, 11)
    if valid == "none":
        target.zero_()
    elif valid == "one":
        target.zero_()[1, 2, 3] = depth[1, 2, 3]
    elif valid == "right":
        target.copy_(depth)
    else:
        depth, target = depth[:0], target[:0]
    for function in (loss, lambda *a: loss(*(x.double() for x in a))):
        value, gradient = derived(lambda d, f=function: f(d, target), depth)
        assert value == 0
        assert not gradient.any()


def test_one_pixel():
    """One has no variance; the squared mean is left."""
    depth, target = torch.full((1, 3, 3), 2.0), torch.zeros(1, 3, 3)
    target[0, 1, 1] = 5
    expected = 0.15**0.5 * np.log(5.001 / 2.001)
    assert float(scale_invariant_log_loss(depth, target)) == pytest.approx(expected, rel=1e-6)
    assert log_gradient_loss(depth, target) == 0


def test_scale_does_not_count_without_the_mean():
    depth, target, _ = draw(2, 7, 11, dtype=torch.float64)
    losses = [scale_invariant_log_loss((depth + EPS) * k - EPS, target, mean_weight=0) for k in (1, 1.5)]
    torch.testing.assert_close(*losses)


# ---- the head


def make_head(grid, norm, upsample=1, **options):
    head = DepthHead(
        17, 19, depth_range=(1e-3, 10), clamp=norm == "linear", grid=grid, norm=norm, upsample=upsample, **options
    )
    generator = torch.Generator().manual_seed(3)
    for p in head.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return head


MAPS = [torch.randn(2, c, h, w, generator=torch.Generator().manual_seed(c)) for c, h, w in ((5, 4, 6), (7, 7, 5))]
CLS = [torch.randn(2, 5, generator=torch.Generator().manual_seed(9)), None]


def plain_order(head, maps, target, valid, grid, cls, warm_up=False, gradient_weight=0.5):
    """Maps up and concatenated, K bins on the head's grid, their expectation, and that up to the image."""
    columns = []
    for x, token in zip(maps, cls, strict=True):
        columns.append(F.interpolate(x, grid, mode="bilinear"))
        if token is not None:
            columns.append(token[:, :, None, None].expand(-1, -1, *grid))
    x = torch.cat(columns, 1)
    logits = head.classifier(x)
    weights = logits.softmax(1) if head.norm == "softmax" else logits.relu() + 0.1
    depth = (weights * head.values()[:, None, None]).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    depth = depth.clamp(*head.depth_range) if head.clamp else depth
    depth = F.interpolate(depth, target.shape[1:], mode="bilinear")[:, 0]
    loss = plain_sig(depth, target, valid, warm_up)
    return loss + gradient_weight * reference.log_gradient_loss(depth, target, valid)


HEADS = [
    ("largest", "softmax", 1, (7, 6)),
    ("first", "linear", 4, (16, 24)),
    ("image", "softmax", 1, (23, 29)),
]


@pytest.mark.parametrize(("grid", "norm", "upsample", "at"), HEADS)
@pytest.mark.parametrize("options", [{}, {"warm_up": True}, {"gradient_weight": 0.0}])
def test_loss_of_a_head(grid, norm, upsample, at, options):
    """Value, and gradients of maps and parameters, against the plain order in float64."""
    _, target, mask = draw(2, 23, 29)

    def results(dtype, seed=None):
        head = make_head(grid, norm, upsample).to(dtype)
        maps = [(m if seed is None else nudged(m, seed)).to(dtype).requires_grad_() for m in MAPS]
        cls = [None if t is None else t.to(dtype) for t in CLS]
        if seed is None and dtype == torch.float32:
            loss = head.loss(maps, target, cls, mask=mask, max_depth=9, **options)
        else:
            valid = (target > 0) & (target <= 9) & mask
            loss = plain_order(head, maps, target.to(dtype), valid, at, cls, **options)
        return [loss.detach(), *torch.autograd.grad(loss, [*maps, *head.parameters()])]

    plain = zip(*(results(torch.float32, seed) for seed in range(4)), strict=True)
    for ours, theirs, oracle in zip(results(torch.float32), plain, results(torch.float64), strict=True):
        assert ours.dtype == torch.float32
        assert_within_budget(ours, oracle, worst(list(theirs), oracle))


def test_loss_with_a_batch_norm():
    """That of the depth which the head gives, statistics of the batch and all."""
    _, target, mask = draw(2, 23, 29)
    head = make_head("largest", "softmax", batch_norm=True)
    where = {"mask": mask, "max_depth": 9}
    losses = [head.loss(MAPS, target, CLS, **where)]
    depth = head(MAPS, target.shape[1:], CLS)
    losses.append(scale_invariant_log_loss(depth, target, **where) + 0.5 * log_gradient_loss(depth, target, **where))
    ours, expected = ([loss.detach(), *torch.autograd.grad(loss, list(head.parameters()))] for loss in losses)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert head.batch_norm.num_batches_tracked == 2


def test_the_loss_of_a_head_compiles():
    _, target, mask = draw(2, 23, 29)
    head = make_head("first", "softmax", 4)

    def derivatives(function):
        loss = function(MAPS, target, CLS, mask=mask, warm_up=True)
        return [loss.detach(), *torch.autograd.grad(loss, list(head.parameters()))]

    torch.compiler.reset()
    compiled = derivatives(torch.compile(head.loss, fullgraph=True, backend="aot_eager"))
    for a, b in zip(compiled, derivatives(head.loss), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast():
    """Bins of a half type; depth, loss and their gradients in float32."""
    _, target, _ = draw(2, 23, 29)
    head = make_head("largest", "softmax")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.loss(MAPS, target, CLS)
    loss.backward()
    assert loss.dtype == head.classifier.weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, head.loss(MAPS, target, CLS), rtol=0.01, atol=0)


def test_on_a_gpu(gpu):
    """What a CPU gives, within twice its error."""
    _, target, mask = draw(2, 23, 29)
    results = []
    for device, dtype in ((gpu, torch.float32), ("cpu", torch.float32), ("cpu", torch.float64)):
        head = make_head("first", "softmax", 4).to(device, dtype)
        maps, cls = [m.to(device, dtype) for m in MAPS], [None if t is None else t.to(device, dtype) for t in CLS]
        loss = head.loss(maps, target.to(device, dtype), cls, mask=mask.to(device))
        results.append([x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss, list(head.parameters())))])
    for on_gpu, on_cpu, oracle in zip(*results, strict=True):
        assert_within_budget(on_gpu, oracle, on_cpu)


def test_a_depth_head_learns():
    torch.manual_seed(0)
    head = DepthHead(12, 32, depth_range=(1e-3, 10), upsample=2)
    target = (torch.rand(2, 2, 2) * 8 + 1).repeat_interleave(14, 1).repeat_interleave(12, 2)
    target[:, ::3] = 0
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.05)
    losses = []
    for step in range(40):
        loss = head.loss(MAPS, target, max_depth=10, warm_up=step < 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[5]


# VmHWM's rise; maps beyond the 32 MB from which malloc gives memory back at once.
PEAK = """
    import torch
    from murf_fast.cli.meter import observed
    from murf_fast.nn import DepthHead, log_gradient_loss, scale_invariant_log_loss
    torch.set_num_threads(1)
    depth, target = (torch.rand(1, 3000, 3000) * 8 + 0.1 for _ in range(2))
    def of(loss):
        leaf = depth.detach().requires_grad_()
        loss(leaf, target).backward()
        return leaf.grad
    def both(d, t):
        return scale_invariant_log_loss(d, t) + 0.5 * log_gradient_loss(d, t)
    for loss in (scale_invariant_log_loss, log_gradient_loss, both):
        of(loss)
        print(observed(lambda: of(loss))[1])
    head = DepthHead(8, 256, depth_range=(1e-3, 10), grid="first", upsample=4)
    maps, target = [torch.randn(1, 8, 60, 80)], torch.rand(1, 480, 640) * 8
    def of_head():
        return torch.autograd.grad(head.loss(maps, target), list(head.parameters()))
    of_head()
    print(observed(of_head)[1])
"""


@pytest.mark.skipif(_extension.load_error() is not None, reason=str(_extension.load_error()))
def test_peak_memory():
    script = [sys.executable, "-c", textwrap.dedent(PEAK)]
    peaks = subprocess.run(script, capture_output=True, text=True, check=True).stdout.split()
    if "None" in peaks:
        pytest.skip("the system does not tell the resident high-water mark")
    sig, gradient, both = (int(p) / (4 * 3000**2) for p in peaks[:3])
    assert sig < 3.5  # two maps and two of bools; and what the kernel counts late
    assert gradient < 5  # three, and three of bools
    assert both < 6.5  # another gradient; plain PyTorch takes 12
    logits = 256 * 4 * 60 * 80  # bytes of them before they are upsampled, a sixteenth of those on the head's grid
    assert int(peaks[3]) < 6 * logits


IMAGE = torch.ones(2, 8, 9)


@pytest.mark.parametrize("loss", [scale_invariant_log_loss, log_gradient_loss], ids=["sig", "gradient"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"depth": None}, TypeError, "`depth` must be a floating-point tensor, got NoneType"),
        ({"depth": IMAGE.int()}, TypeError, "`depth` must be a floating-point tensor, got torch.int32"),
        ({"depth": IMAGE[:1]}, ValueError, r"`depth` must have the shape of `target`, \(2, 8, 9\), got \(1, 8, 9\)"),
        ({"target": IMAGE[:, None]}, ValueError, r"`target` must be \(B, H, W\) with .*, got \(2, 1, 8, 9\)"),
        ({"target": IMAGE[..., :0]}, ValueError, r"`target` must be \(B, H, W\) with at least one pixel"),
        ({"target": IMAGE.long()}, TypeError, "`target` must be a floating-point tensor"),
        ({"target": IMAGE.to("meta")}, ValueError, "`target` must be on the device of `depth`, cpu, got meta"),
        ({"mask": IMAGE}, TypeError, "`mask` must be a tensor of bools, got torch.float32"),
        ({"mask": IMAGE[0] > 0}, ValueError, r"`mask` must have the shape of `target`, \(2, 8, 9\), got \(8, 9\)"),
        ({"max_depth": 0}, ValueError, "`max_depth` must be above 0, got 0"),
        ({"max_depth": "far"}, TypeError, "`max_depth` must be a number, got 'far'"),
    ],
)
def test_bad_arguments(loss, change, error, words):
    with pytest.raises(error, match=words):
        loss(**{"depth": IMAGE, "target": IMAGE, **change})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: scale_invariant_log_loss(IMAGE, IMAGE, warm_up=1), TypeError, "`warm_up` must be True or False"),
        (lambda: scale_invariant_log_loss(IMAGE, IMAGE, mean_weight=-1), ValueError, "`mean_weight` must be at least"),
        (lambda: log_gradient_loss(IMAGE, IMAGE, strides=()), TypeError, "`strides` must be a non-empty list"),
        (lambda: log_gradient_loss(IMAGE, IMAGE, strides=(1, 0)), ValueError, "`strides` must be at least 1, got 0"),
    ],
)
def test_bad_options(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"features": []}, TypeError, "DepthHead.loss: `features` must be a non-empty list"),
        ({"target": IMAGE.long()}, TypeError, "DepthHead.loss: `target` must be a floating-point tensor"),
        ({"target": IMAGE[:1]}, ValueError, "DepthHead.loss: `target` must have the batch size of `features`, 2, got"),
        ({"target": IMAGE.to("meta")}, ValueError, r"DepthHead.loss: `target` must be on the device of `features\[0\]"),
        ({"mask": IMAGE}, TypeError, "DepthHead.loss: `mask` must be a tensor of bools"),
        ({"max_depth": -1}, ValueError, "DepthHead.loss: `max_depth` must be above 0"),
        ({"warm_up": 3}, TypeError, "DepthHead.loss: `warm_up` must be True or False"),
        ({"gradient_weight": -0.5}, ValueError, "DepthHead.loss: `gradient_weight` must be at least 0"),
    ],
)
def test_bad_calls_of_a_head(change, error, words, monkeypatch):
    head = DepthHead(12, 5, depth_range=(1, 2))
    monkeypatch.setattr(head, "depth_on_head_grid", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(error, match=words):
        head.loss(**{"features": MAPS, "target": IMAGE, **change})
