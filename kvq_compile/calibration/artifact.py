"""`Calibration`: what a calibrated method has learned of a model, and the file that keeps it.

The file is in the safetensors format: one tensor of `Tables` words for the keys and one for the values of
each layer, and in its metadata the method, its options, and what it takes to see that the file belongs to the
model at hand and is whole. Nothing in it is ever executed.

A model is known by its weights: of every parameter, 64 numbers spread over it, rounded to bf16, are
hashed. A graph that is compiled must hold parameters with the same hashes. Names do not matter, nor the
dtype that the weights were loaded in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvq_compile.kernels.tables import Tables

FORMAT, VERSION = "kvq-compile calibration", "1"
SAMPLES = 64  # numbers of a parameter that are hashed
KNOWN_SHARE = 0.5  # of a graph's parameters; a dtype between may round a few differently


@dataclass(frozen=True)
class LayerTables:
    """The tables of one layer.

    Attributes:
        key, value: Tables of its keys and values; ``None`` for a method that has none.
        rotary: Whether its keys are coded as they were before the rotary embedding.
        note: Why they are not, where the method would have wanted it.
        key_options, value_options: How ``"auto"`` codes them, as options of `TensorSpec`; else empty.
        query_norms: Squared norm that few queries of each KV head exceed, for ``"qaq"``; else empty.
    """

    key: Tables | None
    value: Tables | None
    rotary: bool
    note: str = ""
    key_options: dict[str, Any] = field(default_factory=dict)
    value_options: dict[str, Any] = field(default_factory=dict)
    query_norms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` returns.

    Attributes:
        method: Name of the method.
        options: The options that it was calibrated with.
        layers: Tables by layer, in the order in which the model runs its attentions.
        weights: Hashes of the model's parameters.
    """

    method: str
    options: dict[str, Any]
    layers: tuple[LayerTables, ...]
    weights: frozenset[str]

    def save(self, path: str | Path) -> None:
        """Write the file."""
        from safetensors.torch import save_file

        tensors = {name: tables.words for name, tables in self._tables()}
        about = {
            "method": self.method,
            "options": self.options,
            "head_dims": {name: tables.head_dim for name, tables in self._tables()},
            "layers": [
                [
                    *(layer.rotary, layer.note, layer.key_options, layer.value_options),
                    *([layer.query_norms] if layer.query_norms else []),
                ]
                for layer in self.layers
            ],
            "weights": sorted(self.weights),
        }
        text = json.dumps(about, sort_keys=True)
        metadata = {"format": FORMAT, "version": VERSION, "about": text}
        metadata["digest"] = _digest(text, self.layers)
        save_file(tensors, str(path), metadata)

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """Read the file.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is no calibration, of a version this release cannot read, truncated or altered.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"calibration must be a file written by calibrate, got {path}")
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                words = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"calibration must be a whole safetensors file, got {path}: {error}"
            ) from None
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
            raise ValueError(
                f"calibration must be of format {FORMAT!r} version {VERSION}, got {path} with "
                f"{metadata.get('format')!r} version {metadata.get('version')}; calibrate the model anew"
            )
        about = json.loads(metadata["about"])
        layers = tuple(
            _layer(
                [
                    Tables(words[name], about["head_dims"][name]) if name in words else None
                    for name in _names(index)
                ],
                rest,
            )
            for index, rest in enumerate(about["layers"])
        )
        if _digest(metadata["about"], layers) != metadata.get("digest"):
            raise ValueError(f"calibration must be as it was saved, got {path}, which was altered")
        return Calibration(about["method"], about["options"], layers, frozenset(about["weights"]))

    def check(self, inputs: Iterable[Any], attentions: int) -> None:
        """Make sure that a graph is of the model that was calibrated.

        Args:
            inputs: Arguments of the graph, the model's parameters among them.
            attentions: How many attentions the graph runs.

        Raises:
            ValueError: It is of another model.
        """
        parameters = [x for x in inputs if isinstance(x, nn.Parameter)]
        known = sum(weight_hash(x) in self.weights for x in parameters)
        if known < KNOWN_SHARE * len(parameters):
            raise ValueError(
                f"calibration must be of this model, got one of other weights: {known} of "
                f"{len(parameters)} parameters are known to it; calibrate this model"
            )
        if attentions != len(self.layers):
            raise ValueError(
                f"calibration must be of a model captured as this one, whose graph runs {attentions} "
                f"attentions, got one of {len(self.layers)} layers; see explain() for graph breaks"
            )

    def _tables(self) -> Iterable[tuple[str, Tables]]:
        for index, layer in enumerate(self.layers):
            for name, tables in zip(_names(index), (layer.key, layer.value), strict=True):
                if tables is not None:
                    yield name, tables


def weight_hash(parameter: Tensor) -> str:
    """Return a hash of ``SAMPLES`` numbers of a parameter and its shape."""
    flat = parameter.detach().reshape(-1)
    index = torch.linspace(
        0, max(0, flat.numel() - 1), SAMPLES, dtype=torch.float64, device="cpu"
    ).long()
    numbers = flat[index.to(flat.device)] if flat.numel() else flat
    content = f"{tuple(parameter.shape)} {numbers.to(torch.bfloat16).tolist()}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _layer(tables: list[Tables | None], rest: list[Any]) -> LayerTables:
    key, value = tables
    rotary, note, key_options, value_options, *norms = rest
    return LayerTables(
        *(key, value, rotary, note, key_options, value_options), tuple(norms[0]) if norms else ()
    )


def _names(layer: int) -> tuple[str, str]:
    return f"layers.{layer}.key", f"layers.{layer}.value"


def _digest(about: str, layers: Iterable[LayerTables]) -> str:
    tables = (tables for layer in layers for tables in (layer.key, layer.value))
    content = about + "".join(x.digest for x in tables if x is not None)
    return hashlib.sha256(content.encode()).hexdigest()
