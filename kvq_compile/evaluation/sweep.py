"""Compare every method at many widths: what to run, which of them no other beats, and a plot of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kvq_compile.calibration.artifact import Calibration
from kvq_compile.calibration.calibrator import calibrate
from kvq_compile.evaluation.kept import Kept
from kvq_compile.evaluation.perplexity import Score
from kvq_compile.evaluation.results import Row
from kvq_compile.evaluation.runner import Method, parse_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAIN = (
    "int8",
    "int4",
    "int3",
    "int2",
    "kivi:bits=4",
    "kivi:bits=2",
    "qaq:bits=4",
    "qaq:bits=3",
    "qaq:bits=2.3",
)
# Label, method, options of calibration, options of the compiled call.
CALIBRATED: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("skvq-K4V4", "skvq", {"bits": 4, "group_size": None}, {}),
    ("skvq-K3V3", "skvq", {"bits": 3, "group_size": None}, {}),
    ("skvq:bits=2", "skvq", {"bits": 2}, {}),
    ("skvq-K2V2", "skvq", {"bits": 2, "group_size": None}, {}),
    ("skvq-K2V1.5", "skvq", {"key_bits": 2, "value_bits": 1.5, "group_size": None}, {"packing": "trits"}),
    ("cq-2c8b", "cq-2c8b", {}, {}),
    ("cq-4c8b", "cq-4c8b", {}, {}),
    ("cq-8c8b", "cq-8c8b", {}, {}),
    ("auto-4.5", "auto", {"bits": 4.5}, {}),
    ("auto-3", "auto", {"bits": 3.0}, {}),
    ("auto-2.5", "auto", {"bits": 2.5}, {}),
    ("auto-2", "auto", {"bits": 2.0}, {}),
)  # fmt: skip
Say = Callable[[str, int, int], None]


def standard_methods(
    model: nn.Module,
    texts: Sequence[Tensor],
    say: Say = lambda stage, done, total: None,
    folder: Path | None = None,
    kept: Kept | None = None,
    only: Collection[str] | None = None,
) -> list[Method]:
    """Return all methods, calibrated on ``texts`` where they learn; without texts, those that do not.

    Args:
        model: What to calibrate.
        texts: Token ids, each ``[1, T]``.
        say: Called with a stage of calibration, how much of it is done and how much there is to do.
        folder: Where calibrations are saved, as ``<label>.safetensors``, if they are to be.
        kept: Which of them were saved by a run that was cut short, and need not be made again.
        only: Labels of those that are wanted; all by default.
    """
    methods = [parse_method(text) for text in PLAIN if only is None or text in only]
    kept = kept or Kept()
    for label, name, options, runtime in CALIBRATED if texts else ():
        if only is not None and label not in only:
            continue
        path = None if folder is None else folder / f"{label}.safetensors"
        if path is not None and ("calibrated", label) in kept and path.exists():
            calibration = Calibration.load(path)
        else:

            def advance(stage: str, done: int, total: int, label: str = label) -> None:
                say(f"{label}: {stage}", done, total)

            calibration = calibrate(model, texts, name, advance=advance, **options)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                calibration.save(path)
                kept["calibrated", label] = True
        methods.append(Method(label, {"calibration": calibration, **runtime}))
    return methods


def front(scores: Sequence[Score]) -> list[Score]:
    """Return the scores that no other beats: none diverges less at as few bits. Ascending in bits."""
    best: list[Score] = []
    for score in sorted(scores, key=lambda s: (s.packed_bits, s.kl)):
        if not best or score.kl < best[-1].kl:
            best.append(score)
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


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draw the divergence of methods against bits of packed pages, a panel for each text, with the front.

    Args:
        rows: Rows of any kinds, of which those of perplexity are drawn.
        out: The folder of ``sweep.png`` and ``sweep.svg``.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    scores = [row for row in rows if isinstance(row, Score) and row.packed_bits < 16]
    texts = list(dict.fromkeys(score.text for score in scores))
    figure = Figure(figsize=(7.5 * len(texts), 5), layout="constrained")
    families = list(dict.fromkeys(_family(score.method) for score in scores))
    panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        _draw_text(axes, [score for score in scores if score.text == text], families)
        axes.set_title(text)
    panels[0].set_ylabel("KL divergence from the 16-bit cache")
    panels[-1].legend()
    paths = [out / "sweep.png", out / "sweep.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _draw_text(axes: Axes, scores: Sequence[Score], families: Sequence[str]) -> None:
    """Draw the methods of one text, a colour for each family, and the front."""
    best = front(scores)
    line = [score.packed_bits for score in best], [score.kl for score in best]
    axes.step(*line, where="post", color="0.7", zorder=1)
    for number, family in enumerate(families):
        members = [score for score in scores if _family(score.method) == family]
        points = [score.packed_bits for score in members], [score.kl for score in members]
        axes.scatter(*points, label=family, color=f"C{number}")
    for score in scores:
        axes.annotate(
            _short(score.method), (score.packed_bits, score.kl),
            xytext=(4, 4), textcoords="offset points", fontsize=7,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("bits a number of packed pages, parameters included")
    axes.grid(alpha=0.3)


def _short(method: str) -> str:
    """Return a method's name and bits: ``"kivi 4"`` of ``"kivi:bits=4"``."""
    return method.replace(":bits=", " ")


def _family(method: str) -> str:
    name = method.partition(":")[0].partition("-")[0]
    return "int" if name.startswith("int") else name
