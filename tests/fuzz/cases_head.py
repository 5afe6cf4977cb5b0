"""``linear_head``: a 1x1 convolution over resized, concatenated maps, as it is written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fuzz.cases_resize import FORMATS, check_layout
from fuzz.cases_upsample import drawn_maps
from fuzz.compare import Comparison, arithmetic, unit
from fuzz.draw import DTYPES, Draw
from fuzz.evaluation import both_ways
from fuzz.maps import drawn_vector
from fuzz.resampling import resize_of

__all__ = ["linear_head"]


def linear_head(d: Draw) -> list[Comparison]:
    wants = d.chance("gradients", 0.35)
    kinds = ("normal", "offset", "small", "integers")
    maps = drawn_maps(d, channels=None, gradients=wants, most=17, kinds=kinds, via=False)
    dtype, batch = maps.dtype, len(maps.maps[0])
    classes = d.choice("classes", (1, 2, 3, 17))
    cls = None
    if d.chance("cls", 0.4):
        cls = []
        for s in range(len(maps.maps)):
            token = torch.randn(batch, d.choice(f"cls{s}.width", (1, 3, 8)), generator=d.generator, dtype=torch.float64)
            token = None if d.chance(f"cls{s}.none", 0.3) else token.to(dtype).requires_grad_(wants)
            cls.append(token)
    tokens = cls or [None] * len(maps.maps)
    widths = [x.shape[1] for pair in zip(maps.maps, tokens, strict=True) for x in pair if x is not None]
    columns = sum(widths)
    weight = torch.randn(classes, columns, generator=d.generator, dtype=torch.float64) / columns**0.5
    weight = weight.to(dtype)
    weight = weight[:, :, None, None] if d.chance("weight (K, D, 1, 1)", 0.4) else weight
    weight = weight.requires_grad_(wants)
    bias = None
    if d.chance("bias", 0.6):
        bias = drawn_vector(d, "bias", (classes,), DTYPES, ("normal", "large")).detach().requires_grad_(wants)
    via = d.grid("via", 13) if d.chance("via", 0.3) else None
    where = via or maps.size
    norm, kind = None, d.choice("norm", ("none", "eval", "train"), (4, 3, 2))
    if kind == "train" and batch * where[0] * where[1] < 8:
        kind = "eval"
    if kind != "none":
        norm = nn.BatchNorm2d(columns, affine=d.chance("norm.affine", 0.8), dtype=torch.float64)
        with torch.no_grad():
            norm.running_mean.copy_(torch.randn(columns, generator=d.generator))
            norm.running_var.copy_(torch.rand(columns, generator=d.generator) + 0.3)
            if norm.affine:
                norm.weight.copy_(torch.randn(columns, generator=d.generator))
                norm.bias.copy_(torch.randn(columns, generator=d.generator))
        norm = norm.to(torch.float64 if dtype == torch.float64 else torch.float32).train(kind == "train")
        norm.requires_grad_(wants)
    layout = d.choice("memory_format", FORMATS, (3, 1, 1))
    before = {} if norm is None else {n: b.double().clone() for n, b in norm.named_buffers()}
    options = {**maps.options, "via": via}
    result = d.call(
        "linear_head",
        maps.maps,
        weight,
        bias,
        size=maps.written_size,
        norm=norm,
        cls=cls,
        memory_format=layout,
        **options,
    )
    assert result.dtype == dtype
    check_layout(result, maps.maps[0], layout)
    mode, antialias = options["mode"], options["antialias"]
    resizes = [resize_of(tuple(m.shape[2:]), where, mode, antialias, None, None, dtype) for m in maps.maps]
    last = None if via is None else resize_of(via, maps.size, mode, antialias, None, None, dtype)
    inputs = {f"map{s}": m for s, m in enumerate(maps.maps)}
    inputs |= {f"cls{s}": t for s, t in enumerate(tokens)} | {"weight": weight, "bias": bias}
    if norm is not None and norm.affine:
        inputs |= {"norm.weight": norm.weight, "norm.bias": norm.bias}

    def stacked(x) -> Tensor:
        parts = []
        for s, rule in enumerate(resizes):
            parts.append(rule(x[f"map{s}"]))
            if f"cls{s}" in x:
                parts.append(x[f"cls{s}"][:, :, None, None].expand(-1, -1, *where))
        return torch.cat(parts, 1)

    def formula(x, dtype):
        z = stacked(x)
        if norm is not None:
            if kind == "train":
                mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
            else:
                mean, variance = before["running_mean"].to(dtype), before["running_var"].to(dtype)
            z = (z - mean[:, None, None]) / (variance + norm.eps).sqrt()[:, None, None]
            if norm.affine:
                z = z * x["norm.weight"][:, None, None] + x["norm.bias"][:, None, None]
        logits = torch.einsum("kd,bdyx->bkyx", x["weight"].flatten(1), z)
        if "bias" in x:
            logits = logits + x["bias"][:, None, None]
        return {"result": logits if last is None else last(logits)}

    if kind == "train":
        z = stacked({name: x.detach().double() for name, x in inputs.items() if x is not None})
        if bool((z.var((0, 2, 3)) < 1e-3 * (1e-3 + z.square().mean((0, 2, 3)))).any()):
            return []  # a column without a deviation: what is left is the rounding of its mean

    def rounded(x, dtype_):
        """By maps: low-resolution logits, and a weight with running statistics in it, are rounded to a half dtype."""
        mean = variance = torch.zeros(columns, dtype=torch.float64)
        w = x["weight"].flatten(1)
        offset = x["bias"][:, None, None] if "bias" in x else 0.0
        if norm is not None:
            mean, variance = before["running_mean"], before["running_var"]
            if kind == "train":
                z = stacked(x)
                mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
            scale = (variance + norm.eps).rsqrt()
            if norm.affine:
                scale = scale * x["norm.weight"]
                offset = offset + (w @ x["norm.bias"])[:, None, None]
            w = w * scale
            w = w if kind == "train" else _Rounded.apply(w, dtype, d.generator)
        total, begin = offset, 0
        for s, rule in enumerate(resizes):
            for name in (f"map{s}", f"cls{s}"):
                if name not in x:
                    continue
                part = slice(begin, begin + x[name].shape[1])
                begin = part.stop
                if name.startswith("cls"):
                    total = total + ((x[name] - mean[part]) @ w[:, part].T)[:, :, None, None]
                    continue
                logits = torch.einsum("kd,bdyx->bkyx", w[:, part], x[name] - mean[part][:, None, None])
                # Maps of one grid are added up in the half dtype: a rounding for each.
                for _ in maps.maps:
                    logits = _Rounded.apply(logits, dtype, d.generator)
                total = total + rule(logits)
        return {"result": total if last is None else last(total)}

    half = dtype in (torch.float16, torch.bfloat16)
    wide = arithmetic(dtype)
    checks = both_ways(formula, inputs, {"result": result}, d.generator, wide, rounded=rounded if half else None)
    if norm is not None and kind == "train":
        checks += _statistics(stacked, inputs, norm, before)
    return checks


class _Rounded(torch.autograd.Function):
    """A value, and its gradient, off by a rounding to ``dtype`` each, up or down."""

    @staticmethod
    def forward(ctx, x, dtype, generator):
        ctx.rule = dtype, generator
        return _off(x, dtype, generator)

    @staticmethod
    def backward(ctx, grad):
        return _off(grad, *ctx.rule), None, None


def _off(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return x * (1 + unit(dtype) * (2.0 * torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int8) - 1))


def _statistics(stacked, inputs, norm: nn.BatchNorm2d, before: dict[str, Tensor]) -> list[Comparison]:
    """The running statistics after one batch."""
    z = stacked({name: x.detach().double() for name, x in inputs.items() if x is not None})
    mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=1)
    checks = []
    squares = (z.square().mean((0, 2, 3)) + z.abs().amax((0, 2, 3))) * 1.0
    for name, now in (("running_mean", mean), ("running_var", variance)):
        want = before[name] + norm.momentum * (now - before[name])
        got = getattr(norm, name)
        allowed = (z[:, 0].numel() + 64) * unit(got.dtype) * (want.abs() + squares)
        checks.append(Comparison(name, got, want, allowed, got.dtype))
    return checks
