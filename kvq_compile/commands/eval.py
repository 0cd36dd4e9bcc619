"""``kvq eval``."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import kvq_compile
from kvq_compile.commands.eval_options import (
    TASKS,
    BatchOption,
    CalibrateOnOption,
    ChunkOption,
    DepthsOption,
    ExamsOption,
    LengthsOption,
    MethodsOption,
    OutOption,
    PrefillOption,
    PromptOption,
    PromptsOption,
    RecallOption,
    SamplesOption,
    SweepOption,
    TasksOption,
    TextsOption,
    TokensOption,
    WindowOption,
    WindowsOption,
)
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


def evaluate_(
    model: ModelOption,
    method: MethodsOption = None,
    text: TextsOption = None,
    task: TasksOption = None,
    sweep: SweepOption = False,
    calibrate_on: CalibrateOnOption = None,
    batch: BatchOption = 1,
    out: OutOption = Path("kvq-eval"),
    windows: WindowsOption = 4,
    window: WindowOption = 2048,
    prefill: PrefillOption = 512,
    chunk: ChunkOption = 64,
    recall: RecallOption = None,
    exams: ExamsOption = 4,
    length: LengthsOption = None,
    depths: DepthsOption = 5,
    samples: SamplesOption = 4,
    prompts: PromptsOption = 50,
    prompt: PromptOption = 1024,
    tokens: TokensOption = 200,
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
    from kvq_compile.evaluation.passkey import Passkeys
    from kvq_compile.evaluation.perplexity import Protocol
    from kvq_compile.evaluation.tasks import Measurement

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
        check_sweep(wanted)
    make_folder(out)

    network, tokenizer = load(model, dtype, device)
    texts = encode(tokenizer, files)
    tasks = fit_tasks({name: protocols[name] for name in wanted}, network, texts, bool(length))
    about = describe(network, model, list(texts), plain)
    about |= {name: asdict(fitted) for name, fitted in tasks.items()} | {"recall contexts": exams}
    kept = keep(out, {**about, "calibrated on": str(calibrate_on)}, network, texts)
    if sweep:
        found = sweep_methods(network, tokenizer, calibrate_on, out, kept)
        choices += [uncompiled(item) for item in found]
    measurement = Measurement(
        network, tokenizer, texts, choices, compile_plain, kept, recall or [], exams
    )
    rows, written = run_tasks(measurement, list(tasks.values()), out, about)
    kept.remove()
    show(rows, written, out, sweep, as_json)


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


def check_sweep(tasks: Sequence[str]) -> None:
    """Make sure that a sweep can draw its plot, which shows perplexity."""
    from kvq_compile.evaluation.plot import check_plot

    check_plot("perplexity" in tasks)


def fit_tasks(
    tasks: Mapping[str, Task],
    network: PreTrainedModel,
    texts: Mapping[str, Sequence[int]],
    keep_lengths: bool,
) -> dict[str, Task]:
    """Return tasks as the model can run them: without ``keep_lengths``, passkeys in the contexts that it has.

    Raises:
        ValueError: A text is too short, or a context longer than the model's.
    """
    from kvq_compile.evaluation.passkey import Passkeys
    from kvq_compile.evaluation.tasks import check_text, usual_lengths
    from kvq_compile.loading import longest_context

    context = longest_context(network)
    fitted = dict(tasks)
    for name, task in tasks.items():
        if isinstance(task, Passkeys) and not keep_lengths:
            fitted[name] = replace(task, lengths=usual_lengths(context))
        for ids in texts.values():  # what is too short is told before methods are calibrated
            check_text(fitted[name], ids, context)
    return fitted


def keep(
    out: Path,
    about: Mapping[str, object],
    network: PreTrainedModel,
    texts: Mapping[str, Sequence[int]],
) -> Kept:
    """Return what the same measurement has found before it was cut short, and where the rest goes."""
    from kvq_compile.evaluation.kept import Kept

    ids = [token for text in texts.values() for token in text]
    return Kept(out / "eval.part.jsonl", about, network, ids)


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


def show(
    rows: Sequence[Row], written: Sequence[Path], out: Path, sweep: bool, as_json: bool
) -> None:
    """Print rows as a table or as JSON, draw the plot of a sweep, and name the files that were written."""
    if as_json:
        print(written[-1].read_text(), end="")
    else:
        show_results(rows)
    if sweep:
        from kvq_compile.evaluation.plot import draw, points_of

        written = [*written, *draw(points_of(rows), out)]
    for path in written:
        note(f"wrote {path}")


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
