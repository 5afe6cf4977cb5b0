"""Ctrl-C while foreign code runs that does not look at signals for many seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

INTERRUPTED = 130  # the exit status of a process that Ctrl-C ended, as shells have it


@contextlib.contextmanager
def ending_at_once(message: str, last: Callable[[], None]) -> Iterator[None]:
    """Within the block Ctrl-C prints ``message``, calls ``last`` and ends the process, whatever its main thread does.

    Nothing else is cleaned up: it is for blocks before any work. Python itself looks at a signal when its main thread
    is back from what it calls; a byte is written to a socket at once, and another thread waits for that. Elsewhere than
    in the main thread, which alone hears of signals, and where Ctrl-C is ignored or handled by others, this does
    nothing.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    ours, signals = socket.socketpair()
    signals.setblocking(False)
    before = signal.set_wakeup_fd(signals.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(ours, message, last), name="Ctrl-C", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signals.close()  # the watcher reads the end
        watcher.join()
        ours.close()


def _watch(ours: socket.socket, message: str, last: Callable[[], None]) -> None:
    """Reads the number of every signal that comes, until the other end is closed."""
    while numbers := ours.recv(64):
        if signal.SIGINT in numbers:
            sys.stdout.flush()
            print(message, file=sys.stderr, flush=True)
            try:
                last()
            finally:
                os._exit(INTERRUPTED)
