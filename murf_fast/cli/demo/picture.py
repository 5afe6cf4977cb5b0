"""The photo beside the principal components of its feature maps, as in Figure 6 of the MuRF paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PANEL_INCHES = 3.0
DPI = 160


@dataclass(frozen=True)
class Panel:
    title: str
    subtitle: str
    pixels: np.ndarray  # (H, W, 3)


def draw(panels: list[Panel], footer: str, path: Path) -> None:
    """Writes the panels side by side as a PNG."""
    height, width = panels[0].pixels.shape[:2]
    gap, head, foot = 0.12, 0.62, 0.42
    panel_height = PANEL_INCHES * height / width
    total_width = len(panels) * PANEL_INCHES + (len(panels) + 1) * gap
    total_height = head + panel_height + foot
    figure = Figure(figsize=(total_width, total_height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for i, panel in enumerate(panels):
        left = gap + i * (PANEL_INCHES + gap)
        axes = figure.add_axes(
            (left / total_width, foot / total_height, PANEL_INCHES / total_width, panel_height / total_height)
        )
        axes.imshow(panel.pixels, interpolation="antialiased", aspect="auto")
        axes.set_axis_off()
        top = foot + panel_height
        for text, above, size, weight, colour in (
            (panel.title, 0.31, 13, "bold", "#111111"),
            (panel.subtitle, 0.1, 10, "normal", "#555555"),
        ):
            figure.text(left / total_width, (top + above) / total_height, text, size=size, weight=weight, color=colour)
    figure.text(gap / total_width, 0.15 / total_height, footer, size=9, color="#555555")
    figure.savefig(path)
