"""Every method at many widths: what `kvq eval --sweep` runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kvq_compile.calibration.artifact import Calibration
from kvq_compile.calibration.calibrator import calibrate
from kvq_compile.evaluation.kept import Kept
from kvq_compile.evaluation.runner import Method, parse_method

PLAIN = (
    *(f"tc:bits={bits}" for bits in (4, 3.5, 3, 2.5, 2, 1.75)),
    "int8",
    "int4",
    "int3",
    "int2",
    "kivi:bits=4",
    "kivi:bits=2",
    *(f"kivi:bits={bits},clip=best" for bits in (4, 3, 2)),
    "qaq:bits=4",
    "qaq:bits=3",
    "qaq:bits=2.3",
    *(f"qaq:bits={bits},transform=hadamard" for bits in (4, 3, 2.3)),
)
# Label, method, options of calibration, options of the compiled call.
CALIBRATED: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("tc-calibrated-4", "tc", {}, {"bits": 4}),
    ("tc-calibrated-3", "tc", {}, {"bits": 3}),
    ("tc-calibrated-2.5", "tc", {}, {"bits": 2.5}),
    ("tc-calibrated-2", "tc", {}, {"bits": 2}),
    ("tc-calibrated-1.68", "tc", {}, {"bits": 1.68}),
    ("skvq-K4V4", "skvq", {"bits": 4, "group_size": None}, {}),
    ("skvq-K3V3", "skvq", {"bits": 3, "group_size": None}, {}),
    ("skvq:bits=2", "skvq", {"bits": 2}, {}),
    ("skvq-K2V2", "skvq", {"bits": 2, "group_size": None}, {}),
    ("skvq-K2V1.5", "skvq", {"key_bits": 2, "value_bits": 1.5, "group_size": None}, {"packing": "trits"}),
    *(
        (f"skvq-K{bits}V{bits}-hadamard", "skvq", {"bits": bits, "values": "hadamard"}, {})
        for bits in (4, 3, 2)
    ),
    ("cq-2c8b", "cq-2c8b", {}, {}),
    ("cq-4c8b", "cq-4c8b", {}, {}),
    ("cq-8c8b", "cq-8c8b", {}, {}),
    *((f"{name}-balanced", name, {"balance": True}, {}) for name in ("cq-4c8b", "cq-8c8b")),
    *(
        (f"{name}-balanced-hadamard", name, {"balance": True, "values": "hadamard"}, {})
        for name in ("cq-2c8b", "cq-2c6b", "cq-4c10b", "cq-4c8b")
    ),
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
    made: dict[str, Calibration] = {}  # by what was asked for: one serves several widths
    for label, name, options, runtime in CALIBRATED if texts else ():
        if only is not None and label not in only:
            continue
        path = None if folder is None else folder / f"{label}.safetensors"
        if path is not None and ("calibrated", label) in kept and path.exists():
            calibration = Calibration.load(path)
        else:

            def advance(stage: str, done: int, total: int, label: str = label) -> None:
                say(f"{label}: {stage}", done, total)

            asked = f"{name} {options}"
            if asked not in made:
                made[asked] = calibrate(model, texts, name, advance=advance, **options)
            calibration = made[asked]
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                calibration.save(path)
                kept["calibrated", label] = True
        methods.append(Method(label, {"calibration": calibration, **runtime}))
    return methods
