"""``kvq demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from kvq_compile.commands.shared import (
    DemoModelOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    PlainOption,
    TextOption,
    check_places,
    find_text,
    load,
    read_method,
    read_plain,
)
from kvq_compile.console import show_comparison, status


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
