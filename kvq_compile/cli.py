"""The command line: ``kvq demo``, ``kvq eval``, ``kvq calibrate`` and ``kvq explain``.

Commands parse, call and print; the work is in `kvq_compile.demo`, `kvq_compile.evaluation` and
`kvq_compile.calibration`, which are imported when a command runs. What can be wrong about arguments is
checked before a model is loaded, and where results go before they are measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

import kvq_compile
from kvq_compile.console import (
    Commands,
    console,
    note,
    progress,
    show_comparison,
    show_scores,
    stages,
    status,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq_compile.evaluation.kept import Kept
    from kvq_compile.evaluation.perplexity import Method, Protocol, Runner, Score

app = typer.Typer(
    name="kvq",
    help="Compile decoders onto a quantized key-value cache.",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON instead of tables; the rest goes to stderr.")
]


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        print(f"kvq-compile {kvq_compile.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Compile decoders onto a quantized key-value cache."""


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
    as_json: JsonOption = False,
) -> None:
    """Generate with a plain and with a quantized cache, side by side."""
    from kvq_compile.demo import compare
    from kvq_compile.loading import encode_file

    compile_plain = read_plain(plain)
    choice = read_method(method)
    text = find_text(text)
    check_places(dtype, device, text)
    network, tokenizer = load(model, dtype, device)
    ids = encode_file(tokenizer, text)
    with status("") as say:
        result = compare(
            network,
            tokenizer,
            ids,
            choice,
            prompt_tokens=prompt,
            new_tokens=tokens,
            windows=windows,
            compile_plain=compile_plain,
            say=say,
        )
    if as_json:
        print(result.json())
    else:
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
    plain: PlainOption = "eager",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity, divergence, recall, bytes and speed against the plain cache.

    Graphs run uncompiled unless a method says inner=inductor. Each row is written when it is measured;
    the same command goes on where one was cut short.
    """
    from kvq_compile.evaluation.kept import Kept
    from kvq_compile.evaluation.perplexity import Protocol, make_runners, write_results
    from kvq_compile.loading import encode_file

    compile_plain = read_plain(plain)
    if not method and not sweep:
        raise ValueError("--method must be given, got none; give --sweep to run all methods")
    choices = [uncompiled(read_method(item)) for item in method or []]
    protocol = Protocol(window, prefill, chunk, windows)
    text = find_text(text)
    check_places(dtype, device, text, calibrate_on)
    make_folder(out)
    network, tokenizer = load(model, dtype, device)
    ids = encode_file(tokenizer, text)
    protocol.cut(ids)  # a text that is too short is told before methods are calibrated
    about = describe(network, model, text, protocol, plain, exams if recall else 0)
    kept = Kept(
        out / "eval.part.jsonl", {**about, "calibrated on": str(calibrate_on)}, network, ids
    )
    if sweep:
        found = sweep_methods(network, tokenizer, calibrate_on, out, kept)
        choices += [uncompiled(item) for item in found]
    runners = make_runners(network, choices, compile_plain)

    def write(rows: Sequence[Score]) -> None:
        write_results(rows, out, about)

    scores = measure(runners, tokenizer, ids, protocol, recall or [], exams, kept, write)
    written = write_results(scores, out, about)
    kept.remove()
    if as_json:
        print(written[1].read_text(), end="")
    else:
        show_scores(scores)
    if sweep:
        from kvq_compile.evaluation.sweep import draw

        written += draw(scores, out)
    for path in written:
        note(f"wrote {path}")


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
    as_json: JsonOption = False,
) -> None:
    """Fit a method's tables to a model. A run that was cut short goes on where it stopped."""
    from kvq_compile.calibration.calibrator import calibrate as fit
    from kvq_compile.calibration.calibrator import check_calibration
    from kvq_compile.evaluation.perplexity import parse_options
    from kvq_compile.loading import encode_file, spread_windows

    name, options = parse_options(method)
    check_calibration(name, options)
    check_places(dtype, device, text)
    check_file(out)
    network, tokenizer = load(model, dtype, device)
    batches = spread_windows(encode_file(tokenizer, text), windows, window)
    part = out.with_name(f"{out.name}.part")
    with stages() as advance:
        moved = [batch.to(network.device) for batch in batches]
        result = fit(
            network,
            moved,
            name,
            tokens=tokens,
            seed=seed,
            resume=part,
            advance=advance,
            **options,
        )
    result.save(out)
    part.unlink(missing_ok=True)
    notes = {index: layer.note for index, layer in enumerate(result.layers) if layer.note}
    if as_json:
        about = {"file": str(out), "method": name, "options": result.options}
        print(json.dumps({**about, "layers": len(result.layers), "notes": notes}, indent=2))
        return
    for index, said in notes.items():
        console.print(escape(f"layer {index}: {said}"), highlight=False)
    console.print(f"wrote {escape(str(out))}: {name}, {len(result.layers)} layers", highlight=False)


