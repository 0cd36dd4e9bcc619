"""The options of QAQ, the method whose tokens differ in bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kvq_compile.calibration.artifact import LayerTables
from kvq_compile.kernels.schemes import Adaptive, Mixed, Params, Transform
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.method_base import Options, check_number, is_number

QAQ_RECORDS = {
    "fp8": 0.196,
    "fp16": 0.321,
}  # bits an element of records and headers at 128 channels
QAQ_QUERY_NORM = 300.0  # squared; what QAQ's code takes for every layer of every model
QAQ_KEYS_WIDER = 0.55  # keys get so many bits more than the average, values as many less


@dataclass(frozen=True, kw_only=True)
class Qaq(Options):
    """Bits by token, more for those of wide range and for those that the last five queries attended to.

    They are ``bits`` on average.

    A page of tokens has a budget; its bits go where they lower the largest weighted error most. ``bits`` counts
    codes and metadata of heads of 128 channels; ``key_bits`` and ``value_bits`` count codes alone.
    ``variant="fitted"`` weighs attention softly, for keys too, and keeps each token's product with itself;
    ``"paper"`` does neither and keeps one element at each end exact. ``params="fp8"`` saves an eighth of a bit, for
    models whose keys and values stay below 448: larger elements would be cut off.

    Targets are the standard deviations of an attention weight (``key_target``) and of attention's output
    (``value_target``) that are good enough. Tokens get the bits that meet them, weighed as in the paper: values by
    attention as it is, keys not at all. The budget stays the cap, and what is held; less of it is used and read.
    The target of keys takes ``query_norm``, the squared norm that one query of ten exceeds: 300 as in the code of
    the paper, or what `calibrate` measured, of each layer the largest of its heads.

    ``requantize=True``: whenever a page fills, tokens of older pages lose the bits that their target needs no more
    now that attention has moved on, in place. It needs a target: a budget would gain nothing.
    ``keep_exact="cpu"`` holds packed tokens whose bits depend on attention exactly in host memory, as in the paper,
    and quantizes a page anew, within its budget, when a token of it would gain bits. Only of caches that grow.

    ``transform="hadamard"`` rotates heads before they are quantized, so that no channel stands out of a token's range.

    Source: QAQ (arXiv 2403.04643), with its per-head level.
    """

    bits: float = 3.0
    key_bits: float | None = None
    value_bits: float | None = None
    max_bits: int | None = None
    min_bits: int | None = None
    outliers: int | None = None
    variant: Literal["fitted", "paper"] = "fitted"
    key_target: float | None = None
    value_target: float | None = None
    query_norm: float = QAQ_QUERY_NORM
    requantize: bool = False
    keep_exact: Literal["cpu"] | None = None
    params: Params = "fp16"
    transform: Transform = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("fitted", "paper"):
            raise ValueError(f'variant must be "fitted" or "paper", got {self.variant!r}')
        if self.params not in QAQ_RECORDS:
            raise ValueError(f'params must be "fp16" or "fp8", got {self.params!r}')
        for name in ("key_target", "value_target", "query_norm"):
            number = getattr(self, name)
            if number is not None and not (is_number(number) and 0 < number < math.inf):
                raise ValueError(f"{name} must be a positive number, got {number!r}")
        if not isinstance(self.requantize, bool):
            raise TypeError(f"requantize must be a bool, got {self.requantize!r}")
        if self.keep_exact not in (None, "cpu"):
            raise ValueError(f'keep_exact must be "cpu" or None, got {self.keep_exact!r}')
        targets = self.key_target, self.value_target, self.keep_exact
        if self.requantize and targets == (None, None, None):
            raise ValueError(
                "requantize must go with error targets, got none: a page keeps its budget, so that taking bits "
                'away would gain nothing; give key_target or value_target, or keep_exact="cpu"'
            )
        for name in ("max_bits", "min_bits", "outliers"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
                raise TypeError(f"{name} must be an integer, got {number!r}")
        self._check_budgets()

    def _check_budgets(self) -> None:
        """Make sure that the bits of keys and values lie between those of the least and the most of a token."""
        check_number("bits", self.bits)
        least, most = self._range()
        if not 0 <= least < most <= 8:
            raise ValueError(
                f"min_bits and max_bits must be two ascending numbers of 0 to 8, got {least} and {most}"
            )
        for name in ("key_bits", "value_bits"):
            budget = getattr(self, name)
            if budget is None:
                continue
            check_number(name, budget)
            if not (least <= budget <= most and budget > 0):
                raise ValueError(
                    f"{name} must be from min_bits={least} to max_bits={most} and positive, got {budget}"
                )
        low, high = -99.0, 99.0  # of the codes' share, where keys and values follow from it
        if self.value_bits is None:
            low = max(least, 1 / self.page_size) + QAQ_KEYS_WIDER
        if self.key_bits is None:
            high = most - QAQ_KEYS_WIDER
        if not low <= self.bits - self._records() <= high:
            raise ValueError(
                f"bits must be from {math.ceil(100 * (low + self._records())) / 100:g} to "
                f"{math.floor(100 * (high + self._records())) / 100:g} with min_bits={least} and "
                f"max_bits={most}, got {self.bits}; give other min_bits or max_bits, or another method"
            )

    def _range(self) -> tuple[int, int]:
        """Return the least and the most bits of a token."""
        least = (0 if self.variant == "paper" else 1) if self.min_bits is None else self.min_bits
        most = (4 if self.bits <= 3.25 else 6) if self.max_bits is None else self.max_bits
        return least, most

    def _outliers(self) -> int:
        return (2 if self.variant == "paper" else 0) if self.outliers is None else self.outliers

    def _records(self) -> float:
        """Return the bits an element that are not codes."""
        return QAQ_RECORDS[self.params] + 24 * self._outliers() / 128

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec; with ``tables``, for the query norm that was measured."""
        norm = max(tables.query_norms) if tables is not None else self.query_norm
        codes = self.bits - self._records()
        keys, values = (
            int(budget * self.page_size) / self.page_size
            if given is None
            else given  # whole rows of a page
            for budget, given in (
                (codes + QAQ_KEYS_WIDER, self.key_bits),
                (codes - QAQ_KEYS_WIDER, self.value_bits),
            )
        )
        by_attention = self.variant != "paper" and self.key_target is None
        key = self._tensor(keys, by_attention, self.key_target, float(norm))
        return self._cache(key, self._tensor(values, True, self.value_target, 0.0))

    def _tensor(self, budget: float, attentive: bool, target: float | None, norm: float) -> Mixed:
        exact = self.keep_exact is not None and attentive
        adaptive = None
        if target is not None:
            adaptive = Adaptive(float(target), norm, self.requantize, exact)
        elif exact:
            adaptive = Adaptive(keep_exact=True)
        least, most = self._range()
        fitted = self.variant != "paper"
        return Mixed(
            budget, least, most, self._outliers(), self.params, fit=fitted,
            soften=fitted and target is None, attentive=attentive, transform=self.transform,
            adaptive=adaptive,
        )  # fmt: skip
