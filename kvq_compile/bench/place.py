"""What a figure depends on besides what is measured: hardware, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import kvq_compile

PACKAGES = ("triton", "transformers")


def place(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """Return the columns that say where a row was measured; ``commit`` where there is no git to ask."""
    return {
        "hardware": hardware(device),
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
        "kvq_compile": kvq_compile.__version__,
        "commit": commit or find_commit() or "",
    }


def hardware(device: torch.device) -> str:
    """Return the name of a GPU, or that of the processor and the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or "CPU"])[0]


def find_commit() -> str | None:
    """Return the commit of the checkout that this package lies in; ``None`` where it lies in none."""
    root = Path(kvq_compile.__file__).resolve().parent.parent
    if not (
        root / ".git"
    ).exists():  # an installed package is no part of whatever checkout is around it
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
