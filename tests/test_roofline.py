"""What a call must move and compute: counted for every case, as PyTorch counts, and not beaten by what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import every_op
import floors
import formulas
import numpy as np
import pytest
import registry
import report
import roofline
import sized_calls
import torch
import work
from torch.utils.flop_counter import FlopCounterMode

import murf_fast
from murf_fast import reference
from murf_fast.ops import _flops
from murf_fast.tables.resize import axis

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# Results of these find their inputs in the last-level cache, which holds so much at most (of a server's, all of it).
CACHE = 64 << 20
# By oneDNN. Records without a rate of bfloat16 measured products by MKL, which on AMD is slower.
ONEDNN = ("nearest_distance",)
SLOW = ("featsharp_model", "murf", "overhead")  # a second or more to count


def test_every_case_is_recorded():
    rows = floors.recorded()
    wanted = {(case.op, case.name, dtype) for case, dtype in roofline.tasks([])}
    assert rows.keys() == wanted, "python benchmarks/roofline.py --record OP"
    for (_, name, _), row in rows.items():
        if name.endswith(", kept"):  # of the first call
            assert not row["ops"]
            assert not row["operations"]
            continue
        assert min(row["read"], row["written"]) > 0, row
        # A resize to its own size and sums: nothing that counts.
        assert row["operations"] or name == "GuidedFilter, 21 channels of 448^2", row


def first_cases():
    found = {}
    for case in registry.cases():
        if case.op not in SLOW:
            found.setdefault(case.op, case)
    return list(found.values())


@pytest.mark.parametrize("case", first_cases(), ids=lambda c: c.op)
def test_the_record_is_that_of_the_cases(case):
    dtype = str(case.dtype).removeprefix("torch.")
    row = floors.recorded()[case.op, case.name, dtype]
    assert roofline.counted(case, dtype) == row


def test_every_operation_has_a_formula():
    registered = {n for n in dir(torch.ops.murf_fast) if hasattr(getattr(torch.ops.murf_fast, n), "overloads")}
    assert _flops.FORMULAS.keys() == registered


def test_every_public_operation_takes_sizes():
    public = {op.name.partition("[")[0] for op in every_op.OPS}
    assert sized_calls.CALLS.keys() == public


@pytest.mark.parametrize("op", sized_calls.CALLS)
def test_calls_of_sizes_have_work(op):
    small = sized_calls.Sizes(
        channels=64, grid=(8, 9), grids=((5, 6), (8, 9)), size=(33, 35), sizes=((28, 42),), image=(40, 50), classes=7,
        bins=9, filters=4, taps=3, radius=2, window=3, rows=300, queries=20, count=5
    )  # fmt: skip
    found = work.work_of_call(lambda: sized_calls.call_of(op, small, torch.float32))
    assert found.read > 0
    assert found.written > 0
    assert sum(found.operations.values()) > 0
    assert found.ops


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def counted(call) -> int:
    return sum(work.counted(call).operations.values())


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def test_feature_unify_counts_as_pytorch():
    features, basis = r(2, 5, 6, 7), r(4, 1, 3, 3)
    # The reference also counts the pixels that a filter sees at a border, once for all maps.
    at_borders = flops(lambda: torch.conv2d(torch.ones(1, 1, 6, 7), basis[:1], padding=1))
    expected = flops(lambda: reference.feature_unify(features, basis)) - at_borders
    assert counted(lambda: murf_fast.feature_unify(features, basis)) == expected


def test_patch_embed_counts_as_pytorch():
    """Its product; the resize of the images and of the positions is no product."""
    images, weight = torch.zeros(2, 28, 42, 3, dtype=torch.uint8), r(5, 3, 14, 14)
    expected = flops(lambda: torch.conv2d(r(2, 3, 28, 42), weight, stride=14))
    assert counted(lambda: murf_fast.patch_embed(images, [(28, 42)], weight, patch_size=14).tokens) == expected


def test_linear_head_counts_as_pytorch():
    maps, weight = [r(2, 6, 4, 5), r(2, 6, 3, 4)], r(7, 12)
    products = flops(lambda: [torch.einsum("kc,bchw->bkhw", weight[:, :6], m) for m in maps])
    resized = sum(_flops.on_taps(axis(h, 8, "bilinear"), axis(w, 9, "bilinear"), 2 * 7) for h, w in ((4, 5), (3, 4)))
    assert counted(lambda: murf_fast.linear_head(maps, weight, size=(8, 9))) == products + resized


def test_bilateral_kernels_count_as_pytorch():
    t = every_op.bilateral(4, 1)
    params = every_op.params_of(t)["params"]
    keys, pixels = 4, t["guidance"][0, 0].numel()
    networks = flops(lambda: [torch.nn.functional.linear(r(pixels, w.shape[1]), w) for w in params if w.ndim == 2])
    similarity = flops(lambda: torch.bmm(r(pixels, 9, keys), r(pixels, keys, 1)))
    call = counted(lambda: murf_fast.bilateral_kernels(t["guidance"], params, radius=1))
    assert call == networks + similarity


def test_window_attention_counts_as_pytorch_and_its_windows_alone():
    q, k, v = r(2, 8, 5, 6), r(2, 8, 3, 4), r(2, 10, 3, 4)
    q_rows, k_rows = r(4, 30, 4), r(4, 4, 12)
    expected = flops(lambda: (torch.bmm(q_rows, k_rows), torch.bmm(r(2, 30, 12), r(2, 12, 10))))
    full = murf_fast.windows.full()
    assert counted(lambda: murf_fast.window_attention(q, k, v, windows=full, num_heads=2)) == expected
    rule = murf_fast.windows.ratio((5, 6), (3, 4), 0.2)
    pairs = np.prod([int((a.multiplicity() > 0).sum()) for a in rule.tables()])
    assert pairs < 30 * 12
    call = counted(lambda: murf_fast.window_attention(q, k, v, windows=rule, num_heads=2))
    assert call == 2 * 2 * pairs * (8 + 10)


def test_dense_attention_counts_as_pytorch():
    from murf_fast.ops._dense_attention import dense_attention

    q, k, v = (r(1, 150, 2, 64) for _ in range(3))
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    expected = flops(lambda: torch.bmm(torch.bmm(rows[0], rows[1].mT), rows[2]))
    assert counted(lambda: dense_attention(q, k, v, 0.125)) == expected


def test_backward_of_attention_counts_as_pytorch():
    """The forward's products, and of the backward the weights again and four more."""
    leaves = [r(1, 8, 5, 6).requires_grad_(), r(1, 8, 3, 4).requires_grad_(), r(1, 8, 3, 4).requires_grad_()]
    full, direction = murf_fast.windows.full(), r(1, 8, 5, 6)

    def call():
        result = murf_fast.window_attention(*leaves, windows=full, num_heads=1)
        return torch.autograd.grad(result, leaves, direction)

    def plain():
        q, k, v = (x.flatten(2).mT for x in leaves)
        result = torch.bmm(torch.bmm(q, k.mT).softmax(2), v)
        return torch.autograd.grad(result, leaves, direction.flatten(2).mT)

    again = flops(lambda: torch.bmm(r(1, 30, 8), r(1, 8, 12)))
    assert counted(call) == flops(plain) + again


