"""``kvq bench chunk``, ``prefill``, ``first-call`` and ``start``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvq_compile.commands.bench import (
    CommitOption,
    MethodsOption,
    OutOption,
    bench,
    read_dtype,
    read_methods,
    read_shape,
)
from kvq_compile.commands.shared import DeviceOption, JsonOption, make_folder
from kvq_compile.console import note, refusals, show_grid, stages

if TYPE_CHECKING:
    import torch

ShapesOption = Annotated[
    list[str] | None, typer.Option("--shape", help="BATCHxCONTEXT, as 1x32k; may be repeated.")
]
ModelOption = Annotated[
    str, typer.Option(help="llama-3-8b, llama-2-7b or small: shapes; weights are random.")
]
LayersOption = Annotated[int | None, typer.Option(help="Fewer layers than the model has.", min=1)]
RunsOption = Annotated[
    list[str] | None, typer.Option("--run", help="A method, as tc:bits=3; may be repeated.")
]


@bench.command()
def chunk(
    method: MethodsOption = None,
    shape: ShapesOption = None,
    queries: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of the chunk; may be repeated. 2048 if none is named.", min=2),
    ] = None,
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.", min=1)] = 8,
    head_size: Annotated[int, typer.Option(help="Channels of a head.", min=1)] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: DeviceOption = "auto",
    commit: CommitOption = None,
    out: OutOption = Path("kvq-bench"),
    as_json: JsonOption = False,
) -> None:
    """Time attention of a chunk of a prompt to a long packed history, against flash attention to an exact one.

    A row also has the error of its output against attention in fp64, the time of dequantizing the history, and the
    memory that the call takes.
    """
    from kvq_compile.bench import chunks
    from kvq_compile.bench.caches import Shape
    from kvq_compile.loading import pick_device

    where = pick_device(device)
    usual = ("1x64k",) if where.type == "cuda" else ("1x2k",)
    shapes = [Shape(*read_shape(text), heads, kv_heads, head_size) for text in shape or usual]
    methods = read_methods(method or chunks.METHODS, shapes)
    counts = queries or [2048]
    total = (len(methods) + 1) * len(shapes) * len(counts)
    found = chunks.measure(methods, shapes, counts, read_dtype(dtype), where)
    rows = _collect(found, total, out, "chunks.csv", chunks.CASE, where, commit)

    def told(row: chunks.Row) -> str:
        if row.ms is None:
            return "not run"
        ratio = f" ({row.times_baseline:.2f})" if row.times_baseline else ""
        return f"{row.ms:.2f}{ratio}"

    cells = {
        (row.method, f"{row.queries} on {row.batch} x {row.context}"): told(row) for row in rows
    }
    title = f"ms of a chunk's attention (times as long as {chunks.BASELINE} on 16 bit)"
    _show(rows, title, cells, "method", as_json)
    wrong = [row.method for row in rows if row.is_wrong]
    if wrong:
        raise RuntimeError(
            f"attention must be as exact as in 16 bit, and is not: {', '.join(wrong)}"
        )


@bench.command()
def prefill(
    run: RunsOption = None,
    shape: ShapesOption = None,
    model: ModelOption = "llama-3-8b",
    layers: LayersOption = None,
    device: DeviceOption = "auto",
    commit: CommitOption = None,
    out: OutOption = Path("kvq-bench"),
    as_json: JsonOption = False,
) -> None:
    """Time prompts that are quantized as they are written, against a 16-bit dynamic cache under Inductor."""
    from kvq_compile.bench import calls

    where, network = _network(calls, model, layers, device, run or ())
    usual = ("1x8k", "1x32k") if where.type == "cuda" else ("1x512",)
    shapes = [read_shape(text) for text in shape or usual]
    runs = list(dict.fromkeys((calls.PLAIN, *(run or calls.RUNS))))
    found = calls.measure_prompts(network, model, runs, shapes)
    total = len(runs) * len(shapes)
    rows = _collect(found, total, out, "prefill.csv", calls.PROMPT_CASE, where, commit)

    def told(row: calls.Prompt) -> str:
        if row.ms is None or row.plain_ms is None:
            return "not run" if row.ms is None else f"{row.ms:.1f}"
        return f"{row.ms:.1f} ({100 * (row.ms / row.plain_ms - 1):+.1f} %)"

    cells = {(row.run, (row.batch, row.context)): told(row) for row in rows}
    _show(rows, f"{model}: ms of a prompt (more than {calls.PLAIN})", cells, "run", as_json)


@bench.command()
def first_call(
    run: RunsOption = None,
    shape: ShapesOption = None,
    model: ModelOption = "llama-3-8b",
    layers: LayersOption = None,
    device: DeviceOption = "auto",
    commit: CommitOption = None,
    out: OutOption = Path("kvq-bench"),
    as_json: JsonOption = False,
) -> None:
    """Measure the memory of the first compiled call onto a cache that was filled in 16 bit.

    A run is a method with a dynamic cache, or with a static one, as int4-static. Memory is measured on a GPU.
    """
    from kvq_compile.bench import calls

    where, network = _network(calls, model, layers, device, ())
    usual = ("1x128k",) if where.type == "cuda" else ("1x512",)
    shapes = [read_shape(text) for text in shape or usual]
    runs = list(dict.fromkeys(run or ("tc:bits=4", "tc:bits=4-static")))
    found = calls.measure_first_calls(network, model, runs, shapes)
    total = len(runs) * len(shapes)
    rows = _collect(found, total, out, "first-call.csv", calls.PROMPT_CASE, where, commit)

    def told(row: calls.FirstCall) -> str:
        if row.seconds is None or row.layer_gib is None:
            return "not run"
        if row.more_gib is None or row.cache_gib is None:
            return f"{row.seconds:.1f} s"
        layers_more = row.more_gib / row.layer_gib
        return f"{row.cache_gib:.1f} + {row.more_gib:.1f} GiB ({layers_more:.1f} layers)"

    cells = {(row.run, (row.batch, row.context)): told(row) for row in rows}
    _show(rows, f"{model}: 16-bit cache + most memory beside it", cells, "run", as_json)


@bench.command()
def start(
    run: RunsOption = None,
    model: ModelOption = "llama-3-8b",
    layers: LayersOption = None,
    device: DeviceOption = "auto",
    commit: CommitOption = None,
    out: OutOption = Path("kvq-bench"),
    as_json: JsonOption = False,
) -> None:
    """Time new processes to their first token and through their first steps, against a 16-bit cache under Inductor.

    Each run is a process whose caches on disk are empty, and then one that finds them filled.
    """
    from kvq_compile.bench import calls, steps
    from kvq_compile.loading import pick_device, require_transformers

    require_transformers()
    where = pick_device(device)
    calls.check_model(model)
    runs = list(dict.fromkeys((calls.PLAIN, *(run or ("tc:bits=4",)))))
    _check_runs(calls, runs)
    count = layers or steps.SHAPES[model]["num_hidden_layers"]
    found = calls.measure_starts(model, count, runs, where)
    rows = _collect(found, 2 * len(runs), out, "start.csv", calls.START_CASE, where, commit)
    cells = {}
    for row in rows:
        for name in ("first_token", "prompt", "steps", "step"):
            value = getattr(row, name)
            cells[f"{row.run}, {row.caches}", name] = "" if value is None else f"{value:.2f}"
    _show(rows, f"{model}, {count} layers: seconds of a new process", cells, "run", as_json)


def _network(
    calls: Any, model: str, layers: int | None, device: str, runs: Sequence[str]
) -> tuple[torch.device, Any]:
    """Return the device and a model with random weights on it, after a check of what is asked for."""
    from kvq_compile.bench import steps
    from kvq_compile.loading import pick_device

    where = pick_device(device)
    calls.check_model(model)
    _check_runs(calls, runs)
    if where.type != "cuda" and model != "small":
        raise ValueError(
            f"device must be a GPU for --model {model}, got {where.type}; take --model small"
        )
    count = layers or steps.SHAPES[model]["num_hidden_layers"]
    return where, steps.make_model(model, count, where)


def _check_runs(calls: Any, runs: Sequence[str]) -> None:
    from kvq_compile.bench import steps

    for run in runs:
        steps.check_run(run)
        if not calls.is_dynamic(run):
            raise ValueError(f"run must be a method with a dynamic cache, got {run!r}")


def _collect(
    found: Iterable[Any], total: int, out: Path, name: str, case: Sequence[str], where: torch.device, commit: str | None
) -> list[Any]:  # fmt: skip
    """Measure rows and add each to its file as it is measured."""
    from kvq_compile.bench.place import place
    from kvq_compile.bench.rows import PLACE, add_rows, short_cell

    make_folder(out)
    about, path, rows = place(where, commit), out / name, []
    with stages() as advance:
        for row in found:
            add_rows(path, [asdict(row) | about], (*PLACE, *case), short_cell)
            rows.append(row)
            advance("measuring", len(rows), total)
    note(f"wrote {path}")
    return rows


def _show(
    rows: Sequence[Any], title: str, cells: dict[tuple[str, Any], str], name: str, as_json: bool
) -> None:
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2))
    else:
        show_grid(title, cells, refusals(rows, name))
