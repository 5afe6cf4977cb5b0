"""What a measurement was made on."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

import murf_fast
from murf_fast import _extension


def describe(device: str = "cpu") -> dict:
    """The processor or GPU that was measured, and what ran on it."""
    gpu = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "driver": _driver() if gpu else None,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_level": _extension.current_level() if _extension.load_error() is None else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "murf_fast": murf_fast.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def slug(machine: dict) -> str:
    """Folder name of a machine's results."""
    kind = "gpu" if machine["driver"] else "cpu"
    parts = [kind, machine["device"]]
    if kind == "cpu":
        parts += [f"{machine['threads']} threads", machine["cpu_level"] or "reference"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _commit() -> str | None:
    """The commit; where tracked files have changed since, with ``-dirty`` and a digest that tells changes apart."""
    try:
        commit = _git("describe", "--always", "--dirty", "--exclude=*").decode().strip()
        return f"{commit}+{hashlib.sha256(_git('diff', 'HEAD')).hexdigest()[:8]}" if "-dirty" in commit else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> bytes:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True).stdout


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
