"""The command line: ``kvq demo``, ``kvq eval``, ``kvq calibrate`` and ``kvq explain``.

Commands parse, call and print; the work is in `kvq_compile.demo`, `kvq_compile.evaluation` and
`kvq_compile.calibrator`, which are imported when a command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq_compile.demo import Comparison, Generation
    from kvq_compile.evaluation.perplexity import Method, Protocol, Runner, Score

T = TypeVar("T")

app = typer.Typer(
    name="kvq",
    help="Compile decoders onto a quantized key-value cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()

ModelOption = Annotated[str, typer.Option("--model", help="A folder or a Hugging Face id.")]
DemoModelOption = Annotated[
    str | None, typer.Option("--model", help="A folder or a Hugging Face id. [default: our own]")
]
TextOption = Annotated[
    Path | None, typer.Option("--text", help="A UTF-8 text file. [default: the demo's own]")
]
MethodOption = Annotated[
    str | None,
    typer.Option("--method", help="NAME or NAME:OPTION=VALUE,... [default: the backend's]"),
]
MethodsOption = Annotated[
    list[str] | None,
    typer.Option("--method", help="NAME or NAME:OPTION=VALUE,...; may be repeated."),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto, checkpoint, float32, bfloat16 or float16; auto is float32 on a CPU, "
        "else the checkpoint's.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu or cuda; auto is cuda where there is one.")
]
PlainOption = Annotated[
    str, typer.Option("--plain", help="How the plain cache runs: compiled or eager.")
]


def attempt(action: Callable[[], T]) -> T:
    """Return what ``action`` returns; a wrong argument ends the command with a clear line."""
    try:
        return action()
    except (ValueError, TypeError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def demo(
    model: DemoModelOption = None,
    text: TextOption = None,
    method: MethodOption = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 64,
    prompt: Annotated[int, typer.Option(help="Tokens of the text to start from.", min=1)] = 1536,
    windows: Annotated[int, typer.Option(help="Windows scored, at most.", min=1)] = 2,
    plain: PlainOption = "compiled",
    dtype: DtypeOption = "checkpoint",
    device: DeviceOption = "auto",
) -> None:
    """Generate with a plain and with a quantized cache, side by side."""
    from kvq_compile.demo import compare

    compile_plain = read_plain(plain)
    choice = attempt(lambda: read_method(method))
    network, tokenizer = load(model, dtype, device)
    ids = attempt(lambda: read_text(tokenizer, text))
    with console.status("") as status:
        result = attempt(
            lambda: compare(
                network,
                tokenizer,
                ids,
                choice,
                prompt_tokens=prompt,
                new_tokens=tokens,
                windows=windows,
                compile_plain=compile_plain,
                say=lambda step: status.update(f"{step} ..."),
            )
        )
    show_comparison(result, plain)


@app.command("eval")
def evaluate_(
    model: ModelOption,
    method: MethodsOption = None,
    text: TextOption = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also run all methods at many widths and draw a plot.")
    ] = False,
    calibrate_on: Annotated[
        Path | None, typer.Option(help="Text on which --sweep calibrates methods that learn.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of the text.", min=1)] = 4,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    prefill: Annotated[int, typer.Option(help="Tokens fed at once, not scored.")] = 512,
    chunk: Annotated[int, typer.Option(help="Tokens fed at a time after that.")] = 64,
    recall: Annotated[
        list[int] | None,
        typer.Option(help="Also measure recall in a context of so many tokens; may be repeated."),
    ] = None,
    exams: Annotated[int, typer.Option(help="Contexts for each recall length.", min=1)] = 4,
    out: Annotated[Path, typer.Option(help="Folder for eval.csv and eval.json.")] = Path(
        "kvq-eval"
    ),
    plain: PlainOption = "compiled",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Measure perplexity, divergence, recall, bytes and speed against the plain cache."""
    from kvq_compile.evaluation.perplexity import Protocol, make_runners, write_results

    compile_plain = read_plain(plain)
    if not method and not sweep:
        raise typer.BadParameter("give --method, or --sweep for all of them")
    choices = attempt(lambda: [read_method(item) for item in method or []])
    protocol = attempt(lambda: Protocol(window, prefill, chunk, windows))
    network, tokenizer = load(model, dtype, device)
    ids = attempt(lambda: read_text(tokenizer, text))
    if sweep:
        choices += sweep_methods(network, tokenizer, calibrate_on)
    runners = make_runners(network, choices, compile_plain)
    scores = attempt(lambda: measure(runners, tokenizer, ids, protocol, recall or [], exams))
    show_scores(scores)
    about = describe(network, model, text, protocol, plain, exams if recall else 0)
    written = write_results(scores, out, about)
    if sweep:
        from kvq_compile.evaluation.sweep import draw

        written += draw(scores, out)
    for path in written:
        console.print(f"wrote {escape(str(path))}")


