"""What Triton kernels become without a GPU: compiled for several, and handed to Triton's launcher.

Both are made once for all processes of a test run. What has not changed since it was recorded is not compiled
(compiled_record.py); what has, once for both.
"""

from __future__ import annotations

import ast
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from compiled_record import REQUESTS

from murf_fast import backends

TESTS = Path(__file__).parent
COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def missing_tools() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return "triton is not installed"
    tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    missing = [name for name in ("ptxas", "cuobjdump") if not (tools / name).exists()]
    return f"this triton comes without {' and '.join(missing)}" if missing else None


def reasons_against_launches() -> str:
    found = [*backends.triton_problems(), *filter(None, [missing_tools()])]
    if COMPILER is None:
        found.append("there is no C compiler, which Triton's launchers and the stand-in driver need")
    if sys.platform != "linux":
        found.append("the stand-in is a library for Linux")
    return "; ".join(found)


def launched_kernels() -> set[str]:
    """Functions under @kernel, which are those under it or @triton.jit that no other of them calls."""
    functions = [
        node
        for path in (TESTS.parent / "kernels").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    ]
    of = {f.name: ast.unparse(f.decorator_list[0]).partition("(")[0] for f in functions}
    called = {node.id for f in functions for node in ast.walk(f) if isinstance(node, ast.Name)}
    launched = {name for name, decorator in of.items() if decorator == "kernel"}
    assert launched == {name for name, decorator in of.items() if decorator in ("kernel", "triton.jit")} - called
    return launched


def compiled(factory: pytest.TempPathFactory) -> list[dict]:
    """A dictionary for every kernel of every configuration (triton_compile_all.py)."""
    if missing_tools():
        pytest.skip(missing_tools())
    return once(factory, "compiled", _compile)


def launched(factory: pytest.TempPathFactory) -> list[dict]:
    """A dictionary for every call (triton_launch_all.py)."""
    if reasons_against_launches():
        pytest.skip(reasons_against_launches())
    compiled(factory)
    return once(factory, "launched", launch)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], list[dict]]) -> list[dict]:
    """What ``make`` gave to the first process of this test run that asked; the others wait for it."""
    shared = shared_folder(factory)
    result = shared / f"{name}.json"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            result.write_text(json.dumps(make(shared)))
    return json.loads(result.read_text())


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of all processes of this test run."""
    folder = factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def compiled_now(requests: Sequence[str], factory: pytest.TempPathFactory) -> list[dict]:
    """As above, of some requests."""
    return _compile(shared_folder(factory), requests)


def _compile(folder: Path, requests: Sequence[str] = REQUESTS) -> list[dict]:
    return _lines([TESTS / "triton_compile_all.py", *requests], folder)


def launched_now(call: str, folder: Path) -> dict:
    """What came of one call, whose kernels are compiled whatever is recorded. ``folder`` is empty."""
    return launch(folder, call)[0]


def launch(folder: Path, *only: str) -> list[dict]:
    library = folder / "libcuda.so.1"
    build = [COMPILER, "-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}", "-o", library]
    subprocess.run([*build, TESTS / "stand_in_cuda.c"], check=True)
    (folder / "libcuda.so").symlink_to(library)
    return _lines([TESTS / "triton_launch_all.py", folder, *only], folder)


def _lines(script: Sequence[str | Path], folder: Path) -> list[dict]:
    """What a script prints."""
    done = subprocess.run([sys.executable, *script], env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def environment(folder: Path) -> dict[str, str]:
    """Of a process that compiles, with one cache for all of them."""
    cache = os.environ.get("TRITON_CACHE_DIR", str(folder / "triton"))
    return os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
