"""Ctrl-C in a recorded run: the call that runs ends, and then the run, with all that was measured in its record.

An exception at any other moment could meet the record half written, or pytest at work that it does not guard.
"""

from __future__ import annotations

import signal

_is_asked_for = False


def wait_for_calls() -> None:
    """From here on an interruption ends the run at the next :func:`check`. One that came before waits in the signal
    mask of the process, which `murf-fast bench` starts with SIGINT blocked.
    """
    signal.signal(signal.SIGINT, _ask)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def check() -> None:
    """Between two calls.

    Raises:
        KeyboardInterrupt: It was asked for.
    """
    if _is_asked_for:
        raise KeyboardInterrupt


def _ask(number, frame) -> None:
    global _is_asked_for
    _is_asked_for = True
