"""Images of a source as pixels, in order, read and decoded ahead by processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np

from murf_fast.data._reader_process import LENGTHS
from murf_fast.data.sources.item import FILE, TAR, Item
from murf_fast.data.sources.parquet import Rows

SCRIPT = Path(__file__).with_name("_reader_process.py")
LARGEST_FILE = 1 << 31  # bytes of one encoded image


class BrokenImageError(ValueError):
    """An image that cannot be read; the message names it and the reason."""


class Readers:
    """So many processes that decode, each fed by a thread that reads the bytes.

    Args:
        count: How many; each holds one image at a time.
        column: Of the tables that images come from.
    """

    def __init__(self, count: int, column: str | None = None) -> None:
        self._column = column
        self._threads = ThreadPoolExecutor(count, "murf_fast-reading")
        self._own = threading.local()
        self._processes: list[_Process] = []

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for what is being read, no more is begun."""
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.end()

    def read(self, items: Iterable[Item], ahead: int) -> Iterator[np.ndarray | BrokenImageError]:
        """The pixels (H, W, 3), uint8, of every item in order, or why there are none.

        Memory: ``ahead`` images beside the one at hand.
        """
        waiting: deque[Any] = deque()
        for item in items:
            waiting.append(self._threads.submit(self._read, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _read(self, item: Item) -> np.ndarray | BrokenImageError:
        own = self._own
        if not hasattr(own, "process"):
            own.process, own.rows = _Process(), Rows(cast("str", self._column))
            self._processes.append(own.process)
        try:
            return own.process.decoded(item.name, _bytes(item, own.rows))
        except BrokenImageError as error:
            return error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return BrokenImageError(reason if item.name in reason else f"{item.name}: {reason}")


def _bytes(item: Item, rows: Rows) -> bytes:
    """The encoded image."""
    if item.kind not in (FILE, TAR):
        return rows.read(item)
    if item.count > LARGEST_FILE:
        raise BrokenImageError(f"{item.name} has {item.count:,} bytes, more than {LARGEST_FILE:,}")
    with open(item.path, "rb") as file:
        file.seek(item.at)
        data = file.read(item.count + (item.kind == FILE))
    if len(data) != item.count:  # images that grew or shrank are others than those that were planned
        raise BrokenImageError(f"{item.name} has {len(data)} bytes, it had {item.count} when the run began")
    return data


class _Process:
    """A process that decodes, started when it is first needed, and again when it was taken down."""

    def __init__(self) -> None:
        self._popen: Any = None  # a subprocess.Popen with pipes

    def decoded(self, name: str, data: bytes) -> np.ndarray:
        """The pixels. Raises a :class:`BrokenImageError`."""
        try:
            told, pixels = self._asked(name, data)
        except (EOFError, BrokenPipeError):
            raise BrokenImageError(f"{name} {self._end_of_process()}") from None
        if "error" in told:
            raise BrokenImageError(told["error"])
        for text in told["warnings"]:
            warnings.warn(text, stacklevel=2)
        return np.frombuffer(pixels, np.uint8).reshape(told["shape"])

    def end(self) -> None:
        if self._popen is not None:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.close()
            self._popen.stdout.close()
            self._popen.wait()
            self._popen = None

    def _asked(self, name: str, data: bytes) -> tuple[dict[str, Any], bytearray]:
        if self._popen is None:
            self._popen = subprocess.Popen(
                [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment()
            )
        text = name.encode(errors="surrogatepass")
        for part in (LENGTHS.pack(len(text), len(data)), text, data):
            self._popen.stdin.write(part)
        self._popen.stdin.flush()
        lengths = LENGTHS.unpack(_exactly(self._popen.stdout, LENGTHS.size))
        told, pixels = (_exactly(self._popen.stdout, length) for length in lengths)
        return json.loads(told), pixels

    def _end_of_process(self) -> str:
        """Why it is no more; the next image gets another."""
        popen, self._popen = self._popen, None
        with contextlib.suppress(BrokenPipeError):
            popen.stdin.close()
        popen.stdout.close()
        status = popen.wait()
        if status < 0:
            return f"crashed the decoder ({signal.Signals(-status).name})"
        return f"ended the decoder with status {status}"


def _environment() -> dict[str, str]:
    """Threads of NumPy's libraries would do nothing here but take memory."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _exactly(file: Any, length: int) -> bytearray:
    """So many bytes; an EOFError if the file ends before."""
    data = bytearray(length)
    view, read = memoryview(data), 0
    while read < length:
        count = file.readinto(view[read:])
        if not count:
            raise EOFError
        read += count
    return data
