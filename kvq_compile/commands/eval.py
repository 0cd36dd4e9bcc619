"""``kvq eval``."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import kvq_compile
from kvq_compile.commands.shared import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PlainOption,
    check_places,
    find_text,
    load,
    make_folder,
    read_method,
    read_plain,
)
from kvq_compile.console import note, show_results, stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq_compile.evaluation.kept import Kept
    from kvq_compile.evaluation.results import Row
    from kvq_compile.evaluation.runner import Method
    from kvq_compile.evaluation.tasks import Measurement, Task

TASKS = ("perplexity", "passkey", "greedy")
RETRIEVAL, CONTINUATION, PERPLEXITY = "Passkey", "Greedy", "Perplexity"  # panels of the help


def evaluate_(
    model: ModelOption,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="NAME or NAME:OPTION=VALUE,...; may be repeated."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text", help="A UTF-8 text file; may be repeated. [default: the demo's own]"
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(TASKS)}; may be repeated. [default: perplexity]"),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also run all methods at many widths and draw a plot.")
    ] = False,
    calibrate_on: Annotated[
        Path | None, typer.Option(help="Text on which --sweep calibrates methods that learn.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences fed at once.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the results, CSV and JSON.")] = Path(
        "kvq-eval"
    ),
    windows: Annotated[
        int, typer.Option(help="Windows of a text.", min=1, rich_help_panel=PERPLEXITY)
    ] = 4,
    window: Annotated[
        int, typer.Option(help="Tokens in a window.", rich_help_panel=PERPLEXITY)
    ] = 2048,
    prefill: Annotated[
        int, typer.Option(help="Tokens fed at once, not scored.", rich_help_panel=PERPLEXITY)
    ] = 512,
    chunk: Annotated[
        int, typer.Option(help="Tokens fed at a time after that.", rich_help_panel=PERPLEXITY)
    ] = 64,
    recall: Annotated[
        list[int] | None,
        typer.Option(
            help="Also measure recall of six facts in a context of so many tokens; may be repeated.",
            rich_help_panel=PERPLEXITY,
        ),
    ] = None,
    exams: Annotated[
        int,
        typer.Option(help="Contexts for each recall length.", min=1, rich_help_panel=PERPLEXITY),
    ] = 4,
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of a context; may be repeated. 2048, 4096 and 8192, as the model has them, if none is named.",
            rich_help_panel=RETRIEVAL,
        ),
    ] = None,
    depths: Annotated[
        int, typer.Option(help="Places of the passkey.", rich_help_panel=RETRIEVAL)
    ] = 5,
    samples: Annotated[
        int, typer.Option(help="Contexts for each length and place.", rich_help_panel=RETRIEVAL)
    ] = 4,
    prompts: Annotated[int, typer.Option(help="Prompts.", rich_help_panel=CONTINUATION)] = 50,
    prompt: Annotated[
        int, typer.Option(help="Tokens of a prompt.", rich_help_panel=CONTINUATION)
    ] = 1024,
    tokens: Annotated[
        int, typer.Option(help="Tokens to generate.", rich_help_panel=CONTINUATION)
    ] = 200,
    plain: PlainOption = "eager",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure quality, bytes and speed against the plain cache: perplexity, passkey retrieval, greedy text.

    Graphs run uncompiled unless a method says inner=inductor. Rows are written as they are measured;
    the same command goes on where one was cut short.
    """
    from kvq_compile.evaluation.greedy import Continuations
    from kvq_compile.evaluation.kept import Kept
    from kvq_compile.evaluation.passkey import Passkeys
    from kvq_compile.evaluation.perplexity import Protocol
    from kvq_compile.evaluation.tasks import Measurement, check_text, usual_lengths
    from kvq_compile.loading import longest_context

    if not method and not sweep:
        raise ValueError("--method must be given, got none; give --sweep to run all methods")
    choices = [uncompiled(read_method(item)) for item in method or []]
    wanted = read_tasks(task)
    protocols: dict[str, Task] = {
        "perplexity": Protocol(window, prefill, chunk, windows, batch),
        "passkey": Passkeys(tuple(length or Passkeys.lengths), depths, samples, batch),
        "greedy": Continuations(prompts, prompt, tokens, batch),
    }
    compile_plain = read_plain(plain)
    files = text or [find_text(None)]
    check_places(dtype, device, *files, calibrate_on)
    check_names(files)
    if sweep:
        from kvq_compile.evaluation.plot import check_plot

        check_plot("perplexity" in wanted)
    make_folder(out)
    network, tokenizer = load(model, dtype, device)
    texts = encode(tokenizer, files)
    context = longest_context(network)
    if not length:
        protocols["passkey"] = Passkeys(usual_lengths(context), depths, samples, batch)
    for name in wanted:
        for ids in texts.values():  # what is too short is told before methods are calibrated
            check_text(protocols[name], ids, context)
    about = describe(network, model, list(texts), plain)
    about |= {name: asdict(protocols[name]) for name in wanted} | {"recall contexts": exams}
    kept = Kept(
        out / "eval.part.jsonl",
        {**about, "calibrated on": str(calibrate_on)},
        network,
        [token for ids in texts.values() for token in ids],
    )
    if sweep:
        found = sweep_methods(network, tokenizer, calibrate_on, out, kept)
        choices += [uncompiled(item) for item in found]
    measurement = Measurement(
        network, tokenizer, texts, choices, compile_plain, kept, recall or [], exams
    )
    rows, written = run_tasks(measurement, [protocols[name] for name in wanted], out, about)
    kept.remove()
    if as_json:
        print(written[-1].read_text(), end="")
    else:
        show_results(rows)
    if sweep:
        from kvq_compile.evaluation.plot import draw, points_of

        written += draw(points_of(rows), out)
    for path in written:
        note(f"wrote {path}")


