"""What every method has: the options that all take, and the checks of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kvq_compile.calibration.artifact import LayerTables
from kvq_compile.kernels.layout import Regions
from kvq_compile.kernels.schemes import Scheme
from kvq_compile.kernels.spec import CacheSpec


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every method takes: the regions of exact tokens, and how many tokens are quantized at once.

    Args:
        sinks: First tokens that stay exact for ever.
        window: Most recent tokens that are always exact.
        page_size: Tokens quantized at once: 32, 64, 128 or 256.
    """

    calibrated: ClassVar[bool] = False  # whether there is no spec without tables

    sinks: int = 5
    window: int = 128
    page_size: int = 128

    def __post_init__(self) -> None:
        _ = Regions(self.sinks, self.window, self.page_size)  # which checks itself

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec of a cache, or of the layer that ``tables`` belong to.

        Raises:
            TypeError: An option has the wrong type.
            ValueError: An option is out of its range, or options do not go together.
        """
        raise NotImplementedError

    def specs(self, layers: Sequence[LayerTables]) -> list[CacheSpec]:
        """Return the specs of all layers of a calibration."""
        return [self.spec(tables) for tables in layers]

    def _cache(self, key: Scheme, value: Scheme, tables: LayerTables | None = None) -> CacheSpec:
        return CacheSpec(
            *(key, value, self.sinks, self.window, self.page_size),
            key_tables=None if tables is None else tables.key,
            value_tables=None if tables is None else tables.value,
        )


def is_number(x: Any) -> bool:
    """Return whether ``x`` is an integer or a float, and no bool."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def check_number(name: str, x: Any) -> None:
    """Make sure that an option is a finite number.

    Raises:
        TypeError: It is no number.
        ValueError: It is not finite.
    """
    if not is_number(x):
        raise TypeError(f"{name} must be a number, got {x!r}")
    if not math.isfinite(x):
        raise ValueError(f"{name} must be finite, got {x!r}")
