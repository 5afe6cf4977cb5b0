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
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]


@app.command()
def fit(
    images: Annotated[Path, typer.Argument(help="Folder of normal images.")],
    out: Annotated[Path, typer.Option(help="Folder for the banks.")],
    weights: Weights = None,
    scales: Annotated[str, typer.Option(help="Factors of the image's size.")] = "0.3,0.4,0.5,0.6,0.7",
    layers: Annotated[str, typer.Option(help="0-based blocks of the transformer.")] = "7,9,11",
    index: Annotated[str, typer.Option(help="exact, coreset or ivf.")] = "exact",
    rules: Annotated[str, typer.Option(help="mrf-ad, mrf-max, patchcore, anomaly-dino or superad.")] = "mrf-ad",
    pixels: Annotated[float, typer.Option(min=0, help="Resize images to so many pixels first; 0: never.")] = 5e6,
) -> None:
    """Fill banks with the patches of normal images."""
    options = {"index": index, "rules": rules, "pixels": pixels or None}
    at = (numbers(scales, float, "--scales"), numbers(layers, int, "--layers"))
    with one_line("anomaly,cli,models"):
        from murf_fast.cli.anomaly.fit import fit as fit_banks

        fit_banks(images, out, weights, *at, options, console())


@app.command()
def score(
    bank: Annotated[Path, typer.Argument(help="Folder that `murf-fast anomaly fit` wrote.")],
    image: Annotated[Path, typer.Argument(help="The image to look at.")],
    out: Annotated[Path, typer.Option(help="Picture of the image with its heat map.")] = Path("map.png"),
    weights: Weights = None,
) -> None:
    """Score an image and draw its heat map."""
    with one_line("anomaly,cli,models"):
        from murf_fast.cli.anomaly.score import score as score_image

        score_image(bank, image, out, weights, console())


@app.command()
def evaluate(
    data: Annotated[Path, typer.Argument(help="Folder of a data set or of one category; see below.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json; what is done in it is not done again.")],
    weights: Weights = None,
    scales: Annotated[str, typer.Option(help="Factors of the image's size.")] = "0.3,0.4,0.5,0.6,0.7",
    layers: Annotated[str, typer.Option(help="0-based blocks of the transformer.")] = "7,9,11",
    index: Annotated[str, typer.Option(help="exact, coreset or ivf.")] = "exact",
    rules: Annotated[str, typer.Option(help="mrf-ad, mrf-max, patchcore, anomaly-dino or superad.")] = "mrf-ad",
    scale_weights: Annotated[
        str | None, typer.Option(help="One number per scale: fusion by weights.", show_default=False)
    ] = None,
    layer_weights: Annotated[
        str | None, typer.Option(help="One number per layer: fusion by weights.", show_default=False)
    ] = None,
    pixels: Annotated[float, typer.Option(min=0, help="Resize images to so many pixels first; 0: never.")] = 5e6,
    subsets: Annotated[
        str, typer.Option(help="Measure choices of banks, too: none, scales, layers, scales-x-layers or all.")
    ] = "none",
    heat_maps: Annotated[bool, typer.Option("--heat-maps", help="Draw every test image's map.")] = False,
    keep_banks: Annotated[bool, typer.Option("--keep-banks", help="Leave the banks in the folder.")] = False,
    device: Device = "cpu",
) -> None:
    """Fit and score every category of a data set, and print the measures of the field.

    Data sets: MVTec AD (CATEGORY/train/good, test/KIND, ground_truth/KIND/NAME_mask.png), MVTec AD 2 (test_public/good,
    bad and ground_truth), VisA (by split_csv/1cls.csv if it is there), and plain folders: good or train/good beside
    folders of defects, masks in ground_truth/KIND, named as the images or NAME_mask.
    """
    options = {"index": index, "pixels": pixels or None}
    at = (numbers(layers, int, "--layers"), numbers(scales, float, "--scales"))
    given = {"scale_weights": scale_weights, "layer_weights": layer_weights}
    fusion = {name: tuple(parsed(text, float)) for name, text in given.items() if text is not None}
    with one_line("anomaly,cli,models"):
        from murf_fast.cli.anomaly.evaluate import Plan, run

        run(Plan(data, out, weights, *at, rules, fusion, options, subsets, heat_maps, keep_banks, device), console())
