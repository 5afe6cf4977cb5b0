"""The subcommands of ``murf-fast anomaly``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from murf_fast.cli._terminal import console, numbers, one_line

app = typer.Typer(help="Training-free anomaly detection (MRF-AD).", no_args_is_help=True)

Weights = Annotated[
    Path | None,
    typer.Option(help="Folder of a Hugging Face Dinov2Model, as for `murf-fast demo`.", show_default=False),
]


@app.command()
def fit(
    images: Annotated[Path, typer.Argument(help="Folder of normal images.")],
    out: Annotated[Path, typer.Option(help="Folder for the banks.")],
    weights: Weights = None,
    scales: Annotated[str, typer.Option(help="Factors of the image's size.")] = "0.3,0.4,0.5,0.6,0.7",
    layers: Annotated[str, typer.Option(help="0-based blocks of the transformer.")] = "7,9,11",
    index: Annotated[str, typer.Option(help="exact, cells, coreset or ivf.")] = "exact",
    rules: Annotated[str, typer.Option(help="mrf-ad, patchcore or anomaly-dino.")] = "mrf-ad",
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
