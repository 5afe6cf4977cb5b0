"""What every op is tested for. An op's test file gives `call(maps, case, backend)` and runs these checks on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from util import assert_gradient_within_budget, assert_within_budget, layouts

from murf_fast import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_GPU = torch.cuda.is_available()
# The interpreter computes half precision with NumPy, which has no bfloat16.
TRITON_DTYPES = DTYPES if HAS_GPU else (torch.float32, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "tokens", "sliced")
_TRITON_ON = "cuda" if HAS_GPU else "cpu"
_AGAINST_TRITON = "; ".join(backends.reasons_against("triton", _TRITON_ON))
# For tests that are the same for both kinds of kernel: C++ on the CPU, Triton as the fixture `device` has it.
KERNELS = [
    pytest.param("native", "cpu", id="native"),
    pytest.param(
        "triton",
        _TRITON_ON,
        id="triton",
        marks=[
            *([pytest.mark.gpu] if HAS_GPU else []),
            pytest.mark.skipif(bool(_AGAINST_TRITON), reason=_AGAINST_TRITON),
        ],
    ),
]
every_kernel = pytest.mark.parametrize(("backend", "device"), KERNELS)


@dataclass(frozen=True)
class Case:
    """Shapes of the maps (channels, height, width), the grid, and how to get there."""

    name: str
    maps: tuple[tuple[int, int, int], ...]
    size: tuple[int, int]
    mode: str = "bilinear"
    antialias: bool = False
    via: tuple[int, int] | None = None
    batch: int = 2

    @property
    def resize(self) -> dict:
        return {"mode": self.mode, "antialias": self.antialias, "via": self.via}

    def __str__(self) -> str:
        return self.name


# Primes, single pixels, one under and over the kernels' sixteen lanes, non-integer ratios, both directions.
SUM_CASES = (
    Case("up", ((5, 7, 6), (5, 3, 4)), (23, 17)),
    Case("sixteen", ((16, 5, 3),), (11, 13)),
    Case("fifteen", ((15, 5, 3),), (11, 13)),
    Case("seventeen", ((17, 5, 3), (17, 2, 7)), (11, 13)),
    Case("one_pixel", ((3, 1, 1), (3, 4, 1)), (5, 7)),
    Case("to_one_pixel", ((4, 6, 9),), (1, 1)),
    Case("one_channel", ((1, 5, 7), (1, 5, 7), (1, 9, 11)), (31, 37)),
    Case("same_grid", ((6, 9, 8), (6, 9, 8)), (9, 8)),
    Case("down", ((7, 19, 23),), (5, 4)),
    Case("via", ((9, 4, 5), (9, 7, 3)), (29, 31), via=(11, 13)),
    Case("via_bicubic", ((9, 4, 5),), (29, 31), mode="bicubic", via=(11, 13)),
    Case("bicubic", ((8, 7, 5), (8, 4, 6)), (19, 23), mode="bicubic"),
    Case("bilinear_antialias", ((8, 17, 15), (8, 4, 6)), (7, 11), antialias=True),
    Case("bicubic_antialias", ((8, 17, 15), (8, 4, 6)), (7, 11), mode="bicubic", antialias=True),
    Case("area", ((8, 17, 15), (8, 4, 6)), (7, 11), mode="area"),
    Case("nearest", ((8, 17, 15), (8, 4, 6)), (7, 11), mode="nearest"),
    Case("nearest_exact", ((8, 17, 15), (8, 4, 6)), (7, 11), mode="nearest-exact"),
    Case("many_rows", ((3, 37, 5),), (263, 9), batch=1),
    Case("empty_batch", ((3, 4, 5),), (7, 8), batch=0),
)
CONCAT_CASES = (
    Case("different_channels", ((5, 7, 6), (16, 3, 4), (1, 9, 2)), (23, 17)),
    Case("wide", ((130, 4, 3), (67, 2, 5)), (9, 41), batch=1),
    *SUM_CASES,
)
GRADIENT_CASES = ("up", "seventeen", "one_pixel", "one_channel", "down", "via", "bicubic", "bilinear_antialias", "area")

# The interpreter takes about half a millisecond per program of a launch.
SMALL_CASES = (
    Case("small_up", ((5, 2, 3), (5, 3, 2)), (5, 7)),
    Case("small_seventeen", ((17, 2, 3),), (3, 5), batch=1),
    Case("small_bicubic_via", ((3, 3, 2),), (5, 7), mode="bicubic", via=(4, 5), batch=1),
    Case("small_area_down", ((3, 7, 8), (3, 5, 4)), (3, 3), mode="area", batch=1),
    Case("small_antialias", ((3, 7, 5),), (3, 2), antialias=True, batch=1),
    Case("small_nearest_down", ((2, 7, 5),), (3, 2), mode="nearest", batch=1),
    Case("small_one_pixel", ((1, 1, 1), (1, 3, 1)), (2, 3)),
)
# More classes than a chunk holds; the interpreter affords one pixel row of them.
MANY_CLASSES = Case("many_classes", ((131, 1, 2),), (1, 3), batch=1)
TINY_CASE = Case("tiny", ((5, 2, 1), (5, 1, 2)), (3, 3), batch=1)

Call = Callable[[list[Tensor], Case, str], Tensor]


def for_triton(small: Sequence, more: Sequence) -> list:
    """What a test of a Triton kernel draws from: small cases in the interpreter, all of them on a GPU."""
    return [*small, *more] if HAS_GPU else [*small]


def by_name(cases: tuple[Case, ...], names: tuple[str, ...]) -> list[Case]:
    return [c for c in cases if c.name in names]


def make_maps(case: Case, dtype: torch.dtype = torch.float32, layout: str = "channels_last") -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(case.name))
    return [layouts(torch.randn(case.batch, *m, generator=generator).to(dtype))[layout] for m in case.maps]


def check_parity(
    call: Call, case: Case, dtype: torch.dtype, layout: str, backend: str = "native", device: str = "cpu"
) -> Tensor:
    maps = [m.to(device) for m in make_maps(case, dtype, layout)]
    oracle = call([m.double() for m in maps], case, "reference")
    actual = call(maps, case, backend)
    assert_within_budget(actual, oracle, call(maps, case, "reference"), str(case))
    return actual


def check_gradients(
    call: Call, case: Case, dtype: torch.dtype, layout: str, backend: str = "native", device: str = "cpu"
) -> None:
    def gradients(maps: list[Tensor], backend: str, direction: Tensor) -> tuple[Tensor, ...]:
        leaves = [m.detach().requires_grad_() for m in maps]
        result = call(leaves, case, backend)
        return torch.autograd.grad(result, leaves, direction.to(result.dtype))

    maps = [m.to(device) for m in make_maps(case, dtype, layout)]
    shape = call(maps, case, "reference").shape
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    oracle = gradients([m.double() for m in maps], "reference", direction)
    same_dtype = gradients(maps, "reference", direction)
    actual = gradients(maps, backend, direction)
    for i, (a, o, s) in enumerate(zip(actual, oracle, same_dtype, strict=True)):
        assert a.dtype == dtype
        assert_gradient_within_budget(a, o, s, f"{case}: gradient of map {i}")


def check_gradcheck(call: Call, case: Case) -> None:
    """The reference's own gradients, in float64, against finite differences."""
    maps = [m.double().requires_grad_() for m in make_maps(case)]
    assert torch.autograd.gradcheck(lambda *m: call(list(m), case, "reference"), maps)


