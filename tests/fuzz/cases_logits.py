"""``upsample_argmax``, ``upsample_confusion``, ``upsample_expectation`` and ``upsample_cross_entropy``: functions of
resized logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fuzz.cases_resize import smallest, weight_noise
from fuzz.cases_upsample import Maps, drawn_bias, drawn_maps
from fuzz.compare import Comparison, arithmetic, derived, exact, unit
from fuzz.draw import Draw
from fuzz.maps import drawn_vector

__all__ = ["upsample_argmax", "upsample_confusion", "upsample_cross_entropy", "upsample_expectation"]

LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def drawn_logits(d: Draw, gradients: bool) -> tuple[Maps, Tensor | None, int]:
    classes = d.choice("classes", (1, 2, 3, 5, 7, 16, 19, 33, 257), (1, 3, 3, 3, 3, 2, 3, 2, 0.3))
    most = 5 if classes > 100 or d.interpreted else 23
    maps = drawn_maps(d, channels=classes, gradients=gradients, most=most)
    bias = drawn_bias(d, maps, classes)
    if bias is not None and maps.needs_grad and d.chance("bias.gradient", 0.7):
        bias = bias.detach().requires_grad_()
    return maps, bias, classes


def drawn_target(d: Draw, maps: Maps, classes: int) -> tuple[Tensor, int]:
    """Labels of any type and strides, and the one that does not count."""
    label_type = d.choice("target.dtype", LABELS)
    ignored = d.choice("ignore_index", (-100, 255, -1, 0, 1, 1000))
    most = min(classes - 1, torch.iinfo(label_type).max)
    target = torch.randint(0, most + 1, (len(maps.maps[0]), *maps.size), generator=d.generator).to(label_type)
    if torch.iinfo(label_type).min <= ignored <= torch.iinfo(label_type).max:
        share = d.choice("ignored", (0.0, 0.3, 1.0), (2, 5, 0.5))
        target[torch.rand(target.shape, generator=d.generator) < share] = ignored
    if d.chance("target.strided", 0.3):
        target = target.mT.contiguous().mT
    return target, ignored


def drawn_ignored(d: Draw, ignored: int) -> dict:
    if ignored == -100 and d.chance("ignore_index left out", 0.5):
        return {}
    return {"ignore_index": d.as_number("ignore_index", ignored)}


def upsample_argmax(d: Draw) -> list[Comparison]:
    maps, bias, classes = drawn_logits(d, gradients=False)
    special = d.choice("special", ("none", "NaN", "inf", "minus inf"), (8, 1, 1, 1))
    if special != "none":
        # A whole plane, so that every pixel has it whatever the weights.
        at = d.integer("special.class", 0, classes - 1)
        maps.maps[0] = maps.maps[0].clone()
        maps.maps[0][:, at] = {"NaN": torch.nan, "inf": torch.inf, "minus inf": -torch.inf}[special]
    with_values = d.chance("return_values", 0.5)
    result = d.call(
        "upsample_argmax", maps.maps, maps.written_size, bias=bias, return_values=with_values, **maps.options
    )
    labels, values = result if with_values else (result, None)
    least = torch.uint8 if classes <= 256 else torch.int16
    assert labels.dtype == least, f"{labels.dtype}, right {least}"
    logits, bound = maps.total(bias)
    if special != "none":
        weighed = maps.options["mode"] == "bicubic" or "via" in maps.options or maps.dtype == torch.float64
        if special != "NaN" and weighed:
            return []  # a negative or a zero weight of an infinity: NaN somewhere
        logits[:, at], bound[:, at] = {"NaN": torch.nan, "inf": torch.inf, "minus inf": -torch.inf}[special], 0.0
    # Rounded to the dtype of the maps or not before they are compared: logits that near are equal.
    bound = bound + (unit(maps.dtype) * logits.abs()).nan_to_num(0.0, 0.0, 0.0)
    top, best = logits.max(1, keepdim=True)
    at_top = bound.gather(1, best)
    near = (logits >= top - (at_top + bound)) | logits.isnan() | (logits == top)
    if special == "NaN":
        near = logits.isnan()
    certain_tie = near & (logits == top) & (bound == bound) & _is_exact(maps, bias)
    chosen = labels.long()[:, None]
    assert bool(((chosen >= 0) & (chosen < classes)).all()), f"labels from {int(chosen.min())} to {int(chosen.max())}"
    allowed = near.gather(1, chosen)
    # Exact arithmetic leaves no doubt, and of equal logits the lowest class wins.
    sure = certain_tie.any(1, keepdim=True) & ((near & ~certain_tie).sum(1, keepdim=True) == 0)
    right = torch.where(sure, best == chosen, allowed)
    checks = [exact("labels are among the largest logits", right[:, 0].double(), torch.ones(labels.shape))]
    if with_values:
        checks.append(derived("values", values, top[:, 0], at_top[:, 0] + bound.amax(1), maps.dtype))
    return checks


def _is_exact(maps: Maps, bias: Tensor | None) -> bool:
    return len(maps.maps) == 1 and bias is None and maps.resizes[0].roundings == 0


def upsample_confusion(d: Draw) -> list[Comparison]:
    maps, bias, classes = drawn_logits(d, gradients=False)
    target, ignored = drawn_target(d, maps, classes)
    counts = d.call("upsample_confusion", maps.maps, target, bias=bias, **maps.options, **drawn_ignored(d, ignored))
    assert counts.dtype == torch.int64
    logits, bound = maps.total(bias)
    bound = bound + unit(maps.dtype) * logits.abs()
    # Pixels whose class is beyond doubt must be in its count, the others in one of their row.
    runner_up = (logits + bound).topk(min(2, classes), 1)
    least = (logits - bound).gather(1, runner_up.indices[:, :1])[:, 0]
    sure = least > runner_up.values[:, -1] if classes > 1 else torch.ones_like(least, dtype=torch.bool)
    labels = target.long()
    used = labels != ignored
    pairs = labels * classes + runner_up.indices[:, 0]
    certain = torch.bincount(pairs[used & sure], minlength=classes**2).view(classes, classes)
    rows = torch.bincount(labels[used], minlength=classes)
    return [
        exact("every pixel is in the row of its label", counts.sum(1).double(), rows.double()),
        exact("certain pixels are in their counts", (counts >= certain).double(), torch.ones(counts.shape)),
    ]


def upsample_expectation(d: Draw) -> list[Comparison]:
    maps, bias, classes = drawn_logits(d, gradients=d.chance("gradients", 0.4))
    table = drawn_vector(d, "values", (classes,), kinds=("normal", "offset", "integers"))
    if maps.needs_grad and d.chance("values.gradient", 0.5):
        table = table.detach().requires_grad_()
    norm = d.choice("norm", ("softmax", "linear"))
    result = d.call("upsample_expectation", maps.maps, maps.written_size, table, bias=bias, norm=norm, **maps.options)
    dtype = torch.promote_types(maps.dtype, table.dtype)
    wide = arithmetic(dtype)
    u = unit(wide)
    logits, bound = maps.total(bias)
    v = table.detach().double()[:, None, None]
    if norm == "softmax":
        centred = logits - logits.amax(1, keepdim=True)
        p = centred.softmax(1)
        # An exponential is as exact as its argument; then a sum, a quotient.
        relative = bound + u * (centred.abs() + 4)
        slope = p
    else:
        shifted = logits.relu() + 0.1
        p = shifted / shifted.sum(1, keepdim=True)
        relative = (bound + 2 * u * shifted) / shifted
        slope = (logits > 0) / shifted.sum(1, keepdim=True)
    want = (p * v).sum(1)
    spread = v - want[:, None]
    allowed = (p * spread.abs() * relative).sum(1) * 1.1 + (2 * classes + 8) * u * (p * v.abs()).sum(1)
    # Changes of the logits beyond the first order.
    allowed = allowed + (p * relative).sum(1) * (p * spread.abs() * relative).sum(1)
    # Exponentials that underflow.
    underflow = 4 * classes * torch.finfo(wide).tiny * (1 + v.abs().max())
    checks = [derived("result", result, want, allowed + underflow, dtype)]
    if not result.requires_grad:
        return checks
    g = torch.randn(result.shape, generator=d.generator, dtype=torch.float64).to(result.dtype)
    result.backward(g)
    g = g.double()[:, None]
    by_logit = g * slope * spread
    worst = relative.amax(1, keepdim=True) if norm == "softmax" else (p * relative).sum(1, keepdim=True)
    doubt = g.abs() * slope * (spread.abs() * (relative + worst) + allowed[:, None])
    doubt = doubt + (2 * classes + 12) * u * g.abs() * slope * (v.abs() + want.abs()[:, None] + spread.abs())
    doubt = doubt + g.abs() * underflow
    if norm == "linear":
        # Where the rounding of a logit decides its sign, either derivative is right.
        unsure = (logits.abs() <= bound) & (bound > 0)
        doubt = torch.where(unsure, g.abs() * spread.abs() / shifted.sum(1, keepdim=True) * 1.01 + doubt, doubt)
    checks += _gradients_through(maps, bias, by_logit, doubt, wide)
    if table.requires_grad:
        terms = g.numel()
        slack = ((p * g.abs()) * (relative + worst + (classes + terms) * u)).sum((0, 2, 3))
        checks.append(derived("gradient of values", table.grad, (p * g).sum((0, 2, 3)), slack, table.dtype))
    return checks


def _gradients_through(
    maps: Maps, bias: Tensor | None, by_logit: Tensor, doubt: Tensor, wide: torch.dtype
) -> list[Comparison]:
    """Gradients of maps and bias from that of the logits and its bound."""
    checks, u = [], unit(wide)
    for s, (m, rule) in enumerate(zip(maps.maps, maps.resizes, strict=True)):
        if m.requires_grad:
            adjoint = rule.transposed()
            # The fused kernels add every pixel's share to a row of sums, or walk the transposed table.
            roundings = (adjoint.roundings + rule.roundings + 4) * u
            bound = adjoint.magnitude(doubt) + roundings * adjoint.magnitude(by_logit)
            bound = bound + weight_noise(rule, by_logit.abs() + doubt) + 16 * smallest(wide) * max(by_logit.shape[2:])
            checks.append(derived(f"gradient of map {s}", m.grad, adjoint(by_logit), bound, maps.dtype))
    if bias is not None and bias.requires_grad:
        over = (0, 2, 3) if bias.ndim == 1 else (2, 3)
        terms = by_logit.numel() + 16
        bound = doubt.sum(over) + terms * u * by_logit.abs().sum(over)
        checks.append(derived("gradient of bias", bias.grad, by_logit.sum(over), bound, bias.dtype))
    return checks


def upsample_cross_entropy(d: Draw) -> list[Comparison]:
    maps, bias, classes = drawn_logits(d, gradients=d.chance("gradients", 0.5))
    target, ignored = drawn_target(d, maps, classes)
    weight = None
    if d.chance("weight", 0.4):
        weight = drawn_vector(d, "weight", (classes,)).abs() + 0.1
    smoothing = d.choice("label_smoothing", (0.0, 0, 0.1, 1.0, 1), (5, 1, 3, 0.5, 0.5))
    reduction = d.choice("reduction", ("none", "sum", "mean"))
    given = drawn_ignored(d, ignored)
    loss = d.call(
        "upsample_cross_entropy",
        maps.maps,
        target,
        bias=bias,
        weight=weight,
        label_smoothing=d.as_number("label_smoothing", smoothing),
        reduction=reduction,
        **maps.options,
        **given,
    )
    dtype = wide = arithmetic(maps.dtype)
    u = unit(wide)
    logits, bound = maps.total(bias)
    logits.requires_grad_()
    w = None if weight is None else weight.double()
    labels = target.long()
    options = {"weight": w, "ignore_index": ignored, "label_smoothing": float(smoothing)}
    per_pixel = F.cross_entropy(logits, labels, reduction="none", **options)
    # The centred logits and their roundings.
    with torch.no_grad():
        counts = labels != ignored
        weights = torch.ones(classes, dtype=torch.float64) if w is None else w
        at = labels.where(counts, 0)
        of_label = weights[at] * counts
        centred = logits - logits.amax(1, keepdim=True)
        doubt = bound.amax(1) if bound.numel() else per_pixel
        own = centred.gather(1, at[:, None])[:, 0].abs()
        log_sum = centred.logsumexp(1).abs()
        rest = (weights[:, None, None] * centred.abs()).sum(1) * counts
        slack = (1 - smoothing) * of_label * (2 * doubt + u * (2 * own + 4 * log_sum + 2 * classes + 8))
        slack = slack + smoothing / classes * (
            weights.sum() * counts * (2 * doubt + u * (4 * log_sum + 2 * classes + 8)) + (classes + 4) * u * rest
        )
        slack = slack + 8 * u * per_pixel.abs()
    pixels = per_pixel.numel()
    if reduction == "none":
        want, allowed, share = per_pixel, slack, 1.0
    else:
        share = 1.0
        if reduction == "mean":
            share = 1 / of_label.sum()
        want = per_pixel.sum() * share
        allowed = (slack.sum() + (2 * pixels + 4) * u * per_pixel.detach().abs().sum()) * share
    checks = [derived("loss", loss, want, allowed, dtype)]
    if not loss.requires_grad:
        return checks
    g = torch.randn(loss.shape, generator=d.generator, dtype=torch.float64).to(loss.dtype)
    loss.backward(g)
    (by_logit,) = torch.autograd.grad(want, logits, g.double()) if want.numel() else (torch.zeros_like(logits),)
    with torch.no_grad():
        g = g.double() * share
        g = (g.expand(labels.shape) * counts)[:, None].abs()
        p = centred.softmax(1)
        of_sum = ((1 - smoothing) * of_label + smoothing / classes * weights.sum() * counts)[:, None]
        relative = 2 * doubt[:, None] + u * (2 * centred.abs() + 2 * classes + 12)
        doubts = g * of_sum * p * (relative + relative.square())
        subtracted = smoothing / classes * weights[:, None, None] * counts[:, None]
        subtracted = subtracted + (1 - smoothing) * torch.zeros_like(p).scatter_(1, at[:, None], of_label[:, None])
        doubts = (
            doubts
            + (pixels if reduction == "mean" else 8) * u * g * (of_sum * p + subtracted)
            + 8 * u * g * (of_sum * p + subtracted)
        )
        doubts = doubts + g * of_sum * 4 * classes * torch.finfo(wide).tiny  # exponentials that underflow
    return checks + _gradients_through(maps, bias, by_logit.detach(), doubts, wide)
