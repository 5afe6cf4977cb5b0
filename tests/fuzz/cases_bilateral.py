"""``adaptive_conv``, ``bilateral_kernels`` and ``joint_bilateral_upsample``."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fuzz.cases_resize import FORMATS, check_layout
from fuzz.compare import Comparison, arithmetic, derived, unit
from fuzz.draw import DTYPES, Draw
from fuzz.evaluation import both_ways
from fuzz.maps import cotangent, drawn_map, drawn_vector
from fuzz.resampling import resize_of
from murf_fast import BilateralParams

__all__ = ["adaptive_conv", "bilateral_kernels", "joint_bilateral_upsample"]

PADDINGS = ("reflect", "replicate", "constant", None)


def padded_rows(n: int, radius: int, padding: str) -> Tensor:
    """(n + 2 radius, n): which row a padded row is; none for zeros."""
    table = torch.zeros(n + 2 * radius, n, dtype=torch.float64)
    for i in range(n + 2 * radius):
        at = i - radius
        if padding == "reflect":
            at = -at if at < 0 else 2 * (n - 1) - at if at >= n else at
        elif padding == "replicate":
            at = min(max(at, 0), n - 1)
        if 0 <= at < n:
            table[i, at] = 1.0
    return table


def padded_source(
    source: Tensor, size, mode: str | None, padding: str | None, diameter: int, magnitude=False
) -> Tensor:
    """The resized, padded map (B, C, H + D - 1, W + D - 1), or with absolute values and weights."""
    grow = 0 if padding else diameter - 1
    if mode is not None:
        rule = resize_of(tuple(source.shape[2:]), (size[0] + grow, size[1] + grow), mode)
        source = rule.magnitude(source) if magnitude else rule(source)
    source = source.abs() if magnitude else source
    if padding is None:
        return source
    rows, columns = (padded_rows(n, diameter // 2, padding).to(source.dtype) for n in source.shape[2:])
    return rows @ source @ columns.T


def applied(padded: Tensor, kernels: Tensor) -> Tensor:
    """Tap after tap."""
    diameter, (height, width) = math.isqrt(kernels.shape[1]), kernels.shape[2:]
    return sum(
        kernels[:, i * diameter + j, None] * padded[:, :, i : i + height, j : j + width]
        for i in range(diameter)
        for j in range(diameter)
    )


def adaptive_conv(d: Draw) -> list[Comparison]:
    dtype = d.dtype()
    diameter = d.choice("diameter", (1, 3, 5, 7), (1, 3, 2, 2))
    padding, mode = d.choice("padding", PADDINGS), d.choice("mode", ("bicubic", "bilinear", None))
    size = tuple(max(n, diameter // 2 + 1) for n in d.grid("grid", 17))
    grid = tuple(n if padding else n + diameter - 1 for n in size) if mode is None else d.grid("source grid", 13)
    batch, channels = d.batch(), d.choice("channels", (1, 2, 3, 8, 17))
    wants = d.chance("gradients", 0.35)
    kinds = ("normal", "offset", "large", "small", "integers")
    source = drawn_map(d, "source", (batch, channels, *grid), dtype, kinds, wants)
    kernel_dtype = d.choice("kernels.dtype", (dtype, torch.float32)) if dtype != torch.float64 else dtype
    kernels = drawn_map(d, "kernels", (batch, diameter**2, *size), kernel_dtype, ("normal", "small", "constant"), wants)
    bias = drawn_vector(d, "bias", (channels,), kinds=("normal", "large")) if d.chance("bias", 0.5) else None
    if bias is not None and wants:
        bias = bias.detach().requires_grad_()
    layout = d.choice("memory_format", FORMATS, (3, 1, 1))
    given = {"size": size} if d.chance("size", 0.3) else {}
    result = d.call(
        "adaptive_conv", source, kernels, mode=mode, padding=padding, bias=bias, memory_format=layout, **given
    )
    check_layout(result, source, layout)
    wide = arithmetic(dtype)
    leaf = source.detach().double().requires_grad_()
    weights = kernels.detach().double().requires_grad_()
    offset = None if bias is None else bias.detach().double()[:, None, None]
    want = applied(padded_source(leaf, size, mode, padding, diameter), weights)
    want = want if bias is None else want + offset
    # Not zero, where the derivative of an absolute value is.
    size_leaf = source.detach().double().abs().clamp(min=1e-30).requires_grad_()
    size_weights = kernels.detach().double().abs().requires_grad_()
    terms = applied(padded_source(size_leaf, size, mode, padding, diameter, magnitude=True), size_weights)
    # Folded weights: taps and their rows along both axes, then the window's products.
    roundings = 2 * (2 * diameter + 8) + (diameter + 4) ** 2 + 8
    if wide == torch.float64:
        roundings *= 8
    with torch.no_grad():
        bound = roundings * unit(wide) * terms + 1e3 * torch.finfo(wide).tiny * unit(wide)
        if bias is not None:
            bound = bound + 2 * unit(wide) * (offset.abs() + terms)
    checks = [derived("result", result, want, bound, dtype)]
    if wants:
        g = cotangent(d, result)
        result.backward(g)
        right = torch.autograd.grad(want, [leaf, weights], g.double(), retain_graph=True)
        sizes = torch.autograd.grad(terms, [size_leaf, size_weights], g.double().abs())
        counts = (roundings + diameter**2 * 16 + max(size) ** 2, roundings + channels)
        for name, x, w, s, n in zip(("source", "kernels"), (source, kernels), right, sizes, counts, strict=True):
            bound = n * unit(wide) * s + 1e3 * torch.finfo(wide).tiny * unit(wide)
            checks.append(derived(f"gradient of {name}", x.grad, w, bound, x.dtype))
        if bias is not None:
            over, many = (0, 2, 3), g.numel() / max(1, channels) + 4
            bound = many * unit(wide) * g.double().abs().sum(over)
            checks.append(derived("gradient of bias", bias.grad, g.double().sum(over), bound, bias.dtype))
    return checks


def drawn_params(d: Draw, guides: int, radius: int, wants: bool) -> BilateralParams:
    taps, keys = (2 * radius + 1) ** 2, d.choice("keys", (1, 3, 8, 32))
    fixup = d.chance("fixup", 0.6)
    shapes = [(), (), (keys, guides), (keys,), (keys, keys), (keys,)]
    shapes += [(taps, taps + guides), (taps,), (taps, taps), (taps,)] if fixup else []
    dtype = d.choice("params.dtype", DTYPES, (4, 1, 1, 1))
    as_convolution = d.chance("params.convolutions", 0.3)
    params = []
    for i, shape in enumerate(shapes):
        x = torch.randn(shape, generator=d.generator, dtype=torch.float64)
        if i == 0:
            x = x * 0.5 + d.choice("range_temp", (0.0, 1.0, -12.0), (6, 1, 1))
        elif i == 1:
            x = x.abs() * 0.5 + 0.3
        elif len(shape) == 2:
            x = x / shape[1] ** 0.5
            x = x[..., None, None] if as_convolution else x
        params.append(x.to(dtype).requires_grad_(wants))
    return BilateralParams(*params)


def kernels_of(x: Mapping[str, Tensor], radius: int) -> Tensor:
    """The documented formula, tap after tap."""
    diameter = 2 * radius + 1
    guidance = x["guidance"]

    def mixed(y: Tensor, name: str) -> Tensor:
        weight = x[f"{name}_weight{mixed.layer}"]
        return (
            torch.einsum("oc,bchw->bohw", weight.reshape(len(weight), -1), y)
            + x[f"{name}_bias{mixed.layer}"][:, None, None]
        )

    def network(y: Tensor, name: str, mask: Tensor | None) -> Tensor:
        mixed.layer = 0
        hidden = torch.nn.functional.gelu(mixed(y, name))
        hidden = hidden if mask is None else hidden * mask[:, :, None, None]
        mixed.layer = 1
        return mixed(hidden, name)

    p = network(guidance, "range", x.get("range_mask"))
    (height, width), dtype = p.shape[2:], p.dtype
    rows, columns = (padded_rows(n, radius, "reflect").to(dtype) for n in (height, width))
    around = rows @ p @ columns.T
    products = [
        (around[:, :, i : i + height, j : j + width] * p).sum(1) for i in range(diameter) for j in range(diameter)
    ]
    temperature = x["range_temp"].exp().clamp(1e-4, 1e4)
    similar = (temperature * torch.stack(products, 1)).softmax(1)
    step = [-1 + 2 * i / (diameter - 1) if radius else -1.0 for i in range(diameter)]
    squares = torch.tensor([a * a + b * b for a in step for b in step], dtype=dtype)
    near = torch.exp(-squares / (2 * x["sigma_spatial"].square()))[:, None, None]
    kernels = similar * near
    kernels = kernels / kernels.sum(1, keepdim=True).clamp(min=1e-7)
    if "fixup_weight0" not in x:
        return kernels
    return kernels + 0.1 * network(torch.cat([kernels, guidance], 1), "fixup", x.get("fixup_mask"))


def drawn_guidance(d: Draw, dtype: torch.dtype, batch: int, radius: int, wants: bool, most: int = 9):
    size = tuple(max(n, radius + 1) for n in d.grid("grid", most))
    guidance = drawn_map(d, "guidance", (batch, d.choice("guides", (1, 3, 5)), *size), dtype, ("normal",), wants)
    params = drawn_params(d, guidance.shape[1], radius, wants)
    inputs = {"guidance": guidance, **{n: p for n, p in params._asdict().items() if p is not None}}
    masks = {}
    for name, count in (("range_mask", len(params.range_bias0)), ("fixup_mask", (2 * radius + 1) ** 2)):
        if d.chance(name, 0.2) and (name == "range_mask" or params.fixup_bias0 is not None):
            kept = torch.rand(batch, count, generator=d.generator) < 0.8
            masks[name] = kept.to(d.choice(f"{name}.dtype", (torch.float32, dtype))) * 1.25
    return size, guidance, params, inputs, masks


def sigma_terms(cotangents: Mapping[str, Tensor], inputs: Mapping[str, Tensor], sources) -> dict[str, float]:
    """Sizes of the terms of the gradient of sigma, which cancel over the taps of a normalized kernel."""
    if not cotangents or not all(c.numel() for c in cotangents.values()):
        return {}
    size = max(float(c.double().abs().max()) * c.numel() ** 0.5 for c in cotangents.values())
    size *= max([1.0, *(float(s.detach().double().abs().max()) for s in sources)])
    return {"gradient of sigma_spatial": size * 4 / abs(float(inputs["sigma_spatial"].detach())) ** 3}


def bilateral_kernels(d: Draw) -> list[Comparison]:
    dtype, radius = d.dtype(), d.choice("radius", (0, 1, 2, 3))
    radius = min(radius, 1) if d.interpreted else radius
    wants = d.chance("gradients", 0.35)
    _, guidance, params, inputs, masks = drawn_guidance(d, dtype, d.batch(), radius, wants)
    asked = d.choice("dtype of kernels", (None, torch.float32)) if dtype != torch.float64 else None
    result = d.call("bilateral_kernels", guidance, params, radius=d.as_number("radius", radius), dtype=asked, **masks)
    assert result.dtype == (asked or dtype)
    assert result.is_contiguous(memory_format=torch.channels_last)
    wide = arithmetic(dtype)
    fixed = {name: m.double() for name, m in masks.items()}

    def formula(x, dtype):
        return {"kernels": kernels_of({**x, **{n: m.to(dtype) for n, m in fixed.items()}}, radius)}

    return both_ways(formula, inputs, {"kernels": result}, d.generator, wide, lambda g: sigma_terms(g, inputs, ()))


def joint_bilateral_upsample(d: Draw) -> list[Comparison]:
    dtype, radius = d.dtype(), d.choice("radius", (0, 1, 2, 3))
    radius = min(radius, 1) if d.interpreted else radius
    guided = dtype if dtype == torch.float64 or d.chance("guidance as source", 0.6) else torch.float32
    wants, batch = d.chance("gradients", 0.3), d.batch()
    size, guidance, params, inputs, masks = drawn_guidance(d, guided, batch, radius, wants)
    mode = d.choice("mode", ("bicubic", "bilinear"))
    channels = d.choice("channels", (1, 3, 8, 17))
    sources = [
        drawn_map(d, f"source{i}", (batch, channels, *d.grid(f"source{i}.grid", 9)), dtype, ("normal", "offset"), wants)
        for i in range(d.choice("sources", (1, 2), (3, 1)))
    ]
    bias = drawn_vector(d, "bias", (channels,)) if d.chance("bias", 0.4) else None
    if bias is not None and wants and len(sources) == 1:  # else autograd adds up gradients in the dtype of the bias
        bias = bias.detach().requires_grad_()
    layout = d.choice("memory_format", FORMATS, (3, 1, 1))
    single = len(sources) == 1 and d.chance("single", 0.7)
    begin = d.integer("begin", 0, size[0] - 1) if d.chance("rows", 0.3) else None
    rows = None if begin is None else (begin, d.integer("end", begin + 1, size[0]))
    results = d.call(
        "joint_bilateral_upsample",
        sources[0] if single else sources,
        guidance,
        params,
        radius=radius,
        mode=mode,
        bias=bias,
        rows=rows,
        memory_format=layout,
        **masks,
    )
    results = [results] if single else results
    for source, result in zip(sources, results, strict=True):
        check_layout(result, source, layout)
    fixed = {name: m.double() for name, m in masks.items()}

    def formula(x, dtype):
        kernels = kernels_of({**x, **{n: m.to(dtype) for n, m in fixed.items()}}, radius)
        out = {}
        for i in range(len(sources)):
            r = applied(padded_source(x[f"source{i}"], size, mode, "reflect", 2 * radius + 1), kernels)
            r = r if bias is None else r + x["bias"][:, None, None]
            out[f"result{i}"] = r if rows is None else r[:, :, slice(*rows)]
        return out

    inputs |= {f"source{i}": s for i, s in enumerate(sources)} | {"bias": bias}
    got = {f"result{i}": r for i, r in enumerate(results)}
    wide = arithmetic(dtype)
    return both_ways(formula, inputs, got, d.generator, wide, lambda g: sigma_terms(g, inputs, sources))
