"""One packed tensor on the CPU, and the changes of basis that save decoding it token by token.

Exact tokens are in the basis of the model. A packed one is ``x[order] = R(mean + scale * H(yhat))`` of what its
codes stand for, ``yhat``, with the layout's transform ``H`` and, for rotary keys, the rotation ``R`` of its
position. Instead of all that,

- a query meets packed keys as ``H(scale * query[order])`` and adds ``mean . query[order]`` to its scores;
- rotary keys are taken to ``R(mean + scale * yhat)``, which ``query[order]`` meets;
- values are summed as ``yhat``, and the sum is taken back once: ``mean`` counts as often as they weigh.
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
    """Tables of the channels, ready to use: each ``[1, H, 1, D]``.

    Attributes:
        order, mean, scale: As `Tables` has them, in coded order.
        place: The coded channel of each of the model's channels.
    """

    order: Tensor
    place: Tensor
    mean: Tensor
    scale: Tensor

    @staticmethod
    def of(calibrated: Calibrated, layout: Layout) -> Channels:
        """Return the tables, made ready once while their tensor lives and stays as it is."""
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
    """The keys or the values of a cache, for the duration of one call.

    Attributes:
        parts: Its parts.
        layout: Their layout.
        calibrated: What packed tokens are coded relative to, where the layout has tables.
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
        """Tokens held when the call began."""
        return self._lengths[0]

    @property
    def pages(self) -> int:
        """Pages packed when the call began."""
        return self._lengths[1]

    def meet(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take query rows ``[B, H, rows, D]`` (fp32) to the basis of unpacked keys.

        Returns:
            The rows, contiguous, and what to add to their scores, ``[B, H, rows, 1]``, if anything.
        """
        if self.calibrated.tables is None:
            return rotate(rows, self.layout).contiguous(), None
        channels = Channels.of(self.calibrated, self.layout)
        rows = rows.gather(-1, channels.order.expand(rows.shape))
        if self.layout.rotary:
            return rows, None
        coded = rotate(rows * channels.scale, self.layout).contiguous()
        return coded, (rows * channels.mean).sum(-1, keepdim=True)

    def leave(self, total: Tensor, weight: Tensor) -> Tensor:
        """Take a weighted sum of unpacked values ``[B, H, rows, D]`` to the basis of the model.

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
