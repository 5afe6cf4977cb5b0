"""The subcommands of ``murf-fast``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from murf_fast.backends import BackendUnavailableError

# An image a hundred times as large in each direction is a typing error.
LARGEST_SCALE = 100

app = typer.Typer(
    help="Fast, exact kernels for dense features of frozen vision transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def info() -> None:
    """Versions, processors, and every backend with each reason why it cannot be used."""
    from murf_fast.cli.info import render

    render(_console())


@app.command()
def demo(
    image: Annotated[
        Path | None, typer.Argument(help="A photo; a bundled one if left out.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the numbers.")] = Path("out"),
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a Hugging Face Dinov2Model. Else $MURF_FAST_WEIGHTS, else facebook/dinov2-small from cache "
            "or hub, else random weights.",
            show_default=False,
        ),
    ] = None,
    sizes: Annotated[str, typer.Option(help="Resolutions to encode at, in pixels.")] = "266,518,784",
    longest: Annotated[int, typer.Option(min=1, max=2048, help="Longer side of the fused map, in pixels.")] = 448,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads; torch's number if left out.", show_default=False)
    ] = None,
) -> None:
    """Encode a photo at several resolutions, fuse the features, compare with plain PyTorch, draw the components."""
    resolutions = _resolutions(sizes)
    if threads is not None:
        torch.set_num_threads(threads)
    bundled = files("murf_fast") / "assets" / "coffee.jpg"
    with _one_line("cli,models"):
        from murf_fast.cli.demo.run import run

        with as_file(bundled) as default:
            run(image or default, out, weights, resolutions, longest, _console())


anomaly = typer.Typer(help="Training-free anomaly detection (MRF-AD).", no_args_is_help=True)
app.add_typer(anomaly, name="anomaly")

Weights = Annotated[
    Path | None,
    typer.Option(help="Folder of a Hugging Face Dinov2Model, as for `murf-fast demo`.", show_default=False),
]


@anomaly.command()
def fit(
    images: Annotated[Path, typer.Argument(help="Folder of normal images.")],
    out: Annotated[Path, typer.Option(help="Folder for the banks.")],
    weights: Weights = None,
    scales: Annotated[str, typer.Option(help="Factors of the image's size.")] = "0.3,0.4,0.5,0.6,0.7",
    layers: Annotated[str, typer.Option(help="0-based blocks of the transformer.")] = "7,9,11",
    index: Annotated[str, typer.Option(help="exact, coreset or ivf.")] = "exact",
    rules: Annotated[str, typer.Option(help="mrf-ad, patchcore or anomaly-dino.")] = "mrf-ad",
    pixels: Annotated[float, typer.Option(min=0, help="Resize images to so many pixels first; 0: never.")] = 5e6,
) -> None:
    """Fill banks with the patches of normal images."""
    options = {"index": index, "rules": rules, "pixels": pixels or None}
    at = (_numbers(scales, float, "--scales"), _numbers(layers, int, "--layers"))
    with _one_line("anomaly,cli,models"):
        from murf_fast.cli.anomaly import fit as fit_banks

        fit_banks(images, out, weights, *at, options, _console())


@anomaly.command()
def score(
    bank: Annotated[Path, typer.Argument(help="Folder that `murf-fast anomaly fit` wrote.")],
    image: Annotated[Path, typer.Argument(help="The image to look at.")],
    out: Annotated[Path, typer.Option(help="Picture of the image with its heat map.")] = Path("map.png"),
    weights: Weights = None,
) -> None:
    """Score an image and draw its heat map."""
    with _one_line("anomaly,cli,models"):
        from murf_fast.cli.anomaly import score as score_image

        score_image(bank, image, out, weights, _console())


@app.command()
def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="Operations; all if left out.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON and the report.", show_default=False)] = None,
) -> None:
    """Run the benchmark suites of a source checkout and write their report.

    `bench jbu` and `bench anyup` need no checkout: they print latency and memory of FeatUp's upsampler and of AnyUp at
    four output sizes. Nor does `bench featsharp`: time per image by factor, beside its encoder at the full resolution.
    """
    with _one_line("bench,cli"):
        if ops in (["jbu"], ["anyup"], ["featsharp"]):
            from importlib import import_module

            if out is not None:
                raise ValueError(f"`bench {ops[0]}` prints its table and takes no --out")
            import_module(f"murf_fast.cli.bench.{ops[0]}").main(_console())
            return
        from murf_fast.cli.bench.suites import main

        status = main(ops or (), out)
    raise typer.Exit(status)


def _resolutions(sizes: str) -> list[int]:
    resolutions = _parsed(sizes, int)
    if not resolutions or min(resolutions) < 1:
        raise typer.BadParameter(f"expected pixels such as 266,518,784, got {sizes!r}", param_hint="--sizes")
    return resolutions


def _numbers(text: str, kind: type, option: str) -> list:
    numbers = _parsed(text, kind)
    if not numbers or (kind is float and not all(0 < n <= LARGEST_SCALE for n in numbers)):
        expected = "numbers such as 7,9,11" if kind is int else f"numbers such as 0.3,0.5, up to {LARGEST_SCALE}"
        raise typer.BadParameter(f"expected {expected}, got {text!r}", param_hint=option)
    return numbers


def _parsed(text: str, kind: type) -> list:
    """The numbers of a list; none where a part is no finite number."""
    try:
        numbers = [kind(part) for part in text.replace(",", " ").split()]
    except ValueError:
        return []
    return numbers if kind is int or all(map(math.isfinite, numbers)) else []


@contextlib.contextmanager
def _one_line(extras: str) -> Iterator[None]:
    """What users can put right is one line, not a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        _fail(f"this needs {str(error.name).partition('.')[0]}: pip install 'murf-fast[{extras}]'", 1)
    except (OSError, ValueError, BackendUnavailableError) as error:
        _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail("not enough memory for images and scales of this size")


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _fail(message: str, code: int = 2) -> None:
    typer.echo(f"murf-fast: {message}", err=True)
    raise typer.Exit(code)


def _console() -> Console:
    """Rich's console; where the output is no terminal, wide enough for every table."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
