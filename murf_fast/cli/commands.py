"""The subcommands of ``murf-fast``."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import torch
import typer

import murf_fast
from murf_fast.cli._terminal import SMALLEST_SIDE, console, one_line, parsed
from murf_fast.cli.anomaly.commands import app as anomaly
from murf_fast.cli.extract.command import extract

app = typer.Typer(
    help="Fast, exact kernels for dense features of frozen vision transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"murf-fast {murf_fast.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Which this is.")
    ] = False,
) -> None:
    pass


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
) -> None:
    """Versions, processors, and every backend with each reason why it cannot be used."""
    from murf_fast.cli import info

    if as_json:
        typer.echo(json.dumps(info.as_json(info.collect()), indent=2))
    else:
        info.render(console())


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
    longest: Annotated[
        int, typer.Option(min=SMALLEST_SIDE, max=2048, help="Longer side of the fused map, in pixels.")
    ] = 448,
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
app.command()(extract)


@app.command()
def tables(
    name: Annotated[
        str | None,
        typer.Argument(help="anyup10, encoder, featsharp14, jbu, mrfad or murf2.", show_default=False),
    ] = None,
    sizes: Annotated[str | None, typer.Option(help="Sizes in pixels, such as 224,448.", show_default=False)] = None,
    models: Annotated[
        str | None, typer.Option(help="Methods (anyup10, jbu) or ViT-S/14,ViT-B/14,ViT-L/14.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Images of a call.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; a GPU if any.", show_default=False)] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds for all cases together: those expected to take more than is left are left out. No call is "
            "broken off, so that one may end late.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[str, typer.Option(help="rich, md, csv, latex or json.")] = "rich",
    weights: Annotated[
        str | None, typer.Option(help="A ViT as for `anomaly`, or a checkpoint of a method.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="module:function that makes a model of your own.", show_default=False)
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Data set for mrfad.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder for NAME.json and NAME.png.")] = Path("out"),
    source: Annotated[
        Path | None, typer.Option("--from", help="A NAME.json to show again.", show_default=False)
    ] = None,
) -> None:
    """Measure latency and memory as in the tables of the papers, and draw them. Needs no checkout.

    `murf2`: MuRF's Table 2. `anyup10`: AnyUp's Table 10. `featsharp14`: FeatSharp's Figure 14. `mrfad`: seconds of the
    detector's parts. `jbu`: FeatUp's upsampler. `encoder`: a ViT at any sizes. Ctrl-C keeps what is measured.
    """
    with one_line("cli,models"):
        from murf_fast.cli.tables.command import Job, main

        job = Job(name, sizes, models, batch, dtype, device, budget, format, weights, model, data, out, source)
        status = main(job, console(), console(stderr=True))
    raise typer.Exit(status)


@app.command()
def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="Operations; all if left out.", show_default=False)] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the record and the report; out/benchmarks if left out.", show_default=False),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="A record of an earlier run (run.json, quick.json or a results.json): its cases are measured again, "
            "and what changed beyond the measured spread is listed.",
            show_default=False,
        ),
    ] = None,
    fail_on_slower: Annotated[
        bool, typer.Option("--fail-on-slower", help="With --against: exit status 10 if something became slower.")
    ] = False,
    other_machine: Annotated[
        bool, typer.Option("--other-machine", help="With --against: a record of another machine, by its ratios alone.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="One small case of every operation: about a minute, for no report.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run of the same command.")
    ] = False,
) -> None:
    """Run the benchmark suites of a source checkout, keep every case as it is measured, write their report.

    A full run of all of them updates benchmarks/results.

    `bench jbu`, `bench anyup` and `bench featsharp` are `tables jbu`, `anyup10` and `featsharp14`, and need no
    checkout.

    Exit status: 0; 1 if a case gave a wrong result or raised; 2 for bad input; 10 with --fail-on-slower if something
    became slower; 130 if interrupted.
    """
    with one_line("bench,cli"):
        from murf_fast.cli.bench.suites import TABLES, Options, main

        options = Options(ops or (), out, against, fail_on_slower, other_machine, quick, resume)
        if ops is not None and len(ops) == 1 and ops[0] in TABLES:
            from murf_fast.cli.tables.command import Job
            from murf_fast.cli.tables.command import main as measure

            if options != Options(ops, out):
                raise ValueError(f"`bench {ops[0]}` makes a table and takes no option but --out")
            status = measure(Job(TABLES[ops[0]], out=out or Path("out")), console(), console(stderr=True))
        else:
            status = main(options, console())
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
