"""Pictures of heat maps: panels beside each other, a colour bar with the scale's numbers, and the line on both."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

PANEL_INCHES = 3.0
DPI = 160
TITLE_INCHES, NOTE_INCHES = 0.1, 0.065  # of a letter, about
MOST_INCHES = 12.0  # that are made for text
MOST_PIXELS = 960  # of a panel's longer side: more than is drawn
MAP, LINE = "inferno", "#00b8ff"
OVERLAY = 0.55  # of the colours over the photo
NEAR = 0.05  # of the bar: numbers nearer to the line's give way to it


@dataclass(frozen=True)
class Scale:
    """Scores from black (``low``) to yellow (``high``), and the score of the line; None: no line."""

    low: float
    high: float
    line: float | None

    def norm(self) -> Normalize:
        return Normalize(self.low, max(self.high, np.nextafter(self.low, np.inf)), clip=True)


@dataclass(frozen=True)
class Panel:
    """An image (H, W, 3), uint8 or in [0, 1], and scores (H, W) whose line is drawn over it."""

    pixels: np.ndarray
    contour: np.ndarray | None = None


def panels(photo: np.ndarray, heat: np.ndarray, scale: Scale, mask: np.ndarray | None = None) -> list[Panel]:
    """Photo, heat map, and both with the line; and the mask (H, W) of the defect, if given.

    ``photo`` is (H, W, 3), uint8, ``heat`` (H, W).
    """
    photo, heat = _shrunk(photo, Image.Resampling.LANCZOS), _shrunk(heat, Image.Resampling.BOX)
    colours = colormaps[MAP](scale.norm()(heat))[..., :3]
    drawn = [Panel(photo), Panel(colours), Panel((1 - OVERLAY) * photo / 255 + OVERLAY * colours, heat)]
    if mask is not None:
        white = _shrunk(np.uint8(255 * mask), Image.Resampling.BOX)
        drawn.append(Panel(np.repeat(white[..., None], 3, axis=2)))
    return drawn


def draw(drawn: Sequence[Panel], scale: Scale, title: str, note: str, path: Path) -> None:
    """Writes panels of one size as a picture, with a colour bar of the scale."""
    height, width = drawn[0].pixels.shape[:2]
    panel = PANEL_INCHES * min(1.0, width / height)
    tall = panel * height / width
    gap, head, foot, bar = 0.12, 0.5, 0.42, 0.85
    count = len(drawn)
    # Panels may be narrower than title and note.
    text = max(TITLE_INCHES * len(title), NOTE_INCHES * len(note)) + 2 * gap
    total = (max(count * panel + (count + 1) * gap + bar, min(text, MOST_INCHES)), head + tall + foot)
    figure = Figure(figsize=total, dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for i, each in enumerate(drawn):
        left = gap + i * (panel + gap)
        axes = figure.add_axes((left / total[0], foot / total[1], panel / total[0], tall / total[1]))
        axes.imshow(each.pixels, interpolation="antialiased", aspect="auto")
        if each.contour is not None and _crosses(each.contour, scale.line):
            lines = axes.contour(each.contour, [scale.line], colors=[LINE], linewidths=1.2)
            lines.set_path_effects([withStroke(linewidth=2.4, foreground="black", alpha=0.6)])
        axes.set_axis_off()
    left = count * panel + (count + 0.5) * gap
    _colour_bar(figure, (left / total[0], foot / total[1], 0.13 / total[0], tall / total[1]), scale)
    with warnings.catch_warnings():
        # Names in scripts that the font has no letters of are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        for text, y, size, weight in ((title, foot + tall + 0.16, 11, "bold"), (note, 0.15, 8, "normal")):
            figure.text(gap / total[0], y / total[1], text, size=size, weight=weight, color="#222222", parse_math=False)
        figure.savefig(path)


def _crosses(scores: np.ndarray, line: float | None) -> bool:
    """Whether some scores are below the line and others are not; a row of pixels has no line."""
    return line is not None and min(scores.shape) > 1 and scores.min() < line <= scores.max()


def _colour_bar(figure: Figure, place: tuple[float, float, float, float], scale: Scale) -> None:
    """The numbers of the scale, and that of the line in its colour."""
    norm: Any = scale.norm()
    bar = figure.colorbar(ScalarMappable(norm, MAP), cax=figure.add_axes(place))
    bar.ax.tick_params(labelsize=7)
    if scale.line is None or not norm.vmin <= scale.line <= norm.vmax:
        return
    bar.ax.axhline(scale.line, color=LINE, linewidth=2.5)
    ticks = [t for t in bar.get_ticks() if norm.vmin <= t <= norm.vmax]
    kept = [t for t in ticks if abs(t - scale.line) > NEAR * (norm.vmax - norm.vmin)]
    bar.set_ticks([*kept, scale.line], labels=[*(f"{t:g}" for t in kept), f"{scale.line:.4g}"])
    bar.ax.get_yticklabels()[-1].set(color="#0077aa", weight="bold")


def _shrunk(pixels: np.ndarray, resampling: Image.Resampling) -> np.ndarray:
    """An image, (H, W) or (H, W, 3), of at most ``MOST_PIXELS`` on its longer side."""
    height, width = pixels.shape[:2]
    factor = MOST_PIXELS / max(height, width)
    if factor >= 1:
        return pixels
    size = [max(1, round(n * factor)) for n in (width, height)]
    return np.asarray(Image.fromarray(pixels).resize(size, resampling))
