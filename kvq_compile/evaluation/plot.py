"""The plot of quality against bits: every method, and the front of those that no other beats."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvq_compile.evaluation.perplexity import Score
from kvq_compile.evaluation.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by people who do not see all colours (Okabe and Ito 2008), and by their markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Point:
    """A method on one panel.

    Attributes:
        panel: Title of the panel: what was measured, of which model or text.
        method: Name and options, as users write them.
        bits: Bits an element of packed pages, parameters included.
        kl: Divergence from the 16-bit cache [nats a token].
    """

    panel: str
    method: str
    bits: float
    kl: float

    @property
    def family(self) -> str:
        """The name of the method without its options and widths."""
        name = self.method.partition(":")[0].partition("-")[0]
        return "int" if name.startswith("int") else name


def points_of(rows: Sequence[Row]) -> list[Point]:
    """Return the points of the rows of perplexity among rows of all kinds, the plain cache's left out."""
    scores = [row for row in rows if isinstance(row, Score) and row.packed_bits < 16]
    return [Point(score.text, score.method, score.packed_bits, score.kl) for score in scores]


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats: none diverges less at as few bits. Ascending in bits."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bits, p.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    return best


def check_plot(measured: bool) -> None:
    """Make sure, before anything is measured, that a plot can be drawn.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: What is drawn is not measured.
    """
    if not measured:
        raise ValueError("task must be perplexity, or it among others, for --sweep, which draws it")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "--sweep draws with matplotlib, which is not installed; pip install kvq-compile[plot]"
        )


def draw(points: Sequence[Point], out: Path, name: str = "sweep") -> list[Path]:
    """Draw divergence against bits, a panel for each text or model, a line for each family of methods.

    Args:
        points: What was measured; panels and families in the order of their first points.
        out: The folder of the two files.
        name: Their name, without ``.png`` and ``.svg``.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(point.panel for point in points))
    families = list(dict.fromkeys(point.family for point in points))
    figure = Figure(figsize=(5.4 * len(titles) + 1.2, 4.4), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axes, title in zip(panels, titles, strict=True):
        _draw_panel(axes, [point for point in points if point.panel == title], families)
        axes.set_title(title, fontsize=11)
    panels[0].set_ylabel("KL divergence from the 16-bit cache [nats]")
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False)
    return save(figure, out, name)


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    """Write a figure as ``.png`` and ``.svg`` and return their paths."""
    import matplotlib

    paths = [out / f"{name}.png", out / f"{name}.svg"]
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same drawing is the same file
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _draw_panel(axes: Axes, points: Sequence[Point], families: Sequence[str]) -> None:
    best = front(points)
    line = [point.bits for point in best], [point.kl for point in best]
    axes.step(*line, where="post", color="0.8", linewidth=5, zorder=1, label="front")
    for number, family in enumerate(families):
        members = sorted((p for p in points if p.family == family), key=lambda p: p.bits)
        if not members:
            continue
        axes.plot(
            [point.bits for point in members], [point.kl for point in members],
            label=family, color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)], linewidth=1, markersize=5,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("bits an element, parameters included")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
