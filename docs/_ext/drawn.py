"""Pictures that are drawn from the library's own tables while the documentation builds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flavours import smooth_table
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from sphinx.application import Sphinx

import murf_fast
from murf_fast import windows

INK = "#1f4e79"


def draw(app: Sphinx) -> None:
    """Writes every picture of this file into the folder of generated ones."""
    folder = Path(app.srcdir) / "pictures" / "drawn"
    folder.mkdir(parents=True, exist_ok=True)
    for make in (resize_tables, window_rules, position_flavours):
        figure = make()
        FigureCanvasSVG(figure)
        # Salt and date: two builds of one tree make the same file.
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": make.__name__, "svg.fonttype": "path"}):
            figure.savefig(folder / f"{make.__name__}.svg", metadata={"Date": None})


def resize_tables() -> Figure:
    """The matrices of one axis, 12 pixels to 30 and 30 to 12: banded, whatever the mode."""
    import torch

    cases = (
        ("bilinear, 12 to 30", 12, 30, {}),
        ("bicubic, 12 to 30", 12, 30, {"mode": "bicubic"}),
        ("bilinear, 30 to 12", 30, 12, {}),
        ("antialiased, 30 to 12", 30, 12, {"antialias": True}),
    )
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (title, n, m, how) in zip(figure.subplots(1, 4), cases, strict=True):
        # Column j of the matrix is what becomes of a one at j.
        basis = torch.eye(n).reshape(1, n, n, 1)
        matrix = murf_fast.resize(basis, (m, 1), **how)[0, :, :, 0].T.numpy()
        axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("pixel in", fontsize=8)
        axes.set_ylabel("pixel out", fontsize=8)
        axes.tick_params(labelsize=7)
    return figure


def window_rules() -> Figure:
    """Rows that each of 48 output rows reads of 12 key rows, by rule."""
    out, grid = (48, 48), (12, 12)
    cases = (
        ("ratio(0.1): AnyUp", windows.ratio(out, grid, 0.1)),
        ("neighborhood(5): NAF, NATTEN", windows.neighborhood(out, grid, 5)),
        ("clamped(2): FeatSharp, 12 to 12", windows.clamped(2)),
        ("full(): JAFAR", windows.full()),
    )
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (title, rule) in zip(figure.subplots(1, 4), cases, strict=True):
        size = (12, 12) if title.startswith("clamped") else out
        axes.imshow(
            rule.tables(size, grid)[0].multiplicity(), cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest",
            aspect="auto",
        )  # fmt: skip
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("row of keys", fontsize=8)
        axes.set_ylabel("row of queries", fontsize=8)
        axes.tick_params(labelsize=7)
    return figure


def position_flavours() -> Figure:
    """One row of one channel of a table of 37 positions, at 16 by four ways."""
    table = smooth_table()
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    before = table.mT.unflatten(2, (37, 37))[0, 0, 18].numpy()
    axes.plot((np.arange(37) + 0.5) / 37, before, color="#bbbbbb", linewidth=4, label="the table, 37")
    for flavor, style in (("dinov2-hf", "o-"), ("dinov2-hub", "s--"), ("dinov2-reg", "^:"), ("siglip2", "x-.")):
        after = murf_fast.resample_pos_embed(table, (37, 16), flavor=flavor).mT.unflatten(2, (37, 16))[0, 0, 18]
        axes.plot((np.arange(16) + 0.5) / 16, after.numpy(), style, linewidth=1, markersize=4, label=f"{flavor}, 16")
    axes.set_xlabel("place along the row", fontsize=9)
    axes.set_ylabel("one channel", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
