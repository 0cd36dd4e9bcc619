"""``kvq calibrate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kvq_compile.commands.shared import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    check_file,
    check_places,
    load,
)
from kvq_compile.console import console, stages


def calibrate(
    model: ModelOption,
    text: Annotated[Path, typer.Option("--text", help="A UTF-8 text file to calibrate on.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    method: Annotated[
        str,
        typer.Option(
            "--method", help="tc, auto, skvq, cq-<c>c<b>b or qaq, as NAME or NAME:OPTION=VALUE,..."
        ),
    ] = "tc",
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
    from kvq_compile.evaluation.runner import parse_options
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
