"""Write the tables of quality and of speed from the rows of ``results/``, between their markers in the documents.

    python benchmarks/quality_tables.py              # write them
    python benchmarks/quality_tables.py --add DIR    # first take over rows that were measured elsewhere
    python benchmarks/quality_tables.py --check      # say whether they are up to date

A table takes the newest row of each of its methods, that is the last of its file; methods without a row are left
out. What the rows of a table were measured on stands under it. Figures that warnings quote,
`kvq_compile.measured.FIGURES`, come from the same rows.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from speed_tables import SPEED_FILES, SPEED_TABLES

from kvq_compile.bench import rows as kept
from kvq_compile.options import DEFAULT

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
FILES = {"eval": "quality.csv", "passkey": "passkey.csv", "greedy": "greedy.csv"}
# Rows that agree in these are the same measurement, of which the last counts.
SAME = ("hardware", "commit", "model", "text", "method", "length", "depth")
REAL, REFERENCE = "SmolLM2-135M-Instruct", "kvq-ref-33m"
Row = Mapping[str, str]


@dataclass(frozen=True)
class Column:
    """A column: its heading, the field that it shows, of which text or length, and how."""

    head: str
    name: str
    text: str
    show: Callable[[float], str]


def percent(x: float) -> str:
    """Return a change of perplexity: in hundredths of a percent, larger ones in three digits."""
    if abs(x) < 0.005:
        return "0.00 %"
    return f"{x:+.2f} %" if abs(x) < 10 else f"{x:+.1f} %" if abs(x) < 50 else f"{x:+.0f} %"


def divergence(x: float) -> str:
    """Return a divergence with four decimals, larger ones in three digits."""
    return f"{x:.4f}" if x < 0.1 else f"{x:.3f}" if x < 1 else f"{x:.2f}"


def bits(x: float) -> str:
    """Return bits with two decimals, halves rounded up."""
    return f"{math.floor(100 * x + 0.5) / 100:.2f}"


def share(x: float) -> str:
    """Return a part in percent, one decimal."""
    return f"{x:.0f} %" if x == round(x) else f"{x:.1f} %"


def tokens(x: float) -> str:
    """Return a number of tokens."""
    return f"{x:.1f}"


def of_text(text: str, name: str, top1: bool) -> list[Column]:
    """Return the columns of perplexity on a text."""
    columns = [Column(name, "difference", text, percent), Column("KL", "kl", text, divergence)]
    return [*columns, Column("top-1", "top1", text, share)] if top1 else columns


SIZES = [
    Column("packed bits", "packed_bits", "wikitext", bits),
    Column("effective bits", "effective_bits", "wikitext", bits),
]


@dataclass(frozen=True)
class Table:
    """A table: the name of its markers, its document, its model, its rows by label, and its columns."""

    name: str
    document: str
    model: str
    methods: Mapping[str, str]
    columns: Sequence[Column]
    kind: str = "eval"
    hardware: str = field(default="")

    def lines(self) -> list[str]:
        """Return the table as Markdown, and what it was measured on."""
        rows = [row for row in read(FILES[self.kind]) if row["model"] == self.model]
        rows = [row for row in rows if row["hardware"].startswith(self.hardware)]
        used: list[Row] = []
        body = []
        for label, title in self.methods.items():
            cells, found = self._cells([row for row in rows if row["method"] == label])
            if found:
                mark = " (default)" if label == default_label() else ""
                body.append(f"| {title}{mark} | {' | '.join(cells)} |")
                used += found
        if not body:
            return ["Not measured yet."]
        heads = ["method", *(column.head for column in self.columns)]
        rule = "|" + "---|" * len(heads)
        said = " ".join([*self._plain(rows), measured_on(used)])
        return [f"| {' | '.join(heads)} |", rule, *body, "", said]

    def _plain(self, rows: Sequence[Row]) -> list[str]:
        """Return what the perplexity is at 16 bit, on each text."""
        if self.kind != "eval":
            return []
        plain = {row["text"]: row for row in rows if row["method"] == "plain"}
        told = [f"{text} {float(row['perplexity']):.3f}" for text, row in plain.items()]
        return [f"Perplexity at 16 bit: {', '.join(told)}."] if told else []

    def _cells(self, rows: Sequence[Row]) -> tuple[list[str], list[Row]]:
        cells, used = [], []
        for column in self.columns:
            key = "text" if self.kind != "passkey" else "length"
            values = [row for row in rows if row[key] == column.text and row.get(column.name)]
            if self.kind == "passkey":
                values = newest(values)
                count = sum(float(row["cases"]) for row in values) or 1
                total = sum(float(row[column.name]) * float(row["cases"]) for row in values)
                cells.append(column.show(total / count) if values else "")
            else:
                values = values[-1:]
                cells.append(column.show(float(values[0][column.name])) if values else "")
            used += values
        return cells, used


def newest(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the commit and hardware of the last, all depths of them."""
    if not rows:
        return []
    last = rows[-1]
    return [row for row in rows if all(row[name] == last[name] for name in ("hardware", "commit"))]


