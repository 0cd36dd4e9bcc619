"""Draw quality against bits from the rows of ``results/``: ``docs/quality.png`` and ``.svg``, a panel for each model.

    python benchmarks/quality_plot.py

The rows are those that the tables of ``docs/quality.md`` show, on WikiText-2.
"""

from __future__ import annotations

from quality_tables import FILES, REAL, REAL_METHODS, REFERENCE, REFERENCE_METHODS, ROOT, read

from kvq_compile.evaluation.plot import Point, draw

TEXT = "wikitext"
PANELS = {
    f"{REAL}, WikiText-2": (REAL, REAL_METHODS),
    f"{REFERENCE} (trained for this project)": (REFERENCE, REFERENCE_METHODS),
}


def points() -> list[Point]:
    """Return the newest row of each method of each table."""
    found = []
    for panel, (model, methods) in PANELS.items():
        rows = [row for row in read(FILES["eval"]) if (row["model"], row["text"]) == (model, TEXT)]
        for label in methods:
            newest = [row for row in rows if row["method"] == label and row["packed_bits"]][-1:]
            found += [
                Point(panel, label, float(row["packed_bits"]), float(row["kl"])) for row in newest
            ]
    return found


if __name__ == "__main__":
    draw(points(), ROOT / "docs", "quality")
