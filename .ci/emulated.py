"""A plugin of pytest: kernels run in another process, for another processor, and all else here.

    MURF_FAST_KERNELS="qemu-aarch64-static .../python3.11 .ci/emulated_end.py .../_native.so" \
      PYTHONPATH=.ci python -m pytest -p emulated tests/test_resize.py

The tests, PyTorch and the references run at full speed, and only what an extension does is emulated. In place of the
extension stands a module with its names, whose calls go to the process named above, with the memory that they are
pointed to; what they wrote there comes back. Levels and all else that the extension says are the other one's, and every
call takes its arguments apart there as it would here. Memory lies there as it does here, modulo a cache line.

An address is an integer that lies in a tensor whose ``data_ptr`` was asked for. One of any other memory fails the
test. Processes that a test starts have this machine's extension: tests of those say nothing of the other one.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import os
import pickle
import shlex
import subprocess
import sys
import threading
import types
from collections import Counter
from typing import Any

import pytest
import torch

from murf_fast import _native as local

# Addresses begin far above all sizes, strides and counts.
LOWEST = 1 << 44
# What is no kernel: what an extension says of itself, and huge pages, which are a matter of the memory here.
QUESTIONS = ("available_levels", "current_level", "has_bf16_products", "has_openmp", "threads_for")
KEPT_HERE = ("prefer_huge_pages",)


class Memory:
    """Where the tensors lie whose addresses were taken: storages by their beginnings, the latest where two overlap."""

    def __init__(self) -> None:
        self.begins: list[int] = []
        self.sizes: dict[int, int] = {}

    def note(self, begin: int, size: int) -> None:
        at = bisect.bisect_left(self.begins, begin)
        if at > 0 and self.begins[at - 1] + self.sizes[self.begins[at - 1]] > begin:
            at -= 1
        end = at
        while end < len(self.begins) and self.begins[end] < begin + size:
            del self.sizes[self.begins[end]]
            end += 1
        self.begins[at:end] = [begin]
        self.sizes[begin] = size

    def holding(self, address: int) -> int:
        """The beginning of the storage that holds the address."""
        at = bisect.bisect_right(self.begins, address) - 1
        if at < 0 or address >= self.begins[at] + self.sizes[self.begins[at]]:
            raise AssertionError(f"a kernel was given the address {address:#x}, which no tensor was asked for")
        return self.begins[at]


class OfTable:
    """A class of tables: this machine's extension checks the arrays, the other one is sent them when they are used."""

    numbers = itertools.count()

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, **arrays: Any) -> Table:
        getattr(local, self.name)(**arrays)
        return Table(next(self.numbers), self.name, arrays)


class Table:
    def __init__(self, number: int, name: str, arrays: dict[str, Any]) -> None:
        self.number, self.name, self.arrays = number, name, arrays


class Other:
    """The other process: it answers one call at a time, and a process made by fork has another one."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.memory = Memory()
        self.calls: Counter[str] = Counter()
        self.begin()
        os.register_at_fork(after_in_child=self.begin)

    def begin(self) -> None:
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.sent: set[int] = set()
        self.lock = threading.Lock()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def call(self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        lock = self.lock
        with lock:
            return self._call(name, arguments, keywords)

    def _call(self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Arguments are sent as pairs of a kind and a value, which emulated_end.py takes apart."""
        self.calls[name] += 1
        blocks: dict[int, None] = {}
        tables: dict[int, tuple[str, dict[str, Any]]] = {}

        def packed(value: Any) -> tuple[str, Any]:
            if isinstance(value, Table):
                if value.number not in self.sent:
                    tables[value.number] = value.name, value.arrays
                return "table", value.number
            if isinstance(value, tuple) and hasattr(value, "n_fields"):
                fields = zip(type(value).__match_args__, value, strict=True)
                return "struct", (type(value).__name__, {field: packed(entry) for field, entry in fields})
            if isinstance(value, (tuple, list)):
                return "tuple" if isinstance(value, tuple) else "list", [packed(entry) for entry in value]
            if type(value) is int and value >= LOWEST:
                begin = self.memory.holding(value)
                blocks[begin] = None
                return "address", (begin, value - begin)
            return "value", value

        given = [packed(value) for value in arguments]
        named = {key: packed(value) for key, value in keywords.items()}
        memory = {begin: ctypes.string_at(begin, self.memory.sizes[begin]) for begin in blocks}
        level = os.environ.get("MURF_FAST_CPU", "")
        try:
            pickle.dump((name, level, given, named, memory, tables), self.process.stdin)
            self.process.stdin.flush()
            result, error, written = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            pytest.exit(f"emulated: {name} ended the other process: {self.process.wait()}", returncode=1)
        except KeyboardInterrupt:  # which tests send; the answer is for nobody
            self.process.kill()
            self.process.wait()
            self.begin()
            raise
        self.sent.update(tables)
        for begin, content in written.items():
            ctypes.memmove(begin, content, len(content))
        if error is not None:
            raise error
        return result


def stand_in(other: Other) -> types.ModuleType:
    """A module with the names of the extension: tables, structs, and functions of the other process."""
    module = types.ModuleType(local.__name__)
    module.__file__ = shlex.join(other.command)
    for name, value in vars(local).items():
        if name.startswith("_") or name in KEPT_HERE:
            continue
        if isinstance(value, type):
            value = OfTable(name)
        elif name[0].islower():
            value = lambda *arguments, _name=name, **keywords: other.call(_name, arguments, keywords)  # noqa: E731
        setattr(module, name, value)
    for name in KEPT_HERE:
        setattr(module, name, getattr(local, name))
    return module


def note_addresses(memory: Memory) -> None:
    data_ptr = torch.Tensor.data_ptr

    def noted(self: torch.Tensor) -> int:
        address = data_ptr(self)
        if address and self.device.type == "cpu":
            storage = self.untyped_storage()
            memory.note(storage.data_ptr(), storage.nbytes())
        return address

    torch.Tensor.data_ptr = noted


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--every-kernel", action="store_true", help="fail unless each kernel was called")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: Any) -> None:
    if session.config.getoption("--every-kernel") and uncalled():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = ", ".join(f"{name} {other.calls[name]}" for name in kernels if other.calls[name])
    terminalreporter.write_line(f"emulated: {counts or 'no kernel'}")
    if uncalled():
        terminalreporter.write_line(f"emulated: not called: {', '.join(uncalled())}")


def pytest_unconfigure() -> None:
    other.end()


def uncalled() -> list[str]:
    return [name for name in kernels if not other.calls[name]]


functions = [name for name in vars(local) if name[0].islower()]
kernels = sorted({*functions} - {*QUESTIONS, *KEPT_HERE})
other = Other(shlex.split(os.environ["MURF_FAST_KERNELS"]))
note_addresses(other.memory)
sys.modules[local.__name__] = stand_in(other)