def default_label() -> str:
    """Return the label of the backend's default method."""
    name, options = DEFAULT
    said = ",".join(f"{key}={value}" for key, value in options.items())
    return f"{name}:{said}" if said else name


def measured_on(rows: Sequence[Row]) -> str:
    """Return a sentence with the hardware, versions and commits that rows were measured on."""
    commits: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        versions = ", ".join(
            f"{name} {row[name].partition('+')[0].removesuffix('.0')}"
            for name in ("torch", "triton", "transformers")
            if row.get(name)
        )
        windows = f", {row['windows']} windows" if row.get("windows") else ""
        where = f"{row['hardware']}, {row['dtype']}, {versions}", windows
        commits.setdefault(where, {})[row["commit"]] = None
    said = [
        f"{machine}, commit{'s' * (len(found) > 1)} {', '.join(found)}{windows}"
        for (machine, windows), found in commits.items()
    ]
    return f"Measured on {'; '.join(said)}."


MENDED = {
    "kivi:bits=4,clip=best": '`kivi`, 4 bits, `clip="best"`',
    "kivi:bits=3,clip=best": '`kivi`, 3 bits, `clip="best"`',
    "kivi:bits=2,clip=best": '`kivi`, 2 bits, `clip="best"`',
    "qaq:bits=4,transform=hadamard": '`qaq`, 4 bits, `transform="hadamard"`',
    "qaq:bits=3,transform=hadamard": '`qaq`, 3 bits, `transform="hadamard"`',
    "qaq:bits=2.3,transform=hadamard": '`qaq`, 2.3 bits, `transform="hadamard"`',
    "skvq-K4V4-hadamard": '`skvq` K4 V4, `values="hadamard"`',
    "skvq-K3V3-hadamard": '`skvq` K3 V3, `values="hadamard"`',
    "skvq-K2V2-hadamard": '`skvq` K2 V2, `values="hadamard"`',
    "cq-2c8b-balanced-hadamard": '`cq-2c8b`, `balance=True`, `values="hadamard"`',
    "cq-2c6b-balanced-hadamard": '`cq-2c6b`, `balance=True`, `values="hadamard"`',
    "cq-4c10b-balanced-hadamard": '`cq-4c10b`, `balance=True`, `values="hadamard"`',
    "cq-4c8b-balanced-hadamard": '`cq-4c8b`, `balance=True`, `values="hadamard"`',
    "cq-4c8b-balanced": "`cq-4c8b`, `balance=True`",
    "cq-8c8b-balanced": "`cq-8c8b`, `balance=True`",
}
REAL_METHODS = {
    "int8": "`int8`",
    "tc:bits=4": "`tc`, 4 bits",
    "tc:bits=3.5": "`tc`, 3.5 bits",
    "tc:bits=3": "`tc`, 3 bits",
    "tc:bits=2.5": "`tc`, 2.5 bits",
    "tc:bits=2": "`tc`, 2 bits",
    "tc:bits=1.75": "`tc`, 1.75 bits",
    "tc-calibrated-4": "`tc`, calibrated, 4 bits",
    "tc-calibrated-3": "`tc`, calibrated, 3 bits",
    "tc-calibrated-2.5": "`tc`, calibrated, 2.5 bits",
    "tc-calibrated-2": "`tc`, calibrated, 2 bits",
    "tc-calibrated-1.68": "`tc`, calibrated, 1.68 bits",
    "kivi:bits=4": "`kivi`, 4 bits",
    "int4": "`int4`",
    "int3": "`int3`",
    "qaq:bits=4": "`qaq`, 4 bits",
    "qaq:bits=3": "`qaq`, 3 bits",
    "kivi:bits=2": "`kivi`, 2 bits",
    "qaq:bits=2.3": "`qaq`, 2.3 bits",
    "int2:group_size=64": "`int2`, groups of 64",
    "skvq-K4V4": "`skvq` K4 V4",
    "skvq-K3V3": "`skvq` K3 V3",
    "skvq:bits=2": "`skvq` K2 V2",
    "skvq-K2V1.5": "`skvq` K2 V1.5",
    "cq-2c8b": "`cq-2c8b`",
    "cq-4c8b": "`cq-4c8b`",
    "cq-8c8b": "`cq-8c8b`",
    "auto-4.5": "`auto`, 4.5 bits",
    "auto-3": "`auto`, 3 bits",
    "auto-2.5": "`auto`, 2.5 bits",
    "auto-2": "`auto`, 2 bits",
} | MENDED
# What rounding alone does: a window that covers everything.
GREEDY_METHODS = {"int8:window=4096": "nothing packed"} | REAL_METHODS
REFERENCE_METHODS = {
    "int8": "`int8`",
    "int4": "`int4`",
    "int3": "`int3`",
    "int2:group_size=64": "`int2`, groups of 64",
    "kivi:bits=4": "`kivi`, 4 bits",
    "kivi:bits=2": "`kivi`, 2 bits",
    "auto-4.5": "`auto`, 4.5 bits",
    "auto-3": "`auto`, 3 bits",
    "auto-2.5": "`auto`, 2.5 bits",
    "auto-2": "`auto`, 2 bits",
    "qaq:bits=4": "`qaq`, 4 bits",
    "qaq:bits=3": "`qaq`, 3 bits",
    "qaq:bits=2.3": "`qaq`, 2.3 bits",
    "qaq:bits=2.3,params=fp8": '`qaq`, 2.3 bits, `params="fp8"`',
    "qaq:bits=2.3,keep_exact=cpu": '`qaq`, 2.3 bits, `keep_exact="cpu"`',
    "skvq-K4V4": "`skvq` K4 V4",
    "skvq-K3V3": "`skvq` K3 V3",
    "skvq:bits=2": "`skvq` K2 V2, groups of 64 (default)",
    "skvq-K2V2": "`skvq` K2 V2",
    "skvq-K2V1.5": "`skvq` K2 V1.5",
    "cq-2c8b": "`cq-2c8b`",
    "cq-4c8b": "`cq-4c8b`",
    "cq-8c8b": "`cq-8c8b`",
} | MENDED
FRONT_PAGE = (
    *(
        "int8",
        "kivi:bits=4",
        "int4",
        "tc:bits=4",
        "int3",
        "tc:bits=3",
        "kivi:bits=2",
        "tc:bits=2.5",
    ),
    *("qaq:bits=2.3", "tc:bits=2", "tc-calibrated-3", "tc-calibrated-2", "tc-calibrated-1.68"),
)
TARGETS = "qaq:bits=4,key_target=3e-4,value_target=0.1"
TARGET_METHODS = {
    TARGETS: "targets",
    f"{TARGETS},requantize=true": "and `requantize=True`",
    f"{TARGETS},requantize=true,keep_exact=cpu": 'and `keep_exact="cpu"`',
}
TABLES = (
    Table(
        "front-page", "README.md", REAL,
        {label: REAL_METHODS[label] for label in FRONT_PAGE},
        [*SIZES, *of_text("wikitext", "WikiText-2", False), *of_text("code", "Python code", False)],
    ),
    Table(
        "pretrained", "docs/quality.md", REAL, REAL_METHODS,
        [*SIZES, *of_text("wikitext", "WikiText", True), *of_text("code", "code", True)],
    ),
    Table(
        "passkey", "docs/quality.md", REAL, {"plain": "16 bit"} | REAL_METHODS,
        [Column(f"{n} tokens", "found", str(n), share) for n in (2048, 4096, 8192)],
        kind="passkey",
    ),
    Table(
        "greedy", "docs/quality.md", REAL, GREEDY_METHODS,
        [
            column
            for text in ("wikitext", "code")
            for column in (
                Column(f"{text}: same", "same", text, share),
                Column("first other token", "agreed", text, tokens),
                Column("equal tokens", "equal", text, share),
            )
        ],
        kind="greedy",
    ),
    Table(
        "reference", "docs/quality.md", REFERENCE, REFERENCE_METHODS,
        [
            *SIZES,
            *of_text("wikitext", "WikiText", True),
            *of_text("code", "code", False),
            Column("recall", "recall_4088", "wikitext", share),
        ],
        hardware="NVIDIA",
    ),
    Table(
        "targets", "docs/quality.md", REFERENCE, TARGET_METHODS,
        [
            Column("bits read", "read_bits", "wikitext", bits),
            *of_text("wikitext", "WikiText", False),
            *of_text("code", "code", False),
        ],
        hardware="NVIDIA",
    ),
)  # fmt: skip


