"""``kvq explain``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import kvq_compile
from kvq_compile.commands.shared import (
    DemoModelOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    check_file,
    check_places,
    read_method,
)
from kvq_compile.console import note, status

if TYPE_CHECKING:
    from kvq_compile.explanations import Explanation


def explain(
    model: DemoModelOption = None,
    method: MethodOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    page: Annotated[
        Path | None,
        typer.Option("--html", help="Write one HTML page to this file, instead of printing."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what becomes of every attention of a model, and why. Needs no text and no tokenizer.

    A prompt of 64 tokens is run, and a token after it.
    """
    import torch

    choice = read_method(method)
    check_places(dtype, device)
    if page is not None:
        check_file(page)
    from kvq_compile.loading import DEMO_MODEL, cache_argument, example, load_network

    with status("loading ..."):
        network = load_network(model or str(example(DEMO_MODEL)), dtype, device)
    from transformers import DynamicCache

    words = network.config.get_text_config().vocab_size
    ids = (torch.arange(64, device=network.device, dtype=torch.int64) % words)[None]
    cache = DynamicCache(config=network.config)

    def told(title: str, ids: torch.Tensor) -> Explanation:
        explanation = kvq_compile.explain(
            network, input_ids=ids, use_cache=True, options=dict(choice.options or {}),
            **{cache_argument(network): cache},
        )  # fmt: skip
        return replace(explanation, titles=(title,) * len(explanation.graphs))

    with torch.no_grad(), status("compiling ..."):
        explanation = told("a prompt", ids) + told("a token after it", ids[:, :1])
    if page is not None:
        name = Path(model).name if model is not None else DEMO_MODEL.name
        page.write_text(explanation.html(f"{name}, {choice.label}"), encoding="utf-8")
        note(f"wrote {page}")
    if as_json or page is None:
        print(explanation.json() if as_json else explanation)
