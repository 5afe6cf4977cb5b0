"""``murf-fast tables``: checks what it was given, measures, writes the results, prints and draws them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from murf_fast.cli._interrupts import INTERRUPTED
from murf_fast.cli._terminal import parsed
from murf_fast.cli.tables import formats, results, runner
from murf_fast.cli.tables.case import Setting, Table, names, table
from murf_fast.cli.tables.forecast import Forecast

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = 1 << 14  # pixels of a side
LISTED = 10  # cases that are named


@dataclass(frozen=True)
class Job:
    """What the command was given."""

    name: str | None = None
    sizes: str | None = None
    models: str | None = None
    batch: int = 1
    dtype: str | None = None
    device: str | None = None
    budget: float | None = None
    format: str = "rich"
    weights: str | None = None
    model: str | None = None
    data: Path | None = None
    out: Path = Path("out")
    source: Path | None = None


def main(job: Job, console: Console, log: Console) -> int:
    """Prints the table on ``console``, progress and what was written on ``log``; returns the exit status."""
    if job.format not in formats.FORMATS:
        raise ValueError(f"--format must be one of {', '.join(formats.FORMATS)}, got {job.format!r}")
    if job.source is not None:
        if job.name is not None:
            raise ValueError(f"--from makes no new measurements: leave out {job.name!r}")
        found = results.read(job.source)
        _show(found, job, console, log)
        return 0
    if job.name is None:
        raise ValueError(f"name a table: {', '.join(names())}; or a file of results by --from")
    known = table(job.name)
    setting = _setting(job, known)
    if job.budget is not None and not 0 < job.budget < math.inf:
        raise ValueError(f"--budget must be a number of seconds above 0, got {job.budget}")
    _check_folder(job.out)
    try:
        with log.status("counting operations"):
            cases = known.cases(setting)
    except KeyboardInterrupt:
        log.print("interrupted: nothing was measured")
        return INTERRUPTED
    if not cases:
        raise ValueError("--models: nothing to measure")
    forecast = Forecast(setting.device, setting.dtype)
    runner.check_budget(cases, job.budget, forecast)
    job.out.mkdir(parents=True, exist_ok=True)
    machine = results.machine(setting.device)
    path = job.out / f"{job.name}.json"
    found = results.Results(job.name, machine, results.settings(setting), len(cases), _weights(setting), path=path)
    begun = time.perf_counter()
    left_out = runner.run(cases, found, job.budget, forecast, log)
    stopped, measured = found.cut == runner.INTERRUPTED, len(found.rows)
    if stopped and not measured:
        log.print("interrupted: nothing was measured")
        return INTERRUPTED
    if not measured:
        raise ValueError(f"--budget: no case was measured within {job.budget:g} s")
    if found.cut:
        why = (
            "interrupted" if stopped else f"--budget: {time.perf_counter() - begun:.0f} s of {job.budget:g} s are spent"
        )
        log.print(f"{why}: {measured} of {len(cases)} cases are kept in {path}", highlight=False, soft_wrap=True)
    if left_out:
        named = "; ".join(left_out[:LISTED]) + (f"; and {len(left_out) - LISTED} more" if left_out[LISTED:] else "")
        log.print(f"left out, as more is expected of them than is left: {named}", markup=False, soft_wrap=True)
    _show(found, job, console, log)
    return INTERRUPTED if stopped else 0


def _setting(job: Job, known: Table) -> Setting:
    device = _device(job.device)
    dtype = job.dtype or ("bfloat16" if device == "cuda" and known.half_on_gpu else "float32")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if job.batch < 1:
        raise ValueError(f"--batch must be 1 or more, got {job.batch}")
    sizes = known.sizes if job.sizes is None else tuple(parsed(job.sizes, int))
    if not sizes or min(sizes) < 1 or max(sizes) > LARGEST:
        raise ValueError(f"--sizes must be pixels such as 224,448, up to {LARGEST}, got {job.sizes!r}")
    models = known.models if job.models is None else tuple(job.models.replace(",", " ").split())
    if not models:
        raise ValueError(f"--models must be names such as {','.join(known.models)}, got {job.models!r}")
    given = [f"--{n}" for n in ("models", "weights", "model") if getattr(job, n) is not None]
    if known.replaces and len(given) > 1:
        raise ValueError(f"{' and '.join(given)} say which model it is: give one of them")
    if known.replaces and given and given != ["--models"]:
        models = ()
    if job.data is not None and not known.takes_data:
        raise ValueError(f"--data: the table {job.name} takes none")
    return Setting(
        device, DTYPES[dtype], job.batch, tuple(sorted(set(sizes))), models, job.weights, job.model, job.data
    )


def _device(name: str | None) -> str:
    """``cpu`` or ``cuda``; one of several GPUs is made the current one."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdigit())):
        raise ValueError(f"--device must be cpu, cuda or cuda:1, got {name!r}")
    if kind == "cpu":
        return kind
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device (torch {torch.__version__})")
    count = torch.cuda.device_count()
    if index and int(index) >= count:
        raise ValueError(f"--device {name}: there {'is' if count == 1 else 'are'} {count}, counted from 0")
    torch.cuda.set_device(int(index or 0))
    return kind


def _weights(setting: Setting) -> list[str]:
    """What a reader must know of the models."""
    named = [f"--{n} {value}" for n, value in (("weights", setting.weights), ("model", setting.model)) if value]
    return [f"models: {', '.join(named) or 'random weights, seed 0, which do not change the cost'}."]


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out must be a folder, {folder} is a file")


def _show(found: results.Results, job: Job, console: Console, log: Console) -> None:
    from murf_fast.cli.tables import figure

    if job.format == "rich":
        formats.rich(found, console)
    else:
        console.file.write(formats.TEXTS[job.format](found))
    _check_folder(job.out)
    job.out.mkdir(parents=True, exist_ok=True)
    picture = job.out / f"{found.name}.png"
    written = [str(path) for path in (found.path,) if path is not None]
    if figure.draw(found, picture):
        written.append(str(picture))
    if written:
        log.print(f"wrote {' and '.join(written)}", markup=False, highlight=False, soft_wrap=True)
