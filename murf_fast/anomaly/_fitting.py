"""How a detector's banks are filled, and how they grow: ``MultiResolutionDetector.fit`` and ``add``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from murf_fast import _arguments, backends
from murf_fast.annotations import Image
from murf_fast.anomaly import _description, _files, _saving
from murf_fast.anomaly._coreset import coresets
from murf_fast.anomaly._filling import Filling, OneProcess, fill
from murf_fast.anomaly._fit_arguments import is_cluster, several
from murf_fast.anomaly._growing import GrowingBanks
from murf_fast.anomaly._indices import Sharded
from murf_fast.anomaly._patches import WHAT, HeldOut, Patches
from murf_fast.anomaly._references import references_of
from murf_fast.anomaly.normal_range import NormalRange
from murf_fast.anomaly.ray_workers import RayWorkers
from murf_fast.ops.k_center_greedy import k_center_greedy

if TYPE_CHECKING:
    from murf_fast.anomaly.detector import MultiResolutionDetector


def fit(
    detector: MultiResolutionDetector,
    images: Iterable[Image],
    folder: str | Path | None,
    *,
    overwrite: bool,
    resume: bool,
    held_out: int,
    batch: int | None,
    cluster: RayWorkers | None,
    progress: Callable[[int, int | None], None] | None,
    references_progress: Callable[[int, int], None] | None,
    coreset_progress: Callable[[int, int], None] | None,
) -> MultiResolutionDetector:
    """As :meth:`MultiResolutionDetector.fit` says."""
    place = None if folder is None else _files.folder_of(folder)
    flags = {"overwrite": overwrite, "resume": resume, "cluster": is_cluster(cluster)}
    for name, value in flags.items():
        if _arguments.flag(WHAT, name, value) and place is None:
            raise ValueError(f"murf_fast.{WHAT}: `{name}` needs a `folder`")
    if place is not None:
        _files.check_free(place, overwrite, resume)
    told = {"references_progress": references_progress, "coreset_progress": coreset_progress}
    given = several(images, held_out, batch, progress=progress, **told)
    images = detector._patches.checked(given, detector._check_rows)
    growing = GrowingBanks(_description.places(detector.encoder), place, _saving.row_settings(detector, place), resume)
    home = workers = None
    try:
        if detector.references is not None:
            images = references_of(detector._patches, images, detector.references, references_progress)
        workers = None if cluster is None else cluster._fit(detector._patches, images, batch)
        held = _fill(detector, growing, images, held_out, batch, progress, workers)
        rows = growing.mapped()
        _tell_empty(detector, rows)
        banks, chosen = rows, None
        if detector.index == "coreset":
            of: dict[str, Any] = {
                "projection": detector.projection,
                "backend": backends.resolve(None, "cpu", rows[0].dtype),
            }
            selection = functools.partial(growing.selection, **of)
            choose = {} if workers is None else {"choose": workers.choose(growing)}
            chosen = coresets(rows, detector.coreset, detector.projection, coreset_progress, selection, **choose)
            banks = [r[c] for r, c in zip(rows, chosen, strict=True)]
        detector._check_rows([len(bank) for bank in banks[:: len(detector.encoder.layers)]])
        held = held[-max(1, growing.done // 4) :] if growing.done > 1 else []
        before = [len(r) - sum(h.rows[i // len(detector.encoder.layers)] for h in held) for i, r in enumerate(rows)]
        if not held:
            normal = None
        elif chosen is None:
            others = [r[:n] for r, n in zip(rows, before, strict=True)]
            sharded = None if workers is None or detector.index == "ivf" else workers.sharded(growing)
            normal = _normal_range(detector, held, rows, others, sharded)
        else:
            others = [r[c[c < n]] for r, c, n in zip(rows, chosen, before, strict=True)]
            normal = _normal_range(detector, held, rows, others)
        if place is not None:
            description = _saving.entries_of(detector, growing.done, normal)
            whole = chosen is None
            entries = growing.put_in_place() if whole else _files.write_banks(place, banks, growing.places)
            home = _files.commit(place, {**description, "banks": entries})
    except BaseException:
        growing.stop()
        raise
    finally:
        if workers is not None:
            workers.close()
    growing.close()
    detector.banks_, detector.images_, detector.normal_ = banks, growing.done, normal
    detector._sharded, detector._home, detector._indices = None, home, []
    return detector


def add(
    detector: MultiResolutionDetector,
    images: Iterable[Image],
    *,
    in_place: bool,
    overwrite: bool,
    resume: bool,
    held_out: int,
    batch: int | None,
    progress: Callable[[int, int | None], None] | None,
) -> MultiResolutionDetector:
    """As :meth:`MultiResolutionDetector.add` says."""
    detector._fitted()
    if detector._sharded is not None:
        raise ValueError(
            f"murf_fast.{WHAT}: banks of which ranks or workers hold parts take no further images; load() them whole"
        )
    dtype = next(detector.encoder.model.parameters()).dtype
    other = next((bank.dtype for bank in detector.banks_ if len(bank) and bank.dtype != dtype), None)
    if other is not None:
        raise ValueError(
            f"murf_fast.{WHAT}: banks in {other} take no rows of an encoder in {dtype}, as `any_precision` allows"
        )
    place, settings = _place_of_addition(detector, in_place, overwrite, resume)
    n, coreset = len(detector.encoder.layers), detector.index == "coreset"
    images = detector._patches.checked(
        several(images, held_out, batch, progress=progress),
        detector._check_rows,
        [len(bank) for bank in detector.banks_[::n]],
    )
    growing, home = GrowingBanks(_description.places(detector.encoder), place, settings, resume), detector._home
    try:
        if not coreset and not growing.done:
            growing.begin_with(detector.banks_)
        held = _fill(detector, growing, images, held_out, batch, progress)
        rows = growing.mapped()
        normal = _normal_range(detector, held, rows, None) if held else None
        if normal is None or detector.normal_ is not None:
            normal = detector.normal_ if normal is None else cast("NormalRange", detector.normal_).joined(normal)
        banks = rows
        if coreset:
            banks = [_chosen_anew(detector, *pair) for pair in zip(detector.banks_, rows, strict=True)]
        detector._check_rows([len(bank) for bank in banks[::n]])
        count = detector.images_ + growing.done
        if place is not None:
            description = _saving.entries_of(detector, count, normal)
            cast("_files.Home", home).check()
            entries = _files.write_banks(place, banks, growing.places) if coreset else growing.put_in_place()
            home = _files.commit(place, {**description, "banks": entries})
    except BaseException:
        growing.stop()
        raise
    growing.close()
    detector.banks_, detector.images_, detector.normal_ = banks, count, normal
    detector._home, detector._indices = home, []
    return detector


def _place_of_addition(
    detector: MultiResolutionDetector, in_place: bool, overwrite: bool, resume: bool
) -> tuple[Path | None, dict[str, Any]]:
    """The folder that grows, and what must be the same for an addition to go on."""
    for name, value in (("overwrite", overwrite), ("resume", resume)):
        if _arguments.flag(WHAT, name, value) and not in_place:
            raise ValueError(f"murf_fast.{WHAT}: `{name}` needs `in_place`")
    if not _arguments.flag(WHAT, "in_place", in_place):
        return None, {}
    if detector._home is None:
        raise ValueError(f"murf_fast.{WHAT}: `in_place` needs a folder: load() the detector, or save() it first")
    detector._home.check()
    _files.check_finished(detector._home.folder, overwrite, resume)
    if resume and not (detector._home.folder / _files.UNFINISHED).exists():
        raise ValueError(
            f"murf_fast.{WHAT}: {detector._home.folder} holds no addition that did not finish, so `resume` would add "
            "images that may be in it already"
        )
    settings = {**_saving.row_settings(detector, detector._home.folder), "detector": detector._home.digest}
    return detector._home.folder, settings


def _fill(
    detector: MultiResolutionDetector,
    growing: GrowingBanks,
    images: Iterable[Image],
    held_out: int,
    batch: int | None,
    progress: Callable[..., Any] | None,
    workers: Filling | None = None,
) -> list[HeldOut]:
    """Writes the rows of all images, which ``workers`` or this process encode. Returns the last ``held_out``."""
    total = len(cast("Any", images)) if hasattr(images, "__len__") else None
    filling = workers or OneProcess(detector._patches, images, batch, growing.folder is not None)
    return fill(growing, filling, total, held_out, progress)


def _chosen_anew(detector: MultiResolutionDetector, bank: Tensor, new: Tensor) -> Tensor:
    """A coreset of the rows of one and of new ones, larger by its share of these."""
    if not len(new):
        return bank
    union = torch.cat([bank.to(new.dtype), new]) if len(bank) else new
    count = len(bank) + max(1, int(detector.coreset * len(new)))
    return union[k_center_greedy(union, count=count, projection=detector.projection)]


@torch.no_grad()
def _normal_range(
    detector: MultiResolutionDetector,
    held: Sequence[HeldOut],
    rows: Sequence[Tensor],
    others: Sequence[Tensor] | None,
    sharded: Sharded | None = None,
) -> NormalRange | None:
    """What images whose rows are the last of ``rows`` score by banks of ``others``; None: by the detector's own."""
    n, device = len(detector.encoder.layers), detector._patches.device
    indices = None
    if others is not None:
        indices = detector._prepared(others, sharded, detector.rules.k)
    ends, found = [len(r) for r in rows], []
    for image in reversed(held):
        of_image = []
        for i, of_bank in enumerate(rows):
            count = image.rows[i // n]
            of_image.append(
                Patches(of_bank[ends[i] - count : ends[i]].to(device), image.kept[i // n], image.grids[i // n])
            )
            ends[i] -= count
        maps, weighted = detector._searched(of_image, indices)
        if any(m is not None for m in maps):
            found.append(detector._anomaly(image.size, maps, weighted))
    return NormalRange.of(found)


def _tell_empty(detector: MultiResolutionDetector, banks: list[Tensor]) -> None:
    """Scales that no row came from, as the foreground covers no patch there."""
    empty = [
        detector._patches.resolution(i)
        for i in range(0, len(banks) // len(detector.encoder.layers))
        if not len(banks[i * len(detector.encoder.layers)])
    ]
    if len(empty) * len(detector.encoder.layers) == len(banks):
        raise ValueError(f"murf_fast.{WHAT}: `foreground` covers no patch of any image at any scale")
    if empty:
        warnings.warn(
            f"murf_fast.{WHAT}: `foreground` covers no patch of any image at {', '.join(empty)}: left out",
            stacklevel=4,
        )
