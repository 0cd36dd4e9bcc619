"""Measure the quality of every method on given models and texts: the rows behind the tables of ``docs/quality.md``.

    python benchmarks/quality.py --model SmolLM2-135M-Instruct=.models/smollm2 \\
        --text wikitext=wiki.txt --text code=code.txt --calibrate-on calibration.txt --batch 8

Everything is read from folders and files, so that a machine without a network will do. Rows go to ``quality.csv``,
``passkey.csv`` and ``greedy.csv`` of ``--out`` as soon as they are measured, with hardware, versions and commit; a row
of the same hardware, commit, model, text and method is replaced. Steps that are done are in ``*.part.jsonl`` beside
them: the same command goes on where one was cut short. ``--seconds`` bounds a row, which then has fewer windows, and
says so. ``benchmarks/quality_tables.py`` writes the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quality_tables import FILES, RESULTS, add_rows

from kvq_compile.bench.place import place
from kvq_compile.console import note, stages
from kvq_compile.evaluation.greedy import Continuations
from kvq_compile.evaluation.kept import Kept
from kvq_compile.evaluation.passkey import Passkeys
from kvq_compile.evaluation.perplexity import Protocol
from kvq_compile.evaluation.results import KINDS, Row, flat_row
from kvq_compile.evaluation.runner import Method, parse_method
from kvq_compile.evaluation.sweep import standard_methods
from kvq_compile.evaluation.tasks import Measurement, Task, check_text, usual_lengths
from kvq_compile.loading import encode_file, load_model, longest_context, spread_windows

# Beside what `kvq eval --sweep` runs: variants that single tables are about.
TARGETS = "qaq:bits=4,key_target=3e-4,value_target=0.1"
VARIANTS = (
    "int2:group_size=64",
    "qaq:bits=2.3,params=fp8",
    "qaq:bits=2.3,keep_exact=cpu",
    TARGETS,
    f"{TARGETS},requantize=true",
    f"{TARGETS},requantize=true,keep_exact=cpu",
)
TASKS = ("perplexity", "passkey", "greedy")


def main() -> None:
    """Measure every model."""
    options = read_options()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, folder in options.model:
        measure_model(name, folder, options)


def read_options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=named, action="append", required=True, help="NAME=DIR; may be repeated")
    add("--text", type=named, action="append", required=True, help="NAME=FILE; may be repeated")
    add(
        "--calibrate-on",
        type=Path,
        help="text for methods that learn; without it they are left out",
    )
    add("--method", action="append", help="label or NAME:OPTION=VALUE,... [default: all]")
    add("--task", action="append", choices=TASKS, help="may be repeated [default: all]")
    add("--windows", type=int, default=16, help="of each text")
    add("--batch", type=int, default=1, help="sequences fed at once")
    add("--seconds", type=float, default=float("inf"), help="that a row may take, for each text")
    add("--recall", type=int, action="append", default=[], help="contexts of six facts, in tokens")
    add("--length", type=int, action="append", help="of passkey contexts [default: 2048 4096 8192]")
    add("--samples", type=int, default=8, help="passkeys for each length and depth")
    add("--prompts", type=int, default=50, help="of greedy continuations")
    add("--tokens", type=int, default=200, help="of a greedy continuation")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--commit", default=None, help="of the code, where there is no git to ask")
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args()


def named(text: str) -> tuple[str, Path]:
    """Return name and path of ``NAME=PATH``."""
    name, equals, path = text.partition("=")
    if not equals or not Path(path).exists():
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, a path that is there, got {text}")
    return name, Path(path)


def measure_model(model_name: str, folder: Path, options: argparse.Namespace) -> None:
    """Measure all methods and tasks on one model."""
    model, tokenizer = load_model(str(folder), options.dtype, options.device)
    texts = {name: encode_file(tokenizer, path) for name, path in options.text}
    about = describe(model, model_name, options.commit)
    tasks = make_tasks(options, longest_context(model))
    wanted = options.task or TASKS
    for name in wanted:
        for ids in texts.values():
            check_text(tasks[name], ids, longest_context(model))
    kept = Kept(
        options.out / f"{model_name}.part.jsonl",
        about | {name: str(asdict(task)) for name, task in tasks.items()},
        model,
        [token for ids in texts.values() for token in ids],
    )
    methods = make_methods(model, tokenizer, options, model_name, kept)
    measurement = Measurement(
        model, tokenizer, texts, methods,
        kept=kept, lengths=options.recall, seconds=options.seconds,
    )  # fmt: skip

    def write(rows: Sequence[Row]) -> None:
        for name, (_, kind) in KINDS.items():
            found = [about | flat_row(row) for row in rows if isinstance(row, kind)]
            add_rows(options.out / FILES[name], found)

    for name in wanted:
        note(f"{model_name}: {name}")
        measurement.run(tasks[name], write)
    kept.remove()


def make_tasks(options: argparse.Namespace, context: int | None) -> dict[str, Task]:
    """Return the tasks by name, with the contexts that a model takes."""
    lengths = options.length or usual_lengths(context)
    return {
        "perplexity": Protocol(windows=options.windows, batch=options.batch),
        "passkey": Passkeys(lengths, samples=options.samples, batch=options.batch),
        "greedy": Continuations(options.prompts, tokens=options.tokens, batch=options.batch),
    }


def make_methods(
    model: Any, tokenizer: Any, options: argparse.Namespace, name: str, kept: Kept
) -> list[Method]:
    """Return the methods that are asked for, those of `standard_methods` under their labels there."""
    texts = []
    if options.calibrate_on is not None:
        ids = encode_file(tokenizer, options.calibrate_on)
        texts = [window.to(model.device) for window in spread_windows(ids, 16, 2048)]
    wanted = options.method
    with stages() as advance:
        folder = options.out / "calibrations" / name
        standard = standard_methods(model, texts, advance, folder, kept, wanted)
    known = {method.label: method for method in [*standard, *map(parse_method, VARIANTS)]}
    chosen = [known.get(label) or parse_method(label) for label in wanted or known]
    return [replace(each, options={"inner": "eager", **(each.options or {})}) for each in chosen]


def describe(model: Any, name: str, commit: str | None) -> dict[str, str]:
    """Return the columns that say what a row was measured on."""
    where = place(model.device, commit)
    if not where["commit"]:
        sys.exit("--commit must be given where there is no git checkout")
    return where | {"dtype": str(model.dtype).removeprefix("torch."), "model": name}


if __name__ == "__main__":
    main()
