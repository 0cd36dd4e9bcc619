"""`Kept`: what a measurement has found so far, on disk, so that one that was cut short goes on.

The file has one JSON object a line. The first says what is measured, by a hash of the texts and of the model's
weights too; every other is one step that was measured, such as a window of a text under a method, and its key. A
last line that was cut off is dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kvq_compile.calibration.artifact import weight_hash

Key = tuple[str | int | float, ...]


class Kept:
    """What is done, by key: what kind of measurement, of which text and method, and which part of it.

    Without a file it only remembers.

    Args:
        path: The file; read when it is there, else written at the first entry.
        about: What is measured.
        model: The model it is measured on.
        ids: The texts, one after the other.

    Raises:
        ValueError: The file is of another measurement.
    """

    def __init__(
        self,
        path: Path | None = None,
        about: Mapping[str, object] | None = None,
        model: nn.Module | None = None,
        ids: Sequence[int] = (),
    ) -> None:
        self.path = path
        self._entries: dict[Key, Any] = {}
        weights = [] if model is None else [weight_hash(x) for x in model.parameters()]
        said = json.dumps([about, list(ids), weights], sort_keys=True, default=str)
        self._head = {"measurement": hashlib.sha256(said.encode()).hexdigest()}
        if path is not None and path.exists():
            self._read(path)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __getitem__(self, key: Key) -> Any:
        return self._entries[key]

    def __setitem__(self, key: Key, value: Any) -> None:
        """Keep ``value``, of what JSON has, and write it down."""
        self._entries[key] = value
        self._write({"key": list(key), "value": value})

    def remove(self) -> None:
        """Remove the file: the measurement is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        lines = [entry] if self.path.exists() else [self._head, entry]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def _read(self, path: Path) -> None:
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        lines = [json.loads(line) for line in whole.splitlines()]
        if lines[:1] != [self._head]:
            raise ValueError(
                f"out must be empty or of this measurement, got {path} of another, cut short; "
                "remove that file or name another folder"
            )
        path.write_text(whole + "\n", encoding="utf-8")
        self._entries = {tuple(entry["key"]): entry["value"] for entry in lines[1:]}
