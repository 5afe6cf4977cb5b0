"""What is installed, which backends work here, and why another does not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import murf_fast
from murf_fast import _extension, backends

# Distribution, and the way to get it.
OPTIONAL = {
    "triton": "pip install triton (comes with torch on Linux GPUs)",
    "transformers": "pip install 'murf-fast[models]'",
    "timm": "pip install 'murf-fast[timm]'",
    "natten": "pip install 'murf-fast[peers]' (benchmarks only)",
    "xformers": "pip install xformers (attention of all sequences in one launch on GPUs)",
    "openvino": "pip install 'murf-fast[peers]' (benchmarks only)",
    "faiss-cpu": "pip install faiss-cpu",
    "rich": "pip install 'murf-fast[cli]'",
    "typer": "pip install 'murf-fast[cli]'",
    "matplotlib": "pip install 'murf-fast[cli]'",
    "pillow": "pip install 'murf-fast[cli]'",
}
VARIABLES = {
    "MURF_FAST_BACKEND": "backend of every call: reference, native or triton",
    "MURF_FAST_CPU": "instruction-set level of the CPU kernels: baseline, avx2, avx512 or amx",
    "MURF_FAST_WEIGHTS": "folder of the backbone that the demo takes",
    "TRITON_INTERPRET": "1 runs Triton kernels in the interpreter, also on CPU tensors",
    "OMP_NUM_THREADS": "threads of torch, which are the kernels' too",
}
DEVICES = ("cpu", "cuda")
SCHEMA = 1  # of the JSON


@dataclass(frozen=True)
class Report:
    """Pairs of name and value, by section. ``backends`` holds, per backend and device type, the reasons against it."""

    versions: dict[str, str]
    cpu: dict[str, str]
    gpus: list[str]
    backends: dict[tuple[str, str], list[str]]
    optional: dict[str, str]
    variables: dict[str, str]
    missing: dict[str, str] = field(default_factory=dict)


def collect() -> Report:
    """Looks at this machine; imports nothing that is optional."""
    found = {name: _version(name) for name in OPTIONAL}
    reasons = {(name, device): _reasons(name, device) for name in backends.NAMES for device in DEVICES}
    missing = {name: how for name, how in OPTIONAL.items() if found[name] is None}
    if _extension.load_error() is not None:
        missing["C++ extension"] = backends.native_problems()[0].rpartition("; ")[2]
    return Report(
        versions={
            "murf_fast": murf_fast.__version__,
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": importlib.metadata.version("numpy"),
            "CUDA of torch": torch.version.cuda or "none (CPU build)",
            "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        },
        cpu=_cpu(),
        gpus=_gpus(),
        backends=reasons,
        optional={name: version or "not installed" for name, version in found.items()},
        variables={name: os.environ.get(name, "") for name in VARIABLES},
        missing=missing,
    )


def as_json(report: Report) -> dict[str, Any]:
    """``report`` as JSON holds it: one entry per backend and device type, and null for what is not installed or set."""
    found = asdict(report)
    found["backends"] = [
        {"backend": name, "device": device, "works": not reasons, "reasons": reasons}
        for (name, device), reasons in report.backends.items()
    ]
    found["optional"] = {name: _version(name) for name in report.optional}
    found["variables"] = {name: value or None for name, value in report.variables.items()}
    return {"schema": SCHEMA, **found}


def render(console: Any) -> None:
    """Prints :func:`collect` with rich."""
    from rich.markup import escape
    from rich.table import Table

    report = collect()
    for title, pairs in (("Versions", report.versions), ("CPU kernels", report.cpu)):
        _print_pairs(console, title, pairs)
    console.print("\n[bold]GPUs[/]")
    for gpu in report.gpus or ["none"]:
        console.print(f"  {escape(gpu)}", highlight=False)
    table = Table(title="\nBackends", title_justify="left", title_style="bold", show_lines=True)
    for column in ("backend", "tensors on", "works", "why not"):
        table.add_column(column)
    for (name, device), reasons in report.backends.items():
        works = "[red]no[/]" if reasons else "[green]yes[/]"
        table.add_row(name, device, works, "\n".join(f"- {escape(reason)}" for reason in reasons))
    console.print(table)
    _print_pairs(console, "Optional libraries", report.optional)
    described = {name: f"{value or '(not set)'}  [{VARIABLES[name]}]" for name, value in report.variables.items()}
    _print_pairs(console, "Environment variables", described)
    if report.missing:
        _print_pairs(console, "To get what is missing", report.missing)


def _print_pairs(console: Any, title: str, pairs: dict[str, str]) -> None:
    from rich.markup import escape

    console.print(f"\n[bold]{title}[/]")
    width = max(map(len, pairs))
    for name, value in pairs.items():
        console.print(f"  {name:<{width}}  {escape(value)}", highlight=False, soft_wrap=True)


def _cpu() -> dict[str, str]:
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    if _extension.load_error() is not None:
        return {"extension": f"not there: {_extension.load_error()}", "threads": threads}
    try:
        level = _extension.current_level()
    except RuntimeError as error:
        level = f"none: {error}"
    return {
        "extension": _extension.module().__file__,
        "level in use": level,
        "levels that run here": ", ".join(_extension.available_levels()),
        "OpenMP": "yes" if _extension.module().has_openmp() else "no: one thread",
        "threads": threads,
    }


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties]


def _reasons(name: str, device: str) -> list[str]:
    reasons = backends.reasons_against(name, device)
    if device == "cuda" and not torch.cuda.is_available():
        reasons = [*reasons, "torch sees no CUDA device"]
    return reasons


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
