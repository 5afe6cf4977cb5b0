"""The subcommands of ``murf-fast anomaly``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from murf_fast.cli._ray_options import Address, Cluster, Ray, Threads, Workers
from murf_fast.cli._terminal import SMALLEST_SIDE, check_pixels, console, numbers, one_line, parsed

if TYPE_CHECKING:
    from murf_fast.cli.anomaly._settings import Settings

app = typer.Typer(
    help="Training-free anomaly detection: MRF-AD, PatchCore, AnomalyDINO, SuperAD.", no_args_is_help=True
)

Weights = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub name of a vision transformer of transformers, timm:NAME[:CHECKPOINT], or "
        "hub:REPOSITORY:NAME of torch.hub. Else $MURF_FAST_WEIGHTS, else facebook/dinov2-small from cache or hub.",
        show_default=False,
    ),
]
FEATURES, BANKS, SCORES = "Features", "Banks", "Scores"  # panels of options, all by the method if left out


def _option(*names: str, panel: str, help: str) -> typer.models.OptionInfo:
    return typer.Option(*names, help=help, show_default=False, rich_help_panel=panel)


Method = Annotated[
    str,
    typer.Option(
        help="mrf-ad, patchcore, anomaly-dino or superad: layers, sizes, banks and scores as the method has them. "
        "The options below stand in for what it says."
    ),
]
Layers = Annotated[str | None, _option(panel=FEATURES, help="0-based blocks of the transformer, such as 7,9,11.")]
Scales = Annotated[str | None, _option(panel=FEATURES, help="Factors of the image's size, such as 0.3,0.5,0.7.")]
Norm = Annotated[bool | None, _option("--norm/--no-norm", panel=FEATURES, help="The model's final norm on all layers.")]
Pixels = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Shrink images to so many pixels first, such as 5e6; 0: never.",
        show_default=False,
        rich_help_panel=FEATURES,
    ),
]
Enlarge = Annotated[
    bool,
    typer.Option("--enlarge", help="Enlarge images to --pixels, too: MRF-AD's protocol.", rich_help_panel=FEATURES),
]
ShorterSide = Annotated[
    int | None,
    typer.Option(
        min=SMALLEST_SIDE,
        help="Instead of --pixels: bring the shorter side of images to so many pixels.",
        show_default=False,
        rich_help_panel=FEATURES,
    ),
]
Index = Annotated[
    str | None,
    _option(
        panel=BANKS,
        help="exact; cells (the same, searched by cells); coreset (a share of the rows); ivf (approximate, by faiss).",
    ),
]
Coreset = Annotated[float | None, _option(panel=BANKS, help="Share of the rows that --index coreset keeps.")]
Projection = Annotated[str | None, _option(panel=BANKS, help="Coresets by random projections: sparse, linear or none.")]
References = Annotated[
    float | None,
    _option(panel=BANKS, help="Share of the images that fill the banks, chosen by their CLS tokens; 1: all."),
]
Rules = Annotated[
    str | None,
    _option(
        panel=SCORES,
        help="Distances to scores as in mrf-ad, mrf-max, patchcore, anomaly-dino or superad, and nothing else of it.",
    ),
]
Metric = Annotated[str | None, _option(panel=SCORES, help="l2, l2sq or cosine.")]
Neighbors = Annotated[int | None, _option("--k", panel=SCORES, help="Nearest rows that a patch is compared with.")]
OfNeighbors = Annotated[str | None, _option("--neighbors", panel=SCORES, help="mean of their distances, or kth.")]
Fusion = Annotated[str | None, _option(panel=SCORES, help="mean or max of the maps of all banks.")]
ScaleWeights = Annotated[str | None, _option(panel=SCORES, help="One number per scale: a weighted mean.")]
LayerWeights = Annotated[str | None, _option(panel=SCORES, help="One number per layer: a weighted mean.")]
Sigma = Annotated[float | None, _option(panel=SCORES, help="Gaussian smoothing of maps, in pixels.")]
ImageScore = Annotated[str | None, _option(panel=SCORES, help="max, top1% or reweighted.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help="Images that share a pass of the model, at most; as many as pay if left out."),
]
HeldOut = Annotated[
    int, typer.Option(min=0, help="Images scored by the others, for the colours of heat maps and a threshold.")
]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave out images that cannot be read, list them.")]


@app.command()
def fit(
    images: Annotated[list[Path], typer.Argument(help="Folders of normal images, or image files.")],
    out: Annotated[Path, typer.Option(help="Folder for the banks.")],
    weights: Weights = None,
    method: Method = "mrf-ad",
    layers: Layers = None,
    scales: Scales = None,
    norm: Norm = None,
    pixels: Pixels = None,
    enlarge: Enlarge = False,
    shorter_side: ShorterSide = None,
    index: Index = None,
    coreset: Coreset = None,
    projection: Projection = None,
    references: References = None,
    rules: Rules = None,
    metric: Metric = None,
    k: Neighbors = None,
    neighbors: OfNeighbors = None,
    fusion: Fusion = None,
    scale_weights: ScaleWeights = None,
    layer_weights: LayerWeights = None,
    sigma: Sigma = None,
    image_score: ImageScore = None,
    device: Device = "cpu",
    batch: Batch = None,
    held_out: HeldOut = 4,
    skip_broken: SkipBroken = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the bank that --out holds.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a fit that did not finish.")] = False,
    ray: Ray = False,
    address: Address = None,
    workers: Workers = None,
    threads: Threads = None,
) -> None:
    """Fill banks with the patches of normal images.

    With --ray workers encode the images and choose coresets; --out must lie where all machines see it.
    """
    given = locals()  # before anything else is one
    with one_line("anomaly,cli,models"):
        from murf_fast.cli.anomaly.fit import Job
        from murf_fast.cli.anomaly.fit import fit as fit_banks

        fit_banks(
            Job(
                images,
                out,
                _settings(given),
                weights,
                device,
                batch,
                skip_broken,
                force,
                resume,
                held_out,
                Cluster(ray, address, workers, threads),
            ),
            console(),
        )


@app.command()
def add(
    bank: Annotated[Path, typer.Argument(help="Folder that `murf-fast anomaly fit` wrote.")],
    images: Annotated[list[Path], typer.Argument(help="Folders of normal images, or image files.")],
    weights: Weights = None,
    device: Device = "cpu",
    batch: Batch = None,
    held_out: HeldOut = 4,
    skip_broken: SkipBroken = False,
    force: Annotated[bool, typer.Option("--force", help="Start an addition anew that did not finish.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an addition that did not finish.")] = False,
) -> None:
    """Add the patches of more normal images to a bank, which stays as it is until the larger one is whole."""
    with one_line("anomaly,cli,models"):
        from murf_fast.cli.anomaly.add import Job
        from murf_fast.cli.anomaly.add import add as add_images

        add_images(Job(bank, images, weights, device, batch, held_out, skip_broken, force, resume), console())


@app.command()
def show(
    bank: Annotated[Path, typer.Argument(help="Folder that `murf-fast anomaly fit` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="All that its index says, as one JSON object.")] = False,
) -> None:
    """Say how a bank was made, what it holds, and what its normal images score. Needs no weights."""
    with one_line("anomaly,cli,models"):
        from murf_fast.cli.anomaly.show import show as show_bank

        show_bank(bank, as_json, console())


@app.command()
def score(
    bank: Annotated[Path, typer.Argument(help="Folder that `murf-fast anomaly fit` wrote.")],
    images: Annotated[list[Path], typer.Argument(help="Images to look at, and folders of them.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Picture of the image with its heat map, map.png if left out. Of several images: a folder for one "
            "picture each; none are drawn if left out.",
            show_default=False,
        ),
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(help="File of image scores, .csv or .json; may be repeated.", show_default=False),
    ] = None,
    maps: Annotated[Path | None, typer.Option(help="Folder for the raw maps.", show_default=False)] = None,
    map_type: Annotated[str, typer.Option(help="npy or tiff, both float32.")] = "npy",
    threshold: Annotated[
        str | None,
        typer.Option(
            help="Image score from which on an image fails: a number; bank: the largest of its held-out normal images "
            "(this if left out); or labelled: the best F1 of these images.",
            show_default=False,
        ),
    ] = None,
    pixel_threshold: Annotated[
        float | None,
        typer.Option(
            help="Score of the line on heat maps. If left out: a --threshold, where the method's images score what "
            "their highest patch does, else the bank's highest normal pixel.",
            show_default=False,
        ),
    ] = None,
    vmax: Annotated[
        float | None, typer.Option(help="Score of the brightest colour; the bank's if left out.", show_default=False)
    ] = None,
    labelled: Annotated[
        bool,
        typer.Option(
            "--labelled",
            help="Images in folders named good, normal or ok are good, others defective: print AUROC, the threshold "
            "of the best F1, and what the threshold gets wrong.",
        ),
    ] = False,
    fail_on_defect: Annotated[
        bool,
        typer.Option(
            "--fail-on-defect", help="Exit status 10 if an image fails, or cannot be read with --skip-broken."
        ),
    ] = False,
    weights: Weights = None,
    device: Device = "cpu",
    batch: Batch = None,
    skip_broken: SkipBroken = False,
    any_precision: Annotated[
        bool, typer.Option("--any-precision", help="Take the bank's weights in another floating-point type.")
    ] = False,
    ray: Ray = False,
    address: Address = None,
    workers: Workers = None,
    threads: Threads = None,
) -> None:
    """Score images, say which pass and which fail, and draw their heat maps on one scale.

    With --ray workers search the banks, of which each holds a part.

    Exit status: 0, whatever images score; 2 for bad input; 10 with --fail-on-defect if an image fails; 130 if
    interrupted.
    """
    with one_line("anomaly,cli,models"):
        from murf_fast.cli.anomaly.score import Job
        from murf_fast.cli.anomaly.score import score as score_images

        outputs = (out, scores or [], maps, map_type)
        verdicts = (threshold, pixel_threshold, vmax, labelled, fail_on_defect)
        at = (weights, device, batch, skip_broken, any_precision, Cluster(ray, address, workers, threads))
        arguments: tuple[Any, ...] = (*outputs, *verdicts, *at)
        status = score_images(Job(bank, images, *arguments), console())
    raise typer.Exit(status)


@app.command()
def evaluate(
    data: Annotated[Path, typer.Argument(help="Folder of a data set, or of one category.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json; what is done in it is not done again.")],
    weights: Weights = None,
    method: Method = "mrf-ad",
    layers: Layers = None,
    scales: Scales = None,
    norm: Norm = None,
    pixels: Pixels = None,
    enlarge: Enlarge = False,
    shorter_side: ShorterSide = None,
    index: Index = None,
    coreset: Coreset = None,
    projection: Projection = None,
    references: References = None,
    rules: Rules = None,
    metric: Metric = None,
    k: Neighbors = None,
    neighbors: OfNeighbors = None,
    fusion: Fusion = None,
    scale_weights: ScaleWeights = None,
    layer_weights: LayerWeights = None,
    sigma: Sigma = None,
    image_score: ImageScore = None,
    subsets: Annotated[
        str, typer.Option(help="Measure choices of banks, too: none, scales, layers, scales-x-layers or all.")
    ] = "none",
    heat_maps: Annotated[bool, typer.Option("--heat-maps", help="Draw every test image's map.")] = False,
    keep_banks: Annotated[bool, typer.Option("--keep-banks", help="Leave the banks in the folder.")] = False,
    device: Device = "cpu",
    batch: Batch = None,
    skip_broken: SkipBroken = False,
) -> None:
    """Fit and score every category of a data set, and print the measures of the field.

    Data sets: MVTec AD (CATEGORY/train/good, test/KIND, ground_truth/KIND/NAME_mask.png), MVTec AD 2 (test_public/good,
    bad and ground_truth), VisA (by split_csv/1cls.csv if it is there), and plain folders: good or train/good beside
    folders of defects, masks in ground_truth/KIND, named as the images or NAME_mask.
    """
    given = locals()  # before anything else is one
    with one_line("anomaly,cli,models"):
        from murf_fast.cli.anomaly.evaluate import Plan, run

        outputs = (subsets, heat_maps, keep_banks, skip_broken)
        run(Plan(data, out, weights, device, batch, _settings(given), *outputs), console())


def _settings(given: dict[str, Any]) -> Settings:
    """Those among a command's arguments."""
    from murf_fast.cli.anomaly._settings import Settings

    found = {field.name: given[field.name] for field in dataclasses.fields(Settings)}
    check_pixels(found["pixels"], "--pixels")
    for name, kind in (("layers", int), ("scales", float)):
        if found[name] is not None:
            found[name] = numbers(found[name], kind, f"--{name}")
    for name in ("scale_weights", "layer_weights"):
        if found[name] is not None:
            found[name] = tuple(parsed(found[name], float))
    return Settings(**found)
