"""``murf-fast anomaly evaluate``: every category of a data set, and a table."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from murf_fast.anomaly.datasets import Category, categories
from murf_fast.anomaly.detector import HELD_OUT, MultiResolutionDetector
from murf_fast.anomaly.evaluation import MEASURES, Scored, check_files
from murf_fast.anomaly.subsets import ALL, Subset, subsets_of
from murf_fast.cli import meter
from murf_fast.cli.anomaly._configuration import described
from murf_fast.cli.anomaly._cost import tell_cost
from murf_fast.cli.anomaly._images import ImageFile, grids, readable, shown, tell_skipped
from murf_fast.cli.anomaly._inputs import device_of, encoder
from murf_fast.cli.anomaly._settings import Settings
from murf_fast.cli.anomaly.heat_maps import draw
from murf_fast.nn.vit._fingerprint import fingerprint

RESULTS, SETTINGS, CATEGORIES, BANKS, HEAT_MAPS = "results.json", "settings.json", "categories", "banks", "heat-maps"


@dataclass(frozen=True)
class Plan:
    """What the command was asked for."""

    data: Path
    out: Path
    weights: str | None
    device: str
    batch: int | None
    settings: Settings
    subsets: str
    heat_maps: bool
    keep_banks: bool
    skip_broken: bool = False


def run(plan: Plan, console: Console) -> dict[str, Any]:
    """Evaluates what is not done yet, writes results.json and prints it."""
    found = categories(plan.data)
    _writable(plan.out)
    device = device_of(plan.device)
    vit = encoder(plan.weights)
    vit.model.to(device)
    made = plan.settings.detectors(vit)
    detector = made()
    subsets = subsets_of(detector, cast("Any", plan.subsets))
    console.print(
        f"{vit.description}; {len(found)} {'category' if len(found) == 1 else 'categories'} in {shown(plan.data)}",
        markup=False,
        soft_wrap=True,
    )
    for line in described(detector.settings):
        console.print(line, markup=False, soft_wrap=True)
    _settle(plan.out, detector, vit.description)
    todo = [c for c in found if not _is_done(_done(plan, c), c, subsets, plan)]
    whole: dict[str, Category] = {}
    broken: dict[Path, str] = {}
    for category in todo:
        files = [ImageFile(path, path, ()) for path in (*category.train, *(s.path for s in category.test))]
        files, unopened = readable(files, plan.skip_broken, decode=False)
        grids(detector, files)  # before large ones are decoded
        files, damaged = readable(files, plan.skip_broken, decode=True)
        whole[category.name] = _without(category, {*unopened, *damaged})
        fitted = {file.path for file in files} & set(category.train)
        of_images = grids(detector, [file for file in files if file.path in fitted])
        tell_cost(detector, of_images, plan.out, console, f"{shown(category.name)}: ")
        broken |= unopened | damaged
        check_files(whole[category.name].test)
    for category in found:
        if category not in todo:
            console.print(f"{shown(category.name)}: done already", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        for category in todo:
            # A detector of its own, so that the last one's banks go before these come.
            detector = made()
            result: Any
            result, peak = meter.observed(
                lambda c=whole[category.name], d=detector: _category(plan, c, d, subsets, bar), device.type
            )
            _write(_file(plan, category), {"images": _identity(_files_of(category)), **result, "memory": peak})
    results = {c.name: cast("dict[str, Any]", _done(plan, c)) for c in found}
    _write(plan.out / RESULTS, {"weights": vit.description, "mean": _mean(results), "categories": results})
    console.print(_table(results))
    if len(subsets) > 1:
        console.print(_table_of_subsets(results, subsets))
    tell_skipped(broken, console)
    console.print(f"results in {shown(plan.out / RESULTS)}", markup=False, soft_wrap=True)
    return results


def _category(
    plan: Plan, category: Category, detector: MultiResolutionDetector, subsets: dict[str, Subset], bar: Progress
) -> dict[str, Any]:
    """Fits and scores one category. Banks that an earlier run kept are taken as they are."""
    shown_name = escape(shown(category.name))
    task = bar.add_task(f"{shown_name}: fit", total=len(category.train))
    kept = plan.out / BANKS / category.name
    made_of, start = kept.with_name(f"{category.name}.json"), time.perf_counter()
    advance: dict[str, Any] = {"batch": plan.batch, "progress": lambda done, _: bar.update(task, completed=done)}
    is_there = made_of.exists() and _read(made_of) == {"images": _identity(category.train)}
    try:
        if is_there:
            detector = MultiResolutionDetector.load(kept, detector.encoder)
        else:
            made_of.unlink(missing_ok=True)
            # Held out are images for the colours of `score`, which takes banks that are kept.
            held_out = HELD_OUT if plan.keep_banks else 0
            images = list(category.train) if detector.references is not None else iter(category.train)
            detector.fit(images, folder=kept, overwrite=True, held_out=held_out, **advance)
            if plan.keep_banks:
                _write(made_of, {"images": _identity(category.train)})
        fitted = time.perf_counter()
        bar.reset(task, description=f"{shown_name}: score", total=len(category.test))
        scored = Scored(detector, category.test, **advance)
    finally:
        if not is_there and not plan.keep_banks:
            shutil.rmtree(kept, ignore_errors=True)
            with contextlib.suppress(OSError):  # others are kept in it
                kept.parent.rmdir()
    searched = time.perf_counter()
    bar.reset(task, description=f"{shown_name}: measure", total=len(subsets))
    measures = {}
    for name, subset in subsets.items():
        measures[name] = scored.measures(subset, plan.out)
        bar.advance(task)
    seconds = {"fit": fitted - start, "score": searched - fitted, "measure": time.perf_counter() - searched}
    if plan.heat_maps:
        draw(scored, subsets[ALL], measures[ALL]["F1 threshold"], plan.out / HEAT_MAPS / category.name)
    bar.update(task, description=f"{shown_name}: done")
    return {
        "fit images": len(category.train),
        "test images": len(category.test),
        "heat maps": plan.heat_maps,
        "seconds": seconds,
        "measures": measures,
    }


def _without(category: Category, broken: Collection[Path]) -> Category:
    """A category without the images that cannot be read."""
    train = tuple(path for path in category.train if path not in broken)
    test = tuple(sample for sample in category.test if sample.path not in broken)
    for what, left in (("normal image to fit", train), ("image to test", test)):
        if not left:
            raise ValueError(f"{category.name} has no {what} that can be read")
    return dataclasses.replace(category, train=train, test=test)


def _writable(out: Path) -> None:
    """Raises before any work where nothing could be written after it."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def _settle(out: Path, detector: MultiResolutionDetector, weights: str) -> None:
    """Notes what an output folder is made with; refuses one that was made with something else."""
    settings = {
        **json.loads(json.dumps(detector.settings)),
        "weights": weights,
        # Of the layers, scales and normalization, too: a difference that is left is one of the weights.
        "fingerprint": fingerprint(detector.encoder),
    }
    path = out / SETTINGS
    if not path.exists():
        _write(path, settings)
        return
    there = _read(path)
    # What folders of earlier versions do not say was always so.
    there = {"norm": False, "shorter_side": None, "references": None, "coreset": 0.1, "projection": None, **there}
    # Words that change no number, and what the commands leave as it is.
    words = ("weights", "method", "model", "on_empty", "background", "precision", "foreground")
    other = [name for name in settings if name not in words and there.get(name) != settings[name]]
    if other:
        name = other[0]
        raise ValueError(
            f"--out {out} holds an evaluation with other {name}: {there.get(name)}, now {settings[name]}; choose "
            "another folder"
        )