@app.command()
def explain(
    model: DemoModelOption = None,
    method: MethodOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say what becomes of every attention of a model, and why. Needs no text and no tokenizer."""
    import torch

    choice = read_method(method)
    check_places(dtype, device)
    from kvq_compile.loading import DEMO_MODEL, cache_argument, example, load_network

    with status("loading ..."):
        network = load_network(model or str(example(DEMO_MODEL)), dtype, device)
    from transformers import DynamicCache

    words = network.config.get_text_config().vocab_size
    ids = (torch.arange(64, device=network.device, dtype=torch.int64) % words)[None]
    with torch.no_grad(), status("compiling ..."):
        explanation = kvq_compile.explain(
            network,
            input_ids=ids,
            use_cache=True,
            options=dict(choice.options or {}),
            **{cache_argument(network): DynamicCache(config=network.config)},
        )
    print(explanation.json() if as_json else explanation)


def read_method(text: str | None) -> Method:
    """Return the method an option spells; the backend's default where there is none."""
    from kvq_compile.evaluation.perplexity import Method, parse_method
    from kvq_compile.options import DEFAULT

    if text is None:
        name, options = DEFAULT
        said = ",".join(f"{key}={value}" for key, value in options.items())
        return Method(f"{name}:{said} (default)" if said else f"{name} (default)", {})
    return parse_method(text)


def uncompiled(method: Method) -> Method:
    """Return a method whose graphs run without a compiler, unless it says which."""
    from dataclasses import replace

    if method.options is None:
        return method
    return replace(method, options={"inner": "eager", **method.options})


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


def read_plain(text: str) -> bool:
    """Return whether the plain cache runs compiled."""
    if text not in ("compiled", "eager"):
        raise ValueError(f"--plain must be compiled or eager, got {text!r}")
    return text == "compiled"


def check_places(dtype: str, device: str, *texts: Path | None) -> None:
    """Check, before anything is loaded, that dtype and device exist and that texts can be read.

    Raises:
        ValueError: They do not.
        OSError: A text cannot be read.
    """
    from kvq_compile.loading import pick_device, pick_dtype

    pick_dtype(dtype, pick_device(device))
    for text in filter(None, texts):
        if not text.is_file():
            raise FileNotFoundError(f"text must be a UTF-8 text file, got {text}: No such file")
        text.open("rb").close()


def make_folder(path: Path) -> None:
    """Make sure that there is a folder that can be written to.

    Raises:
        ValueError: There is none and none can be made.
    """
    import tempfile

    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be written to, got {path}: {error.strerror}; name another"
        ) from error


def check_file(path: Path) -> None:
    """Make sure that a file can be written.

    Raises:
        ValueError: It is a folder, or its folder cannot be written to.
    """
    if path.is_dir():
        raise ValueError(f"out must be a file to write, got the folder {path}; add a file name")
    make_folder(path.parent)


def find_text(path: Path | None) -> Path:
    """Return a text file, the demo's own where none is named."""
    from kvq_compile.loading import DEMO_TEXT, example

    return path or example(DEMO_TEXT)


def load(
    name: str | None, dtype: str, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, the demo's own where no name is given."""
    from kvq_compile.loading import DEMO_MODEL, example, load_model

    with status("loading ..."):
        return load_model(name or str(example(DEMO_MODEL)), dtype, device)


def measure(
    runners: Sequence[Runner],
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    protocol: Protocol,
    lengths: Sequence[int],
    exams: int,
    kept: Kept,
    write: Callable[[Sequence[Score]], object],
) -> list[Score]:
    """Score runners under a progress bar, recall included; ``write`` is called with the rows so far."""
    from dataclasses import replace

    from kvq_compile.evaluation.perplexity import chunks_to_do, evaluate
    from kvq_compile.evaluation.recall import recall

    with progress("perplexity", chunks_to_do(protocol, runners)) as advance:
        scores = evaluate(runners, ids, protocol, advance, kept, write)
    for length in lengths:
        with progress(f"recall at {length}", exams * len(runners)) as advance:
            percents = recall(runners, tokenizer, ids, length, exams, advance, kept)
        scores = [
            replace(score, recall={**score.recall, length: percent})
            for score, percent in zip(scores, percents, strict=True)
        ]
        write(scores)
    return scores


def describe(
    network: PreTrainedModel,
    model: str,
    text: Path,
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
        "text": text.name,
        "protocol": asdict(protocol),
        "passkey retrieval": exams,
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


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
