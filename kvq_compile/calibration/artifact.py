"""`Calibration`: what a calibrated method has learned of a model, and the file that keeps it.

The file is in the safetensors format: one tensor of `Tables` words for the keys and one for the values of
each layer, and in its metadata the method, its options, and what it takes to see that the file belongs to the
model at hand and is whole. Nothing in it is ever executed, and what kernels take on trust is checked on reading.

A model is known by its weights: of every parameter, 64 numbers spread over it, rounded to bf16, are
hashed. A graph that is compiled must hold parameters with the same hashes. Names do not matter, nor the
dtype that the weights were loaded in.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvq_compile.kernels.channelwise_scheme import MAX_WIDTH
from kvq_compile.kernels.schemes import MAX_INDEX_BITS
from kvq_compile.kernels.tables import Tables, checked_tables

FORMAT, VERSION = "kvq-compile calibration", "1"
SAMPLES = 64  # numbers of a parameter that are hashed
Changes = tuple[tuple[float, float], ...]  # width in bits, relative squared change of the output
KNOWN_SHARE = 0.5  # of a graph's parameters; a dtype between may round a few differently


@dataclass(frozen=True)
class LayerTables:
    """The tables of one layer.

    Attributes:
        key, value: Tables of its keys and values; ``None`` for a method that has none, or whose values need none.
        rotary: Whether its keys are quantized as they were before the rotary embedding.
        note: Why they are not, where the method would have wanted it.
        key_options, value_options: How ``"auto"`` codes them, as options of `scheme_of`; else empty.
        query_norms: Squared norm that few queries of each KV head exceed, for ``"qaq"``; else empty.
        key_changes, value_changes: Widths that ``"tc"`` may give the layer's keys and values, in bits, each with the
            relative squared change of the attention's output; else empty.
    """

    key: Tables | None
    value: Tables | None
    rotary: bool
    note: str = ""
    key_options: dict[str, Any] = field(default_factory=dict)
    value_options: dict[str, Any] = field(default_factory=dict)
    query_norms: tuple[float, ...] = ()
    key_changes: Changes = ()
    value_changes: Changes = ()


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
                    *_measured_of(layer),
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
        try:
            return _read(metadata, words)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"calibration must be as it was saved, got {path}, which was altered: {said}; "
                "calibrate the model anew"
            ) from error

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


def _read(metadata: dict[str, str], words: dict[str, Tensor]) -> Calibration:
    """Return the calibration of a file's metadata and tensors.

    A digest can be computed anew by whoever alters a file, and kernels take tables on trust: everything that
    they index with or divide by is checked.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: Something is missing or is not what the format says.
    """
    about = json.loads(metadata["about"])
    method, options, head_dims = about["method"], about["options"], about["head_dims"]
    layers = []
    for index, (rotary, note, key_options, value_options, *more) in enumerate(about["layers"]):
        _check_types(rotary=(rotary, bool), note=(note, str))
        roles = {}
        for name, chosen, turned in (
            ("key", key_options, rotary),
            ("value", value_options, False),
        ):
            full = f"layers.{index}.{name}"
            _check_types(**{f"{name}_options": (chosen, dict)})
            if full in words:
                entries = _entries(method, options, chosen)
                turned = turned or (name == "key" and (method == "tc" or "weighs" in chosen))
                roles[name] = checked_tables(words[full], head_dims[full], turned, entries)
        if len({tables.heads for tables in roles.values()}) > 1 or set(roles) == {"value"}:
            raise ValueError(
                f"layer {index} must have tables of keys, and of values for the same heads or none"
            )
        norms, keys, values = _checked_measures(*more)
        if not roles and not norms:
            raise ValueError(f"layer {index} has neither tables nor query norms")
        if method == "tc" and not (keys and values):
            raise ValueError(f"layer {index} must have widths of keys and of values")
        layers.append(
            LayerTables(
                *(roles.get("key"), roles.get("value"), rotary, note),
                *(key_options, value_options, norms),
                *(keys, values),
            )
        )
    if not layers or set(words) - {name for i in range(len(layers)) for name in _names(i)}:
        raise ValueError("every tensor must belong to a layer")
    if _digest(metadata["about"], layers) != metadata.get("digest"):
        raise ValueError("its digest is another")
    _check_types(method=(method, str), options=(options, dict), weights=(about["weights"], list))
    return Calibration(method, options, tuple(layers), frozenset(about["weights"]))


def _measured_of(layer: LayerTables) -> list[Any]:
    """Return what the file has of a layer's measures: nothing, query norms, or the changes behind them as well."""
    changes = [layer.key_changes, layer.value_changes]
    if any(changes):
        return [layer.query_norms, *changes]
    return [layer.query_norms] if layer.query_norms else []


def _checked_measures(
    norms: Sequence[Any] = (), keys: Sequence[Any] = (), values: Sequence[Any] = ()
) -> tuple[tuple[float, ...], Changes, Changes]:
    """Return query norms and changes by width as `LayerTables` has them.

    Raises:
        ValueError: They are no such numbers.
        TypeError: A change has no width.
    """
    if not all(isinstance(norm, float) and 0 < norm < math.inf for norm in norms):
        raise ValueError(f"query norms must be positive numbers, got {norms}")
    return tuple(norms), _checked_changes(keys), _checked_changes(values)


def _checked_changes(pairs: Sequence[Any]) -> Changes:
    for width, change in pairs:
        _check_types(width=(width, (int, float)), change=(change, (int, float)))
        if not (0 < width <= MAX_WIDTH and 0 <= change < math.inf):
            raise ValueError(
                f"widths must be up to {MAX_WIDTH} bits and change 0 or more, got {width}: {change}"
            )
    return tuple((width, change) for width, change in pairs)


def _entries(method: str, options: dict[str, Any], chosen: dict[str, Any]) -> int:
    """Return how many vectors the codebook of a tensor has; 0 where it has none."""
    family = re.fullmatch(r"cq-(\d+)c(\d+)b", method)
    couple = options.get("couple") if family else chosen.get("couple")
    bits = options.get("bits") if family else chosen.get("bits")
    if couple is None:
        return 0
    if not (isinstance(bits, int) and 1 <= bits <= MAX_INDEX_BITS):
        raise ValueError(f"bits of a codebook must be 1 to {MAX_INDEX_BITS}, got {bits!r}")
    return int(2**bits)


def _check_types(**values: tuple[object, type | tuple[type, ...]]) -> None:
    for name, (value, kind) in values.items():
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            said = kind.__name__ if isinstance(kind, type) else "number"
            raise TypeError(f"{name} must be a {said}, got {value!r}")


def _names(layer: int) -> tuple[str, str]:
    return f"layers.{layer}.key", f"layers.{layer}.value"


def _digest(about: str, layers: Iterable[LayerTables]) -> str:
    tables = (tables for layer in layers for tables in (layer.key, layer.value))
    content = about + "".join(x.digest for x in tables if x is not None)
    return hashlib.sha256(content.encode()).hexdigest()
