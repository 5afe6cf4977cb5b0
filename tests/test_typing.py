"""The types that users' checkers see: what is asked for is what is found, and every public signature is whole.

That the package itself keeps to them is ``make lint``.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections import defaultdict
from pathlib import Path

import public_api
import pytest

import murf_fast
from murf_fast import annotations as names

ROOT = Path(__file__).resolve().parents[1]
USAGE = Path(__file__).parent / "typing" / "usage.py"


def test_what_a_checker_finds():
    """Seconds behind ``make lint``, whose cache it shares; half a minute without."""
    api = pytest.importorskip("mypy.api", reason="mypy is not installed; it comes with the extra [dev]")
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / "build" / "mypy")]
    told, errors, _ = api.run([*options, "--hide-error-context", "--no-error-summary", str(USAGE)])
    assert not errors, errors
    found = defaultdict(list)
    for line in told.splitlines():
        place, kind, text = re.fullmatch(r"(.+?:\d+): (error|note): (.*)", line).groups()
        if "usage.py" not in place:
            pytest.fail(line)
        code = re.search(r"\[([a-z-]+)\]$", text)
        if revealed := re.fullmatch(r'Revealed type is "(.*)"', text):
            # Without the modules that names come from.
            found[int(place.rpartition(":")[2])].append(re.sub(r"(?:\w+\.)+(?=\w)", "", revealed[1]))
        elif kind == "error":
            found[int(place.rpartition(":")[2])].append(f"error: {code[1]}")
    expected = {}
    for number, line in enumerate(USAGE.read_text().splitlines(), 1):
        comment = re.search(r"  # (.*)$", line)
        if comment and ("reveal_type(" in line or comment[1].startswith("error: ")):
            expected[number] = {comment[1]}
    assert len(expected) > 70
    assert {number: set(what) for number, what in found.items()} == expected


# Names of choices, and where those that are taken are listed.
CHOICES = {
    "AnomalyMethod": "anomaly.methods.METHODS",
    "AnomalyRules": "anomaly.scoring.PRESETS",
    "Attention": "nn.vit._attention.KINDS",
    "Backend": "backends.NAMES",
    "BankIndex": "anomaly.detector.INDICES",
    "Border": "ops.gaussian_blur.BORDERS",
    "Distance": "anomaly.scoring.METRICS",
    "HeadGrid": "nn.heads._head_grid.GRIDS",
    "Layout": "ops.image_to_patches.LAYOUTS",
    "Metric": "ops.nearest_distance.METRICS",
    "Mode": "tables.resize.MODES",
    "Norm": "ops.upsample_expectation.NORMS",
    "Padding": "tables.folded.PADDINGS",
    "PositionFlavor": "ops.resample_pos_embed.FLAVORS",
    "Precision": "ops.nearest_distance.PRECISIONS",
    "Projection": "ops._random_projection.PROJECTIONS",
    "Reduce": "nn.guided._attend.REDUCTIONS",
    "Remainder": "ops.patch_embed.REMAINDERS",
    "Rounding": "nn.vit.multi_resolution_encoder.ROUNDINGS",
    "SharpInput": "nn.featsharp.upsampler.INPUTS",
    "SmoothMode": "ops.adaptive_conv.MODES",
    "SubsetKind": "anomaly.subsets.KINDS",
    "TileFusion": "nn.vit.siglip_hd.FUSIONS",
    "Tiling": "nn.vit.siglip_hd.TILINGS",
    "Values": "ops.window_attention.VALUES",
}
# Those of one argument alone.
ARGUMENTS = {
    ("anomaly.MultiResolutionDetector", "background"): "anomaly.detector.BACKGROUNDS",
    ("anomaly.MultiResolutionDetector", "on_empty"): "anomaly.detector.ON_EMPTY",
    ("anomaly.ScoringRules", "fusion"): "anomaly.scoring.FUSIONS",
    ("anomaly.ScoringRules", "image_score"): "anomaly.scoring.IMAGE_SCORES",
    ("anomaly.ScoringRules", "neighbors"): "anomaly.scoring.NEIGHBORS",
    ("feature_unify", "variant"): "ops.feature_unify.VARIANTS",
    ("nearest_distance", "index"): "ops.nearest_distance.INDICES",
    ("nn.AnyUp", "windows"): "nn.guided._anyup_forward.WINDOWS",
    ("nn.DepthHead", "rule"): "nn.heads.depth_head.SPACINGS",
    ("nn.MuRF.graphed", "method"): "nn.vit.murf.GRAPHED",
    ("nn.fine_to_coarse_loss", "kind"): "nn.vit.siglip_hd.LOSSES",
    ("upsample_cross_entropy", "reduction"): "ops.upsample_cross_entropy.REDUCTIONS",
}


def _listed(path: str) -> set[str]:
    module, _, name = path.rpartition(".")
    return set(getattr(importlib.import_module(f"murf_fast.{module}"), name))


@pytest.mark.parametrize("name", CHOICES)
def test_names_of_choices_are_those_that_are_taken(name):
    assert set(typing.get_args(getattr(names, name))) == _listed(CHOICES[name])


def test_every_name_of_choices_is_held():
    literals = {n for n in names.__all__ if typing.get_origin(getattr(names, n)) is typing.Literal}
    assert literals == set(CHOICES)


@pytest.mark.parametrize(("place", "argument"), ARGUMENTS)
def test_choices_of_an_argument_are_those_that_are_taken(place, argument):
    value = murf_fast
    for name in place.split("."):
        value = getattr(value, name)
    annotation = inspect.signature(value).parameters[argument].annotation
    module = importlib.import_module(value.__module__)
    found = eval(annotation, vars(module))
    literals = [part for part in (found, *typing.get_args(found)) if typing.get_origin(part) is typing.Literal]
    assert {choice for literal in literals for choice in typing.get_args(literal)} == _listed(
        ARGUMENTS[place, argument]
    )


def test_public_signatures_are_whole():
    """Every argument and result has a type, and every generic type its parameters."""
    lines = list(public_api.public_api())
    generic = r"\b(tuple|list|dict|set|frozenset|Callable|Iterable|Iterator|Sequence|Mapping|PathLike)\b(?!\[)"
    loose = [line for line in lines if "(" in line and re.search(rf"'[^']*{generic}[^']*'", line)]
    assert not loose
    for line in lines:
        if "(" not in line or line.endswith("(Exception)"):
            continue
        arguments = re.sub(r"'[^']*'|\"[^\"]*\"", "T", line[line.index("(") + 1 : line.rindex(")")])
        untyped = [a for a in re.findall(r"(?:^|, )(\*{0,2}[a-z_]\w*)(?=,|=|$)", arguments) if a not in ("self", "cls")]
        assert not untyped, line
        is_function = line[: line.index("(")].rpartition(".")[2][0].islower()
        assert ") -> " in line or not is_function, line