def test_image_encoders_count_as_pytorch():
    """AnyUp's encoders and attention, all but the last layer of the keys, which sees pooled pixels."""
    model, image = murf_fast.nn.AnyUp(qk_dim=32).requires_grad_(False), r(1, 3, 12, 16)
    with murf_fast.use_backend("reference"):
        plain = flops(lambda: model.encode_image(image, grids=[(3, 4)]))
    ours = counted(lambda: model.encode_image(image, grids=[(3, 4)]))
    pixels = 12 * 16
    # The 3x3 convolution and the projection are the decoder's in plain PyTorch.
    both = {0, 2 * pixels * 32 * 32 * 9, 2 * pixels * 32 * 32, 2 * pixels * 32 * 32 * 10}
    assert any(plain - 2 * pixels * 32 * 32 + more == ours for more in both), (plain, ours)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "area", "nearest"])
def test_interpolation_counts_a_multiply_add_for_every_tap_but_one(mode):
    y, x = axis(5, 12, mode), axis(7, 9, mode)
    first, second = (int((t.dense() != 0).sum()) - t.out_size for t in (y, x))
    expected = 2 * 3 * min(first * 7 + second * 12, second * 5 + first * 9)
    assert _flops.on_taps(y, x, 3) == expected
    assert (expected == 0) == (mode == "nearest")


def test_bytes_are_those_of_inputs_and_results_once():
    x, bias = r(1, 4, 8, 8), r(4)

    def call():
        inner = murf_fast.resize(x, (16, 16))  # never leaves the call
        return inner.sum((2, 3)) + bias + bias

    found = work.counted(call)
    assert (found.read, found.written) == (4 * (x.numel() + bias.numel()), 4 * bias.numel())
    out = torch.empty(1, 4, 16, 16)
    found = work.counted(lambda: murf_fast.upsample_concat([x[:, :2], x[:, 2:]], (16, 16), out=out))
    assert (found.read, found.written) == (4 * x.numel(), 4 * out.numel())
    row = x[:, :1].expand(1, 4, 8, 8)
    assert work.counted(lambda: row.cos()).read == 4 * 64


def test_nothing_is_computed():
    x = torch.full((1, 64, 64, 64), torch.nan)
    with work.Outlined():
        assert murf_fast.resize(x, (65, 65)).isnan().any() == 0


def committed():
    return sorted((BENCHMARKS / "results").glob("*/results.json"))


