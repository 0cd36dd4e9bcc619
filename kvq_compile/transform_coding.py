"""The method ``tc``, transform coding: keys by channel, values by token after a Hadamard transform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvq_compile.calibration.artifact import LayerTables
from kvq_compile.calibration.choose import Choice, choose
from kvq_compile.kernels.channelwise_scheme import MAX_WIDTH, Pairs
from kvq_compile.kernels.layout import Regions
from kvq_compile.kernels.schemes import WIDTHS, Channelwise, Role, Uniform
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.method_base import Options, check_number

CLIPS = {1: 0.7, 1.5: 0.78, 2: 0.88, 3: 0.96}  # parts of a value's range that its codes span
TRIT_BITS = 1.6  # of a code of 1.5 bits as it is packed
# What calibration tries for keys and for values of each layer.
KEY_WIDTHS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)  # few: each is a kernel
VALUE_WIDTHS = (1, 1.5, 2, 3, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Tc(Options):
    """Transform coding: keys by channel, each with bits of its own; values by token after a Hadamard transform.

    A cache finds the bits of its channels from its first page and the last queries; no calibration is needed.
    Values get the largest width up to ``bits`` and keys what is left of ``2 * bits``, unless ``key_bits`` or
    ``value_bits`` say otherwise. ``pairs`` says which channels of a key the rotary embedding mixes: ``"halves"`` as
    in Llama, ``"neighbours"`` as in GPT-J, ``"none"``.

    With a calibration, channels are weighed by what an error in them does to the loss, and each layer's keys and
    values get widths of their own, ``bits`` on average, so that the outputs of the attentions change least. It serves
    any ``bits``.
    """

    bits: float = 4.0
    key_bits: float | None = None
    value_bits: float | None = None
    value_clip: float | None = None
    pairs: Pairs = "halves"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bits", "key_bits", "value_bits", "value_clip"):
            number = getattr(self, name)
            if name == "bits" or number is not None:
                check_number(name, number)
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be from 1 to 8, got {self.bits}")
        if self.key_bits is not None and not 0 < self.key_bits <= MAX_WIDTH:
            raise ValueError(
                f"key_bits must be above 0 and at most {MAX_WIDTH}, got {self.key_bits}"
            )

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec."""
        if tables is not None:
            return self.specs([tables])[0]
        value_bits = self.value_bits
        if value_bits is None:
            value_bits = max(width for width in WIDTHS if width <= max(self.bits, 1.5))
            value_bits = value_bits if 2 * self.bits - value_bits <= MAX_WIDTH else 8
        key_bits = 2 * self.bits - value_bits if self.key_bits is None else self.key_bits
        return self._of_widths(key_bits, value_bits, None)

    def specs(self, layers: Sequence[LayerTables]) -> list[CacheSpec]:
        """Return the specs of all layers of a calibration: widths of least change, ``bits`` on average.

        Raises:
            ValueError: No widths are as few as ``bits``.
        """
        tensors = [
            candidates
            for tables in layers
            for candidates in (
                _candidates(self.key_bits, tables.key_changes),
                _candidates(self.value_bits, tables.value_changes),
            )
        ]
        widths = iter(float(choice.options["bits"]) for choice in choose(tensors, self.bits))
        return [self._of_widths(next(widths), next(widths), tables) for tables in layers]

    def _of_widths(
        self, key_bits: float, value_bits: float, tables: LayerTables | None
    ) -> CacheSpec:
        options = value_options(value_bits)
        if self.value_clip is not None:
            options["clip"] = self.value_clip
        value = Uniform(**options)
        key = Channelwise(float(key_bits), self.pairs)
        if tables is not None and tables.key is not None:
            key = Channelwise(float(key_bits), self.pairs, tables.key.digest, weighs=True)
        return self._cache(key, value, tables)


def value_options(bits: float) -> dict[str, Any]:
    """Return how values of a width are coded, as options of `Uniform`."""
    bits = int(bits) if bits == int(bits) else bits
    return {
        "bits": bits,
        "clip": CLIPS.get(bits, 1.0),
        "transform": "hadamard",
        "params": "e5m3",
        "packing": "trits" if bits == 1.5 else "fields",
    }


def codings(role: Role, head_dim: int) -> list[dict[str, Any]]:
    """Return what calibration tries, as options of `scheme_of`: widths of keys fill whole words of a token."""
    if role == "value":
        return [value_options(bits) for bits in VALUE_WIDTHS]
    page_size = Regions().page_size
    bound = [Channelwise(bits).bound_to(head_dim, page_size).bits for bits in KEY_WIDTHS]
    return [{"bits": bits, "weighs": True} for bits in dict.fromkeys(bound)]


def _candidates(given: float | None, changes: Sequence[tuple[float, float]]) -> list[Choice]:
    """Return what to choose the width of a tensor from: the one that is given, or all that were measured."""
    pairs = changes if given is None else [(given, 0.0)]
    return [
        Choice({"bits": width}, None, TRIT_BITS if width == 1.5 else width, change)
        for width, change in pairs
    ]
