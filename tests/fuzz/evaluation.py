"""Operations that are not linear: their formula in plain torch, in float64 and in the dtype of the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fuzz.compare import Comparison, unit

Tensors = Mapping[str, Tensor]
Formula = Callable[[Tensors, torch.dtype], Tensors]


def both_ways(
    formula: Formula,
    inputs: Mapping[str, Tensor | None],
    results: Tensors,
    generator: torch.Generator,
    wide: torch.dtype,
    terms: Callable[[Tensors], Mapping[str, float]] = lambda cotangents: {},
    rounded: Formula | None = None,
) -> list[Comparison]:
    """Compares results and, where inputs want them, their gradients for random cotangents.

    ``formula`` maps inputs, cast to a dtype, to the results in that dtype. Right is float64. Allowed is four times (for
    gradients sixteen times; four times that for few elements) the largest error of a float32 evaluation and of float64
    ones whose inputs and cotangents are off by a float32 rounding each, and one rounding of every value: at least that
    of a quarter of the largest one, or of what ``terms`` names for results (and "gradient of ...") that are small sums
    of large terms. ``rounded`` is the formula with random roundings that are documented, and its errors count as well.
    float64 results: the same in their precision, with room for the right value's own roundings.
    """
    given = {name: x for name, x in inputs.items() if x is not None}
    leaves = [name for name, x in given.items() if x.requires_grad]
    roots = [name for name, got in results.items() if got.requires_grad]
    cotangents = {
        name: torch.randn(results[name].shape, generator=generator, dtype=torch.float64).to(results[name].dtype)
        for name in (roots if leaves else ())
    }

    def off(x: Tensor) -> Tensor:
        signs = torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int8)
        return x * (1 + unit(torch.float32) * (2.0 * signs - 1))

    def evaluate(
        dtype: torch.dtype, change: Callable[[Tensor], Tensor] = lambda x: x, formula: Formula = formula
    ) -> dict[str, Tensor]:
        cast = {n: change(x.detach().to(dtype)).requires_grad_(x.requires_grad) for n, x in given.items()}
        out = formula(cast, dtype)
        values = {name: out[name].detach().double() for name in results}
        if cotangents:
            grads = gradients_of(out, [cast[name] for name in leaves], change)
            values |= {f"gradient of {name}": g.double() for name, g in zip(leaves, grads, strict=True)}
        return values

    def gradients_of(outputs: Tensors, sources: list[Tensor], change=lambda x: x) -> tuple[Tensor, ...]:
        g = [change(c.to(outputs[name].dtype)) for name, c in cotangents.items()]
        outputs = [outputs[name] for name in cotangents]
        return torch.autograd.grad(outputs, sources, g, allow_unused=True, materialize_grads=True)

    got = {name: r.detach() for name, r in results.items()}
    dtypes = {name: r.dtype for name, r in results.items()}
    if cotangents:
        for name, g in zip(leaves, gradients_of(results, [given[name] for name in leaves]), strict=True):
            got[f"gradient of {name}"] = g
            dtypes[f"gradient of {name}"] = given[name].dtype
    want = evaluate(torch.float64)
    others = [evaluate(torch.float32), *(evaluate(torch.float64, off) for _ in range(3))]
    if rounded is not None:
        others += [evaluate(torch.float64, formula=rounded) for _ in range(3)]
    least = terms(cotangents)
    precision = unit(wide) / unit(torch.float32) * (16 if wide == torch.float64 else 1)
    checks = []
    for name, right in want.items():
        allowed = torch.zeros_like(right)
        if right.numel():
            error = max(float((x[name] - right).abs().nan_to_num(0.0, 0.0).max()) for x in others)
            floor = max(least.get(name, 0.0), float(right.abs().nan_to_num(0.0, 0.0, 0.0).max()) / 4)
            # The order of a gradient's sums is anyone's, and the largest of few errors says little.
            times = (16 if name.startswith("gradient") else 4) * (1 if right.numel() > 8 else 4)
            allowed = times * precision * error + 2 * min(unit(torch.float32), 16 * unit(wide)) * right.abs().clamp(
                min=floor
            )
            allowed = allowed + 16 * torch.finfo(wide).tiny  # exponentials that underflow
        checks.append(Comparison(name, got[name], right, allowed, dtypes[name]))
    return checks