@pytest.mark.parametrize("path", committed(), ids=lambda p: p.parent.name)
def test_nothing_measured_beats_its_floor(path):
    """But for what a cache holds, and operations that do with less than their definition and say so."""
    results, works, shares = json.loads(path.read_text()), floors.recorded(), 0
    for case in results["cases"]:
        row = floors.work_in(works, case)
        if row is None:
            continue
        ceilings = case.get("ceilings", results["ceilings"])
        chip = floors.measured(ceilings, bool(results["machine"]["driver"]))
        floor = floors.floor_of(row, chip)
        if floor is None:
            continue
        share = floor.seconds / report.headline(case["contenders"]["murf_fast"])
        shares += 1
        cached = floor.bound == "memory" and row["read"] + row["written"] < CACHE
        fewer = any(op in formulas.FEWER for op in row["ops"])
        by_mkl = "AMD" in results["machine"]["device"] and "gemm_bfloat16_flops_per_s" not in ceilings
        other = by_mkl and case["op"] in ONEDNN
        assert share <= 1 or cached or fewer or other, f"{case['op']}: {case['case']}: {share:.0%} of {floor.bound}"
        assert share > 0
    assert shares


def test_a_floor_is_the_longer_of_both():
    chip = floors.Chip(1e9, {"float32": 1e12})
    assert floors.floor(10**9, {"float32": 10**9}, chip) == (1.0, "memory")
    assert floors.floor(10**3, {"float32": 10**12}, chip) == (1.0, "float32")
    assert floors.floor(10**3, {"bfloat16": 1}, chip) is None
    assert floors.floor(0, {}, chip) is None


def test_old_records_stay_readable():
    """Those of GPUs have no rate of float32, those of CPUs none of bfloat16."""
    old = {"write_bytes_per_s": 2e12, "copy_bytes_per_s": 3e12, "gemm_flops_per_s": 7e14}
    gpu = floors.measured(old, gpu=True)
    assert gpu == floors.Chip(3e12, {"bfloat16": 7e14, "float16": 7e14})
    new = old | {"gemm_float32_flops_per_s": 5e13, "gemm_tf32_flops_per_s": 3e14}
    assert floors.measured(new, gpu=True).flops["float32"] == 1e14
    assert floors.measured(old, gpu=False).flops == {"float32": 7e14}
    assert floors.measured(old | {"gemm_bfloat16_flops_per_s": 9e14}, gpu=False).flops["bfloat16"] == 9e14


def roofline_of(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "roofline.py"), *arguments], capture_output=True, text=True, timeout=120
    )


def test_the_command_says_what_a_chip_could_do():
    ran = roofline_of("resize", "--sizes", "channels=8", "grid=4x5", "size=9", "--chip", "l4", "--json")
    assert ran.returncode == 0, ran.stderr
    line = json.loads(ran.stdout)
    size = 4 * 8 * (4 * 5 + 81)
    assert (line["read"] + line["written"], line["bound"]) == (size, "memory")
    assert line["floor_s"] == pytest.approx(size / 0.3e12)
    assert line["measured_s"] is None
    assert line["share"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sort"], "no such operation: sort"),
        (["resize", "--chip", "abacus"], "no such chip: abacus"),
        (["resize", "--sizes", "classes=3"], "resize takes the sizes batch, channels, grid, size"),
        (["resize", "--sizes", "grid=0"], "grid must be a side or HxW, from 1, got '0'"),
        (["--sizes", "grid=3"], "are of an operation"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["roofline.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        roofline.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_predictions_stand_beside(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["roofline.py", "upsample_concat", "--chip", "h100", "--json"])
    assert roofline.main() == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["op"] for line in lines} == {"upsample_concat"}
    both = [line for line in lines if line["kernels_s"]]
    # What the code of a kernel moves and issues takes as long as what it must move.
    assert both
    assert all(line["kernels_s"] > 0.99 * line["floor_s"] for line in both)


def test_the_table_fits(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["roofline.py", "window_attention", "k_center_greedy", "--chip", "a100"])
    assert roofline.main() == 0
    out = capsys.readouterr().out
    assert "FLOP/byte" in out
    assert f"* {formulas.FEWER['k_center_greedy']}" in out


def test_l2_reads_are_of_the_whole_buffer():
    """In Triton's interpreter: every program's largest is that of all it has read, in the end of everything."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, l2_read\n"
        "x, largest = torch.rand(3 * l2_read.BLOCK), torch.zeros(3)\n"
        "l2_read.read_again(x, largest)\n"
        "assert (largest == x.max()).all(), largest\n"
        "seconds = lambda read: (read(), 2.0)[1]\n"
        "rate = l2_read.l2_bytes_per_s(16 * 4 * l2_read.BLOCK, seconds, 'cpu')\n"
        "assert rate == 4 * 4 * l2_read.BLOCK * l2_read.PASSES / 2\n"
    )
    pytest.importorskip("triton")
    ran = subprocess.run(
        [sys.executable, "-c", code, str(BENCHMARKS)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
