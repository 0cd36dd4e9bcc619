"""``kvq model``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kvq_compile.commands.shared import JsonOption
from kvq_compile.console import console, status


def model(
    name: Annotated[str, typer.Argument(help="smollm2")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    as_json: JsonOption = False,
) -> None:
    """Make a Hugging Face folder of a pretrained model whose weights a Python package ships.

    Needs the extra `real`.
    """
    from kvq_compile.pretrained import MODELS, make_model

    with status("dequantizing weights ..."):
        made = make_model(name, out)
    about = MODELS[name].about
    if as_json:
        parameters = sum(x.numel() for x in made.parameters())
        print(json.dumps({"folder": str(out), "about": about, "parameters": parameters}, indent=2))
    else:
        console.print(f"wrote {escape(str(out))}: {about}", highlight=False)