FAMILIES = {"uniform": "int", "kivi": "kivi", "qaq": "qaq", "skvq": "skvq", "cq": "cq"}
TABLES += tuple(
    Table(
        f"{page}{suffix}", f"docs/methods/{page}.md", model,
        {label: title for label, title in methods.items() if label.startswith(family)},
        [*SIZES, *of_text("wikitext", "WikiText", True), *of_text("code", "code", False)],
        hardware="NVIDIA",
    )
    for page, family in FAMILIES.items()
    for suffix, model, methods in (("", REAL, REAL_METHODS), ("-reference", REFERENCE, REFERENCE_METHODS))
)  # fmt: skip


def read(name: str) -> list[dict[str, str]]:
    """Return the rows of a file of results; none where there is no file."""
    return kept.read_rows(RESULTS / name)


def add_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Add rows to a file of results at its end, without those that are of the same measurement."""
    kept.add_rows(path, rows, SPEED_FILES.get(path.name, SAME), _cell)


def _cell(value: object) -> str:
    return f"{value:.5f}" if isinstance(value, float) else str(value)


def with_tables(document: str, text: str) -> str:
    """Return a document with its tables as the rows have them.

    Raises:
        ValueError: The document lacks the markers of one.
    """
    for table in (*TABLES, *SPEED_TABLES):
        if table.document != document:
            continue
        begin, end = f"<!-- table {table.name} -->\n", "<!-- end of table -->\n"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{document} must have the markers {begin.strip()} and {end.strip()}")
        content = "\n".join(["", *table.lines(), "", ""])
        text = f"{before}{begin}{content}{end}{after}"
    return text


def with_figures(source: str) -> str:
    """Return the module of measured figures with the numbers that the rows have, where they have some."""
    rows = [row for row in read(FILES["eval"]) if (row["model"], row["text"]) == (REAL, "wikitext")]

    def figure(match: re.Match[str]) -> str:
        found = [row for row in rows if row["method"] == match[1]][-1:]
        if not found:
            return match[0]
        numbers = (float(found[0][name]) for name in ("packed_bits", "difference", "kl"))
        return f'Figure("{match[1]}", {", ".join(f"{x:.3g}" for x in numbers)})'

    return re.sub(r'Figure\("([^"]+)", [^)]*\)', figure, source)


def documents() -> dict[Path, str]:
    """Return what the documents should hold."""
    found = {}
    for name in dict.fromkeys(table.document for table in (*TABLES, *SPEED_TABLES)):
        path = ROOT / name
        found[path] = with_tables(name, path.read_text(encoding="utf-8"))
    figures = ROOT / "kvq_compile" / "measured.py"
    return found | {figures: with_figures(figures.read_text(encoding="utf-8"))}


def main() -> None:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--add", type=Path, help="folder of rows to take over")
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    for name in (*FILES.values(), *SPEED_FILES) if options.add else ():
        add_rows(RESULTS / name, kept.read_rows(options.add / name))
    stale = [path for path, text in documents().items() if path.read_text(encoding="utf-8") != text]
    if options.check and stale:
        sys.exit(f"out of date: {', '.join(path.name for path in stale)}; make tables writes them")
    for path in stale:
        path.write_text(documents()[path], encoding="utf-8")


if __name__ == "__main__":
    main()
