"""A photo beside its heat map, drawn on the scale of the bank, with the threshold as a line."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

PANEL_INCHES = 3.0
DPI = 160
MAP, LINE = "inferno", "#4fc3f7"
OVERLAY = 0.55  # of the colours over the photo


@dataclass(frozen=True)
class Scale:
    """Scores from black (``low``) to yellow (``high``), and the score of the line; None: no line."""

    low: float
    high: float
    line: float | None


def draw(photo: np.ndarray, heat: np.ndarray, scale: Scale, title: str, note: str, path: Path) -> None:
    """Writes photo, heat map and both as a picture. ``photo`` is (H, W, 3), uint8, ``heat`` (H, W)."""
    height, width = heat.shape
    panel = PANEL_INCHES * min(1.0, width / height)
    tall = panel * height / width
    gap, head, foot, bar = 0.12, 0.5, 0.42, 0.75
    total = (3 * panel + 4 * gap + bar, head + tall + foot)
    figure = Figure(figsize=total, dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    norm = Normalize(scale.low, max(scale.high, np.nextafter(scale.low, np.inf)), clip=True)
    colours = colormaps[MAP](norm(heat))[..., :3]
    panels = (photo, colours, (1 - OVERLAY) * photo / 255 + OVERLAY * colours)
    for i, pixels in enumerate(panels):
        axes = figure.add_axes(
            ((gap + i * (panel + gap)) / total[0], foot / total[1], panel / total[0], tall / total[1])
        )
        axes.imshow(pixels, interpolation="antialiased", aspect="auto")
        if i == 2 and scale.line is not None and heat.min() < scale.line <= heat.max():
            axes.contour(heat, [scale.line], colors=[LINE], linewidths=0.9)
        axes.set_axis_off()
    axes = figure.add_axes(((3 * panel + 3.5 * gap) / total[0], foot / total[1], 0.13 / total[0], tall / total[1]))
    bar_of_scale = figure.colorbar(ScalarMappable(norm, MAP), cax=axes)
    bar_of_scale.ax.tick_params(labelsize=7)
    if scale.line is not None and norm.vmin < scale.line < norm.vmax:
        bar_of_scale.ax.axhline(scale.line, color=LINE, linewidth=1.5)
    with warnings.catch_warnings():
        # Names in scripts that the font has no letters of are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        for text, y, size, weight in ((title, foot + tall + 0.16, 11, "bold"), (note, 0.15, 8, "normal")):
            figure.text(gap / total[0], y / total[1], text, size=size, weight=weight, color="#222222", parse_math=False)
        figure.savefig(path)
