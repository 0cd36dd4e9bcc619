"""The demo's model cut to its first layer, for what does not depend on how well a model predicts."""

from pathlib import Path
from typing import Any

from kvq_compile.loading import DEMO_MODEL, load_model


def load_one_layer() -> Any:
    """Return the model, in float32, and its tokenizer."""
    model, tokenizer = load_model(str(DEMO_MODEL), "float32", "cpu")
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    return model, tokenizer


def save_one_layer(folder: Path) -> None:
    """Write both as a Hugging Face folder."""
    for part in load_one_layer():
        part.save_pretrained(folder)
