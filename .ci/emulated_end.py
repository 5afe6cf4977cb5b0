"""The process in which emulated.py has the kernels run: no PyTorch, only an extension and numpy.

Argument: the extension's file. Reads calls from the standard input and answers each on the standard output. A call that
writes beside the memory that it was given is an error.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pickle
import sys
from typing import Any

# As far as a vector of any level reaches, and as strictly as addresses are aligned.
MARGIN = 64
UNTOUCHED = bytes([0xA5]) * MARGIN


class Block:
    """Memory with the alignment that it has over there, between two margins."""

    def __init__(self, origin: int, content: bytes) -> None:
        self.content = content
        self.buffer = ctypes.create_string_buffer(len(content) + 4 * MARGIN)
        lowest = ctypes.addressof(self.buffer) + MARGIN
        self.begin = lowest + (origin - lowest) % MARGIN
        self.end = self.begin + len(content)
        ctypes.memmove(self.begin, content, len(content))
        for margin in (self.begin - MARGIN, self.end):
            ctypes.memmove(margin, UNTOUCHED, MARGIN)

    def now(self) -> bytes:
        for where, margin in (("before", self.begin - MARGIN), ("behind", self.end)):
            if ctypes.string_at(margin, MARGIN) != UNTOUCHED:
                raise RuntimeError(f"a kernel wrote {where} the {len(self.content)} bytes that it was given")
        return ctypes.string_at(self.begin, len(self.content))


def load(file: str) -> Any:
    spec = importlib.util.spec_from_file_location("_native", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(file: str) -> None:
    extension = load(file)
    known: dict[int, Any] = {}
    calls, answers = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            name, level, given, named, memory, tables = pickle.load(calls)
        except EOFError:
            return
        os.environ["MURF_FAST_CPU"] = level
        result, error, written = None, None, {}
        try:
            blocks = {begin: Block(begin, content) for begin, content in memory.items()}
            for number, (of, arrays) in tables.items():
                known[number] = getattr(extension, of)(**arrays)

            def taken(packed: tuple[str, Any], blocks: dict[int, Block] = blocks) -> Any:
                kind, value = packed
                if kind == "table":
                    return known[value]
                if kind == "struct":
                    of, fields = value
                    return getattr(extension, of)(**{field: taken(entry) for field, entry in fields.items()})
                if kind in ("list", "tuple"):
                    return (list if kind == "list" else tuple)(map(taken, value))
                if kind == "address":
                    begin, offset = value
                    return blocks[begin].begin + offset
                return value

            result = getattr(extension, name)(*map(taken, given), **{key: taken(value) for key, value in named.items()})
            after = {begin: block.now() for begin, block in blocks.items()}
            written = {begin: content for begin, content in after.items() if content != blocks[begin].content}
        except Exception as caught:
            error = caught
        pickle.dump((result, error, written), answers)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
