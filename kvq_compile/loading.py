"""Load a decoder, its tokenizer and a text for the command line.

transformers is imported inside the functions: ``kvq --help`` must be quick, and the rest of the
package works without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DEMO_MODEL = EXAMPLES / "models" / "kvq-tiny-2.6m"
DEMO_TEXT = EXAMPLES / "text" / "demo.txt"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def example(path: Path) -> Path:
    """Return ``path``, a file or folder of the repository's examples.

    Raises:
        FileNotFoundError: The package was installed without the repository around it.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path.name} lies in the repository's examples, which are not installed with the "
            f"package; pass {'--text' if path.suffix == '.txt' else '--model'}"
        )
    return path


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name under which a model takes its cache and gives it back; transformers 5.24 changed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def require_transformers() -> None:
    """Raise ImportError that names the extra to install when transformers is missing."""
    try:
        import transformers  # noqa: F401  (only its presence matters)
    except ImportError as error:
        raise ImportError(
            "this command loads models with transformers, which is not installed; "
            "pip install kvq-compile[transformers]"
        ) from error


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called ``name``; ``"auto"`` is CUDA where there is one, else the CPU.

    Raises:
        ValueError: It is none of these, or is not there.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<number>, got {name!r}")
    if kind == "cuda" and int(index or 0) >= count:
        raise ValueError(
            f"device must be one that torch sees, got {name!r} of {count} CUDA devices; use cpu or auto"
        )
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype called ``name``, ``None`` for the checkpoint's own.

    ``"auto"`` keeps the checkpoint's dtype on a GPU and takes float32 on a CPU, where 16-bit
    matrix products are slow and their rounding differs from one processor to the next.
    """
    if name == "checkpoint":
        return None
    if name == "auto":
        return torch.float32 if device.type == "cpu" else None
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto, checkpoint, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def load_model(
    name: str, dtype: str = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, ready for inference, and its tokenizer; see `load_network`."""
    model = load_network(name, dtype, device)
    from transformers import AutoTokenizer

    with _named(name, "a tokenizer"):
        return model, AutoTokenizer.from_pretrained(name)


def load_network(name: str, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Load a causal language model, ready for inference.

    Args:
        name: A folder or an id on the Hugging Face hub.
        dtype: As `pick_dtype` takes it.
        device: As `pick_device` takes it.

    Raises:
        ImportError: transformers is missing.
        ValueError: ``name`` is neither a folder with a model nor an id that can be reached, or dtype or device
            is none.
    """
    require_transformers()
    place = pick_device(device)
    kind = pick_dtype(dtype, place) or "auto"
    _check_name(name)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # the command line shows its own
    with _named(name, "a causal language model"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=kind)
    return model.to(place).eval()


def _check_name(name: str) -> None:
    """Make sure that what is no folder with a model may at least be an id."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"model must be a folder with a config.json, got {name}, which has none"
            )
    elif path.exists():
        raise ValueError(f"model must be a folder or a Hugging Face id, got the file {name}")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise ValueError(f"model must be a folder or a Hugging Face id, got {name}: No such folder")


@contextmanager
def _named(name: str, what: str) -> Iterator[None]:
    """Turn whatever transformers raises while it loads ``name`` into a sentence."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # of transformers, tokenizers, safetensors, the hub and JSON
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(
            f"model must be a folder or a Hugging Face id with {what} that transformers can load, "
            f"got {name}: {said or type(error).__name__}"
        ) from error


def encode_file(tokenizer: PreTrainedTokenizerBase, path: Path) -> list[int]:
    """Return the token ids of a UTF-8 text file, without special tokens.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text must be UTF-8, got {path}: {error.reason} at {error.start}"
        ) from None
    # verbose=False: a text longer than the model's context is cut into windows later.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def longest_context(model: PreTrainedModel) -> int | None:
    """Return how many tokens the model can attend over, ``None`` when its config does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def spread_windows(ids: list[int], windows: int, window: int) -> list[torch.Tensor]:
    """Cut ``windows`` pieces of ``window`` tokens, evenly spread, out of a text, each ``[1, window]``.

    Raises:
        ValueError: The text is too short.
    """
    if len(ids) < windows * window:
        raise ValueError(
            f"text must have {windows * window} tokens for {windows} windows of {window}, got {len(ids)}; "
            "take fewer or shorter windows"
        )
    starts = range(0, len(ids) - window + 1, max(1, (len(ids) - window) // max(1, windows - 1)))
    return [
        torch.tensor(ids[start : start + window], dtype=torch.int64, device="cpu")[None]
        for start in list(starts)[:windows]
    ]
