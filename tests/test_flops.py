"""``FlopCounterMode`` counts our operations, whenever its module comes, by the formulas of the roofline."""

from __future__ import annotations

import subprocess
import sys

import every_op
import pytest
import torch
import work
from torch.utils.flop_counter import FlopCounterMode

import murf_fast
from murf_fast.ops import _flops


def total(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_every_operation_has_a_formula():
    registered = {n for n in dir(torch.ops.murf_fast) if hasattr(getattr(torch.ops.murf_fast, n), "overloads")}
    assert registered == _flops.FORMULAS.keys()


@pytest.mark.parametrize("op", every_op.OPS, ids=str)
def test_the_counter_agrees_with_the_roofline(op):
    tensors = op.tensors(4)
    op.call(tensors)  # the roofline counts a second call, too, which finds a kept table of positions
    counted = total(lambda: op.call(tensors))
    assert counted > 0
    assert counted == sum(work.counted(lambda: op.call(tensors)).operations.values())


def test_a_backward_counts():
    x, basis = torch.randn(2, 5, 6, 7, requires_grad=True), torch.randn(4, 1, 3, 3)
    forward = total(lambda: murf_fast.feature_unify(x, basis))
    assert forward == 2 * x.numel() * basis.numel()
    both = total(lambda: murf_fast.feature_unify(x, basis).sum().backward())
    assert both == 3 * forward  # the responses again, and the gradient of the features


@pytest.mark.parametrize("first", ["murf_fast", "torch.utils.flop_counter"])
def test_whichever_module_comes_first(first):
    script = f"""
import sys, torch, {first}
if {first!r} == "murf_fast":
    assert "torch.utils.flop_counter" not in sys.modules
import murf_fast
from torch.utils.flop_counter import FlopCounterMode, flop_registry
assert torch.ops.murf_fast.resize in flop_registry and torch.ops.aten.mm in flop_registry
assert not any(type(finder).__module__.startswith("murf_fast") for finder in sys.meta_path)
with FlopCounterMode(display=False) as counter:
    murf_fast.linear_head([torch.randn(1, 4, 3, 3)], torch.randn(2, 4), size=6)
by_op = counter.get_flop_counts()["Global"]
assert by_op.pop(torch.ops.murf_fast.upsample_sum) > 0 and sum(by_op.values()) == 2 * 9 * 4 * 2, by_op
"""
    subprocess.run([sys.executable, "-c", script], check=True)
