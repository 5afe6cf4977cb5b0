"""Window rules, ``window_attention`` and ``neighborhood_attention``: every pair of a query and a key, one by one."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from fuzz.cases_resize import check_layout
from fuzz.compare import Comparison, arithmetic, exact, unit
from fuzz.draw import Draw
from fuzz.evaluation import both_ways
from fuzz.maps import drawn_map, drawn_vector
from murf_fast import windows

__all__ = ["neighborhood_attention", "window_attention", "window_attention_argmax", "window_rules"]


def ratio_counts(out: int, n: int, ratio: float) -> np.ndarray:
    """AnyUp's rule in float32, in the documented order."""
    one, r = np.float32(1), np.float32(ratio)
    counts = np.zeros((out, n))
    for i in range(out):
        p = (np.float32(i) + np.float32(0.5)) / np.float32(out)
        start = np.floor(min(max(p - r, np.float32(0)), one) * np.float32(n))
        end = np.ceil(min(max(p + r, np.float32(0)), one) * np.float32(n))
        counts[i, int(start) : int(end)] = 1
    return counts if ratio > 0 else np.ones((out, n))


def neighborhood_counts(out: int, n: int, kernel: int, stride: int, dilation: int) -> np.ndarray:
    """NATTEN's windows of output positions, and the key that each position stands for."""
    counts = np.zeros((out, n))
    for i in range(out):
        group = list(range(i % dilation, out, dilation))
        position = group.index(i)
        middle = min(position // stride * stride + stride // 2, len(group) - 1)
        start = min(max(middle - kernel // 2, 0), len(group) - kernel)
        for j in group[start : start + kernel]:
            counts[i, int((Fraction(2 * j + 1, 2) * n) / out)] += 1
    return counts


def drawn_rule(d: Draw, out: tuple[int, int], grid: tuple[int, int], kinds) -> tuple[windows.Windows, list[np.ndarray]]:
    """A rule as the library makes it, and how often each output counts each key, per axis."""
    kind = d.choice("windows", kinds)
    if kind == "full":
        return windows.full(), [np.ones(pair) for pair in zip(out, grid, strict=True)]
    if kind == "ratio":
        ratio = d.choice("ratio", (0.1, 0.25, 0.0, 1, 0.333), (4, 2, 1, 1, 1))
        counts = [ratio_counts(o, n, ratio) for o, n in zip(out, grid, strict=True)]
        return windows.ratio(out, grid, *([] if ratio == 0.1 else [ratio])), counts
    if kind == "clamped":
        radius = (d.integer("radius.y", 0, 3), d.integer("radius.x", 0, 3))
        at = [np.abs(np.arange(o)[:, None] - np.arange(n)) for o, n in zip(out, grid, strict=True)]
        rule = windows.clamped(radius[0] if radius[0] == radius[1] else radius)
        return rule, [(a <= r).astype(float) for a, r in zip(at, radius, strict=True)]
    if kind == "neighborhood":
        dilation = [max(1, o // n) for o, n in zip(out, grid, strict=True)]
        if given := d.chance("dilation given", 0.4):
            dilation = [d.integer(f"dilation{a}", 1, max(1, o // 2)) for a, o in enumerate(out)]
        kernel = [
            d.integer(f"kernel{a}", 1, max(1, o // s)) for a, (o, s) in enumerate(zip(out, dilation, strict=True))
        ]
        stride = [d.integer(f"stride{a}", 1, k) if d.chance(f"strided{a}", 0.3) else 1 for a, k in enumerate(kernel)]
        rule = windows.neighborhood(
            out, grid, tuple(kernel), stride=tuple(stride), dilation=tuple(dilation) if given else None
        )
        parts = zip(out, grid, kernel, stride, dilation, strict=True)
        return rule, [neighborhood_counts(*part) for part in parts]
    counts, given = [], []
    for axis, (o, n) in enumerate(zip(out, grid, strict=True)):
        table = np.zeros((o, n))
        if kind == "ranges":
            start = torch.randint(0, n, (o,), generator=d.generator)
            end = start + 1 + (torch.rand(o, generator=d.generator) * (n - start)).long()
            for i in range(o):
                table[i, int(start[i]) : int(end[i])] = 1
            given.append((start.int(), end.int()))
        else:
            keys = torch.randint(0, n, (o, d.integer(f"taps{axis}", 1, 4)), generator=d.generator).int()
            np.add.at(table, (np.arange(o)[:, None], keys.numpy()), 1)
            given.append(keys)
        counts.append(table)
    return getattr(windows, kind)(*given, grid), counts


def window_rules(d: Draw) -> list[Comparison]:
    """The tables of a rule, also after a pickle."""
    if d.interpreted:
        return []
    out, grid = d.grid("out", 33), d.grid("grid", 33)
    kinds = ("full", "ratio", "neighborhood", "ranges", "tables")
    if d.chance("one grid", 0.2):
        grid, kinds = out, ("clamped", "neighborhood")
    rule, counts = drawn_rule(d, out, grid, kinds)
    if any((c.sum(1) == 0).any() for c in counts):
        try:
            rule.tables(out, grid)
        except ValueError:
            return []
        raise AssertionError("a window without a key is accepted")
    if d.chance("pickled", 0.5):
        rule = pickle.loads(pickle.dumps(rule))
    if d.chance("cropped", 0.3):
        top, left = d.integer("top", 0, out[0] - 1), d.integer("left", 0, out[1] - 1)
        height, width = d.integer("height", 1, out[0] - top), d.integer("width", 1, out[1] - left)
        rule = rule.crop(top, left, height, width, out=out)
        counts = [counts[0][top : top + height], counts[1][left : left + width]]
        out = height, width
    made = rule.tables(out, grid)
    made = [torch.from_numpy(t.multiplicity()) for t in made]
    if d.change is not None:
        made = [d.change(m) for m in made]
    return [exact(name, m, torch.from_numpy(c)) for name, m, c in zip(("rows", "columns"), made, counts, strict=True)]


def scores_of(q: Tensor, k: Tensor, heads: int, scale: float, counts, bias) -> Tensor:
    """(B, heads, H, W, h, w): products, biases and the logarithm of how often a pair counts."""
    q, k = q.unflatten(1, (heads, -1)), k.unflatten(1, (heads, -1))
    s = torch.einsum("bndyx,bndij->bnyxij", q, k) * scale
    rows, columns = (torch.from_numpy(c).to(q.dtype).log() for c in counts)
    s = s + rows[:, None, :, None] + columns[None, :, None, :]
    if bias is not None:
        s = s + bias[0][:, :, None, :, None] + bias[1][:, None, :, None, :]
    return s


def attended(p: Tensor, v: Tensor, values: str) -> Tensor:
    heads = p.shape[1]
    if values == "mean":
        return torch.einsum("byxij,bcij->bcyx", p.mean(1), v)
    return torch.einsum("bnyxij,bncij->bncyx", p, v.unflatten(1, (heads, -1))).flatten(1, 2)


def gradient_terms(cotangents: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, float]:
    """Sizes of the terms of gradients of scores, which cancel over a window: cotangents times values."""
    if not cotangents or not v.numel():
        return {}
    g = cotangents["result"].double().abs().max() * v.detach().double().abs().max() * v.shape[1]
    by_score = float(g + sum(x.double().abs().max() for name, x in cotangents.items() if name == "lse"))
    many = max(1.0, cotangents["result"][:, 0].numel() ** 0.5)
    return {
        "gradient of q": by_score * scale * float(k.detach().double().abs().max()),
        "gradient of k": by_score * scale * float(q.detach().double().abs().max()) * many,
        "gradient of bias0": by_score * many,
        "gradient of bias1": by_score * many,
    }


def window_attention(d: Draw) -> list[Comparison]:
    dtype = d.dtype()
    most = 3 if d.interpreted else 9
    out, grid = d.grid("out", most), d.grid("keys", most)
    kinds = ("full", "ratio", "neighborhood", "ranges", "tables")
    if d.chance("one grid", 0.2):
        grid, kinds = out, (*kinds, "clamped")
    rule, counts = drawn_rule(d, out, grid, kinds)
    if any((c.sum(1) == 0).any() for c in counts):
        return []  # no key: an error, see window_rules
    if d.chance("pickled", 0.1):
        rule = pickle.loads(pickle.dumps(rule))
    batch, heads = d.batch(), d.choice("heads", (1, 2, 3, 4))
    dim, values = d.choice("dim", (1, 2, 5, 8, 16)), d.choice("values", ("mean", "split"))
    wide = d.choice("width of values", (1, 3, 8, 17)) * (heads if values == "split" else 1)
    wants = d.chance("gradients", 0.35)
    kinds = ("normal", "small", "constant")
    q = drawn_map(d, "q", (batch, heads * dim, *out), dtype, (*kinds, "offset"), wants)
    k = drawn_map(d, "k", (batch, heads * dim, *grid), dtype, kinds, wants)
    v = drawn_map(d, "v", (batch, wide, *grid), dtype, (*kinds, "offset"), wants)
    bias = None
    if d.chance("bias", 0.4):
        bias = tuple(
            drawn_vector(d, f"bias{a}", (heads, o, n)).detach().requires_grad_(wants)
            for a, (o, n) in enumerate(zip(out, grid, strict=True))
        )
    scale = d.choice("scale", (None, 1, 0.3, 3.0, np.float64(0.5)), (4, 1, 1, 1, 0.5))
    with_lse = d.chance("return_lse", 0.4)
    options = {
        "windows": rule,
        "num_heads": d.as_number("heads", heads),
        "scale": scale,
        "bias": bias,
        "return_lse": with_lse,
    }
    if values != "mean" or d.chance("values given", 0.5):
        options["values"] = values
    result = d.call("window_attention", q, k, v, **options)
    result, lse = result if with_lse else (result, None)
    assert result.dtype == dtype
    check_layout(result, q, None)
    factor = dim**-0.5 if scale is None else float(scale)

    def formula(x, dtype):
        by = (x["bias0"], x["bias1"]) if bias is not None else None
        s = scores_of(x["q"], x["k"], heads, factor, counts, by)
        p = s.flatten(4).softmax(-1).view(s.shape)
        return {"result": attended(p, x["v"], values), "lse": s.flatten(4).logsumexp(-1)}

    inputs = {"q": q, "k": k, "v": v}
    inputs |= {"bias0": bias[0], "bias1": bias[1]} if bias is not None else {}
    results = {"result": result} | ({"lse": lse} if with_lse else {})
    wide = arithmetic(dtype)
    return both_ways(formula, inputs, results, d.generator, wide, lambda g: gradient_terms(g, q, k, v, abs(factor)))


def window_attention_argmax(d: Draw) -> list[Comparison]:
    dtype = d.dtype()
    most = 3 if d.interpreted else 9
    out, grid = d.grid("out", most), d.grid("keys", most)
    rule, counts = drawn_rule(d, out, grid, ("full", "ratio", "neighborhood", "ranges", "tables"))
    if any((c.sum(1) == 0).any() for c in counts):
        return []  # no key: an error, see window_rules
    batch, heads, dim = d.batch(), d.choice("heads", (1, 2, 3, 4)), d.choice("dim", (1, 2, 5, 8, 16))
    values, classes = d.choice("values", ("mean", "split")), d.choice("classes", (1, 3, 17, 70))
    q = drawn_map(d, "q", (batch, heads * dim, *out), dtype, ("normal", "small"), False)
    k = drawn_map(d, "k", (batch, heads * dim, *grid), dtype, ("normal", "small"), False)
    wide = classes * (heads if values == "split" else 1)
    v = drawn_map(d, "v", (batch, wide, *grid), dtype, ("normal", "offset"), False)
    bias = None
    if d.chance("class_bias", 0.6):
        bias = drawn_vector(d, "class_bias", (batch, classes) if d.chance("by image", 0.3) else (classes,))
    labels = d.call("window_attention_argmax", q, k, v, windows=rule, num_heads=heads, values=values, class_bias=bias)
    assert labels.dtype == torch.uint8
    assert labels.shape == (batch, *out)
    if not labels.numel():
        return []

    def logits(dtype):
        q_, k_, v_ = (x.to(dtype) for x in (q, k, v))
        s = scores_of(q_, k_, heads, dim**-0.5, counts, None)
        result = attended(s.flatten(4).softmax(-1).view(s.shape), v_, values)
        if values == "split":
            result = result.unflatten(1, (heads, -1)).sum(1)
        return result if bias is None else result + bias.to(dtype).view(-1, classes, 1, 1)

    exact_logits = logits(torch.float64)
    chosen, best = exact_logits.gather(1, labels.long()[:, None]), exact_logits.amax(1, keepdim=True)
    # Two logits that are compared have an error each: a float32 sum's, and that of weights in the dtype of the values.
    error = (logits(arithmetic(dtype)).double() - exact_logits).abs().max() + unit(dtype) * v.double().abs().max() * (
        wide // classes
    )
    return [Comparison("the chosen logit", chosen, best, 4 * error.expand(best.shape), torch.float64)]


def neighborhood_attention(d: Draw) -> list[Comparison]:
    dtype = d.dtype()
    grid = d.grid("grid", 3 if d.interpreted else 11)
    batch, heads, dim = d.batch(), d.choice("heads", (1, 2, 3)), d.choice("dim", (1, 3, 8, 16))
    dilation = [
        d.integer(f"dilation{a}", 1, max(1, n // 2)) if d.chance("dilated", 0.3) else 1 for a, n in enumerate(grid)
    ]
    kernel = [d.integer(f"kernel{a}", 1, n // s) for a, (n, s) in enumerate(zip(grid, dilation, strict=True))]
    stride = [d.integer(f"stride{a}", 1, k) if d.chance("strided", 0.3) else 1 for a, k in enumerate(kernel)]
    wants = d.chance("gradients", 0.35)
    width = d.choice("width of values", (1, 3, 8, 17))
    q, k, v = (
        drawn_map(d, name, (batch, heads * n, *grid), dtype, ("normal", "small"), False)
        for name, n in (("q", dim), ("k", dim), ("v", width))
    )
    q, k, v = (x.permute(0, 2, 3, 1).unflatten(3, (heads, -1)).detach().requires_grad_(wants) for x in (q, k, v))
    kind = d.choice("bias", ("none", "slopes", "tables"), (3, 1, 1))
    bias = None
    if kind != "none":
        shapes = [(heads,) if kind == "slopes" else (heads, n, n) for n in grid]
        bias = tuple(drawn_vector(d, f"bias{a}", s).detach().requires_grad_(wants) for a, s in enumerate(shapes))
    scale = d.choice("scale", (None, 1, 0.3))
    one = [x[0] if x[0] == x[1] and d.chance("one number", 0.5) else tuple(x) for x in (kernel, stride, dilation)]
    result = d.call(
        "neighborhood_attention", q, k, v, kernel_size=one[0], stride=one[1], dilation=one[2], scale=scale, bias=bias
    )
    assert result.dtype == dtype
    parts = zip(grid, grid, kernel, stride, dilation, strict=True)
    counts = [neighborhood_counts(*part) for part in parts]
    factor = dim**-0.5 if scale is None else scale

    def formula(x, dtype):
        by = None
        if kind == "tables":
            by = (x["bias0"], x["bias1"])
        elif kind == "slopes":
            far = [torch.tensor([[abs(i - j) for j in range(n)] for i in range(n)], dtype=dtype) for n in grid]
            by = [-x[f"bias{a}"][:, None, None] * far[a] for a in (0, 1)]
        maps = [x[name].flatten(3).permute(0, 3, 1, 2) for name in ("q", "k", "v")]
        s = scores_of(maps[0], maps[1], heads, factor, counts, by)
        r = attended(s.flatten(4).softmax(-1).view(s.shape), maps[2], "split")
        return {"result": r.permute(0, 2, 3, 1).unflatten(3, (heads, width))}

    inputs = {"q": q, "k": k, "v": v}
    inputs |= {"bias0": bias[0], "bias1": bias[1]} if bias is not None else {}
    wide = arithmetic(dtype)
    results = {"result": result}
    return both_ways(formula, inputs, results, d.generator, wide, lambda g: gradient_terms(g, q, k, v, abs(factor)))
