"""The tables of speed in README.md and docs/performance.md, from rows that ``kvq bench`` has measured.

`quality_tables` writes them. A cell takes the newest row of its method and shape, that is the last of its file, of the
hardware that the newest row of the table is of; what has no row is left out. What is slower than 16 bit is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from kvq_compile.bench import cpu, kernels, memory, steps
from kvq_compile.bench.rows import PLACE, read_rows

RESULTS = Path(__file__).parent / "results"
# The file of each kind of row, and what makes two rows the same measurement.
SPEED_FILES: dict[str, tuple[str, ...]] = {
    "kernels.csv": (*PLACE, *kernels.CASE),
    "decode.csv": (*PLACE, *steps.CASE),
    "memory.csv": (*PLACE, *memory.CASE),
    "cpu.csv": (*cpu.PLACE, *cpu.CASE),
}
Row = Mapping[str, str]
Where = tuple[int, int]  # batch and context
Case = tuple[int, Where, Where]  # head size, query and KV heads, batch and context


def readable(context: int) -> str:
    """Return a number of tokens in units of 1024, where it is made of them."""
    return f"{context // 1024}k" if context % 1024 == 0 else f"{context:,}"


def places(rows: Iterable[Row]) -> str:
    """Return a sentence with the hardware, versions and commits that rows were measured on."""
    commits: dict[str, dict[str, None]] = {}
    for row in rows:
        versions = ", ".join(
            f"{name} {row[name].partition('+')[0].removesuffix('.0')}"
            for name in ("torch", "triton", "transformers")
            if row.get(name)
        )
        commits.setdefault(f"{row['hardware']}, {versions}", {})[row.get("commit") or ""] = None
    said = []
    for machine, found in commits.items():
        known = [commit for commit in found if commit]
        told = f", commit{'s' * (len(known) > 1)} {', '.join(known)}" if known else ""
        told += " and some not recorded" if known and "" in found else ""
        said.append(f"{machine}{told}")
    return f"Measured on {'; '.join(said)}."


@dataclass(frozen=True)
class KernelTable:
    """Times of decode attention: a row a shape or head size, a column a method.

    Attributes:
        name, document: Of its markers and of what they stand in.
        methods: Titles by method.
        shapes: Batch and context of its rows.
        sizes: Head sizes; a row each, if there are several.
        heads: Query and KV heads; a row each, if there are several.
        writes: Whether times of writing stand under it.
        digits: Behind the point of a time.
    """

    name: str
    document: str
    methods: Mapping[str, str]
    shapes: Sequence[Where] = ((1, 32768), (1, 131072), (8, 32768))
    sizes: Sequence[int] = (128,)
    heads: Sequence[Where] = ((32, 8),)
    writes: bool = False
    digits: int = 1

    def lines(self) -> list[str]:
        """Return the table as Markdown, what is slower than 16 bit, and where it was measured."""
        newest = self._newest()
        shown = [name for name in self.methods if any(name == method for method, _ in newest)]
        body, used = [], []
        for case in product(self.sizes, self.heads, self.shapes):
            found = {name: newest[name, case] for name in shown if (name, case) in newest}
            if not found:
                continue
            used += found.values()
            cells = [self._cell(found.get(name)) for name in shown]
            plain = float(next(iter(found.values()))["baseline_us"])
            body.append(f"| {self._title(*case)} | {plain:.{self.digits}f} | {' | '.join(cells)} |")
        if not body:
            return ["Not measured yet."]
        heads = ["batch x context", "16 bit", *(self.methods[name] for name in shown)]
        rule = "|" + "---|" * len(heads)
        said = [*self._slower(used), *self._writing(used), places(used)]
        return [f"| {' | '.join(heads)} |", rule, *body, "", *said]

    def _title(self, size: int, heads: Where, where: Where) -> str:
        title = f"{where[0]} x {readable(where[1])}"
        title += f", heads of {size}" if len(self.sizes) > 1 else ""
        return title + (
            f", {heads[0]} query and {heads[1]} KV heads" if len(self.heads) > 1 else ""
        )

    def _newest(self) -> dict[tuple[str, Case], Row]:
        wanted = [
            (row["method"], case, row)
            for row in read_rows(RESULTS / "kernels.csv")
            if row["method"] in self.methods and row["us"]
            for case in [_case(row)]
            if case in product(self.sizes, self.heads, self.shapes)
        ]
        return {
            (method, case): row
            for method, case, row in wanted
            if row["hardware"] == wanted[-1][2]["hardware"]
        }

    def _cell(self, row: Row | None) -> str:
        if row is None:
            return ""
        faster = float(row["baseline_us"]) / float(row["us"])
        return f"{float(row['us']):.{self.digits}f} ({faster:.1f}x)"

    def _slower(self, rows: Sequence[Row]) -> list[str]:
        slow = [row for row in rows if float(row["us"]) > float(row["baseline_us"])]
        names = list(dict.fromkeys(self.methods[row["method"]] for row in slow))
        return [f"Slower than 16 bit: {'; '.join(names)}.", ""] if names else []

    def _writing(self, rows: Sequence[Row]) -> list[str]:
        told = [row for row in rows if row.get("append_us") and row.get("flush_us")]
        if not self.writes or not told:
            return []
        token, page = ([float(row[name]) for row in told] for name in ("append_us", "flush_us"))
        return [
            f"Writing a token's keys and values takes {_span(token)} µs, and {_span(page)} µs in the one step of 128 "
            "that fills a page in every sequence.",
            "",
        ]


def _case(row: Row) -> Case:
    size, *rest = (
        int(row[name]) for name in ("head_size", "heads", "kv_heads", "batch", "context")
    )
    return size, (rest[0], rest[1]), (rest[2], rest[3])


def _span(values: Sequence[float]) -> str:
    low, high = round(min(values)), round(max(values))
    return f"{low}" if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class StepTable:
    """Times of whole decoding steps: a row a shape, a column a run, the first of which is the baseline."""

    name: str
    document: str
    runs: Mapping[str, str]
    shapes: Sequence[Where]

    def lines(self) -> list[str]:
        """Return the table as Markdown, what is slower than the baseline, and where it was measured."""
        baseline = next(iter(self.runs))
        rows = [
            row
            for row in read_rows(RESULTS / "decode.csv")
            if row["run"] in self.runs and row["waited"]
        ]
        newest = {(row["run"], (int(row["batch"]), int(row["context"]))): row for row in rows}
        shown = [run for run in self.runs if any(run == each for each, _ in newest)]
        body, used, slower = [], [], []
        for where in self.shapes:
            found = {run: newest[run, where] for run in shown if (run, where) in newest}
            if not found:
                continue
            used += found.values()
            plain = float(found[baseline]["waited"]) if baseline in found else None
            cells = []
            for run in shown:
                time = float(found[run]["waited"]) if run in found else None
                faster = (
                    ""
                    if plain is None or time is None or run == baseline
                    else f" ({plain / time:.1f}x)"
                )
                cells.append("" if time is None else f"{time:.1f}{faster}")
                if plain is not None and time is not None and time > plain:
                    slower.append(f"{self.runs[run]} at {where[0]} x {readable(where[1])}")
            body.append(f"| {where[0]} x {readable(where[1])} | {' | '.join(cells)} |")
        if not body:
            return ["Not measured yet."]
        heads = ["batch x context", *(self.runs[run] for run in shown)]
        told = [f"Slower than 16 bit: {'; '.join(slower)}.", ""] if slower else []
        return [
            f"| {' | '.join(heads)} |",
            "|" + "---|" * len(heads),
            *body,
            "",
            *told,
            places(used),
        ]


UNIFORM = {
    "int8": "`int8`", "int4": "`int4`", "int3": "`int3`", "int2": "`int2`",
    "int2:group_size=64": "`int2`, groups of 64", "kivi:bits=2": "`kivi`, 2 bits",
}  # fmt: skip
CODED = {f"tc:bits={bits}": f"`tc`, {bits} bits" for bits in ("4", "3", "2.5", "2")}
OTHERS = {
    "qaq:bits=2.3": "`qaq`, 2.3 bits", "qaq:bits=2.3,params=fp8": "`qaq`, 2.3 bits, fp8",
    "skvq:bits=2": "`skvq`, 2 bits", "skvq:bits=2,value_bits=1.5": "`skvq`, K2 V1.5",
    "skvq:bits=2,value_bits=1.5,packing=trits": "`skvq`, K2 V1.5, trits",
    "cq-4c8b": "`cq-4c8b`", "cq-8c8b": "`cq-8c8b`",
}  # fmt: skip
FRONT = {
    "tc:bits=4": "`tc` 4", "tc:bits=2.5": "`tc` 2.5", "int8": "`int8`", "int4": "`int4`",
    "kivi:bits=2": "`kivi` 2", "skvq:bits=2": "`skvq` 2", "qaq:bits=2.3": "`qaq` 2.3",
    "cq-4c8b": "`cq-4c8b`",
}  # fmt: skip
SHARED = {
    name: (UNIFORM | CODED | OTHERS)[name]
    for name in (
        "int8",
        "int4",
        "int2",
        "tc:bits=4",
        "tc:bits=3",
        "tc:bits=2",
        "qaq:bits=2.3",
        "skvq:bits=2",
    )
}
STEPS = {
    "hf-static": "16 bit, static, compiled", "int4": "`int4`, dynamic", "tc:bits=4": "default (`tc`, 4 bits), dynamic",
    "int4-static": "`int4`, static", "tc:bits=3-static": "`tc`, 3 bits, static",
}  # fmt: skip
PAGE, README = "docs/performance.md", "README.md"
USUAL = ((1, 32768), (1, 131072), (8, 32768))
SPEED_TABLES = (
    KernelTable("kernels-front", README, FRONT, digits=0),
    KernelTable("kernels-uniform", PAGE, UNIFORM, (*USUAL, (32, 16384)), writes=True),
    KernelTable("kernels-tc", PAGE, CODED, writes=True),
    KernelTable("kernels-others", PAGE, OTHERS, writes=True),
    KernelTable(
        "kernels-heads", PAGE, UNIFORM | CODED | OTHERS, ((1, 131072),), (64, 96, 192, 256)
    ),
    KernelTable("kernels-apart", PAGE, SHARED, ((1, 65536),), heads=((32, 32),)),
    KernelTable("kernels-one", PAGE, SHARED, ((1, 65536),), heads=((32, 1),)),
    StepTable("steps", PAGE, STEPS, ((1, 4096), (1, 32768), (1, 131072), (16, 8192))),
)
