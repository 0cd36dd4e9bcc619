"""Compare every method at many widths: what to run, which of them no other beats, and a plot of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kvq_compile.calibration.artifact import Calibration
from kvq_compile.calibration.calibrator import calibrate
from kvq_compile.evaluation.kept import Kept
from kvq_compile.evaluation.perplexity import Method, Score, parse_method

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
) -> list[Method]:
    """Return all methods, calibrated on ``texts`` where they learn; without texts, those that do not.

    Args:
        model: What to calibrate.
        texts: Token ids, each ``[1, T]``.
        say: Called with a stage of calibration, how much of it is done and how much there is to do.
        folder: Where calibrations are saved, as ``<label>.safetensors``, if they are to be.
        kept: Which of them were saved by a run that was cut short, and need not be made again.
    """
    methods = [parse_method(text) for text in PLAIN]
    kept = kept or Kept()
    for label, name, options, runtime in CALIBRATED if texts else ():
        path = None if folder is None else folder / f"{label}.safetensors"
        if path is not None and label in kept.calibrated and path.exists():
            calibration = Calibration.load(path)
        else:

            def advance(stage: str, done: int, total: int, label: str = label) -> None:
                say(f"{label}: {stage}", done, total)

            calibration = calibrate(model, texts, name, advance=advance, **options)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                calibration.save(path)
                kept.add_calibrated(label)
        methods.append(Method(label, {"calibration": calibration, **runtime}))
    return methods


def front(scores: Sequence[Score]) -> list[Score]:
    """Return the scores that no other beats: none is better at as few bits. Ascending in bits."""
    best: list[Score] = []
    for score in sorted(scores, key=lambda s: (s.packed_bits, s.perplexity)):
        if not best or score.perplexity < best[-1].perplexity:
            best.append(score)
    return best


def draw(scores: Sequence[Score], out: Path) -> list[Path]:
    """Draw perplexity over 16 bit against bits of packed pages; return a PNG and an SVG in the folder ``out``.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    quantized = [score for score in scores if score.packed_bits < 16]
    best = front(quantized)
    axes.step(
        [s.packed_bits for s in best],
        [s.difference for s in best],
        where="post",
        color="0.7",
        zorder=1,
    )
    for family in dict.fromkeys(_family(score.method) for score in quantized):
        members = [score for score in quantized if _family(score.method) == family]
        axes.scatter(
            [s.packed_bits for s in members], [s.difference for s in members], label=family
        )
    for score in quantized:
        axes.annotate(
            score.method.partition(":")[0] if ":" not in score.method else score.method.replace(":bits=", " "),
            (score.packed_bits, score.difference), xytext=(4, 4), textcoords="offset points", fontsize=7,
        )  # fmt: skip
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xlabel("bits a number of packed pages, parameters included")
    axes.set_ylabel("perplexity over 16 bit (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    paths = [out / "sweep.png", out / "sweep.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _family(method: str) -> str:
    name = method.partition(":")[0].partition("-")[0]
    return "int" if name.startswith("int") else name
