"""Run with an installed wheel first on the path: whether its kernels run, in one thread and in two, and with how many
OpenMP runtimes.

Argument: how many of them the process may hold: 1 where the extension shares torch's (docs/wheels.md).
"""

import os
import sys
from pathlib import Path

import torch

import murf_fast
from murf_fast import _extension


def openmp_runtimes() -> set[str]:
    """Names of the OpenMP runtimes in this process; none where there is no /proc."""
    maps = Path("/proc/self/maps")
    files = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    return {name for name in (Path(file).name for file in files) if name.startswith(("libgomp", "libomp", "libiomp"))}


def check_level(level: str) -> None:
    # Enough work for two threads (csrc/work.h), in channels and sizes that fill no register.
    maps, size = [torch.randn(1, 67, n, n) for n in (9, 21)], (101, 103)
    expected = [
        murf_fast.upsample_concat(maps, size, backend="reference"),
        murf_fast.upsample_argmax(maps, size, backend="reference"),
    ]
    os.environ["MURF_FAST_CPU"] = level
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with murf_fast.use_backend("native"):
            results.append([murf_fast.upsample_concat(maps, size), murf_fast.upsample_argmax(maps, size)])
    (concat, labels), in_two_threads = results
    torch.testing.assert_close(concat, expected[0])
    differ = (labels != expected[1]).float().mean()
    assert differ < 1e-3, f"{level}: {differ:.1%} of the labels are others"
    assert all(map(torch.equal, results[0], in_two_threads)), f"{level}: two threads give other bits than one"


def main(allowed: int) -> None:
    extension = _extension.module()
    torch.manual_seed(0)
    for level in extension.available_levels():
        check_level(level)
    found = openmp_runtimes()
    assert len(found) <= allowed, f"{len(found)} OpenMP runtimes in one process: {', '.join(sorted(found))}"
    threads = f"threads by {', '.join(sorted(found))}" if extension.has_openmp() else "one thread"
    print(f"{Path(extension.__file__).name}: {', '.join(extension.available_levels())}; {threads}")


main(int(sys.argv[1]))
