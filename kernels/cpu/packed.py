"""One packed tensor on the CPU, and transforms of queries and outputs that replace those of every packed token.

A packed token dequantizes to ``x[order] = R(mean + scale * H(yhat))``, where ``yhat`` are the unpacked elements, ``H``
is the layout's transform and ``R``, for rotary keys, the rotation of its position. Attention avoids most of this:

- keys: the query becomes ``H(scale * query[order])``, and ``mean . query[order]`` is added to its scores;
- rotary keys: each key becomes ``R(mean + scale * yhat)``, and the query ``query[order]``;
- values: ``yhat`` is accumulated, and the sum transformed once; ``mean`` enters times the sum of the weights.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.transform import rotate


@dataclass(frozen=True)
class Channels:
    """Calibration constants of the channels, each ``[1, H, 1, D]``.

    Attributes:
        order, mean, scale: Sections of `Tables`, in coded order.
        place: Inverse permutation of ``order``.
    """

    order: Tensor
    place: Tensor
    mean: Tensor
    scale: Tensor

    @staticmethod
    def of(calibrated: Calibrated, layout: Layout) -> Channels:
        """Return the constants of tables; they are cached until the tensor of the tables is changed or freed."""
        words = calibrated.tables
        assert words is not None
        version = 0 if words.is_inference() else words._version
        known = _known_channels.get(words)
        if known is not None and known[0] == version:
            return known[1]
        order, mean, scale = (
            calibrated.section(name, layout)[None, :, None] for name in ("order", "mean", "scale")
        )
        channels = Channels(order.long(), order.argsort(-1), mean.clone(), scale.clone())
        _known_channels[words] = version, channels
        return channels


_known_channels: MutableMapping[Tensor, tuple[int, Channels]] = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class PackedTensor:
    """The keys or the values of a cache during one call.

    Attributes:
        parts: Parts of the cache.
        layout: Its layout.
        calibrated: Its calibration constants, if the layout has tables.
    """

    parts: Packed
    layout: Layout
    calibrated: Calibrated = UNCALIBRATED

    @cached_property
    def _lengths(self) -> list[int]:
        lengths: list[int] = self.parts.cursor.tolist()
        return lengths

    @property
    def held(self) -> int:
        """Tokens held (kv_len) at the beginning of the call."""
        return self._lengths[0]

    @property
    def pages(self) -> int:
        """Packed pages at the beginning of the call."""
        return self._lengths[1]

    def transform_query(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Transform query rows ``[B, H, rows, D]`` (fp32) for products with unpacked keys.

        Returns:
            The rows, contiguous, and a constant to add to their scores, ``[B, H, rows, 1]``, or ``None``.
        """
        if self.calibrated.tables is None:
            return rotate(rows, self.layout).contiguous(), None
        channels = Channels.of(self.calibrated, self.layout)
        rows = rows.gather(-1, channels.order.expand(rows.shape))
        if self.layout.rotary:
            return rows, None
        coded = rotate(rows * channels.scale, self.layout).contiguous()
        return coded, (rows * channels.mean).sum(-1, keepdim=True)

    def inverse_transform(self, total: Tensor, weight: Tensor) -> Tensor:
        """Apply the inverse transform to a weighted sum of unpacked values ``[B, H, rows, D]``.

        Args:
            total: The sum.
            weight: Sum of the weights, ``[B, H, rows, 1]``.
        """
        total = rotate(total, self.layout)
        if self.calibrated.tables is None:
            return total
        channels = Channels.of(self.calibrated, self.layout)
        total = total * channels.scale + weight * channels.mean
        return total.gather(-1, channels.place.expand(total.shape))