def _file(plan: Plan, category: Category) -> Path:
    return plan.out / CATEGORIES / f"{category.name}.json"


def _done(plan: Plan, category: Category) -> dict[str, Any] | None:
    path = _file(plan, category)
    return _read(path) if path.exists() else None


def _is_done(result: dict[str, Any] | None, category: Category, subsets: dict[str, Subset], plan: Plan) -> bool:
    """Whether a result is of these images, and says all that is asked for."""
    if result is None or result.get("images") != _identity(_files_of(category)):
        return False
    kept = plan.out / BANKS / f"{category.name}.json"
    if plan.keep_banks and not kept.exists():
        return False
    measured = result.get("measures", {})
    return set(subsets) <= set(measured) and (result.get("heat maps", False) or not plan.heat_maps)


def _files_of(category: Category) -> list[Path]:
    return [*category.train, *(p for s in category.test for p in (s.path, s.mask) if p is not None)]


def _identity(files: Iterable[Path]) -> str:
    """A hash of names, sizes and times of change: other images under the same category's name are told from these."""
    stats = [(p, p.stat()) for p in files]
    text = json.dumps([[p.parent.name, p.name, s.st_size, s.st_mtime_ns] for p, s in stats])
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; remove it to do its part again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: expected an object; remove it to do its part again")
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    """In place when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def _mean(results: dict[str, dict[str, Any]], subset: str = ALL) -> dict[str, float | None]:
    """The mean of every measure over the categories that have it."""
    means = {}
    for name in MEASURES[:-1]:  # thresholds are of one category
        values = [r["measures"][subset][name] for r in results.values()]
        values = [v for v in values if v is not None]
        means[name] = math.fsum(values) / len(values) if values else None
    return means


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table("category", title="all layers and scales")
    for name in (*MEASURES, "fit s", "score s", "memory GB"):
        table.add_column(_heading(name), justify="right")
    for name, result in results.items():
        seconds, memory = result["seconds"], result["memory"]
        costs = [f"{seconds['fit']:.1f}", f"{seconds['score']:.1f}", "-" if memory is None else f"{memory / 1e9:.2f}"]
        table.add_row(escape(shown(name)), *(_text(result["measures"][ALL][m]) for m in MEASURES), *costs)
    if len(results) > 1:
        table.add_section()
        table.add_row("mean", *map(_text, _mean(results).values()))
    return table


def _table_of_subsets(results: dict[str, dict[str, Any]], subsets: dict[str, Subset]) -> Table:
    table = Table("layers - scales", title=f"mean of {len(results)} categories" if len(results) > 1 else None)
    for name in MEASURES[:-1]:
        table.add_column(_heading(name), justify="right")
    for name in subsets:
        table.add_row(name, *map(_text, _mean(results, name).values()))
    return table


def _heading(name: str) -> str:
    """In two lines, for eleven columns in one terminal."""
    return name.replace("_", "\n").replace(" ", "\n")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
