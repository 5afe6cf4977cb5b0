"""Measuring a case on a CPU: parity first, then every contender interleaved with ours on the same data."""

from __future__ import annotations

import statistics

import interruption
import torch
from registry import Case, Contenders, Rows
from torch import Tensor

from murf_fast.cli.meter import observed, release, seconds_of

SECONDS = 20.0  # per case, for all contenders
FEWEST, MOST = 3, 25
QUICK_SECONDS, QUICK_SCALE = 0.8, 0.2  # per case; of its sides, channels and classes (registry.side)
SLOW = 10.0  # a contender that takes so long is called as rarely as can be, and not twice in a row


class WrongResult(AssertionError):
    """Ours is not within the error budget; nothing is timed."""


def joined(result) -> Tensor:
    return result.joined() if isinstance(result, Rows) else result


def first_of(contenders: Contenders) -> Tensor:
    """The result of the first of the others."""
    return joined(next(iter(contenders.others.values()))())


def check(case: Case, contenders: Contenders, theirs: Tensor) -> float:
    """Largest error of ours against float64, relative to the largest value; raises WrongResult over budget.

    The budget is that of the tests: twice the error of ``theirs``, plain PyTorch's result in the same dtype, plus one
    rounding. Of labels, the logits that they choose are compared, and the error is that of plain PyTorch's logits: two
    logits that are off by a budget each may change places if they are two budgets apart. (What plain PyTorch's labels
    fall short by is luck: nothing, where no two logits are near.)
    """
    ours = joined(contenders.ours())
    if contenders.counted:
        return check_counts(case, contenders, ours)
    worst = 0.0
    for where, oracle in contenders.oracle():
        largest = float(oracle.abs().max())
        values = contenders.logits() if contenders.logits else theirs
        expected = oracle[:, 0].shape if contenders.logits else oracle.shape
        if ours[where].shape != expected:
            raise WrongResult(f"{case.id}: shape {tuple(ours[where].shape)}, expected {tuple(expected)}")
        allowed = 2 * float((values[where].double() - oracle).abs().max())
        allowed += float(torch.finfo(case.dtype).eps) * largest
        if contenders.logits:
            error, allowed = shortfall(oracle, ours[where]), 2 * allowed
        else:
            error = float((ours[where].double() - oracle).abs().max())
        if not error <= allowed:
            raise WrongResult(f"{case.id}: error {error:.3g} against float64, {allowed:.3g} allowed")
        worst = max(worst, error / largest)
    return worst


def check_counts(case: Case, contenders: Contenders, counts: Tensor) -> float:
    """The share of pixels in a wrong count; raises WrongResult if they are more than those with two logits so near that
    either may be taken for the largest. A pixel in a wrong count is one too many there, and one too few elsewhere.
    """
    ((_, oracle),) = contenders.oracle()
    budget = 2 * float((contenders.logits().double() - oracle).abs().max())
    budget += float(torch.finfo(case.dtype).eps) * float(oracle.abs().max())
    top = oracle.topk(2, 1)
    near = int((top.values[:, 0] - top.values[:, 1] <= 2 * budget).sum())
    wrong = int((counts - contenders.counted(top.indices[:, 0])).abs().sum()) / 2
    if not wrong <= near:
        raise WrongResult(f"{case.id}: {wrong:g} pixels in a wrong count, {near} allowed")
    return wrong / top.indices[:, 0].numel()


def shortfall(logits: Tensor, labels: Tensor) -> float:
    """How far the chosen logits stay below the largest."""
    return float((logits.amax(1) - logits.gather(1, labels.long()[:, None])[:, 0]).max())


def quick_cases(cases: list[Case]) -> list[Case]:
    """One case of every operation: the first without a goal against a compiler's code, or else the first."""
    first: dict[str, Case] = {}
    for case in sorted(cases, key=lambda c: any("compile" in target.against for target in c.targets)):
        first.setdefault(case.op, case)
    return [case for case in cases if first[case.op] is case]


def without_compilers(others: dict) -> dict:
    """Those of ``others`` that compile nothing, which takes longer than a quick case; all where none else is left."""
    return {name: call for name, call in others.items() if "compile" not in name and name != "OpenVINO"} or others


