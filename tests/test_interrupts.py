"""Ctrl-C while the main thread is in foreign code: the process ends at once, and says what it was at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from murf_fast.cli._interrupts import ending_at_once

SECONDS = 60.0  # far more than an end takes, far less than what is waited for

# The second lock of a mutex waits for ever, and no signal ends it.
WAITS = """
import ctypes
from murf_fast.cli._interrupts import ending_at_once
c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
with ending_at_once("interrupted while it waits", lambda: print("last", flush=True)):
    c.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    c.pthread_mutex_lock(mutex)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a mutex that zeros make")
def test_foreign_code_is_ended():
    with subprocess.Popen(
        [sys.executable, "-c", WAITS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            told, errors = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert process.returncode == 130
    assert told == "last\n"
    assert errors == "interrupted while it waits\n"


@pytest.fixture
def heeded():
    """Ctrl-C is Python's, as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(SECONDS)


def test_behind_the_block_ctrl_c_is_what_it_was(heeded):
    threads = threading.active_count()
    with ending_at_once("never", lambda: None):
        assert threading.active_count() == threads + 1
    assert threading.active_count() == threads
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_handlers_of_others_stay():
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with ending_at_once("never", lambda: None):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
