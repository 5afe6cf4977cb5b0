"""A process that decodes images: a request on its input, pixels or a reason on its output, until the input ends.

A decoder of damaged files may do worse than raise: it takes this process with it, and no other. Run by its path, not as
a module of the package, whose import takes torch's seconds and megabytes; so it takes the decoder by its path, too.

Request: `<II`, bytes of the name and of the file, and these. Answer: `<II`, bytes of a JSON object and of the pixels,
and these: ``{"shape": [H, W, 3], "warnings": [...]}`` and uint8, or ``{"error": ...}`` alone.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose names are of the package

import importlib.util
import json
import os
import signal
import struct
import warnings
from pathlib import Path
from typing import Any, BinaryIO

LENGTHS = struct.Struct("<II")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    decode = _decoder()
    while head := requests.read(LENGTHS.size):
        name, data = (requests.read(length) for length in LENGTHS.unpack(head))
        _answer(answers, *_decoded(decode, data, name.decode(errors="surrogatepass")))


def _decoder() -> Any:
    """``murf_fast._pillow.decode``, without the package."""
    path = Path(__file__).resolve().parents[1] / "_pillow.py"
    spec: Any = importlib.util.spec_from_file_location("_pillow", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.decode


def _decoded(decode: Any, data: bytes, name: str) -> tuple[dict[str, Any], memoryview | bytes]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        try:
            pixels = decode(data, name)
        except MemoryError:
            return {"error": f"{name} needs more memory than there is"}, b""
        except ValueError as error:
            return {"error": str(error)}, b""
    return {"shape": pixels.shape, "warnings": [str(w.message) for w in told]}, memoryview(pixels).cast("B")


def _answer(file: BinaryIO, content: dict[str, Any], pixels: memoryview | bytes) -> None:
    text = json.dumps(content).encode()
    file.write(LENGTHS.pack(len(text), len(pixels)))
    file.write(text)
    file.write(pixels)
    file.flush()


if __name__ == "__main__":
    main()