def run(benchmark, case: Case, ceilings: dict, quick: bool = False) -> None:
    """Checks, measures memory, and times ours by pytest-benchmark with the others in between its rounds.

    Every timed call follows an untimed one of the same function. A large result lies on pages that the system hands out
    afresh; after a contender has given gigabytes back, a virtual machine's host takes them away, and whoever comes
    next pays up to ten times its own time to get them again. Called in a row, each meets the memory it left itself.

    A quick run takes :data:`QUICK_SECONDS` for a case, leaves compilers out and measures no memory; that its case is a
    small one is the caller's doing (``registry.scale_down``).
    """
    budget = QUICK_SECONDS if quick else SECONDS
    contenders = case.build("cpu", case.dtype)
    error = check(case, contenders, first_of(contenders))
    if quick:
        contenders.others = without_compilers(contenders.others)
    else:
        release()
    functions = {"murf_fast": contenders.ours, **contenders.others}
    memory, first = {}, {}
    for name, function in functions.items():
        first[name] = _seconds(function)  # compiles, fills caches
        memory[name] = None if quick else observed(function)[1]
        if first[name] < SLOW or "compile" in name:
            first[name] = _seconds(function)
    others = {n: [] for n in contenders.others}
    rounds = int(min(MOST, max(FEWEST, budget / sum(2 * seconds for seconds in first.values()))))

    def settle(name, function):
        if first[name] <= SLOW:
            function()

    def others_first():
        for name, function in contenders.others.items():
            # A slow contender needs no more than a few rounds.
            fewest = 1 if first[name] > SLOW else FEWEST
            if len(others[name]) < max(fewest, budget / len(functions) / (2 * first[name])):
                settle(name, function)
                others[name].append(_seconds(function))
        settle("murf_fast", contenders.ours)

    ours = []

    def timed():
        ours.append(_seconds(contenders.ours))

    benchmark.pedantic(timed, setup=others_first, rounds=rounds, warmup_rounds=1)
    times = {"murf_fast": ours[1:], **others}
    summaries = {name: {**_summary(seconds), "peak_bytes": memory[name]} for name, seconds in times.items()}
    median = summaries["murf_fast"]["median_s"]
    benchmark.extra_info.update(
        op=case.op,
        case=case.name,
        dtype=str(case.dtype).removeprefix("torch."),
        error=error,
        threads=torch.get_num_threads(),
        bytes=contenders.result_bytes,
        operations=contenders.operations,
        contenders=summaries,
        relative_time={name: median / summaries[name]["median_s"] for name in others},
        targets=[{"against": t.against, "ratio": t.ratio} for t in case.targets],
        write_target=case.write_target,
        memory_target=case.memory_target,
        less_memory=case.less_memory,
        beside=case.beside,
        facts=case.facts,
        ceilings=ceilings,
    )


def _seconds(function) -> float:
    """Of a call; an interrupted run ends after it."""
    seconds = seconds_of(function)
    interruption.check()
    return seconds


def measured_ceilings() -> dict:
    """This machine's own rates with the threads in use: streaming write, copy (read plus written), and float32 matrix
    products; in bfloat16, too, where the processor multiplies in it.
    """
    from murf_fast import native

    memory = torch.ones(1 << 28)
    copy = torch.ones(1 << 28)
    size = memory.numel() * 4
    rates = {
        "write_bytes_per_s": size / _best(lambda: native.stream_fill(memory)),
        "copy_bytes_per_s": 2 * size / _best(lambda: copy.copy_(memory)),
        "gemm_flops_per_s": _product_rate(torch.float32),
    }
    if getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)():
        rates["gemm_bfloat16_flops_per_s"] = _product_rate(torch.bfloat16)
    return rates


def _product_rate(dtype: torch.dtype, side: int = 2048) -> float:
    """Operations a second, by torch's own call or oneDNN's, which on processors that are not Intel's is up to twice as
    fast in float32 (torch calls MKL).
    """
    a, b, c = (torch.ones(side, side, dtype=dtype) for _ in range(3))
    calls = [lambda: torch.mm(a, b, out=c)]
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return 2 * side**3 / min(_best(call) for call in calls)


def _best(function) -> float:
    function()
    return min(seconds_of(function) for _ in range(7))


def _summary(seconds: list[float]) -> dict:
    ordered = sorted(seconds)
    return {
        "median_s": statistics.median(ordered),
        "p20_s": ordered[int(0.2 * (len(ordered) - 1))],
        "p80_s": ordered[int(0.8 * (len(ordered) - 1) + 0.5)],
        "rounds": len(ordered),
    }
