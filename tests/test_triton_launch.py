"""Every Triton kernel through Triton's own launcher, against a stand-in for the CUDA driver: what reaches the driver is
what was passed, and calls of extreme shapes compile.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import registry
from launch_edges import EDGES
from test_triton_compile import launched_kernels, missing_tools

from murf_fast import backends

TESTS = Path(__file__).parent
COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
DTYPES = ("float32", "bfloat16")  # float16 is that of calls of extreme shapes
SHARES = 2  # processes


def reasons() -> str:
    found = [*backends.triton_problems(), *filter(None, [missing_tools()])]
    if COMPILER is None:
        found.append("there is no C compiler, which Triton's launchers and the stand-in driver need")
    if sys.platform != "linux":
        found.append("the stand-in is a library for Linux")
    return "; ".join(found)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """What came of every call, by its name."""
    if reasons():
        pytest.skip(reasons())
    folder = tmp_path_factory.mktemp("launch")
    library = folder / "libcuda.so.1"
    build = [COMPILER, "-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}", "-o", library]
    subprocess.run([*build, TESTS / "stand_in_cuda.c"], check=True)
    (folder / "libcuda.so").symlink_to(library)
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(folder / "triton")),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, TESTS / "triton_launch_all.py", folder, str(share), str(SHARES)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=(folder / f"{share}.log").open("w"),
            text=True,
        )
        for share in range(SHARES)
    ]
    calls = {}
    for share, process in enumerate(processes):
        lines = process.communicate()[0].splitlines()
        assert process.returncode == 0, (folder / f"{share}.log").read_text()
        calls |= {call["call"]: call for call in map(json.loads, lines)}
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", registry.all_configurations())
def test_the_driver_gets_what_was_passed(found, name, dtype):
    call = found[f"{name}: {dtype}"]
    assert call["error"] is None
    assert call["faults"] == []
    assert call["kernels"]


def test_every_kernel_is_launched(found):
    assert {name for call in found.values() for name in call["kernels"]} == launched_kernels()


@pytest.mark.parametrize("name", EDGES)
def test_extreme_shapes_compile(found, name):
    assert found[name]["error"] is None
    assert found[name]["faults"] == []
