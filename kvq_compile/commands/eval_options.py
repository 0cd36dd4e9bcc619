"""The options of ``kvq eval``; those of one task are a panel of its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TASKS = ("perplexity", "passkey", "greedy")
PERPLEXITY, RETRIEVAL, CONTINUATION = "Perplexity", "Passkey", "Greedy"  # panels of the help

MethodsOption = Annotated[
    list[str] | None,
    typer.Option("--method", help="NAME or NAME:OPTION=VALUE,...; may be repeated."),
]
TextsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--text", help="A UTF-8 text file; may be repeated.", show_default="the demo's own"
    ),
]
TasksOption = Annotated[
    list[str] | None,
    typer.Option("--task", help=f"{', '.join(TASKS)}; may be repeated.", show_default="perplexity"),
]
SweepOption = Annotated[
    bool, typer.Option("--sweep", help="Also run all methods at many widths and draw a plot.")
]
CalibrateOnOption = Annotated[
    Path | None,
    typer.Option("--calibrate-on", help="Text on which --sweep calibrates methods that learn."),
]
BatchOption = Annotated[int, typer.Option("--batch", help="Sequences fed at once.", min=1)]
OutOption = Annotated[Path, typer.Option("--out", help="Folder for the results, CSV and JSON.")]

WindowsOption = Annotated[
    int, typer.Option("--windows", help="Windows of a text.", min=1, rich_help_panel=PERPLEXITY)
]
WindowOption = Annotated[
    int, typer.Option("--window", help="Tokens in a window.", rich_help_panel=PERPLEXITY)
]
PrefillOption = Annotated[
    int,
    typer.Option("--prefill", help="Tokens fed at once, not scored.", rich_help_panel=PERPLEXITY),
]
ChunkOption = Annotated[
    int,
    typer.Option("--chunk", help="Tokens fed at a time after that.", rich_help_panel=PERPLEXITY),
]
RecallOption = Annotated[
    list[int] | None,
    typer.Option(
        "--recall",
        help="Also measure recall of six facts in a context of so many tokens; may be repeated.",
        rich_help_panel=PERPLEXITY,
    ),
]
ExamsOption = Annotated[
    int,
    typer.Option(
        "--exams", help="Contexts for each recall length.", min=1, rich_help_panel=PERPLEXITY
    ),
]

LengthsOption = Annotated[
    list[int] | None,
    typer.Option(
        "--length",
        help="Tokens of a context; may be repeated. 2048, 4096 and 8192, as the model has them, if none is named.",
        rich_help_panel=RETRIEVAL,
    ),
]
DepthsOption = Annotated[
    int, typer.Option("--depths", help="Places of the passkey.", rich_help_panel=RETRIEVAL)
]
SamplesOption = Annotated[
    int,
    typer.Option(
        "--samples", help="Contexts for each length and place.", rich_help_panel=RETRIEVAL
    ),
]

PromptsOption = Annotated[
    int, typer.Option("--prompts", help="Prompts.", rich_help_panel=CONTINUATION)
]
PromptOption = Annotated[
    int, typer.Option("--prompt", help="Tokens of a prompt.", rich_help_panel=CONTINUATION)
]
TokensOption = Annotated[
    int, typer.Option("--tokens", help="Tokens to generate.", rich_help_panel=CONTINUATION)
]
