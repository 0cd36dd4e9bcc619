"""Choose how each layer's keys and values are quantized, within a budget of bits.

Every candidate scheme of every tensor is tried on sequences that the model has run: the tensor alone is quantized
as a cache would hold it, tokens that have left the window by the time a query sees them are read as they
are stored, and the change of the attention's output is measured. The choice with the least sum of relative
changes among all whose average width is within the budget is found exactly, by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvq_compile.calibration.attention_change import Text, attend
from kvq_compile.kernels import reference
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.reference.cache import find_state_, with_state
from kvq_compile.kernels.schemes import Role, scheme_of
from kvq_compile.kernels.tables import NO_TABLES, Tables

GRAIN = 64  # parts of a bit that the budget is counted in


@dataclass(frozen=True)
class Choice:
    """A candidate for one tensor.

    Attributes:
        options: Options of its scheme: see `scheme_of`.
        tables: Its tables, if it has any.
        bits: Bits per element of packed pages, parameters included.
        error: Relative squared change of the attention's output.
    """

    options: Mapping[str, Any]
    tables: Tables | None
    bits: float
    error: float


def measure(
    role: Role,
    options: Mapping[str, Any],
    tables: Tables | None,
    rotary: bool,
    texts: Sequence[Text],
    outputs: Sequence[Tensor],
) -> Choice:
    """Code one tensor as a candidate says and measure what that changes.

    Args:
        role: Whether it is the keys or the values.
        options: Of the scheme.
        tables: Of the scheme, if it has any.
        rotary: Whether keys are quantized before the rotary embedding.
        texts: What the attention saw.
        outputs: What `exact` makes of each text.

    Raises:
        ValueError: The scheme does not go with heads of this size.
    """
    digest = NO_TABLES if tables is None else tables.digest
    scheme = scheme_of(options, digest, rotary and role == "key")
    layout = Layout(role, texts[0].value.shape[-1], Regions(), scheme)
    off, size = 0.0, 0.0
    for text, output in zip(texts, outputs, strict=True):
        x = text.key if role == "key" else text.value
        stored = _stored(x, layout, tables)
        pair = (stored, text.value) if role == "key" else (text.key, stored)
        changed = attend(text, *pair, layout.sinks, layout.window)
        off += float((changed - output).square().sum(dtype=torch.float64))
        size += float(output.square().sum(dtype=torch.float64))
    return Choice(options, tables, layout.bits_per_element, off / size)


def _stored(x: Tensor, layout: Layout, tables: Tables | None) -> Tensor:
    """Return the tokens ``[H, T, D]`` that a cache stands for when all of its pages are packed."""
    shift = torch.zeros(1, dtype=torch.int32, device=x.device) if layout.rotary else None
    calibrated = Calibrated(None if tables is None else tables.on(x.device), shift)
    end = layout.sinks + layout.pages_at(x.shape[1]) * layout.page_size
    pages = x[None, :, layout.sinks : end].unflatten(2, (-1, layout.page_size))
    tail = x.new_zeros(1, len(x), layout.tail_rows, x.shape[2])
    find_state_(tail, pages, 0, layout, calibrated)
    calibrated = with_state(calibrated, tail, layout)
    coded = reference.quantize_pages(pages, layout, calibrated, layout.sinks)
    stored = x.clone()
    read = reference.dequantize_pages(*coded, layout, calibrated, layout.sinks)
    stored[:, layout.sinks : end] = read[0].flatten(1, 2)
    return stored


def choose(candidates: Sequence[Sequence[Choice]], bits: float) -> list[Choice]:
    """Return one choice for each tensor, of least error among those of ``bits`` on average.

    Raises:
        ValueError: The narrowest choices are wider than the budget.
    """
    room = int(bits * GRAIN * len(candidates) + 1e-6)
    best = torch.zeros(room + 1, dtype=torch.float64, device="cpu")  # least error within a budget
    picks: list[Tensor] = []
    for tensor in candidates:
        table = torch.full((len(tensor), room + 1), torch.inf, dtype=torch.float64, device="cpu")
        for row, choice in zip(table, tensor, strict=True):
            width = -int(-choice.bits * GRAIN // 1)
            if width <= room:
                row[width:] = best[: room + 1 - width] + choice.error
        best, pick = table.min(0)
        picks.append(pick)
    if not torch.isfinite(best[room]):
        least = sum(min(c.bits for c in tensor) for tensor in candidates) / len(candidates)
        raise ValueError(f"bits must be {least:.2f} or more for this model, got {bits}")
    chosen: list[Choice] = []
    for tensor, pick in zip(reversed(candidates), reversed(picks), strict=True):
        choice = tensor[int(pick[room])]
        chosen.append(choice)
        room -= -int(-choice.bits * GRAIN // 1)
    return chosen[::-1]
