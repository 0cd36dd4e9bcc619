"""Plots of measurements against the context: a line a method, a panel a shape."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvq_compile.evaluation.plot import COLOURS, MARKERS, save


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        panel: What its panel shows.
        line: What its line is called.
        context: Tokens.
        value: What was measured there.
    """

    panel: str
    line: str
    context: int
    value: float


def can_draw() -> bool:
    """Return whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(
    points: Sequence[Point], label: str, out: Path, name: str, *, log: bool = True, level: float | None = None
) -> list[Path]:  # fmt: skip
    """Draw points against the context, panels and lines in the order of their first points.

    Args:
        points: What was measured.
        label: Of the vertical axis, with its unit.
        out: The folder of the two files.
        name: Their name, without ``.png`` and ``.svg``.
        log: Whether the vertical axis is logarithmic.
        level: Where a horizontal line goes, if one does.

    Returns:
        Their paths; none where there are no points.
    """
    from matplotlib.figure import Figure

    if not points:
        return []
    titles = list(dict.fromkeys(point.panel for point in points))
    names = list(dict.fromkeys(point.line for point in points))
    figure = Figure(figsize=(4.6 * len(titles) + 1.8, 4.2), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axes, title in zip(panels, titles, strict=True):
        for number, line in enumerate(names):
            found = [p for p in points if (p.panel, p.line) == (title, line)]
            found.sort(key=lambda p: p.context)
            axes.plot(
                [p.context for p in found], [p.value for p in found], label=line, linewidth=1,
                markersize=5, color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
                linestyle=("-", "--", ":")[number // len(COLOURS) % 3],
            )  # fmt: skip
        if level is not None:
            axes.axhline(level, color="0.6", linewidth=1, zorder=0)
        axes.set_xscale("log", base=2)
        if log:
            axes.set_yscale("log")
        axes.set_xlabel("tokens of context")
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(label)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    return save(figure, out, name)
