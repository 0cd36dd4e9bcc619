"""``kvq bench decode``, ``memory`` and ``cpu``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvq_compile.commands.bench import (
    CommitOption,
    MethodsOption,
    OutOption,
    ResumeOption,
    bench,
    read_shape,
)
from kvq_compile.commands.shared import (
    DemoModelOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    TextOption,
    check_places,
    find_text,
    load,
    make_folder,
)
from kvq_compile.console import note, readable_bytes, refusals, show_grid, stages

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from kvq_compile.bench.steps import Row

ShapesOption = Annotated[
    list[str] | None, typer.Option("--shape", help="BATCHxCONTEXT, as 8x32k; may be repeated.")
]


@bench.command()
def decode(
    run: Annotated[
        list[str] | None,
        typer.Option(
            help="A method with a dynamic cache, as tc:bits=3; with a static one, as int4-static; hf-static, "
            "hf-dynamic, hf-quanto or hf-hqq; may be repeated. The usual ones if none is named."
        ),
    ] = None,
    shape: ShapesOption = None,
    model: Annotated[
        str, typer.Option(help="llama-3-8b, llama-2-7b or small: shapes; weights are random.")
    ] = "llama-3-8b",
    layers: Annotated[
        int | None, typer.Option(help="Fewer layers than the model has.", min=1)
    ] = None,
    device: DeviceOption = "auto",
    commit: CommitOption = None,
    resume: ResumeOption = False,
    out: OutOption = Path("kvq-bench"),
    as_json: JsonOption = False,
) -> None:
    """Time whole decoding steps of a model of a known shape, against transformers' own caches in the same run.

    Caches hold random tokens. hf-static is a 16-bit static cache, compiled; hf-quanto and hf-hqq are transformers'
    quantized cache, as far as its backends are installed. With -tuned behind a run Inductor tries tiles for the model's
    own products (coordinate_descent_tuning). A GPU is needed but for --model small.
    """
    from kvq_compile.bench import steps
    from kvq_compile.bench.place import place
    from kvq_compile.loading import pick_device

    where = pick_device(device)
    check_model(model, where)
    usual = ("1x4k", "1x32k", "1x128k") if where.type == "cuda" else ("1x1k", "1x2k")
    shapes = [read_shape(text) for text in shape or usual]
    runs = list(dict.fromkeys(run or steps.RUNS))
    for each in runs:
        steps.check_run(each)
    make_folder(out)
    about, path = place(where, commit), out / "decode.csv"
    network = steps.make_model(model, layers or steps.SHAPES[model]["num_hidden_layers"], where)
    rows = time_steps(network, model, runs, shapes, about, path, resume)
    if as_json:
        print(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        show_steps(model, rows)
    drawn = [
        ("decode-time", "time [ms]", [(f"batch {r.batch}", r.run, r.context, r.waited) for r in rows]),
        ("decode-speedup", f"times faster than {steps.BASELINE}",
         [(f"batch {r.batch}", r.run, r.context, _ratio(plain_of(rows, r, steps.BASELINE), r.waited)) for r in rows]),
    ]  # fmt: skip
    _finish(path, out, drawn)


def check_model(name: str, device: torch.device) -> None:
    """Check that there is a model of this name, and a GPU for it where it is large."""
    from kvq_compile.bench import steps

    if name not in steps.SHAPES:
        raise ValueError(f"model must be one of {', '.join(steps.SHAPES)}, got {name!r}")
    if device.type != "cuda" and name != "small":
        raise ValueError(
            f"device must be a GPU for --model {name}, got {device.type}; take --model small, or kvq bench cpu"
        )


def time_steps(
    network: PreTrainedModel,
    model: str,
    runs: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    about: dict[str, str],
    path: Path,
    resume: bool,
) -> list[Row]:
    """Time runs, add each row to the file as it is measured, and return the rows that were not there before."""
    from kvq_compile.bench import steps
    from kvq_compile.bench.rows import PLACE, add_rows, key_of, read_rows

    same = (*PLACE, *steps.CASE)
    before = {key_of(line, same) for line in read_rows(path) if resume and line.get("waited")}

    def known(row: Row) -> bool:
        return key_of(asdict(row) | about, same) in before

    rows = []
    with stages() as advance:
        for row in steps.run_all(network, model, runs, shapes, known):
            add_rows(path, [asdict(row) | about], same, _cell)
            rows.append(row)
            advance("measuring", len(rows), len(runs) * len(shapes))
    return rows


def show_steps(model: str, rows: Sequence[Row]) -> None:
    """Print a table of the times of steps, against those of the baseline at the same shape."""
    from kvq_compile.bench.steps import BASELINE

    cells = {
        (row.run, (row.batch, row.context)): _time(row.waited, plain_of(rows, row, BASELINE))
        for row in rows
    }
    title = f"{model}: ms a token (times faster than {BASELINE})"
    show_grid(title, cells, refusals(rows, "run"))


def plain_of(rows: Sequence[Any], row: Any, baseline: str) -> float | None:
    """Return the time of the baseline at the shape of a row."""
    same = (
        r.waited for r in rows if (r.run, r.batch, r.context) == (baseline, row.batch, row.context)
    )
    return next(same, None)


@bench.command()
def memory(
    method: MethodsOption = None,
    shape: ShapesOption = None,
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.", min=1)] = 8,
    head_size: Annotated[int, typer.Option(help="Channels of a head.", min=1)] = 128,
    device: DeviceOption = "auto",
    commit: CommitOption = None,
    out: OutOption = Path("kvq-bench"),
    as_json: JsonOption = False,
) -> None:
    """Count what a layer's cache takes against its context, beside 16 bit and transformers' quantized cache.

    Exact tokens and spare room count: below a few hundred tokens nothing is packed.
    """
    from kvq_compile.bench import memory as bench_memory
    from kvq_compile.bench.caches import Shape, random_spec
    from kvq_compile.bench.place import place
    from kvq_compile.bench.rows import PLACE, add_rows, short_cell
    from kvq_compile.loading import pick_device

    where = pick_device(device)
    usual = ["1x256", "1x512", "1x1k", "1x4k", "1x16k"] + ["1x128k"] * (where.type == "cuda")
    shapes = [Shape(*read_shape(text), heads, kv_heads, head_size) for text in shape or usual]
    methods = list(dict.fromkeys([*bench_memory.PEERS, *(method or bench_memory.METHODS)]))
    for each in methods:
        if each not in bench_memory.PEERS:
            random_spec(each, replace(shapes[0], head_size=128))
    make_folder(out)
    about, path = place(where, commit), out / "memory.csv"
    same = (*PLACE, *bench_memory.CASE)
    rows = []
    with stages() as advance:
        for row in bench_memory.measure(methods, shapes, where):
            told = {**asdict(row), "bits": row.bits, "saving": row.saving, **about}
            add_rows(path, [told], same, short_cell)
            rows.append(row)
            advance("measuring", len(rows), len(methods) * len(shapes))
    if as_json:
        print(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        cells = {
            (row.method, (row.batch, row.context)): "not run" if row.bytes is None
            else f"{readable_bytes(row.bytes)} ({row.saving:.1f})"
            for row in rows
        }  # fmt: skip
        show_grid("bytes of a layer (times less than in 16 bit)", cells, refusals(rows, "method"))
    drawn = [
        ("memory", "bytes of a layer",
         [(f"batch {r.batch}, heads of {r.head_size}", r.method, r.context, r.bytes) for r in rows]),
    ]  # fmt: skip
    _finish(path, out, drawn)


@bench.command()
def cpu(
    model: DemoModelOption = None,
    text: TextOption = None,
    method: MethodsOption = None,
    context: Annotated[int, typer.Option(help="Tokens in the cache.", min=1)] = 1500,
    tokens: Annotated[int, typer.Option(help="Tokens timed a round.", min=1)] = 24,
    rounds: Annotated[int, typer.Option(help="Rounds.", min=1)] = 3,
    threads: Annotated[int | None, typer.Option(help="Of PyTorch.", min=1)] = None,
    dtype: DtypeOption = "auto",
    commit: CommitOption = None,
    out: OutOption = Path("kvq-bench"),
    as_json: JsonOption = False,
) -> None:
    """Time decoding of a real model on this CPU, a plain cache and quantized ones in turn, all under Inductor."""
    import torch

    from kvq_compile.bench import cpu as bench_cpu
    from kvq_compile.bench.place import place
    from kvq_compile.bench.rows import add_rows
    from kvq_compile.evaluation.runner import parse_method
    from kvq_compile.loading import DEMO_MODEL, encode_file

    methods = [parse_method(each) for each in method or bench_cpu.METHODS]
    text = find_text(text)
    check_places(dtype, "cpu", text)
    make_folder(out)
    if threads is not None:
        torch.set_num_threads(threads)
    network, tokenizer = load(model, dtype, "cpu")
    ids = encode_file(tokenizer, text)
    name = Path(model).name if model is not None else DEMO_MODEL.name
    with stages() as advance:
        rows = bench_cpu.measure(network, name, ids, methods, context, tokens, rounds, advance)
    about, path = place(torch.device("cpu"), commit), out / "cpu.csv"
    found = [asdict(row) | about for row in rows]
    add_rows(path, found, (*bench_cpu.PLACE, *bench_cpu.CASE))
    if as_json:
        print(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        cells: dict[tuple[str, Any], str] = {}
        for row in rows:
            cells[row.method, "tokens/s"] = f"{row.tokens_per_second:.1f}"
            cells[row.method, "times plain"] = f"{row.times_plain:.2f}"
            cells[row.method, "cache"] = readable_bytes(row.bytes)
        show_grid(f"{name}, {context} tokens of context, {rows[0].dtype}", cells, {})
    _finish(path, out, [])


Drawn = tuple[str, str, Sequence[tuple[str, str, int, float | None]]]


def _finish(path: Path, out: Path, drawn: Sequence[Drawn]) -> None:
    """Draw plots, where matplotlib is installed, and say what was written."""
    from kvq_compile.bench.plot import Point, can_draw, draw

    written = [path]
    if drawn and not can_draw():
        note("no plots: matplotlib is not installed; pip install kvq-compile[plot]")
        drawn = []
    for name, label, points in drawn:
        given = [Point(*point) for point in points if point[3] is not None]  # type: ignore[arg-type]
        log = "speedup" not in name
        written += draw(given, label, out, name, log=log, level=None if log else 1.0)
    for each in written:
        note(f"wrote {each}")


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def _ratio(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before / after


def _time(waited: float | None, plain: float | None) -> str:
    if waited is None:
        return "not run"
    return f"{waited:.1f}" if plain is None else f"{waited:.1f} ({plain / waited:.1f})"
