"""The options of ``murf-fast extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from murf_fast.cli._ray_options import Address, Ray, Workers
from murf_fast.cli._terminal import console, one_line
from murf_fast.cli.anomaly.commands import Weights

MOST = 1 << 20


def extract(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images, a list of files (.txt), .tar files of webdataset or .parquet tables: a file, a "
            "folder of them, or a pattern such as 'part-{000..127}.tar'."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the features; an unfinished one is gone on with.")],
    weights: Weights = None,
    sizes: Annotated[str, typer.Option(help="Resolutions in pixels: 266,518 or 266x518 (height x width).")] = "518",
    layers: Annotated[
        str | None, typer.Option(help="0-based blocks; the last if left out.", show_default=False)
    ] = None,
    norm: Annotated[
        bool | None,
        typer.Option("--norm/--no-norm", help="Apply the model's final norm; as the model does if left out."),
    ] = None,
    fuse: Annotated[
        str, typer.Option(help="concat: all maps on one grid; none: every map and CLS token by itself.")
    ] = "concat",
    grid: Annotated[
        str | None,
        typer.Option(
            help="Height x width of what is stored; the largest grid if left out, with a head the largest size.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="What is stored: float32, float16, bfloat16; as computed if left out.", show_default=False),
    ] = None,
    model_dtype: Annotated[str, typer.Option(help="In which the model runs.")] = "float32",
    format: Annotated[str, typer.Option(help="safetensors, zarr, parquet or arrow.")] = "safetensors",
    head: Annotated[
        Path | None,
        typer.Option(help="Weights of a linear head: its labels or depth are stored.", show_default=False),
    ] = None,
    head_kind: Annotated[str, typer.Option(help="segmentation or depth.")] = "segmentation",
    depth_range: Annotated[
        str | None, typer.Option(help="Metres, such as 0.001,10, where the head's file says none.", show_default=False)
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Of .parquet tables: the images' column.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Images that are encoded together.")] = 16,
    shard: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Images of a file; 256 MB if left out.", show_default=False)
    ] = None,
    readers: Annotated[int, typer.Option(min=1, max=1024, help="Processes that decode, for every model.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1; with Ray cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="CPU threads of a model; torch's number if left out.", show_default=False),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first broken image.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the shards that are there before going on, to compare checksums.")
    ] = False,
    ray: Ray = False,
    address: Address = None,
    workers: Workers = None,
) -> None:
    """Write the features of many images to shards that `murf_fast.data.Features` reads.

    The same command goes on where a run stopped. Images that cannot be read are listed in failed.jsonl.

    Exit status: 0; 1 if images are broken; 2 for bad input, a full disk or a folder of another configuration; 130 if
    interrupted.
    """
    with one_line("cli,models"):
        from murf_fast.cli.extract.run import Job, run

        what = (sizes, layers, norm, fuse, grid, dtype, model_dtype, format, head, head_kind, depth_range)
        how = (column, batch, shard, readers, device, threads, strict, verify, ray, address, workers)
        status = run(Job(source, out, weights, *what, *how), console())
    raise typer.Exit(status)
