"""How many threads a call runs on: one for small work, and one in a process made by fork."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import murf_fast
from murf_fast import _extension, _fork
from murf_fast.backends import native_problems

pytestmark = pytest.mark.skipif(bool(native_problems()), reason="needs the C++ extension")

TESTS = Path(__file__).parent
# Every registered op on its small valid call, from a process of two threads.
EVERY_OP = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(2)
from test_registered_ops import OPS, call, made
calls = {name: made(name) for name in OPS}
"""


def run(code: str, timeout: int = 120) -> str:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-c", EVERY_OP + code, str(TESTS)],
        capture_output=True, text=True, timeout=timeout, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_threads_follow_the_work():
    threads_for = _extension.module().threads_for
    grain = next(work for work in range(1, 1 << 24, 1 << 10) if threads_for(8, work) == 2) / 2
    assert 1 << 14 < grain < 1 << 20
    for threads in (1, 2, 7, 64):
        for work in (0, 1, grain, 1.9 * grain, 2.1 * grain, 5.5 * grain, 64 * grain, 1e30):
            used = threads_for(threads, work)
            assert 1 <= used <= threads
            assert used == 1 or work >= used * grain * 0.99
            assert used == threads or work <= (used + 1) * grain * 1.01
    assert threads_for(4, float("inf")) == 4


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_small_calls_open_no_parallel_region():
    """A thread's first region of two threads makes it a pool, whose thread stays as long as it does."""
    out = run("""
import threading, time
import murf_fast
def count():
    return len(os.listdir("/proc/self/task"))
def pool(f):
    base, result = count(), []
    def body():
        torch.set_num_threads(2)
        f()
        result.append(count() - base - 1)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    while count() > base:
        time.sleep(1e-3)
    return result[0]
for name in OPS:  # tables are made
    call(name, calls[name])
pool(lambda: None)
x = torch.randn(1, 64, 64, 64)
# Cosines of positions, sums over bands and the order of cells are torch's, and on some processors so are the regions of
# NAF's convolutions.
of_torch = ("image_queries", "image_rectangle", "image_statistics", "nearest_distance_cells")
of_torch += ("naf_queries", "naf_rectangle", "naf_statistics")
print(*[name for name in OPS if name not in of_torch and pool(lambda: call(name, calls[name]))])
print(pool(lambda: murf_fast.resize(x, (512, 512), backend="native")))
""")
    assert out == f"\n{int(_extension.module().has_openmp())}\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_runs_every_op():
    """Large enough for two threads; the parent's pool is in use before."""
    out = run(
        """
import murf_fast
from murf_fast import _fork
g = torch.Generator().manual_seed(0)
x, bank = torch.randn(2, 32, 40, 40, generator=g), torch.randn(3000, 64, generator=g)
labels = torch.randint(0, 32, (2, 300, 300), generator=g)
large = {
    "resize": lambda: murf_fast.resize(x, (300, 300)),
    "concat": lambda: murf_fast.upsample_concat([x, x], (300, 300), memory_format=torch.channels_last),
    "argmax": lambda: murf_fast.upsample_argmax([x], (300, 300)),
    "confusion": lambda: murf_fast.upsample_confusion([x], labels),
    "attention": lambda: murf_fast.window_attention(x, x, x, windows=murf_fast.windows.full(), num_heads=2),
    "blur": lambda: murf_fast.gaussian_blur(x, 3.0),
    "nearest": lambda: murf_fast.nearest_distance(bank[:500], bank)[1],
    "index": lambda: murf_fast.nearest_distance(bank[:500], murf_fast.NearestIndex(bank))[1],
    "k-center": lambda: murf_fast.k_center_greedy(bank, count=20),
    "k-center in pieces": lambda: murf_fast.k_center_greedy(bank, count=20, progress=lambda *_: None),
}
expected = {name: f() for name, f in large.items()}
torch.mm(bank, bank.T)
child = os.fork()
if child == 0:
    import signal
    signal.alarm(60)
    # With NumPy: before the first op here, torch.equal would open a parallel region, and hang.
    same = all((f().numpy() == expected[name].numpy()).all() for name, f in large.items())
    for name in OPS:
        call(name, calls[name])
    os._exit(0 if same and _fork.threads() == torch.get_num_threads() == 1 else 1)
print(os.waitpid(child, 0)[1], _fork.threads())
""",
    )
    assert out.split() == ["0", "2"], out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_runs_what_ops_leave_to_torch():
    """Each in a child of its own: torch waits for the parent's pool in whatever runs before the first op."""
    out = run(
        """
import murf_fast, signal
g = torch.Generator().manual_seed(0)
x, bank = torch.randn(1, 32, 60, 60, generator=g), torch.randn(3000, 256, generator=g)
projection, head, y = torch.randn(128, 256, generator=g), torch.randn(9, 32, generator=g), x.clone().requires_grad_()
grad, labels = torch.randn(1, 64, 150, 150, generator=g), torch.zeros(1, 250, 250).long()
negative = torch._neg_view(bank)
cases = {
    "float64": lambda x=x.double(): murf_fast.resize(x, (300, 300)),
    "float64 blur": lambda x=x.double(): murf_fast.gaussian_blur(x, 3.0),
    "float64 rows": lambda bank=bank.double(): murf_fast.nearest_distance(bank[:50], bank),
    "float64 index": lambda bank=bank.double(): murf_fast.NearestIndex(bank),
    "float64 k-center": lambda bank=bank.double(): murf_fast.k_center_greedy(bank, count=3),
    "reference": lambda: murf_fast.upsample_sum([x, x], (300, 300), backend="reference"),
    "mean": lambda: murf_fast.upsample_mean([x, x], (300, 300), weights=[1, 2]),
    "head": lambda: murf_fast.linear_head([x], head, None, size=(300, 300)),
    "projection": lambda: murf_fast.k_center_greedy(bank, count=3, projection=projection),
    "negated": lambda: murf_fast.resize(torch._neg_view(x), (300, 300)),
    "negated rows": lambda: murf_fast.NearestIndex(negative),
    "gradient": lambda: murf_fast.upsample_concat([y, y], (150, 150)).backward(grad),
    "labels": lambda: murf_fast.upsample_cross_entropy([y], labels).backward(),
}
for f in cases.values():
    f()
torch.mm(bank, bank.T)
for name, f in cases.items():
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        f()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name)
""",
    )
    assert out == "", f"hang: {out}"


def test_small_resize_beside_busy_processes():
    """With a region per call every one waited for the scheduler, hundreds of times as long as torch's."""
    x, spin = torch.randn(2, 3, 5, 6), "print(flush=True)\nwhile True: pass"
    calls = {
        "ours": lambda: murf_fast.resize(x, (7, 9), backend="native"),
        "torch": lambda: F.interpolate(x, (7, 9), mode="bilinear"),
    }
    threads = torch.get_num_threads()
    command = [sys.executable, "-c", spin]
    busy = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(os.cpu_count() or 2)]
    times = {name: [] for name in calls}
    try:
        torch.set_num_threads(max(2, threads))
        for process in busy:
            process.stdout.readline()
        for _ in range(60):
            for name, f in calls.items():
                begin = time.perf_counter()
                f()
                times[name].append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
        for process in busy:
            process.kill()
            process.communicate()
    assert statistics.median(times["ours"]) < 20 * statistics.median(times["torch"])


def test_threads_of_this_process():
    assert not _fork.is_child()
    assert _fork.threads() == torch.get_num_threads()
