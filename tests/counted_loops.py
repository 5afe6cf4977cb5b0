"""Loops whose length is known, counted in their machine code: what benchmarks/sass says of each, a line of JSON.

A store of every thread in a loop is issued once for every warp and turn, however the compiler has unrolled the loop.

python tests/counted_loops.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
import triton
import triton.language as tl
from cost import program_of
from launches import Launch, captured
from sass.run import Memory, UnknownFlow

THREADS = 128
LISTS = (0, 3, 1, 8, 5, 0, 17, 2)


@triton.jit(do_not_specialize=["n"])
def _loop(out, n):
    i = 0
    while i < n:
        tl.store(out + i * 128 + tl.arange(0, 128), i)
        i += 1


@triton.jit
def _constant_loop(out, N: tl.constexpr):
    for i in range(0, N, 2):
        tl.store(out + i * 128 + tl.arange(0, 128), i)


@triton.jit(do_not_specialize=["rows"])
def _nested(out, begin, rows):
    """Lists of different lengths, one in each row."""
    row = 0
    while row < rows:
        at = tl.load(begin + row)
        end = tl.load(begin + row + 1)
        while at < end:
            tl.store(out + at * 128 + tl.arange(0, 128), row)
            at += 1
        row += 1


@triton.jit(do_not_specialize=["divisor"])
def _place(out, divisor):
    """As many turns as 64-bit division of the program's place leaves."""
    program = tl.program_id(0)
    turns = (program // divisor).to(tl.int64) * 3 + program % divisor
    i = turns * 0
    while i < turns:
        tl.store(out + i * 128 + tl.arange(0, 128), program)
        i += 1


@triton.jit
def _reduced(out, numbers):
    """A number that the warps find together."""
    turns = tl.max(tl.load(numbers + tl.arange(0, 256)), axis=0)
    i = 0
    while i < turns:
        tl.store(out + i * 128 + tl.arange(0, 128), i)
        i += 1


@triton.jit(do_not_specialize=["n"])
def _rare(out, x, n):
    """Stores three times, and more often for some data."""
    largest = tl.max(tl.load(x + tl.arange(0, 128)), axis=0)
    i = 0
    while i < 3:
        tl.store(out + i * 128 + tl.arange(0, 128), i)
        i += 1
    if largest > 2.0:
        while i < n:
            tl.store(out + i * 128 + tl.arange(0, 128), i)
            i += 1


@triton.jit
def _endless(out, x):
    i = 0
    while tl.load(x + i) < 1.0:
        tl.store(out + i * 128 + tl.arange(0, 128), i)
        i += 1


def stores(launch: Launch, program: int) -> tuple[int, bool]:
    """Stores that a warp issues, and whether data decided a branch."""
    code, warps = program_of(launch, {}), launch.kernel.metadata.num_warps
    issued, guessed = code.issued(warps, launch.place(program), launch.packed(), Memory(launch.regions()))
    total = sum(
        int(times) * sum(i.name == "STG" for i in block.instructions)
        for block, times in zip(code.blocks, issued, strict=True)
    )
    assert total % warps == 0, (launch.kernel.name, total)
    return total // warps, bool(guessed)


def main() -> None:
    out = torch.empty(1 << 16, dtype=torch.int32)
    begin = torch.tensor([0, *torch.tensor(LISTS).cumsum(0).tolist()], dtype=torch.int32)
    numbers = torch.zeros(256, dtype=torch.int32)
    numbers[201] = 13
    x = torch.zeros(256)
    expected = []
    with captured(90, lambda kernel: True) as launches:
        for n in (0, 1, 3, 4, 5, 37):
            _loop[(1,)](out, n)
            expected.append([(0, n)])
        for n in (8, 54):
            _constant_loop[(1,)](out, N=n)
            expected.append([(0, n // 2)])
        _nested[(2, 3)](out, begin, len(LISTS))
        expected.append([(5, sum(LISTS))])
        _place[(50,)](out, 7)
        expected.append([(p, p // 7 * 3 + p % 7) for p in (0, 6, 7, 31, 49)])
        _reduced[(1,)](out, numbers)
        expected.append([(0, 13)])
        _rare[(1,)](out, x, 9)
        expected.append([(0, 3)])
        _endless[(1,)](out, x)
        expected.append([(0, None)])
    calls = [
        (launch, program, count) for launch, counts in zip(launches, expected, strict=True) for program, count in counts
    ]
    found = [_counted(launch, program) for launch, program, _ in calls]
    backwards = [_counted(launch, program) for launch, program, _ in reversed(calls)][::-1]
    for (launch, program, count), one, again in zip(calls, found, backwards, strict=True):
        what = {"kernel": launch.kernel.name, "program": program, "expected": count}
        print(json.dumps(what | {"counted": one[0], "by_data": one[1], "again": again[0]}))


def _counted(launch: Launch, program: int) -> tuple[int | None, bool]:
    try:
        return stores(launch, program)
    except UnknownFlow:
        return None, True


if __name__ == "__main__":
    main()
