"""Window attention on CPU: parity at every level, gradients, golden outputs of AnyUp, NAF and FeatSharp, bad input."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
from dataclasses import dataclass

import originals
import pytest
import torch
import torch.nn.functional as F
from suite import (
    DTYPES,
    HAS_GPU,
    LAYOUTS,
    TRITON_DTYPES,
    for_triton,
)
from util import assert_gradient_within_budget, assert_within_budget, layouts

import murf_fast
from murf_fast import _extension, windows
from murf_fast.ops.window_attention import shares


@dataclass(frozen=True)
class Case:
    name: str
    rule: windows.Windows
    out: tuple[int, int]
    grid: tuple[int, int]
    heads: int = 2
    head_dim: int = 5
    channels: int = 6
    batch: int = 2
    bias: bool = False

    def __str__(self) -> str:
        return self.name


def sized(name, rule, out, grid, **options):
    return Case(name, rule(out, grid), out, grid, **options)


REPEATED = torch.tensor([[0, 0, 2], [1, 1, 1], [2, 0, 1], [2, 2, 2], [0, 1, 2]], dtype=torch.int32)
EIGHT = torch.full((8,), 60, dtype=torch.int32)
APART = tuple(torch.tensor(ends, dtype=torch.int32) for ends in ([0, 0, 40, 40], [41, 41, 80, 80]))
CASES = (
    sized("ratio", windows.ratio, (23, 17), (6, 5), channels=67),
    sized("ratio_wide", lambda o, g: windows.ratio(o, g, 0.4), (13, 11), (12, 14), head_dim=17, channels=130),
    sized(
        "natten_integer", lambda o, g: windows.neighborhood(o, g, 3), (21, 28), (7, 7), heads=4, head_dim=8, channels=20
    ),
    sized("natten_fraction", lambda o, g: windows.neighborhood(o, g, (3, 5)), (19, 23), (5, 7)),
    sized(
        "same_grid", lambda o, g: windows.neighborhood(o, g, 5), (13, 12), (13, 12), head_dim=16, channels=32, bias=True
    ),
    sized("dilated", lambda o, g: windows.neighborhood(o, g, 3, dilation=(2, 3)), (11, 13), (11, 13)),
    Case("clamped", windows.clamped((3, 1)), (9, 10), (9, 10), heads=3, channels=9, bias=True),
    Case("full", windows.full(), (9, 7), (3, 4), bias=True),
    Case("many_keys", windows.full(), (10, 3), (37, 31), channels=4),
    Case("repeated", windows.tables(REPEATED, REPEATED[:2], (3, 3)), (5, 2), (3, 3)),
    Case("one_pixel", windows.full(), (1, 1), (1, 1), heads=1, head_dim=1, channels=1),
    Case("empty_batch", windows.full(), (3, 4), (2, 2), batch=0),
)
# More keys than are summed in registers, and than a run has, the same for all rows of queries
# and others for each; large results, with rows that are aligned to a vector and rows that are not.
MANY_KEYS = (
    sized("hundreds_of_keys", lambda o, g: windows.ratio(o, g, 0.4), (11, 23), (20, 21), channels=67, batch=1),
    Case("runs", windows.full(), (5, 7), (37, 31), channels=19, batch=1),
    Case("runs_of_bands", windows.clamped((16, 15)), (37, 31), (37, 31), channels=5, batch=1, bias=True),
    # Queries of one block, half of which have no key among the first thousands, half none among the last.
    Case("apart", windows.ranges(APART, (torch.zeros_like(EIGHT), EIGHT), (80, 60)), (4, 8), (80, 60), batch=1),
)
LARGE = (
    sized("aligned", windows.ratio, (135, 125), (4, 5), heads=1, head_dim=3, channels=128, batch=1),
    sized("not_aligned", windows.ratio, (135, 131), (4, 5), heads=1, head_dim=3, channels=120, batch=1),
)
SMALL = tuple(
    c for c in CASES if c.name in ("ratio", "natten_fraction", "same_grid", "clamped", "repeated", "one_pixel")
)
VALUES = pytest.mark.parametrize("values", ["mean", "split"])
by_name = {c.name: c for c in CASES}


def inputs(case: Case, values: str, dtype=torch.float32, layout="channels_last") -> list[torch.Tensor]:
    """q, k, v and, if the case has one, the two biases."""
    generator = torch.Generator().manual_seed(len(case.name))

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    depth = case.heads * case.head_dim
    channels = case.channels if values == "mean" else -(-case.channels // case.heads) * case.heads
    maps = [
        randn(case.batch, depth, *case.out),
        randn(case.batch, depth, *case.grid),
        randn(case.batch, channels, *case.grid),
    ]
    maps = [layouts(2 * m.to(dtype))[layout] for m in maps]
    if case.bias:
        maps += [randn(case.heads, o, n).to(dtype) for o, n in zip(case.out, case.grid, strict=True)]
    return maps


def call(tensors, case, values, backend, return_lse=False):
    q, k, v, *bias = tensors
    options = {"windows": case.rule, "num_heads": case.heads, "values": values, "bias": tuple(bias) or None}
    return murf_fast.window_attention(q, k, v, **options, return_lse=return_lse, backend=backend)


def double(tensors):
    return [t.double() for t in tensors]


@functools.cache
def references(case, values, dtype):
    """Of the reference in float64 and in ``dtype``: one computation for every level, layout and thread count."""
    tensors = inputs(case, values, dtype)
    return [call(t, case, values, "reference", True) for t in (double(tensors), tensors)]


@functools.cache
def reference_gradients(case, values, dtype):
    tensors = inputs(case, values, dtype)
    return [gradients(t, case, values, "reference") for t in (double(tensors), tensors)]


def check_parity(case, values, dtype, layout, backend="native"):
    tensors = inputs(case, values, dtype, layout)
    results = call(tensors, case, values, backend, True)
    for name, a, o, s in zip(("out", "lse"), results, *references(case, values, dtype), strict=True):
        assert_within_budget(a, o, s, f"{case}: {name}")
    assert results[0].dtype == dtype
    assert torch.equal(call(tensors, case, values, backend), results[0])


def gradients(tensors, case, values, backend):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, lse = call(leaves, case, values, backend, True)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(r.shape, generator=generator).to(tensors[0].dtype).to(r) for r in (out, lse)]
    return torch.autograd.grad((out, lse), leaves, directions)


def check_gradients(case, values, dtype, layout, backend="native"):
    tensors = inputs(case, values, dtype, layout)
    names = ("q", "k", "v", "bias of rows", "bias of columns")
    own, both = gradients(tensors, case, values, backend), reference_gradients(case, values, dtype)
    for name, a, o, s in zip(names, own, *both, strict=False):
        assert a.dtype == dtype
        if o.norm() < 1e-9 * len(o.flatten()):  # a single key: the true gradient is zero
            torch.testing.assert_close(a, torch.zeros_like(a), atol=1e-6, rtol=0)
        else:
            assert_gradient_within_budget(a, o, s, f"{case}: gradient of {name}")


@VALUES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, dtype, values):
    check_parity(case, values, dtype, "contiguous")


@VALUES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_keys(level, layout, values):
    for case in MANY_KEYS:
        check_parity(case, values, torch.float32, layout)
    check_parity(MANY_KEYS[0], values, torch.bfloat16, layout)


@VALUES
def test_gradients_of_many_keys(level, values):
    """A softmax's sum of hundreds of exponentials moves every weight at once."""
    for case in MANY_KEYS:
        check_gradients(case, values, torch.float32, "channels_last")


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_results(level, case):
    """Whole vectors of more than 8 MB go past the caches."""
    check_parity(case, "mean", torch.float32, "channels_last")


