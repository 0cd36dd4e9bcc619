"""``kvq bench``: one command a table of docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvq_compile.commands.shared import DeviceOption, JsonOption, make_folder
from kvq_compile.console import note, show_kernels, stages

if TYPE_CHECKING:
    import torch

    from kvq_compile.bench.caches import Shape
    from kvq_compile.bench.kernels import Case, Row
    from kvq_compile.bench.plot import Point

bench = typer.Typer(
    name="bench",
    help="Measure speed and memory on this machine, against what else is installed here.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        help="BATCHxCONTEXT, as 8x32k; may be repeated. 1x32k 1x128k 8x32k, on a CPU 1x1k 1x4k, if none is named.",
    ),
]
OutOption = Annotated[Path, typer.Option(help="Folder for CSV and plots.")]
CommitOption = Annotated[
    str | None, typer.Option(help="Of the code, where there is no git checkout to ask.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Leave out what the CSV already has of this machine and commit.")
]  # fmt: skip
MethodsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--method", help="NAME or NAME:OPTION=VALUE,...; may be repeated. All if none is named."
    ),
]


@bench.command()
def kernels(
    method: MethodsOption = None,
    shape: ShapeOption = None,
    head_size: Annotated[
        list[int] | None,
        typer.Option(help="Channels of a head; may be repeated. 128 if none is named."),
    ] = None,
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.", min=1)] = 8,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="sdpa-flash, sdpa-cudnn, sdpa-efficient, sdpa-math, flex or none, beside what SDPA chooses; "
            "may be repeated. All if none is named."
        ),
    ] = None,
    writes: Annotated[bool, typer.Option("--writes", help="Time writing a token, too.")] = False,
    jobs: Annotated[
        int, typer.Option(help="Processes that compile kernels ahead, on a GPU.", min=0)
    ] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of queries and of the cache that is not quantized: bfloat16, float16 or float32.")
    ] = "bfloat16",
    device: DeviceOption = "auto",
    commit: CommitOption = None,
    resume: ResumeOption = False,
    out: OutOption = Path("kvq-bench"),
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Time decode attention, one token a sequence, over packed caches and over 16-bit ones.

    Every method and peer in one run. A row also has the error of its output
    against attention in fp64. Caches of several layers are read in turn, so that
    none is in the processor's own; on a GPU, times are those of CUDA graphs. Rows
    are in kernels.csv as soon as they are measured; the same command with --resume
    goes on where one was cut short.

    The table of docs/performance.md, on a GPU machine without git:

    kvq bench kernels --writes --jobs 8 --commit COMMIT

    Other head sizes, beside SDPA's own choice only:

    kvq bench kernels --shape 1x128k --head-size 64 --head-size 96 --head-size 192
    --head-size 256 --peer none --jobs 8 --resume --commit COMMIT

    Many sequences, with multi-head and multi-query attention:

    kvq bench kernels --shape 8x32k --kv-heads 32 --method int4 --method tc:bits=3

    kvq bench kernels --shape 8x32k --kv-heads 1 --method int4 --method tc:bits=3
    """
    from kvq_compile.bench import kernels as bench_kernels
    from kvq_compile.bench.place import place
    from kvq_compile.loading import pick_device

    where = pick_device(device)
    shapes = read_shapes(shape, heads, kv_heads, head_size or [128], where)
    methods = read_methods(method or bench_kernels.METHODS, shapes)
    wanted = bench_kernels.cases(methods, read_peers(peer), shapes, read_dtype(dtype), writes)
    make_folder(out)
    about = place(where, commit)
    rows = run_kernels(wanted, where, about, out / "kernels.csv", resume, jobs)
    if as_json:
        print(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        show_kernels(rows)
    for path in [out / "kernels.csv", *draw_kernels(rows, out)]:
        note(f"wrote {path}")
    wrong = [f"{row.method} at {row.batch}x{row.context}" for row in rows if row.is_wrong]
    if wrong:
        raise RuntimeError(
            f"attention must be as exact as in 16 bit, and is not: {', '.join(wrong)}"
        )


def run_kernels(
    wanted: Sequence[Case], device: torch.device, about: dict[str, str], path: Path, resume: bool, jobs: int
) -> list[Row]:  # fmt: skip
    """Measure cases, add each row to the file as it is measured, and return all rows."""
    import torch

    from kvq_compile.bench import kernels as bench_kernels

    before = bench_kernels.rows_in(path, about) if resume else {}

    def known(case: Case) -> Row | None:
        return before.get(bench_kernels.key(case))

    torch.manual_seed(0)
    rows: list[Row] = []
    with stages() as advance:
        if jobs and device.type == "cuda":
            todo = [case for case in wanted if not case.is_peer and known(case) is None]
            for done, total in bench_kernels.compile_ahead(todo, device, jobs):
                advance("compiling", done, total)
        for row in bench_kernels.measure(wanted, device, known):
            bench_kernels.add(path, row, about)
            rows.append(row)
            advance("measuring", len(rows), len(wanted))
    return rows


def read_shapes(
    texts: Sequence[str] | None, heads: int, kv_heads: int, head_sizes: Sequence[int], device: torch.device
) -> list[Shape]:  # fmt: skip
    """Return the shapes that are asked for, of every head size."""
    from kvq_compile.bench.caches import Shape

    usual = ("1x32k", "1x128k", "8x32k") if device.type == "cuda" else ("1x1k", "1x4k")
    pairs = [read_shape(text) for text in texts or usual]
    return [Shape(*pair, heads, kv_heads, size) for size in head_sizes for pair in pairs]


def read_shape(text: str) -> tuple[int, int]:
    """Return batch and context of ``8x32k``: k is 1024 tokens."""
    batch, _, context = text.lower().partition("x")
    kilo = context.endswith("k")
    context = context.removesuffix("k")
    if not (batch.isdecimal() and context.isdecimal() and int(batch) and int(context)):
        raise ValueError(f"shape must read BATCHxCONTEXT, as 8x32k or 1x5000, got {text!r}")
    return int(batch), int(context) * (1024 if kilo else 1)


def read_methods(texts: Sequence[str], shapes: Sequence[Shape]) -> list[str]:
    """Return methods, each once, after a check that there are such; sizes that one cannot take are told by its row."""
    from dataclasses import replace

    from kvq_compile.bench.caches import random_spec

    for text in texts:
        random_spec(text, replace(shapes[0], head_size=128))
    return list(dict.fromkeys(texts))


def read_peers(names: Sequence[str] | None) -> list[str]:
    """Return the peers that are asked for."""
    from kvq_compile.bench.peers import PEERS

    for name in names or ():
        if name not in (*PEERS, "none"):
            raise ValueError(f"peer must be one of {', '.join(PEERS)} or none, got {name!r}")
    return [name for name in names or PEERS if name != "none"]


def read_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name."""
    from kvq_compile.loading import DTYPES

    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def draw_kernels(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draw time and speed-up against the context, where matplotlib is installed."""
    from kvq_compile.bench.plot import Point, can_draw, draw

    if not can_draw():
        note("no plots: matplotlib is not installed; pip install kvq-compile[plot]")
        return []

    def points(value: Callable[[Row], float | None]) -> list[Point]:
        found = [(row, value(row)) for row in rows]
        return [
            Point(f"batch {row.batch}, heads of {row.head_size}", row.method, row.context, number)
            for row, number in found
            if number is not None
        ]

    times = draw(points(lambda row: row.us), "time [µs]", out, "kernels-time")
    return times + draw(
        points(lambda row: row.speedup), "times faster than SDPA in 16 bit", out, "kernels-speedup",
        log=False, level=1.0,
    )  # fmt: skip