@app.command()
def calibrate(
    model: ModelOption,
    text: Annotated[Path, typer.Option("--text", help="A UTF-8 text file to calibrate on.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    method: Annotated[
        str, typer.Option("--method", help="skvq or cq-<c>c<b>b, NAME or NAME:OPTION=VALUE,...")
    ] = "skvq",
    windows: Annotated[int, typer.Option(help="Windows of the text, evenly spread.", min=1)] = 16,
    window: Annotated[int, typer.Option(help="Tokens in a window.", min=16)] = 2048,
    tokens: Annotated[int, typer.Option(help="Tokens to fit to, of all windows.", min=256)] = 16384,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Fit a method's tables to a model. A run that was cut short goes on where it stopped."""
    from kvq_compile.calibration.calibrator import calibrate as fit
    from kvq_compile.evaluation.perplexity import parse_options
    from kvq_compile.loading import encode_file, spread_windows

    name, options = attempt(lambda: parse_options(method))
    network, tokenizer = load(model, dtype, device)
    batches = attempt(lambda: spread_windows(encode_file(tokenizer, text), windows, window))
    part = out.with_name(f"{out.name}.part")
    with stages() as advance:
        moved = [batch.to(network.device) for batch in batches]
        result = attempt(
            lambda: fit(
                network,
                moved,
                name,
                tokens=tokens,
                seed=seed,
                resume=part,
                advance=advance,
                **options,
            )
        )
    result.save(out)
    part.unlink(missing_ok=True)
    for index, layer in enumerate(result.layers):
        if layer.note:
            console.print(escape(f"layer {index}: {layer.note}"))
    console.print(f"wrote {escape(str(out))}: {name}, {len(result.layers)} layers")


@app.command()
def explain(
    model: DemoModelOption = None,
    method: MethodOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Say what becomes of every attention of a model, and why."""
    import torch

    import kvq_compile

    choice = attempt(lambda: read_method(method))
    network, tokenizer = load(model, dtype, device)
    from transformers import DynamicCache

    from kvq_compile.loading import cache_argument

    ids = torch.tensor([read_text(tokenizer, None)[:64]], device=network.device, dtype=torch.int64)
    with torch.no_grad():
        explanation = kvq_compile.explain(
            network,
            input_ids=ids,
            use_cache=True,
            options=dict(choice.options or {}),
            **{cache_argument(network): DynamicCache(config=network.config)},
        )
    console.print(escape(str(explanation)), highlight=False, soft_wrap=True)


def read_method(text: str | None) -> Method:
    """Return the method an option spells; the backend's default where there is none."""
    from kvq_compile.evaluation.perplexity import Method, parse_method
    from kvq_compile.options import make_config

    if text is None:
        return Method(f"{make_config().spec.method} (default)", {})
    return parse_method(text)


def sweep_methods(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Path | None
) -> list[Method]:
    """Return all methods, calibrated on a text if one is given."""
    from kvq_compile.evaluation.sweep import standard_methods
    from kvq_compile.loading import encode_file, spread_windows

    if text is None:
        console.print("without --calibrate-on only methods that need no calibration are run")
        return standard_methods(network, [])
    windows = attempt(lambda: spread_windows(encode_file(tokenizer, text), 16, 2048))
    with stages() as advance:
        return standard_methods(network, [w.to(network.device) for w in windows], advance)


def read_plain(text: str) -> bool:
    """Return whether the plain cache runs compiled."""
    if text not in ("compiled", "eager"):
        raise typer.BadParameter(f"--plain must be compiled or eager, got {text!r}")
    return text == "compiled"


def read_text(tokenizer: PreTrainedTokenizerBase, path: Path | None) -> list[int]:
    """Return the tokens of a text file, of the demo's own where there is none."""
    from kvq_compile.loading import DEMO_TEXT, encode_file, example

    return encode_file(tokenizer, path or example(DEMO_TEXT))


def load(
    name: str | None, dtype: str, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, the demo's own where no name is given."""
    from kvq_compile.loading import DEMO_MODEL, example, load_model

    with console.status("loading ..."):
        return attempt(lambda: load_model(name or str(example(DEMO_MODEL)), dtype, device))


def measure(
    runners: Sequence[Runner],
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    protocol: Protocol,
    lengths: Sequence[int],
    exams: int,
) -> list[Score]:
    """Score runners under a progress bar, recall included."""
    from dataclasses import replace

    from kvq_compile.evaluation.perplexity import chunks_to_do, evaluate
    from kvq_compile.evaluation.recall import recall

    with progress("perplexity", chunks_to_do(protocol, runners)) as advance:
        scores = evaluate(runners, ids, protocol, advance)
    for length in lengths:
        with progress(f"recall at {length}", exams * len(runners)) as advance:
            percents = recall(runners, tokenizer, ids, length, exams, advance)
        scores = [
            replace(score, recall={**score.recall, length: percent})
            for score, percent in zip(scores, percents, strict=True)
        ]
    return scores


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs; yield the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda steps: bar.advance(task, steps)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each stage while the block runs; yield the function that says how far one is."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield advance


def describe(
    network: PreTrainedModel,
    model: str,
    text: Path | None,
    protocol: Protocol,
    plain: str,
    exams: int,
) -> dict[str, object]:
    """Return what a table was measured on; folders by their last name only."""
    import os
    import platform
    from dataclasses import asdict
    from importlib.metadata import version

    import torch

    on_gpu = network.device.type == "cuda"
    return {
        "model": Path(model).name if Path(model).exists() else model,
        "text": text.name if text else "demo.txt",
        "protocol": asdict(protocol),
        "recall exams": exams,
        "dtype": str(network.dtype).removeprefix("torch."),
        "hardware": torch.cuda.get_device_name(network.device)
        if on_gpu
        else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "plain cache": plain,
        "versions": {name: version(name) for name in ("kvq-compile", "torch", "transformers")},
    }


def readable_bytes(count: int) -> str:
    """Return a number of bytes in kB or MB (powers of ten)."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def show_scores(scores: Sequence[Score], title: str | None = None) -> None:
    """Print the table of `kvq eval`."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold", min_width=16)
    lengths = list(scores[0].recall)
    heads = ("packed", "bits", "perplexity", "diff", "KL", "top-1", "bytes", "tokens/s")
    for head in (*heads, *(f"recall {length}" for length in lengths)):
        table.add_column(head, justify="right", no_wrap=True)
    for score in scores:
        table.add_row(
            escape(score.method),
            f"{score.packed_bits:.2f}",
            f"{score.effective_bits:.2f}",
            f"{score.perplexity:.3f}",
            f"{score.difference:+.2f} %",
            f"{score.kl:.5f}",
            f"{score.top1:.1f} %",
            readable_bytes(score.bytes),
            f"{score.tokens_per_second:.0f}",
            *(f"{score.recall[length]:.1f} %" for length in lengths),
        )
    # In a narrow terminal a line that wraps is better than a figure that is cut off.
    Console(width=max(console.width, 110)).print(table)


def show_comparison(result: Comparison, plain: str) -> None:
    """Print what `kvq demo` found."""
    for run in (result.plain, result.quantized):
        title = f"{run.method} cache, {run.tokens} tokens, greedy"
        console.print(Panel(escape(run.text), title=escape(title), title_align="left"))
    first, second = result.plain, result.quantized
    console.print(f"The first {result.agreed} of {first.tokens} tokens are the same.\n")
    console.print(comparison_table(first, second))
    base, other = result.scores
    console.print(
        f"Perplexity on the text: {base.perplexity:.3f} plain, {other.perplexity:.3f} "
        f"quantized ({other.difference:+.2f} %).\n"
        f"Tokens/s is the median over the tokens of one generation, plain {plain}, quantized "
        "compiled; compilation and prompt do not count.",
        highlight=False,
    )


def comparison_table(*runs: Generation) -> Table:
    """Return bytes by part, effective bits and speed of generations, side by side."""
    tokens = runs[0].cache.tokens
    table = Table(title=f"cache after {tokens} tokens", title_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column(escape(run.method), justify="right")
    for part in dict.fromkeys(part for run in runs for part in run.cache.parts):
        sizes = [run.cache.parts.get(part) for run in runs]
        table.add_row(part, *("" if size is None else readable_bytes(size) for size in sizes))
    table.add_section()
    table.add_row("bytes", *(readable_bytes(run.cache.bytes) for run in runs))
    table.add_row("at 16 bit", *(readable_bytes(run.cache.dense_bytes) for run in runs))
    table.add_row("effective bits", *(f"{run.cache.effective_bits:.2f}" for run in runs))
    table.add_row("tokens/s", *(f"{run.tokens_per_second:.1f}" for run in runs))
    return table


def main() -> None:
    """Run the command line; a missing extra ends it with the line to install."""
    try:
        app()
    except ImportError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}")
        sys.exit(1)


if __name__ == "__main__":
    main()
