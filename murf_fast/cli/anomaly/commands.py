"""The subcommands of ``murf-fast anomaly``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from murf_fast.cli._terminal import console, numbers, one_line, parsed

app = typer.Typer(help="Training-free anomaly detection (MRF-AD).", no_args_is_help=True)

Weights = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub name of a vision transformer of transformers, timm:NAME[:CHECKPOINT], or "
        "hub:REPOSITORY:NAME of torch.hub. Else $MURF_FAST_WEIGHTS, else facebook/dinov2-small from cache or hub.",
        show_default=False,
    ),
]
Rules = Annotated[str, typer.Option(help="mrf-ad, mrf-max, patchcore, anomaly-dino or superad.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help="Images that share a pass of the model, at most; as many as pay if left out."),
]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave out images that cannot be read, list them.")]


@app.command()
def fit(
    images: Annotated[list[Path], typer.Argument(help="Folders of normal images, or image files.")],
    out: Annotated[Path, typer.Option(help="Folder for the banks.")],
    weights: Weights = None,
    scales: Annotated[str, typer.Option(help="Factors of the image's size.")] = "0.3,0.4,0.5,0.6,0.7",
    layers: Annotated[str, typer.Option(help="0-based blocks of the transformer.")] = "7,9,11",
    index: Annotated[str, typer.Option(help="exact, cells, coreset or ivf.")] = "exact",
    rules: Rules = "mrf-ad",
    pixels: Annotated[float, typer.Option(min=0, help="Shrink images to so many pixels first; 0: never.")] = 5e6,
    enlarge: Annotated[
        bool, typer.Option("--enlarge", help="Enlarge images to --pixels, too: the paper's protocol.")
    ] = False,
    device: Device = "cpu",
    batch: Batch = None,
    held_out: Annotated[
        int, typer.Option(min=0, help="Images scored by the others, for the colours of heat maps and a threshold.")
    ] = 4,
    skip_broken: SkipBroken = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the bank that --out holds.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a fit that did not finish.")] = False,
) -> None:
    """Fill banks with the patches of normal images."""
    options = {"index": index, "rules": rules, "pixels": pixels or None, "enlarge": enlarge}
    at = (numbers(layers, int, "--layers"), numbers(scales, float, "--scales"))
    with one_line("anomaly,cli,models"):
        from murf_fast.cli.anomaly.fit import Job
        from murf_fast.cli.anomaly.fit import fit as fit_banks

        job = Job(images, out, weights, device, batch, skip_broken, force, resume, held_out)
        fit_banks(job, *at, options, console())


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
        float | None,
        typer.Option(help="Image score from which an image is a defect; the bank's if left out.", show_default=False),
    ] = None,
    vmax: Annotated[
        float | None, typer.Option(help="Score of the brightest colour; the bank's if left out.", show_default=False)
    ] = None,
    labelled: Annotated[
        bool,
        typer.Option(
            "--labelled",
            help="Images in folders named good, normal or ok are good, others defective: print AUROC, and the "
            "threshold of the best F1.",
        ),
    ] = False,
    weights: Weights = None,
    device: Device = "cpu",
    batch: Batch = None,
    skip_broken: SkipBroken = False,
    any_precision: Annotated[
        bool, typer.Option("--any-precision", help="Take the bank's weights in another floating-point type.")
    ] = False,
) -> None:
    """Score images, and draw their heat maps on one scale."""
    with one_line("anomaly,cli,models"):
        from murf_fast.cli.anomaly.score import Job
        from murf_fast.cli.anomaly.score import score as score_images

        outputs = (out, scores or [], maps, map_type)
        at = (weights, device, batch, vmax, threshold, labelled, skip_broken, any_precision)
        score_images(Job(bank, images, *outputs, *at), console())


@app.command()
def evaluate(
    data: Annotated[Path, typer.Argument(help="Folder of a data set, or of one category.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json; what is done in it is not done again.")],
    weights: Weights = None,
    scales: Annotated[str, typer.Option(help="Factors of the image's size.")] = "0.3,0.4,0.5,0.6,0.7",
    layers: Annotated[str, typer.Option(help="0-based blocks of the transformer.")] = "7,9,11",
    index: Annotated[str, typer.Option(help="exact, cells, coreset or ivf.")] = "exact",
    rules: Rules = "mrf-ad",
    scale_weights: Annotated[
        str | None, typer.Option(help="One number per scale: fusion by weights.", show_default=False)
    ] = None,
    layer_weights: Annotated[
        str | None, typer.Option(help="One number per layer: fusion by weights.", show_default=False)
    ] = None,
    pixels: Annotated[float, typer.Option(min=0, help="Shrink images to so many pixels first; 0: never.")] = 5e6,
    enlarge: Annotated[
        bool, typer.Option("--enlarge", help="Enlarge images to --pixels, too: the paper's protocol.")
    ] = False,
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
    options = {"index": index, "pixels": pixels or None, "enlarge": enlarge}
    at = (numbers(layers, int, "--layers"), numbers(scales, float, "--scales"))
    given = {"scale_weights": scale_weights, "layer_weights": layer_weights}
    fusion = {name: tuple(parsed(text, float)) for name, text in given.items() if text is not None}
    with one_line("anomaly,cli,models"):
        from murf_fast.cli.anomaly.evaluate import Plan, run

        outputs = (subsets, heat_maps, keep_banks, skip_broken)
        run(Plan(data, out, weights, device, batch, *at, rules, fusion, options, *outputs), console())
