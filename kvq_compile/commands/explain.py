"""``kvq explain``."""

from __future__ import annotations

import kvq_compile
from kvq_compile.commands.shared import (
    DemoModelOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    check_places,
    read_method,
)
from kvq_compile.console import status


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
