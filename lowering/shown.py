"""What an attention is shown of a cache of fixed size behind the tokens of a call, and why that keeps it in 16 bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvq_compile.kernels.layout import HIDES

if TYPE_CHECKING:
    from kvq_compile.lowering.slots import Write

OVERWRITES = "cache positions are overwritten that attention goes on to read behind the new tokens"
SHOWN = (
    "the mask shows cache positions behind the new tokens, which hold no token in a quantized cache"
)
UNKNOWN = "whether anything reads what lies behind the new tokens is not known before the call"
UNHELD = "attention reads other cache positions than those up to the new tokens, and has no mask"
ENDS_SEEN = "a mask shows what lies behind the end of a row, where other rows go on"


def shows(write: Write, args: Sequence[Any], first: int, last: int | None = None) -> bool | None:
    """Return whether the attention that follows a write sees positions from ``first`` up to ``last``, or to the end.

    ``None`` where that is not known.
    """
    if write.hides is None or isinstance(write.hides, bool):
        return None if write.hides is None else not write.hides
    (mask,) = write.hides(*args)
    behind = mask[..., first:last]
    if behind.dtype != torch.bool:
        return not bool((behind <= HIDES).all())
    return not bool(behind.all()) if write.inverted else bool(behind.any())


def shows_rows(write: Write, args: Sequence[Any], ends: Sequence[int]) -> bool:
    """Return whether a mask shows cache positions of a row behind its end."""
    assert write.hides is not None and not isinstance(write.hides, bool)
    (mask,) = write.hides(*args)
    column = torch.arange(mask.shape[-1], dtype=torch.int64, device=mask.device)
    end = torch.tensor(ends, dtype=torch.int64, device=mask.device)
    behind = column >= end[:, None]
    seen = mask > HIDES if mask.dtype != torch.bool else mask
    seen = ~seen if write.inverted and mask.dtype == torch.bool else seen
    return bool((seen & behind[:, None, None]).any())


def why_seen(write: Write, args: Sequence[Any], end: int, held: int) -> str:
    """Return why a cache stays in 16 bit that attention sees from ``end`` on, or may, and that held ``held`` tokens."""
    if isinstance(write.hides, bool):
        return UNHELD
    if write.hides is None:
        return f"cache positions are overwritten, and {UNKNOWN}" if held else UNKNOWN
    return OVERWRITES if end < held and shows(write, args, end, held) else SHOWN


def why_row_seen(write: Write, args: Sequence[Any], last: int, reason: str) -> str:
    """Return ``reason``, or another one where attention sees, or may, what lies behind ``last``, where all rows end."""
    if write.hides is None:
        return f"cache positions are overwritten, and {UNKNOWN}"
    return SHOWN if not isinstance(write.hides, bool) and shows(write, args, last) else reason
