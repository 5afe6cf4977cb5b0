"""Which ablations there are, and what each takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rich.console import Console

from murf_fast.cli.ablations import anyup, featsharp, siglip_hd
from murf_fast.cli.ablations._inputs import Model, load
from murf_fast.cli.ablations._table import FORMATS, Table


@dataclass(frozen=True)
class Options:
    """Those of the command that only some take; None where they were left out."""

    student: Path | None = None
    upsampler: Path | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Ablation:
    """takes: Names of the Options that it reads. steps: Of training, unless told otherwise."""

    what: str
    run: Callable[[Model, int, Options], Table]
    takes: tuple[str, ...] = ()
    steps: int = 0


def _of_targets(function: Callable[[Model, Path | None, int], Table], what: str) -> Ablation:
    return Ablation(what, lambda m, n, o: function(m, o.student, n), ("student",))


def _trained(function: Callable[[Model, int, int], Table], what: str, steps: int) -> Ablation:
    return Ablation(what, lambda m, n, o: function(m, n, cast("int", o.steps)), ("steps",), steps)


ABLATIONS = {
    "anyup-parts": _trained(anyup.parts, "AnyUp, Table 8", 100),
    "anyup-basis": _trained(anyup.basis, "AnyUp, Table 9", 100),
    "anyup-windows": Ablation(
        "AnyUp, Figure 8", lambda m, n, o: anyup.windows(m, n, cast("Path", o.upsampler)), ("upsampler",)
    ),
    "featsharp-windows": _trained(featsharp.windows, "FeatSharp, Figure 13", 100),
    "featsharp-tiles": Ablation("FeatSharp, Figure 15", lambda m, n, o: featsharp.tiles(m, n)),
    "siglip-hd-scales": _of_targets(siglip_hd.scales, "SigLIP-HD, Tables 2 and 9"),
    "siglip-hd-tilings": _of_targets(siglip_hd.tilings, "SigLIP-HD, Table 3"),
    "siglip-hd-fusions": _of_targets(siglip_hd.fusions, "SigLIP-HD, Table 4"),
    "siglip-hd-losses": _of_targets(siglip_hd.losses, "SigLIP-HD, Table 8"),
    "siglip-hd-weights": _of_targets(siglip_hd.weights, "SigLIP-HD, Table 10"),
}


def run(name: str, weights: Path | None, patches: int, options: Options, form: str, console: Console) -> None:
    """Prints one table.

    Raises:
        OSError, ValueError: An option is wrong, or does not go with this ablation; the message names it.
    """
    if name not in ABLATIONS:
        raise ValueError(f"no ablation {name!r}; there are: {', '.join(ABLATIONS)}")
    ablation = ABLATIONS[name]
    for option in ("student", "upsampler", "steps"):
        if getattr(options, option) is not None and option not in ablation.takes:
            raise ValueError(f"`ablations {name}` takes no --{option}")
    if "upsampler" in ablation.takes and options.upsampler is None:
        raise ValueError(f"`ablations {name}` needs AnyUp's weights: --upsampler FILE")
    if options.upsampler is not None and not options.upsampler.is_file():
        raise FileNotFoundError(f"--upsampler must be a file, got {options.upsampler}")
    if form not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    if "steps" in ablation.takes and options.steps is None:
        options = Options(options.student, options.upsampler, ablation.steps)
    ablation.run(load(weights), patches, options).show(console, form)
