"""A cluster of Ray, joined for a while: how much room it has, and what its errors mean. Imported when asked for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import ray

from murf_fast._ray_address import check_address, place

# Ends of remote tracebacks that are no bugs.
FOR_USERS = ("ValueError", "OSError", "FileNotFoundError", "PermissionError", "ModuleNotFoundError", "ImportError")


@contextlib.contextmanager
def joined(address: str | None) -> Iterator[None]:
    """A cluster, which is left again if it was not there before.

    Args:
        address: None: Ray's own rule, ``$RAY_ADDRESS``, one that runs here, else a new one of this machine.

    Raises:
        ValueError: None answers, or none starts.
    """
    was_there = ray.is_initialized()
    if not was_there:
        check_address(address)
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = place(address)
            what = (
                f"who listens at {where} takes no worker of this process (a cluster that asks for a token needs "
                "RAY_AUTH_MODE=token)"
                if where
                else "no cluster starts here"
            )
            raise ValueError(f"Ray: {what}: {last_line(error)}") from error
    try:
        yield
    finally:
        if not was_there:
            ray.shutdown()


def room(wanted: int | None, threads: int, gpus: int) -> int:
    """Workers for which the cluster has processors, busy ones too: those are waited for.

    Raises:
        ValueError: There are fewer than ``wanted``, or none.
    """
    there = ray.cluster_resources()
    found = int(there.get("CPU", 0)) // threads
    found = min(found, int(there.get("GPU", 0))) if gpus else found
    if found < (wanted or 1):
        of_gpu = ", each with a GPU" if gpus else ""
        raise ValueError(
            f"the cluster has room for {found} workers of {threads} CPU threads{of_gpu}, not for {wanted or 1}: fewer "
            "--workers or --threads"
        )
    return wanted or found


def end_processes() -> None:
    """Kills the processes of a cluster that this one has begun to start, which Ray has no way to break off.

    Most die with this process, which Ray asks the kernel for, but not all that they have started in turn.
    """
    import psutil  # Ray brings it

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def told(error: Exception) -> Exception:
    """What a worker said, as far as a user can put it right; else that Ray gave up, with all that it says."""
    kind, _, reason = last_line(error).partition(": ")
    if kind in FOR_USERS:
        return ValueError(f"a worker of Ray: {reason}")
    return RuntimeError(f"Ray: {error}")


def last_line(error: BaseException) -> str:
    """Of a remote traceback: what went wrong."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
