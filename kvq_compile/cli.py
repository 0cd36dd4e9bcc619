"""The command line: ``kvq demo``, ``kvq eval``, ``kvq bench``, ``kvq calibrate``, ``kvq explain`` and ``kvq model``.

Each command is a file in `kvq_compile.commands`; the work is in `kvq_compile.demo`, `kvq_compile.evaluation`,
`kvq_compile.bench`, `kvq_compile.calibration` and `kvq_compile.pretrained`, which are imported when a command runs.
What can be wrong about arguments is checked before a model is loaded, and where results go before they are measured.
"""

from __future__ import annotations

from typing import Annotated

import typer

import kvq_compile
from kvq_compile.commands import bench_calls, bench_models  # noqa: F401  (add commands to `bench`)
from kvq_compile.commands.bench import bench
from kvq_compile.commands.calibrate import calibrate
from kvq_compile.commands.demo import demo
from kvq_compile.commands.eval import evaluate_
from kvq_compile.commands.explain import explain
from kvq_compile.commands.model import model
from kvq_compile.console import Commands

app = typer.Typer(
    name="kvq",
    help="Compile decoders onto a quantized key-value cache.",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


app.command("demo")(demo)
app.command("eval")(evaluate_)
app.add_typer(bench, name="bench")
app.command("calibrate")(calibrate)
app.command("explain")(explain)
app.command("model")(model)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
