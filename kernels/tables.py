"""`Tables`: the calibration constants of the keys or the values of one layer, as one tensor.

Sections per KV head, all in *coded* channel order, the order in which channels are packed:

    order      int32  [D]       the model's channel that is packed as channel c
    mean       fp32   [D]       subtracted before quantization
    scale      fp32   [D]       divisor before quantization
    inverse    fp32   [D]       1 / scale, by which quantization multiplies
    margin     fp32   [D]       fraction of a group's range clipped at each end; equal within a group
    frequency  int32  [D / 2]   rotary keys: angle per position, in units of 2 ** -32 of a full rotation
    codebook   fp16   [D / couple, 2 ** bits, couple]

Quantization sees ``y = (inverse_rotate(x[order]) - mean) * inverse`` in place of a token ``x``. Rotary keys are
inversely rotated by the angle of their position. Their channels ``c`` and ``c + D / 2`` form a rotation pair whatever
pairs the model rotates: ``order`` maps them. The angle is ``position * frequency`` in 32-bit integers, which wrap
around as angles do, so it is exact at any length and the same on every device.

The sections follow one another in 32-bit words (`section` gives their offsets). A cache thus carries one tensor of
calibration constants, shared by all caches of the layer.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

NO_TABLES = "-"  # digest of no tables
CHANNEL_SECTIONS = ("order", "mean", "scale", "inverse", "margin")
INTEGERS = ("order", "frequency")
_words: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()  # of all tables


def section(name: str, head_dim: int, rotary: bool) -> tuple[int, int | None]:
    """Return the first word of a section and the word after its last (``None``: the end of the tables)."""
    if name in CHANNEL_SECTIONS:
        first = CHANNEL_SECTIONS.index(name) * head_dim
        return first, first + head_dim
    first = len(CHANNEL_SECTIONS) * head_dim
    if name == "frequency":
        return first, first + head_dim // 2
    return first + (head_dim // 2 if rotary else 0), None


def read_section(words: Tensor, name: str, head_dim: int, rotary: bool = False) -> Tensor:
    """Return a section of ``words`` ``[H, table_words]`` as ``[H, ...]``; a codebook is flat."""
    first, last = section(name, head_dim, rotary)
    part = words[:, first:last]
    if name in INTEGERS:
        return part
    return part.contiguous().view(torch.float16 if name == "codebook" else torch.float32)


@dataclass(frozen=True, eq=False)
class Tables:
    """Calibration tables of one tensor; equal if their digests are. Build them with `Tables.build`.

    Attributes:
        words: ``[H, table_words]``, int32.
        head_dim: Channels of a head.
    """

    words: Tensor
    head_dim: int
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @staticmethod
    def build(
        *,
        order: Tensor,
        mean: Tensor,
        scale: Tensor,
        margin: Tensor,
        frequency: Tensor | None = None,
        codebook: Tensor | None = None,
    ) -> Tables:
        """Return tables made of sections ``[H, ...]``; ``mean``, ``scale`` and ``margin`` are in coded order.

        Raises:
            ValueError: A section has a wrong shape or wrong values.
        """
        H, D = order.shape
        for name, part in (("mean", mean), ("scale", scale), ("margin", margin)):
            if part.shape != (H, D) or not part.isfinite().all():
                raise ValueError(
                    f"{name} must be finite numbers [{H}, {D}], got {tuple(part.shape)}"
                )
        if not torch.equal(
            order.sort(-1).values,
            torch.arange(D, dtype=torch.int64, device=order.device).expand(H, D),
        ):
            raise ValueError(f"order must be a permutation of {D} channels for each head")
        if not (scale > 0).all():
            raise ValueError(f"scale must be positive, got {float(scale.min())}")
        if not ((margin >= 0) & (margin < 0.5)).all():
            raise ValueError("margin must be in [0, 0.5)")
        scale = scale.float()
        parts = [order.int(), mean.float(), scale, 1.0 / scale, margin.float()]
        if frequency is not None:
            if frequency.shape != (H, D // 2):
                raise ValueError(f"frequency must be [{H}, {D // 2}], got {tuple(frequency.shape)}")
            first, second = scale.chunk(2, 1)  # kernels scale a query before they rotate it
            if not torch.equal(first, second):
                raise ValueError("scale must be the same for both channels of a rotary pair")
            parts.append(frequency.int())
        if codebook is not None:
            if codebook.dim() != 4 or codebook.shape[:1] != (H,) or codebook[0, :, 0].numel() != D:
                raise ValueError(
                    f"codebook must be [{H}, groups, entries, couple] over {D} channels, "
                    f"got {tuple(codebook.shape)}"
                )
            parts.append(codebook.half().flatten(1))
        words = [part.contiguous().view(torch.int32) for part in parts]
        return Tables(torch.cat(words, 1).contiguous(), D)

    def on(self, device: torch.device) -> Tensor:
        """Return the words on a device: one tensor for all tables that are equal, which Dynamo looks at once."""
        if device not in self._copies:
            self._copies[device] = self._shared(device)
        return self._copies[device]

    def _shared(self, device: torch.device) -> Tensor:
        about = self.digest, tuple(self.words.shape), device
        known = _words.get(about)
        if known is None:
            known = self.words.to(device)
            if type(known) is Tensor and not known.is_inference():
                known = _words.setdefault(about, known)
        return known

    @property
    def heads(self) -> int:
        """KV heads of the tables."""
        return self.words.shape[0]

    @cached_property
    def digest(self) -> str:
        """Hash of the contents (hexadecimal)."""
        words = self.words.cpu().contiguous()
        content = ctypes.string_at(words.data_ptr(), words.numel() * words.element_size())
        return hashlib.sha256(content + str(self.head_dim).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tables) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def checked_tables(words: Tensor, head_dim: Any, rotary: bool, entries: int) -> Tables:
    """Return tables read from a file.

    Args:
        words: ``[H, table_words]``, int32.
        head_dim: ``D``.
        rotary: Whether they belong to keys that are quantized before the rotary embedding.
        entries: Vectors of the codebook; 0 without one.

    Raises:
        TypeError: ``words`` are not int32, or ``head_dim`` is not an integer.
        ValueError: A size or a value is not what `Tables.build` would have written.
    """
    if not isinstance(head_dim, int) or isinstance(head_dim, bool):
        raise TypeError(f"head_dim must be an int, got {head_dim!r}")
    if words.dtype != torch.int32 or words.dim() != 2 or not words.shape[0] or head_dim < 1:
        raise TypeError(
            f"tables must be int32 [heads, words], got {words.dtype} {list(words.shape)}"
        )
    expected = len(CHANNEL_SECTIONS) * head_dim + (head_dim // 2 if rotary else 0)
    expected += entries * head_dim // 2
    if words.shape[1] != expected or (rotary and head_dim % 2):
        raise ValueError(
            f"tables of {head_dim} channels must have {expected} words, got {words.shape[1]}"
        )
    part = {
        name: read_section(words, name, head_dim, rotary)
        for name in (*CHANNEL_SECTIONS, "frequency", "codebook")
    }
    codebook = part["codebook"].reshape(len(words), 1, entries, head_dim) if entries else None
    if codebook is not None and not codebook.isfinite().all():
        raise ValueError("codebook must be finite")
    built = Tables.build(
        order=part["order"],
        mean=part["mean"],
        scale=part["scale"],
        margin=part["margin"],
        frequency=part["frequency"] if rotary else None,
        codebook=codebook,
    )
    if not torch.equal(built.words, words):
        raise ValueError("inverse must be 1 / scale")
    return Tables(words.contiguous(), head_dim)
