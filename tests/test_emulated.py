"""What lets the kernels' tests call kernels of another processor (.ci/emulated.py), with this one's extension there."""

from __future__ import annotations

import ctypes
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from murf_fast import _extension

ROOT = Path(__file__).resolve().parents[1]
END = ROOT / ".ci" / "emulated_end.py"

pytestmark = pytest.mark.skipif(not END.exists(), reason="needs a checkout")


@pytest.mark.skipif(_extension.load_error() is not None, reason="the extension is not built")
def test_calls_are_answered_by_another_process():
    """With everything that the tests of the native surface ask for; and what they do not call is told."""
    command = [sys.executable, str(END), _extension.module().__file__]
    path = os.pathsep.join([str(ROOT / ".ci"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "emulated", "-p", "no:cacheprovider", "--every-kernel",
         "tests/test_extension.py"],
        cwd=ROOT,
        env={**os.environ, "MURF_FAST_KERNELS": shlex.join(command), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert " passed" in result.stdout, result.stdout + result.stderr
    assert " failed" not in result.stdout, result.stdout
    called, missing = (line for line in result.stdout.splitlines() if line.startswith("emulated: "))
    assert "stream_fill 6" in called
    assert "upsample_argmax" in missing
    assert result.returncode == pytest.ExitCode.TESTS_FAILED


def test_memory_there_is_aligned_as_here_and_guarded():
    block_of = runpy.run_path(str(END))["Block"]
    content = bytes(range(100))
    for origin in (0x7F0000000000, 0x7F0000000004, 0x7F000000003F):
        block = block_of(origin, content)
        assert (block.begin - origin) % 64 == 0
        ctypes.memset(block.begin, 7, 100)
        assert block.now() == bytes([7]) * 100
        for where, offset in (("before", -1), ("behind", 100)):
            block = block_of(origin, content)
            ctypes.memset(block.begin + offset, 7, 1)
            with pytest.raises(RuntimeError, match=f"wrote {where} the 100 bytes"):
                block.now()
