"""Rows of measurements as files: a CSV for each kind of row, and all of them as one JSON document."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvq_compile.evaluation.greedy import GreedyScore
from kvq_compile.evaluation.passkey import PasskeyScore
from kvq_compile.evaluation.perplexity import Score

Row = Score | PasskeyScore | GreedyScore
KINDS: dict[str, tuple[str, type]] = {  # name of the table to its key in the document and its rows
    "eval": ("scores", Score),
    "passkey": ("passkey", PasskeyScore),
    "greedy": ("greedy", GreedyScore),
}


def flat_row(row: Row) -> dict[str, Any]:
    """Return a row with one value a column; of a perplexity, a column for each recall length."""
    flat = asdict(row)
    recall = flat.pop("recall", {})
    return flat | {f"recall_{length}": percent for length, percent in recall.items()}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a CSV file, under the columns of the first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_results(rows: Sequence[Row], out: Path, about: Mapping[str, object]) -> list[Path]:
    """Write ``eval.csv``, ``passkey.csv`` and ``greedy.csv``, those that there are rows for, and ``eval.json``.

    Args:
        rows: The rows, of any kinds.
        out: Created when missing.
        about: What the rows were measured on: model, texts, protocols, versions, hardware.

    Returns:
        The paths, the document's last.
    """
    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"about": dict(about)}
    written: list[Path] = []
    for name, (key, kind) in KINDS.items():
        flat = [flat_row(row) for row in rows if isinstance(row, kind)]
        if flat:
            document[key] = flat
            written.append(out / f"{name}.csv")
            write_csv(written[-1], flat)
    written.append(out / "eval.json")
    written[-1].write_text(json.dumps(document, indent=2) + "\n")
    return written
