"""What several commands share: options, and checks of arguments that come before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvq_compile.console import status

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq_compile.evaluation.runner import Method

ModelOption = Annotated[str, typer.Option("--model", help="A folder or a Hugging Face id.")]
DemoModelOption = Annotated[
    str | None,
    typer.Option("--model", help="A folder or a Hugging Face id.", show_default="our own"),
]
TextOption = Annotated[
    Path | None, typer.Option("--text", help="A UTF-8 text file.", show_default="the demo's own")
]
MethodOption = Annotated[
    str | None,
    typer.Option("--method", help="NAME or NAME:OPTION=VALUE,...", show_default="the backend's"),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto, checkpoint, float32, bfloat16 or float16; auto is float32 on a CPU, "
        "else the checkpoint's.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu or cuda; auto is cuda where there is one.")
]
PlainOption = Annotated[
    str, typer.Option("--plain", help="How the plain cache runs: compiled or eager.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON instead of tables; the rest goes to stderr.")
]


def read_method(text: str | None) -> Method:
    """Return the method an option spells; the backend's default where there is none."""
    from kvq_compile.evaluation.runner import Method, parse_method
    from kvq_compile.options import DEFAULT

    if text is None:
        name, options = DEFAULT
        said = ",".join(f"{key}={value}" for key, value in options.items())
        return Method(f"{name}:{said} (default)" if said else f"{name} (default)", {})
    return parse_method(text)


def read_plain(text: str) -> bool:
    """Return whether the plain cache runs compiled."""
    if text not in ("compiled", "eager"):
        raise ValueError(f"--plain must be compiled or eager, got {text!r}")
    return text == "compiled"


def check_places(dtype: str, device: str, *texts: Path | None) -> None:
    """Check, before anything is loaded, that dtype and device exist and that texts can be read.

    Raises:
        ValueError: They do not.
        OSError: A text cannot be read.
    """
    from kvq_compile.loading import pick_device, pick_dtype

    pick_dtype(dtype, pick_device(device))
    for text in filter(None, texts):
        if not text.is_file():
            raise FileNotFoundError(f"text must be a UTF-8 text file, got {text}: No such file")
        text.open("rb").close()


def make_folder(path: Path) -> None:
    """Make sure that there is a folder that can be written to.

    Raises:
        ValueError: There is none and none can be made.
    """
    import tempfile

    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be written to, got {path}: {error.strerror}; name another"
        ) from error


def check_file(path: Path) -> None:
    """Make sure that a file can be written.

    Raises:
        ValueError: It is a folder, or its folder cannot be written to.
    """
    if path.is_dir():
        raise ValueError(f"out must be a file to write, got the folder {path}; add a file name")
    make_folder(path.parent)


def find_text(path: Path | None) -> Path:
    """Return a text file, the demo's own where none is named."""
    from kvq_compile.loading import DEMO_TEXT, example

    return path or example(DEMO_TEXT)


def load(
    name: str | None, dtype: str, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, the demo's own where no name is given."""
    from kvq_compile.loading import DEMO_MODEL, example, load_model

    with status("loading ..."):
        return load_model(name or str(example(DEMO_MODEL)), dtype, device)