@VALUES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_layouts(case, layout, values):
    check_parity(case, values, torch.float32, layout)


@VALUES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level(level, dtype, values):
    for case in SMALL:
        check_parity(case, values, dtype, "channels_last")
        check_gradients(case, values, dtype, "channels_last")


@VALUES
@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "contiguous"), (torch.bfloat16, "sliced")], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, layout, dtype, values, three_threads):
    if case.batch:
        check_gradients(case, values, dtype, layout)
    else:
        assert all(not g.any() for g in gradients(inputs(case, values, dtype, layout), case, values, "native"))


def test_one_gradient_at_a_time():
    case = by_name["same_grid"]
    tensors = inputs(case, "mean")
    together = torch.autograd.grad(call([t.requires_grad_() for t in tensors], case, "mean", "native").sum(), tensors)
    for i in range(5):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        alone = torch.autograd.grad(call(leaves, case, "mean", "native").sum(), leaves[i])[0]
        assert torch.equal(alone, together[i])


@VALUES
def test_gradcheck(values):
    case = Case("gradcheck", windows.clamped(1), (3, 2), (3, 2), heads=2, head_dim=2, channels=2, batch=1, bias=True)
    tensors = [t.double().requires_grad_() for t in inputs(case, values)]
    assert torch.autograd.gradcheck(lambda *t: call(t, case, values, "reference", True), tensors)


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_registration(layout, needs_gradient):
    case = by_name["same_grid"]
    tensors = [t.requires_grad_(needs_gradient) for t in inputs(case, "mean", layout=layout)]
    arguments = (*tensors, case.rule.rows, case.rule.columns, case.heads)
    op = torch.ops.murf_fast.window_attention.default
    torch.library.opcheck(op, (*arguments, True, 0.5, True, "native"))
    torch.library.opcheck(op, (*arguments, False, 0.5, False, "native"))