def read_tasks(names: Sequence[str] | None) -> list[str]:
    """Return the tasks that are asked for, each once; perplexity where none is named, since a sweep draws it."""
    for name in names or ():
        if name not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return list(dict.fromkeys(names or TASKS[:1]))


def uncompiled(method: Method) -> Method:
    """Return a method whose graphs run without a compiler, unless it says which."""
    if method.options is None:
        return method
    return replace(method, options={"inner": "eager", **method.options})


def encode(tokenizer: PreTrainedTokenizerBase, files: Sequence[Path]) -> dict[str, list[int]]:
    """Return the token ids of text files by their names.

    Raises:
        ValueError: A file is not UTF-8.
    """
    from kvq_compile.loading import encode_file

    return {path.name: encode_file(tokenizer, path) for path in files}


def check_names(files: Sequence[Path]) -> None:
    """Make sure that texts can be told apart by the names of their files."""
    names = [path.name for path in files]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"text must have a file name of its own, got {name} twice; rename one")


def sweep_methods(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Path | None,
    out: Path,
    kept: Kept,
) -> list[Method]:
    """Return all methods, calibrated on a text if one is given; calibrations are kept in ``out``."""
    from kvq_compile.evaluation.sweep import standard_methods
    from kvq_compile.loading import encode_file, spread_windows

    if text is None:
        note("without --calibrate-on only methods that need no calibration are run")
        return standard_methods(network, [])
    windows = spread_windows(encode_file(tokenizer, text), 16, 2048)
    with stages() as advance:
        moved = [window.to(network.device) for window in windows]
        return standard_methods(network, moved, advance, out / "calibrations", kept)


def run_tasks(
    measurement: Measurement, tasks: Sequence[Task], out: Path, about: Mapping[str, object]
) -> tuple[list[Row], list[Path]]:
    """Return the rows of tasks and the files that hold them, which are written as rows are measured."""
    from kvq_compile.evaluation.results import write_results
    from kvq_compile.evaluation.tasks import after

    rows: list[Row] = []
    for task in tasks:
        rows += measurement.run(task, after(rows, lambda found: write_results(found, out, about)))
    return rows, write_results(rows, out, about)


def describe(
    network: PreTrainedModel, model: str, texts: Sequence[str], plain: str
) -> dict[str, object]:
    """Return what tables were measured on; folders by their last name only."""
    import torch

    on_gpu = network.device.type == "cuda"
    return {
        "model": Path(model).name if Path(model).exists() else model,
        "texts": list(texts),
        "dtype": str(network.dtype).removeprefix("torch."),
        "hardware": torch.cuda.get_device_name(network.device)
        if on_gpu
        else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "plain cache": plain,
        "quantized caches": "eager, where the method does not say inner=...",
        "versions": {
            "kvq-compile": kvq_compile.__version__,
            **{name: version(name) for name in ("torch", "transformers")},
        },
    }