def check_opcheck(op, *arguments) -> None:
    """Schema, fake implementation, autograd registration and ahead-of-time tracing."""
    torch.library.opcheck(op, arguments)


def check_compile(call: Call, case: Case) -> None:
    """`fullgraph` compilation gives the eager result and gradients, also within a larger function."""
    maps = [m.requires_grad_() for m in make_maps(case)]

    def function(*maps: Tensor) -> Tensor:
        return call([m * 2 for m in maps], case, "native") * 3

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    expected, actual = function(*maps), compiled(*maps)
    assert torch.equal(actual, expected)
    direction = torch.ones_like(expected)
    if expected.requires_grad:
        for a, e in zip(
            torch.autograd.grad(actual, maps, direction), torch.autograd.grad(expected, maps, direction), strict=True
        ):
            assert torch.equal(a, e)


def check_deterministic_across_threads(call: Call, case: Case) -> None:
    """One and several OpenMP threads, and several Python threads at once, give identical results and gradients."""
    maps = make_maps(case)

    def everything() -> list[Tensor]:
        leaves = [m.detach().requires_grad_() for m in maps]
        result = call(leaves, case, "native")
        if not result.requires_grad:
            return [result]
        return [result.detach(), *torch.autograd.grad(result, leaves, torch.ones_like(result))]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = everything()
        torch.set_num_threads(3)
        results = [everything()]
    finally:
        torch.set_num_threads(threads)
    workers = [threading.Thread(target=lambda: results.append(everything())) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 5
    for result in results:
        for a, e in zip(result, expected, strict=True):
            assert torch.equal(a, e)
