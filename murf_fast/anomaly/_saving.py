"""A detector's folder: what ``MultiResolutionDetector.save`` writes and ``load`` reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from murf_fast import _arguments
from murf_fast.anomaly import _description, _files
from murf_fast.anomaly._fit_arguments import is_cluster
from murf_fast.anomaly._growing import OF_ENCODER
from murf_fast.anomaly._indices import over_ranks
from murf_fast.anomaly._patches import WHAT
from murf_fast.anomaly.normal_range import NormalRange
from murf_fast.anomaly.ray_workers import RayWorkers
from murf_fast.nn.vit._fingerprint import fingerprint, rounded

if TYPE_CHECKING:
    from murf_fast.anomaly.detector import MultiResolutionDetector


def save(detector: MultiResolutionDetector, folder: str | Path, overwrite: bool) -> None:
    """As :meth:`MultiResolutionDetector.save` says."""
    detector._fitted()
    _arguments.flag(WHAT, "overwrite", overwrite)
    folder = _files.folder_of(folder)
    _files.check_free(folder, overwrite)
    _files.make_folder(folder)
    description = entries_of(detector, detector.images_, detector.normal_)
    lock = _files.lock(folder)
    try:
        entries = _files.write_banks(folder, detector.banks_, _description.places(detector.encoder))
        detector._home = _files.commit(folder, {**description, "banks": entries})
    finally:
        _files.unlock(lock)


def load(
    kind: type[MultiResolutionDetector],
    folder: str | Path,
    encoder: nn.Module,
    foreground: Callable[[Tensor], Tensor] | None,
    *,
    group: dist.ProcessGroup | None,
    cluster: RayWorkers | None,
    verify: bool,
    any_precision: bool,
) -> MultiResolutionDetector:
    """As :meth:`MultiResolutionDetector.load` says, whose class is ``kind``."""
    folder = _files.folder_of(folder)
    home, told = _files.Home.of(folder), _description.told(folder)
    if is_cluster(cluster) and group is not None:
        raise ValueError(f"murf_fast.{WHAT}: `group` and `cluster` exclude each other")
    if told["index"] == "ivf" and (group is not None or cluster is not None):
        raise ValueError(f'murf_fast.{WHAT}: banks with index="ivf" cannot be sharded')
    detector = kind(
        encoder,
        told["layers"],
        told["scales"] or (1.0,),
        told["index"],
        foreground,
        told["pixels"],
        enlarge=told["enlarge"],
        norm=told["norm"],
        shorter_side=told["shorter_side"],
        rules=told["rules"],
        coreset=told["coreset"],
        projection=told["projection"],
        references=told["references"],
        background=told["background"],
        precision=told["precision"],
        on_empty=told["on_empty"],
    )
    expected, found = told["fingerprint"], fingerprint(detector.encoder)
    theirs = None if found == expected else _description.same_weights(told, found, detector.encoder)
    if theirs is not None and not any_precision:
        raise _description.OtherEncoderError(
            f"murf_fast.{WHAT}: {folder} was made with the same weights in {theirs}, `encoder` has them in "
            f"{_description.type_of(detector.encoder)}; convert it (model.to(torch.{theirs})), or accept that "
            "features are off by the rounding with any_precision=True"
        )
    if found != expected and theirs is None:
        model = f" ({told['model']})" if told["model"] else ""
        raise _description.OtherEncoderError(
            f"murf_fast.{WHAT}: {folder} was made with another encoder{model}: its fingerprint is {expected[:12]}, "
            f"that of `encoder` {found[:12]}"
        )
    if told["foreground"] and foreground is None:
        raise ValueError(f"murf_fast.{WHAT}: {folder} was made with a `foreground` function; give it again")
    banks = _description.banks(folder, told, detector.encoder, verify, theirs is not None)
    detector._check_rows([len(bank) for bank in banks[:: len(detector.encoder.layers)]])
    detector.banks_ = banks
    detector.images_, detector.normal_ = told["images"], told["normal"]
    detector.method, detector._home = told["method"], home
    if group is not None:
        detector._sharded = over_ranks(group, detector._patches.device)
    elif cluster is not None:
        detector._sharded = cluster._sharded(folder, [bank["file"] for bank in told["banks"]])
    return detector


def entries_of(detector: MultiResolutionDetector, images: int, normal: NormalRange | None) -> dict[str, Any]:
    """What the index says, but for the banks."""
    return {
        "fingerprint": fingerprint(detector.encoder),
        "type": _description.type_of(detector.encoder),
        "rounded": rounded(detector.encoder),
        "images": images,
        **detector.settings,
        "normal": normal and dataclasses.asdict(normal),
    }


def row_settings(detector: MultiResolutionDetector, place: Path | None) -> dict[str, Any]:
    """What decides about the rows of a fit into a folder."""
    if place is None:
        return {}
    of_images = ("pixels", "enlarge", "shorter_side", "references", "background", "on_empty", "foreground")
    names = (*OF_ENCODER, *of_images)
    return {"encoder": fingerprint(detector.encoder), **{name: detector.settings[name] for name in names}}
