"""The subcommands of ``murf-fast``."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import torch
import typer

from murf_fast.cli._terminal import console, one_line, parsed
from murf_fast.cli.anomaly.commands import app as anomaly

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

    render(console())


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
    with one_line("cli,models"):
        from murf_fast.cli.demo.run import run

        with as_file(bundled) as default:
            run(image or default, out, weights, resolutions, longest, console())


app.add_typer(anomaly, name="anomaly")


@app.command()
def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="Operations; all if left out.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON and the report.", show_default=False)] = None,
) -> None:
    """Run the benchmark suites of a source checkout and write their report.

    `bench jbu` and `bench anyup` need no checkout: they print latency and memory of FeatUp's upsampler and of AnyUp at
    four output sizes. Nor does `bench featsharp`: time per image by factor, beside its encoder at the full resolution.
    """
    with one_line("bench,cli"):
        if ops in (["jbu"], ["anyup"], ["featsharp"]):
            from importlib import import_module

            if out is not None:
                raise ValueError(f"`bench {ops[0]}` prints its table and takes no --out")
            import_module(f"murf_fast.cli.bench.{ops[0]}").main(console())
            return
        from murf_fast.cli.bench.suites import main

        status = main(ops or (), out)
    raise typer.Exit(status)


@app.command()
def ablations(
    name: Annotated[
        str, typer.Argument(help="anyup-parts, featsharp-tiles, siglip-hd-tilings, ...; a wrong one lists all.")
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a Hugging Face Dinov2Model or SiglipVisionModel; as for `demo` if left out.",
            show_default=False,
        ),
    ] = None,
    patches: Annotated[int, typer.Option(min=4, max=64, help="Of a side of what the backbone sees; even.")] = 8,
    student: Annotated[
        Path | None, typer.Option(help="siglip-hd: a trained student's folder.", show_default=False)
    ] = None,
    upsampler: Annotated[
        Path | None, typer.Option(help="anyup-windows: AnyUp's weights, a file.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, max=1_000_000, help="Of ablations that train.", show_default=False)
    ] = None,
    form: Annotated[str, typer.Option("--format", help="table, csv or json.")] = "table",
) -> None:
    """Analogues, on features of the bundled photos, of the papers' ablations: docs/papers.md lists them."""
    if patches % 2:
        raise typer.BadParameter(f"expected an even number, got {patches}", param_hint="--patches")
    with one_line("cli,models"):
        from murf_fast.cli.ablations.run import Options, run

        run(name, weights, patches, Options(student, upsampler, steps), form, console())


def _resolutions(sizes: str) -> list[int]:
    resolutions = parsed(sizes, int)
    if not resolutions or min(resolutions) < 1:
        raise typer.BadParameter(f"expected pixels such as 266,518,784, got {sizes!r}", param_hint="--sizes")
    return resolutions
