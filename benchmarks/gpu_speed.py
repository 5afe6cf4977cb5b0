"""Times of a case on a GPU: CUDA events on a cold L2, and replays of a CUDA graph of ours where the case allows it."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable

import torch
from machine import describe
from measure import check, joined
from registry import Case, cases
from torch import Tensor

from murf_fast.cli.clock import Clock
from murf_fast.cli.meter import observed


class CaptureFailed(RuntimeError):
    """A call could not be captured in a graph; the stream is of no more use."""


def replayed(clock: Clock, function: Callable) -> float:
    """Median seconds of a graph replay."""
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            function()
    except RuntimeError as error:
        raise CaptureFailed(f"capture: {error}") from error
    return clock(graph.replay)["median_s"]


def measure(case: Case, device: str, clock: Clock, compiled: bool, say: Callable) -> None:
    """Parity, then ours, then every contender by itself: those of plain PyTorch, or those that compile.

    ``say(kind, **message)`` is told of every result as it comes. Memory is of a call without the others' caches.
    """
    contenders = case.build(device, case.dtype)
    others = {name: f for name, f in contenders.others.items() if ("compile" in name) == compiled}
    if not compiled:
        theirs = _first_that_runs(others)
        # Where only compilers compete, the case beside it has been checked.
        error = None if theirs is None else check(case, contenders, theirs)
        say("case", case=_facts(case, contenders, error), compiles=len(others) < len(contenders.others))
        say("time", name="murf_fast", found=_timed(clock, contenders.ours, device))
    for name, function in others.items():
        try:
            say("time", name=name, found=_timed(clock, function, device))
        except Exception as error:  # out of memory for the most part; the next one may run
            if clock.cuda:
                torch.cuda.synchronize()  # raises where the context is dead
                torch.cuda.empty_cache()
            lines = str(error).splitlines() or [""]
            say("error", text=f"{name}: {type(error).__name__}: {lines[0]}")
    # Last: a failed capture leaves a stream that nothing more can be done with.
    if clock.cuda and case.capturable and not compiled and os.environ.get("MURF_FAST_GPU_CAPTURE") != "0":
        say("time", name="murf_fast", found={"replay_s": replayed(clock, contenders.ours)})


def compile_all(case: Case, device: str) -> None:
    """Ours once, and what Inductor compiles, whose cache is on disk: that takes longer than all measurements."""
    contenders = case.build(device, case.dtype)
    contenders.ours()
    for name, function in contenders.others.items():
        if "compile" in name and device == "cuda":  # Inductor's kernels need a device
            function()


def _timed(clock: Clock, function: Callable, device: str) -> dict:
    return clock(function) | {"peak_bytes": observed(function, device)[1]}


def _first_that_runs(others: dict[str, Callable]) -> Tensor | None:
    """What the error budget is made of."""
    for function in others.values():
        try:
            return joined(function())
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return None


def _facts(case: Case, contenders, error: float | None) -> dict:
    dtype = str(case.dtype).removeprefix("torch.")
    return {
        "op": case.op,
        "case": case.name + (f", {dtype}" if dtype != "float32" and dtype not in case.name else ""),
        "dtype": dtype,
        "error": error,
        "bytes": contenders.result_bytes,
        "operations": contenders.operations,
        "contenders": {},
        # The goals of the CPU suites are for CPUs; on a GPU the write rate is the goal of the copy-like operation.
        "targets": [{"against": t.against, "ratio": t.ratio} for t in case.targets if case.devices == ("cuda",)],
        "write_target": 0.85 if case.op == "upsample_concat" else None,
        "memory_target": case.memory_target,
        "less_memory": case.less_memory,
        "beside": None,
        "facts": case.facts,
    }


def surroundings(device: str, clock: Clock, say: Callable) -> None:
    """The machine; its write and copy (read plus written) rates, and those of matrix products: bfloat16, and on CUDA
    float32 by float32 and by TF32 units; there what it reads from the L2, too.
    """
    n = 1 << 28 if device == "cuda" else 1 << 10
    x, y = torch.zeros(n, device=device), torch.zeros(n, device=device)
    rates = {
        "write_bytes_per_s": 4 * n / clock(lambda: x.fill_(1.0))["median_s"],
        "copy_bytes_per_s": 8 * n / clock(lambda: y.copy_(x))["median_s"],
        "gemm_flops_per_s": _product_rate(device, clock, torch.bfloat16),
    }
    if device == "cuda":
        rates["gemm_float32_flops_per_s"] = _product_rate(device, clock, torch.float32)
        rates["gemm_tf32_flops_per_s"] = _product_rate(device, clock, torch.float32, tf32=True)
        # The CPU's dry run may have no Triton.
        from l2_read import l2_bytes_per_s

        size = torch.cuda.get_device_properties(0).L2_cache_size
        rates["l2_bytes_per_s"] = l2_bytes_per_s(size, lambda read: clock(read)["median_s"])
    say("ceilings", machine=describe(device), ceilings=rates)


def _product_rate(device: str, clock: Clock, dtype: torch.dtype, tf32: bool = False) -> float:
    """Operations a second of a square product that every matrix unit has work in; of random numbers, as the power that
    zeros save raises the clock.
    """
    side = 8192 if device == "cuda" else 32
    a, b, c = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, tf32
    try:
        return 2 * side**3 / clock(lambda: torch.mm(a, b, out=c))["median_s"]
    finally:
        matmul.allow_tf32 = before


def variants(dry: bool = False) -> list[dict]:
    """The cases for a GPU as they stand and, unless an operation has cases in bfloat16, in that: as units of work.

    The first of every operation, then the second of every operation: time may run out.
    """
    by_op: dict[str, list[dict]] = {}
    every = [c for c in cases() if "cuda" in c.devices]
    for case in every:
        own = by_op.setdefault(case.op, [])
        own.append({"op": case.op, "case": case.id, "dtype": str(case.dtype).removeprefix("torch.")})
    for case in every:
        if case.dtype == torch.float32 and not any(c.op == case.op and c.dtype == torch.bfloat16 for c in every):
            by_op[case.op].append({"op": case.op, "case": case.id, "dtype": "bfloat16"})
    rounds = itertools.zip_longest(*by_op.values())
    found = [unit for several in rounds for unit in several if unit]
    # The interpreter has no bfloat16 arithmetic.
    return [unit for unit in found if not (dry and unit["dtype"] == "bfloat16")]


def case_of(unit: dict) -> Case:
    case = next(c for c in cases() if c.id == unit["case"])
    return dataclasses.replace(case, dtype=getattr(torch, unit["dtype"]))
