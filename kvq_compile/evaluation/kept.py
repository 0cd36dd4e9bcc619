"""`Kept`: what a measurement has found so far, on disk, so that one that was cut short goes on.

The file has one JSON object a line. The first says what is measured, by hashes of the text and of the
model's weights too; every other is a window of one method, the recall of one method at one length, or a method
that was calibrated. A last line that was cut off is dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from kvq_compile.calibration.artifact import weight_hash


@dataclass(frozen=True)
class Part:
    """What one window gave for one method.

    Attributes:
        tokens: Tokens scored.
        loss, kl: Sums over them, in nats.
        agreed: Those whose likeliest next token is that of the plain cache.
        packed_bits, effective_bits, bytes: Of the cache at the end of the window.
        seconds: Time per token of each full chunk.
    """

    tokens: int
    loss: float
    kl: float
    agreed: int
    packed_bits: float
    effective_bits: float
    bytes: int
    seconds: list[float] = field(default_factory=list)


class Kept:
    """Windows, recalls and calibrations that are done, by method; without a file it only remembers them.

    Args:
        path: The file; read when it is there, else written at the first entry.
        about: What is measured.
        model: The model it is measured on.
        ids: The text.

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
        self.parts: dict[tuple[str, int], Part] = {}
        self.recalls: dict[tuple[str, int], float] = {}
        self.calibrated: set[str] = set()
        weights = [] if model is None else [weight_hash(x) for x in model.parameters()]
        said = json.dumps([about, list(ids), weights], sort_keys=True, default=str)
        self._head = {"measurement": hashlib.sha256(said.encode()).hexdigest()}
        if path is not None and path.exists():
            self._read(path)

    def add_part(self, method: str, window: int, part: Part) -> None:
        """Keep what a window gave."""
        self.parts[method, window] = part
        self._write({"method": method, "window": window, "part": asdict(part)})

    def add_recall(self, method: str, length: int, percent: float) -> None:
        """Keep a recall in percent."""
        self.recalls[method, length] = percent
        self._write({"method": method, "length": length, "recall": percent})

    def add_calibrated(self, method: str) -> None:
        """Keep that a method's calibration was saved."""
        self.calibrated.add(method)
        self._write({"calibrated": method})

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
        for entry in lines[1:]:
            if "part" in entry:
                self.parts[entry["method"], entry["window"]] = Part(**entry["part"])
            elif "recall" in entry:
                self.recalls[entry["method"], entry["length"]] = entry["recall"]
            else:
                self.calibrated.add(entry["calibrated"])