def test_registration_of_backward():
    case = by_name["same_grid"]
    q, k, v, *bias = inputs(case, "mean")
    grad, lse = torch.randn(2, v.shape[1], *case.out), torch.randn(2, case.heads, *case.out)
    op = torch.ops.murf_fast.window_attention_backward.default
    rule = (case.rule.rows, case.rule.columns)
    torch.library.opcheck(op, (grad, lse, q, k, v, *bias, *rule, case.heads, True, 0.5, [True] * 5, "native"))
    wanted = [True, False, True, False, False]
    torch.library.opcheck(op, (grad, None, q, k, v, None, None, *rule, case.heads, True, 0.5, wanted, "native"))


def test_compile():
    case = by_name["ratio"]
    tensors = [t.requires_grad_() for t in inputs(case, "mean")]

    def function(*tensors):
        rule = windows.ratio(tuple(tensors[0].shape[2:]), tuple(tensors[1].shape[2:]), 0.1)
        return murf_fast.window_attention(*[2 * t for t in tensors], windows=rule, num_heads=case.heads) * 3

    torch.compiler.reset()
    expected, actual = function(*tensors), torch.compile(function, fullgraph=True)(*tensors)
    assert torch.equal(actual, expected)
    direction = torch.ones_like(expected)
    pairs = (torch.autograd.grad(r, tensors, direction) for r in (actual, expected))
    for a, e in zip(*pairs, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("name", ["ratio", "same_grid"])
def test_threads(name):
    case = by_name[name]
    tensors = inputs(case, "mean")

    def everything():
        return [call(tensors, case, "mean", "native"), *gradients(tensors, case, "mean", "native")]

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
        assert all(torch.equal(a, e) for a, e in zip(result, expected, strict=True))


PEAK = """
import torch, murf_fast
from murf_fast.cli.meter import observed
torch.set_num_threads(1)
def gradients(grid):
    maps = (torch.randn(1, c, *n, requires_grad=True) for c, n in ((8, (8, 8)), (8, grid), (4, grid)))
    maps = list(maps)
    out = murf_fast.window_attention(*maps, windows=murf_fast.windows.full(), num_heads=2, values=VALUES)
    return observed(lambda: torch.autograd.grad(out.sum(), maps))[1]
gradients((9, 9))
print(gradients((256, 256)))
"""


@pytest.mark.skipif(_extension.load_error() is not None, reason=str(_extension.load_error()))
@VALUES
def test_memory_of_gradients_does_not_grow_with_the_window(values):
    """As of 2048^2 queries with 103^2 of 512^2 keys each, in small: the scores of one block would be 16 MiB."""
    script = [sys.executable, "-c", PEAK.replace("VALUES", repr(values))]
    peak = subprocess.run(script, capture_output=True, text=True, check=True).stdout.strip()
    if peak == "None":
        pytest.skip("the system does not tell the resident high-water mark")
    assert int(peak) < 8 * 8 * 256 * 256 * 4


def test_sums_of_gradients_stay_below_the_largest_tensor():
    q, k, v = torch.empty(1, 128, 448, 448, device="meta"), *torch.empty(2, 1, 128, 32, 32, device="meta")
    rule = windows.ratio((448, 448), (32, 32))
    assert shares(rule.rows, rule.columns, q, k, v, False) >= 16
    rule = windows.full()
    k = v = q = torch.empty(1, 8, 24, 24, device="meta")
    assert shares(rule.rows, rule.columns, q, k, v, False) <= 2


@pytest.mark.parametrize("values", ["mean", "split"])
def test_large_scores(values, level):
    """Scores of thousands do not overflow; a bias of -inf excludes a key."""
    q, k, v = torch.randn(1, 4, 5, 5) * 300, torch.randn(1, 4, 3, 3) * 300, torch.randn(1, 6, 3, 3)
    bias = (torch.zeros(2, 5, 3), torch.zeros(2, 5, 3))
    bias[0][:, 2, 1] = -torch.inf
    options = {"windows": windows.full(), "num_heads": 2, "values": values, "bias": bias}
    actual = murf_fast.window_attention(q, k, v, **options)
    torch.testing.assert_close(actual, murf_fast.window_attention(q, k, v, **options, backend="reference"))


def golden(name):
    return {k: torch.from_numpy(v) for k, v in originals.golden(name).items()}


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_naf(case, level):
    data = {k.removeprefix(f"{case}."): v for k, v in golden("naf__window_attention").items()}
    q, k, v = data["q"], data["k"], data["v"]
    rule = windows.neighborhood(tuple(q.shape[2:]), tuple(k.shape[2:]), int(data["kernel"]))
    tables = windows.tables(data["rows"], data["cols"], tuple(k.shape[2:]))
    for used in (rule, tables):
        out = murf_fast.window_attention(q, k, v, windows=used, num_heads=4, values="split")
        assert (out - data["output"]).abs().max() <= 5e-6


@pytest.mark.parametrize("case", [0, 1])
def test_golden_anyup(case, level):
    """The cross-attention block with the paper's weights: one input, both window rules."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    weights = load_file(originals.asset("upsamplers/anyup_paper.safetensors"))
    block = {k.removeprefix("cross_decode."): v for k, v in weights.items() if k.startswith("cross_decode.")}
    data = golden(f"anyup_attention_{case}")
    maps = [F.conv2d(data["q"], block["conv2d.weight"], padding=1), data["k"]]
    for i, name in enumerate(("q", "k")):
        x = F.rms_norm(maps[i].permute(0, 2, 3, 1), (128,), block[f"cross_attn.norm_{name}.weight"])
        matrix, bias = (block[f"cross_attn.attention.in_proj_{p}"].chunk(3)[i] for p in ("weight", "bias"))
        maps[i] = F.linear(x, matrix, bias).permute(0, 3, 1, 2)
    out, grid = (tuple(x.shape[2:]) for x in maps)
    kernel = tuple(max(3, round(0.2 * n)) // 2 * 2 + 1 for n in grid)
    rules = {"dense": windows.ratio(out, grid, 0.1), "natten": windows.neighborhood(out, grid, kernel)}
    for name, rule in rules.items():
        result = murf_fast.window_attention(*maps, data["v"], windows=rule, num_heads=4)
        assert (result - data[f"output_{name}"]).abs().max() <= 1e-5


def test_golden_featsharp(level):
    data = golden("featsharp__local_attention")
    q, k, v = (data[f"attn.{n}"] for n in "qkv")
    heads, width, side = q.shape[1], 3, int(data["attn.width"])
    scale = width**-0.5
    q, k, v = (x.mT.flatten(1, 2).unflatten(2, (side, side)) for x in (q, k, v))
    distance = (torch.arange(side)[:, None] - torch.arange(side)).abs().float()
    head = torch.arange(heads)
    slope = 2.0 ** -(1 + head // 2)
    bias = tuple(-(slope * (head % 2 == axis))[:, None, None] * distance for axis in (0, 1))
    out = murf_fast.window_attention(
        q, k, v, windows=windows.clamped(3), num_heads=heads, values="split", scale=scale, bias=bias
    )
    out = out.unflatten(1, (heads, -1))[:, :, :width].flatten(1, 2).flatten(2).mT
    assert (out - data["attn.heads_concat"]).abs().max() <= 4e-5


MAP, GRID = torch.ones(1, 4, 5, 6), torch.ones(1, 4, 2, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": [1.0]}, TypeError, "`q` must be a tensor, got list"),
        ({"k": GRID.double()}, TypeError, "`k` must have the dtype of `q`, torch.float32, got torch.float64"),
        ({"k": GRID.expand(2, -1, -1, -1)}, ValueError, "`k` must have the batch size of `q`, 1, got 2"),
        ({"k": torch.ones(1, 6, 2, 3)}, ValueError, "`k` must have the channels of `q`, 4, got 6"),
        ({"v": torch.ones(1, 4, 2, 4)}, ValueError, r"`v` must have the grid of `k`, \(2, 3\), got \(2, 4\)"),
        ({"num_heads": 3}, ValueError, "`num_heads` must divide the 4 channels of `q`, got 3"),
        ({"v": torch.ones(1, 5, 2, 3), "values": "split"}, ValueError, "must divide the 5 channels of `v`"),
        ({"values": "sum"}, ValueError, "`values` must be one of .*'sum'"),
        ({"scale": float("inf")}, ValueError, "`scale` must be finite, got inf"),
        ({"scale": "a"}, TypeError, "`scale` must be a number, got 'a'"),
        ({"windows": 7}, TypeError, "`windows` must be a rule of murf_fast.windows, got int"),
        ({"windows": windows.ratio(5, (2, 3))}, ValueError, r"its out is \(5, 5\), `q` has \(5, 6\)"),
        ({"windows": windows.ratio((5, 6), 3)}, ValueError, r"its grid is \(3, 3\), `k` has \(2, 3\)"),
        ({"windows": windows.clamped(1)}, ValueError, "need one grid for queries and keys"),
        ({"bias": torch.ones(2, 5, 2)}, TypeError, r"`bias` must be a pair of tensors \(rows, columns\)"),
        ({"bias": (torch.ones(2, 5, 2), torch.ones(2, 6, 2))}, ValueError, r"`bias\[1\]` must have shape \(2, 6, 3\)"),
        ({"q": torch.ones(1, 4, 0, 6)}, ValueError, "`q` must have C, H, W >= 1"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"q": MAP, "k": GRID, "v": GRID, "windows": windows.full(), "num_heads": 2, **change}
    with pytest.raises(error, match=words):
        murf_fast.window_attention(**arguments)


FEW = torch.tensor([[0, 0, 2], [1, 1, 1]], dtype=torch.int32)
TRITON_CASES = (
    Case("ratio", windows.ratio((7, 5), (4, 3), 0.2), (7, 5), (4, 3), channels=19),
    Case("shifted", windows.neighborhood((5, 4), (5, 4), 3), (5, 4), (5, 4), head_dim=17, batch=1, bias=True),
    Case("fraction", windows.neighborhood((7, 8), (3, 3), 2), (7, 8), (3, 3), batch=1),
    Case("repeated", windows.tables(FEW, FEW, (3, 3)), (2, 2), (3, 3), batch=1),
    Case("wide", windows.full(), (2, 3), (3, 18), heads=1, batch=1, channels=3),
    # More queries of a tile of keys, and more channels, than one program takes.
    Case("many_queries", windows.full(), (17, 18), (2, 3), heads=2, batch=1, head_dim=34, channels=36, bias=True),
)
SHAPES = for_triton(TRITON_CASES, [c for c in CASES if c.batch])


def on(tensors, device):
    return [t.to(device) for t in tensors]


@pytest.mark.parametrize("values", ["mean", "split"])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("layout", for_triton(["channels_last"], ["contiguous"]))
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_triton(case, layout, dtype, values, device):
    tensors = on(inputs(case, values, dtype, layout), device)
    oracles = call(double(tensors), case, values, "reference", True)
    same = call(tensors, case, values, "reference", True)
    for name, a, o, s in zip(("out", "lse"), call(tensors, case, values, "triton", True), oracles, same, strict=True):
        assert_within_budget(a, o, s, f"{case}: {name}")


@pytest.mark.parametrize("values", ["mean", "split"])
@pytest.mark.parametrize("dtype", TRITON_DTYPES if HAS_GPU else [torch.float32], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_triton_gradients(case, dtype, values, device):
    tensors = on(inputs(case, values, dtype), device)
    oracle, same = (gradients(t, case, values, "reference") for t in (double(tensors), tensors))
    # One rounding of the largest score is so many roundings of a weight, whichever way its exponential is computed.
    score = call(double(tensors), case, values, "reference", True)[1].abs().max()
    for i, (a, o, s) in enumerate(zip(gradients(tensors, case, values, "triton"), oracle, same, strict=True)):
        if o.norm() > 1e-9 * o.numel():
            assert_within_budget(a, o, s, f"{case}: gradient {i}", terms=float(score * o.abs().max()))
            norm = o.norm()
            assert (a.double() - o).norm() <= 2 * (s.double() - o).norm() + torch.finfo(dtype).eps * norm
