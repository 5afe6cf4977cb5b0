"""What the index of a saved detector must hold, and whether its banks are those of an encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from murf_fast._files import is_name
from murf_fast.anomaly import _files
from murf_fast.anomaly._files import INDEX, WHAT, is_number
from murf_fast.anomaly.normal_range import NormalRange
from murf_fast.anomaly.scoring import ScoringRules
from murf_fast.nn import MultiResolutionEncoder
from murf_fast.nn.vit._fingerprint import rounded

if TYPE_CHECKING:
    from murf_fast.anomaly.detector import MultiResolutionDetector

HALVES = (torch.bfloat16, torch.float16)


class OtherEncoderError(ValueError):
    """Banks were made with another encoder, or with the same weights in another type."""


def places(encoder: MultiResolutionEncoder) -> list[dict[str, str]]:
    """Which layer and resolution each bank is of, in the order of the banks: layers fastest."""
    resolutions: Any
    kind, resolutions = ("scale", encoder.scales) if encoder.sizes is None else ("size", encoder.sizes)
    texts = [f"{r[0]} x {r[1]}" if kind == "size" else repr(r) for r in resolutions]
    return [{"layer": str(layer), kind: text} for text in texts for layer in encoder.layers]


def model_of(encoder: MultiResolutionEncoder) -> str:
    """A model in words, so that people find it again; what tells it from every other is its fingerprint."""
    family = encoder.family
    return (
        f"{type(encoder.model).__name__}, {len(family.blocks)} blocks, {family.width} channels, patch "
        f"{family.patch_size}"
    )


def settings_of(detector: MultiResolutionDetector) -> dict[str, Any]:
    """All that a detector was made with, as JSON holds it."""
    encoder = detector.encoder
    return {
        "method": detector.method,
        "model": model_of(encoder),
        "layers": encoder.layers,
        "norm": encoder.norm,
        "scales": encoder.scales,
        "pixels": detector.pixels,
        "enlarge": detector.enlarge,
        "shorter_side": detector.shorter_side,
        "index": detector.index,
        "coreset": detector.coreset,
        "projection": detector.projection,
        "references": detector.references,
        "rules": dataclasses.asdict(detector.rules),
        "background": detector.background,
        "precision": detector.precision,
        "on_empty": detector.on_empty,
        "foreground": detector.foreground is not None,
    }


def told(folder: Path) -> dict[str, Any]:
    """The index of a folder, with entries of the right kinds."""
    description = _files.read_description(folder)
    for name, (right, expected) in _ENTRIES.items():
        since, before = _LATER.get(name, (1, None))
        if name not in description and description["version"] < since:
            description[name] = before
        elif name not in description:
            raise _damaged(folder, f"`{name}` is missing")
        if not right(description[name]):
            raise _damaged(folder, f"`{name}` must be {expected}, got {description[name]!r}")
    for i, bank in enumerate(description["banks"]):
        missing = [n for n in _BANK_ENTRIES[description["version"]] if n not in bank]
        if missing:
            raise _damaged(folder, f"`banks[{i}]` has no {', '.join(f'`{n}`' for n in missing)}")
        if description["version"] > 1 and not _is_text(bank["sha256"]):
            raise _damaged(folder, f"`banks[{i}]` must have a `sha256` that is text, got {bank['sha256']!r}")
    fields = [f.name for f in dataclasses.fields(ScoringRules)]
    unknown = sorted(set(description["rules"]) - set(fields))
    if unknown:
        raise _damaged(folder, f"`rules` has {unknown}, which are none of {fields}")
    try:
        description["rules"] = ScoringRules(**description["rules"])
    except (TypeError, ValueError) as error:
        raise _damaged(folder, f"`rules`: {error}") from error
    if description["normal"] is not None:
        description["normal"] = NormalRange(**description["normal"])
    return description


def banks(
    folder: Path, description: dict[str, Any], encoder: MultiResolutionEncoder, verify: bool, any_precision: bool
) -> list[Tensor]:
    """The mapped banks, each the one that its place in the index says, and of the encoder's features.

    ``any_precision``: the rows may have another dtype than the features.
    """
    entries, expected = description["banks"], places(encoder)
    if len(entries) != len(expected):
        raise _damaged(
            folder, f"it names {len(entries)} banks, and the encoder has {len(expected)}: one per layer and scale"
        )
    if description["version"] > 1:
        for entry, place in zip(entries, expected, strict=True):
            if entry["place"] != place:
                raise _damaged(folder, f"bank {entry['file']!r} is of {entry['place']}, expected {place}")
    for entry in entries:
        if not is_name(entry["file"]):
            raise _damaged(folder, f"{entry['file']!r} is not the name of a file in the folder")
    if len({entry["file"] for entry in entries}) < len(entries):
        raise _damaged(folder, "it names a bank twice")
    if not description["intact"]:
        raise _damaged(folder, "its checksum is another")
    width, dtype = encoder.family.width, encoder.family.like.dtype
    found = []
    for entry, place in zip(entries, expected, strict=True):
        rows, own = _files.read_rows(folder, entry["file"], entry["sha256"] if verify and "sha256" in entry else None)
        bank = f"{WHAT}: bank {folder / entry['file']}"
        if list(rows.shape) != entry["shape"]:
            raise ValueError(f"{bank} has shape {list(rows.shape)}, expected {entry['shape']}")
        if description["version"] > 1 and own != place:
            raise ValueError(f"{bank} is of {own}, expected {place}")
        if rows.shape[1] != width:
            raise ValueError(f"{bank} has {rows.shape[1]} columns, the encoder's features have {width}")
        # Under autocast, features of float32 weights are of half types.
        if rows.dtype != dtype and not any_precision and not (dtype == torch.float32 and rows.dtype in HALVES):
            raise ValueError(f"{bank} holds {rows.dtype}, the encoder's features are {dtype}")
        found.append(rows)
    if not any(len(rows) for rows in found):
        raise _damaged(folder, "none of its banks has a row")
    return found


def same_weights(told: dict[str, Any], found: str, encoder: MultiResolutionEncoder) -> str | None:
    """The type of the weights that banks were made with, where those of ``encoder`` are the same but for their type.

    ``found`` is its fingerprint. Of two types the wider is rounded to the narrower.
    """
    if told["rounded"].get(type_of(encoder)) == found:
        return told["type"]
    expected = told["fingerprint"]
    return next((name for name, value in rounded(encoder).items() if value == expected), None)


def type_of(encoder: MultiResolutionEncoder) -> str:
    return str(encoder.family.like.dtype).removeprefix("torch.")


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"{WHAT}: {folder / INDEX} is damaged: {what}")


def _list_of(right: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(right(v) for v in value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_range(value: object) -> bool:
    fields = {field.name for field in dataclasses.fields(NormalRange)}
    return isinstance(value, dict) and set(value) == fields and all(map(is_number, value.values()))


_ENTRIES: dict[str, tuple[Callable[[object], bool], str]] = {
    "fingerprint": (_is_text, "text"),
    "images": (lambda v: type(v) is int and v > 0, "a positive integer"),
    "layers": (_list_of(lambda v: type(v) is int), "a list of integers"),
    "scales": (lambda v: v is None or _list_of(is_number)(v), "a list of numbers or null"),
    "index": (_is_text, "text"),
    "pixels": (lambda v: v is None or is_number(v), "a number or null"),
    "rules": (lambda v: isinstance(v, dict), "an object"),
    "coreset": (is_number, "a number"),
    "background": (_is_text, "text"),
    "precision": (_is_text, "text"),
    "on_empty": (_is_text, "text"),
    "foreground": (_is_flag, "true or false"),
    "enlarge": (_is_flag, "true or false"),
    "rounded": (lambda v: isinstance(v, dict) and all(map(_is_text, v.values())), "an object of texts"),
    "type": (_is_text, "text"),
    "normal": (lambda v: v is None or _is_range(v), "the numbers of a range or null"),
    "model": (_is_text, "text"),
    "method": (lambda v: v is None or _is_text(v), "text or null"),
    "norm": (_is_flag, "true or false"),
    "shorter_side": (lambda v: v is None or type(v) is int, "an integer or null"),
    "projection": (lambda v: v is None or _is_text(v), "text or null"),
    "references": (lambda v: v is None or is_number(v), "a number or null"),
    "banks": (_list_of(lambda v: isinstance(v, dict)), "a list of objects"),
}
# The version that an entry came with, and what banks without it were made with.
_LATER = {
    "on_empty": (2, "skip"),
    "enlarge": (3, True),
    "rounded": (3, {}),
    "type": (3, ""),
    "normal": (3, None),
    "norm": (4, False),
    "model": (4, ""),
    **dict.fromkeys(("method", "shorter_side", "projection", "references"), (4, None)),
}
_BANK_ENTRIES = {1: ("file", "shape"), **dict.fromkeys((2, 3, 4), ("file", "shape", "place", "sha256"))}
