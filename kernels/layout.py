"""`Layout`: which tokens of a quantized cache stay exact, how the others are coded, and where each bit lies.

A cache stores the tokens ``0 .. kv_len - 1`` of one key or value tensor in three regions::

    | sinks |      packed pages of page_size tokens      |  recent: window .. window + page_size - 1  |
      exact              quantized once                                    exact

A new token is written to a ring of exact rows, the residual window. When ``page_size`` tokens have left the window,
they are quantized together as one page. The region of a token depends on the length alone, so a prompt written
at once, in chunks or token by token gives the same bytes.

Words used throughout this folder: a *slot* is a cache position, counted from 0 for every sequence (the position that
rotary embeddings see is slot plus shift). The tokens *held* are those written so far; their count, ``cursor[0]``, is
kv_len.

`CacheSpec` (`spec`) is what a user chooses. A `Layout` binds its regions and one scheme to the role and the head
dimension of one tensor. It is a value with many uses: a constant in a graph, an argument of the operators, a
compile-time constant of kernels, and the description in a saved cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase, OpaqueBaseMeta

from kvq_compile.kernels.adaptive.targets import length_class, target_bounds
from kvq_compile.kernels.schemes import (
    PAGE_SIZES,
    Adaptive,
    Channelwise,
    Grouping,
    Mixed,
    Packing,
    Params,
    Role,
    Scheme,
    Transform,
    Uniform,
    as_channelwise,
    as_mixed,
)
from kvq_compile.kernels.tables import NO_TABLES
from kvq_compile.kernels.values import Interned, check, check_integers
from kvq_compile.kernels.words import WORD_BITS, plane_words

HIDES = -9984.0  # an additive mask of at most this gives a token weight 0: -1e4, as bfloat16 has it


class InternedOpaque(Interned, OpaqueBaseMeta):
    """`Interned` for values that are constants of graphs."""


@dataclass(frozen=True, repr=False)
class Regions(metaclass=Interned):
    """Which tokens of a cache are exact.

    Args:
        sinks: First tokens, which always stay exact.
        window: Most recent tokens that are always exact; up to ``page_size - 1`` more wait until their page is full.
        page_size: Tokens quantized together: 32, 64, 128 or 256.

    Raises:
        TypeError: A count of tokens is not an integer.
        ValueError: An argument is out of its range.
    """

    sinks: int = 5
    window: int = 128
    page_size: int = 128

    def __post_init__(self) -> None:
        check_integers(sinks=self.sinks, window=self.window, page_size=self.page_size)
        check(self.sinks >= 0, f"sinks must be 0 or more, got {self.sinks}")
        check(self.window >= 0, f"window must be 0 or more, got {self.window}")
        check(
            self.page_size in PAGE_SIZES,
            f"page_size must be one of {PAGE_SIZES}, got {self.page_size}",
        )

    def __repr__(self) -> str:
        return f"Regions({self.sinks}, {self.window}, {self.page_size})"


@dataclass(frozen=True, eq=False, repr=False)
class Layout(OpaqueBase, metaclass=InternedOpaque):
    """Place of every bit of one packed tensor.

    With ``B`` sequences, ``H`` KV heads, ``P`` pages of ``N = page_size`` tokens and ``D = head_dim``::

        codes   int16    [B, H, P, rows, row_words]   keys: rows are tokens; values: rows are channels
        params  float16  [B, H, P, groups, members, 2]   scale and zero point of each group; uint8 for fp8
        exact   model's  [B, H, exact_rows, D]    sinks, a ring of the recent tokens; the tail: queries, state
        cursor  int32    [2]                      tokens held (kv_len), pages packed; [B, 2] of each row: see `rows`
        tables  int32    [H, table_words]         calibration constants; only where the scheme has tables
        originals  model's  [B, H, P, N, D]       exact copies of packed tokens, in host memory; optional
        shift   int32    [B]                      position minus slot of each sequence; only rotary keys

    Caches that grow have flat pages, and of the rows of tokens in ``exact`` the first only: see `packed`.

    Where tokens differ in bits (`Mixed`), codes have one row and ``params`` are bytes ``[B, H, P, fields, N, 1]``.

    ``groups, members`` is ``D / group_size, N`` for groups inside a token, ``N / group_size, D`` for groups inside a
    channel, and ``0, N`` for a codebook, which has one code for ``couple`` neighbouring channels.

    Codes are packed into 16-bit words. A row is planar: field ``f`` of word ``w`` holds code
    ``f * words + w``, so that unpacking one field of neighbouring words gives neighbouring codes. Uniform codes that do
    not fill whole words are followed by zeros until they do.

    A row of 3 bits has three thirds of ``W`` words, which hold 16 fields: field ``5 t + i`` is the ``i``-th of third
    ``t``, and bit ``t`` of field 15 is the last bit of that third. So no code is cut in two but one in 16.

    The bits of an index of a codebook are split into planes, powers of two bits wide, the widest and lowest first; the
    planes follow one another in the row, each padded by itself. So are those of mixed tokens.

    Trits, three-level codes, are packed into bytes, two to a word, the first in its low half. The words of a row are
    split into planes of four words, then two and one (`trit_planes`), and a page holds the first plane of all rows,
    then the second. A plane of ``w`` words holds the next ``10 w`` codes of a row: digit ``f`` in base 3 of byte ``u``
    is code ``2 w f + u`` of these.

    Args:
        role: Whether the tensor holds keys or values.
        head_dim: Channels of a head.
        regions: Which tokens are exact.
        scheme: Quantization scheme of the others.
        queries: Last queries that a key cache holds, where bits depend on them; else 0.
        shared_by: Queries per KV head (query heads that share it), where keys hold queries; else 0.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A size is out of its range, or ``head_dim`` cannot be grouped as the scheme asks.
    """

    role: Role
    head_dim: int
    regions: Regions
    scheme: Scheme
    queries: int = 0
    shared_by: int = 0

    def __post_init__(self) -> None:
        check(self.role in ("key", "value"), f'role must be "key" or "value", got {self.role!r}')
        sizes = {"queries": self.queries, "shared_by": self.shared_by}
        check_integers(head_dim=self.head_dim, **sizes)
        check(self.head_dim > 0, f"head_dim must be positive, got {self.head_dim}")
        for name, size in sizes.items():
            check(size >= 0, f"{name} must be 0 or more, got {size}")
        scheme = self.scheme.bound_to(self.head_dim, self.page_size)
        object.__setattr__(self, "scheme", scheme)
        check(self.role == "key" or not scheme.rotary, "rotary must be False for values, got True")
        scheme.check_sizes(self.role, self.head_dim, self.page_size)

    # A value: compared in guards and looked up in caches at each call of an operator.

    @cached_property
    def _values(self) -> tuple[Any, ...]:
        return self.role, self.head_dim, self.regions, self.scheme, self.queries, self.shared_by

    @cached_property
    def _hash(self) -> int:
        return hash(self._values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Layout):
            return NotImplemented
        return self._hash == other._hash and self._values == other._values

    def __reduce__(self) -> tuple[Any, ...]:
        # Without cached properties: hashes differ between processes.
        return type(self), self._values

    def __repr__(self) -> str:
        held = f", {self.queries}, {self.shared_by}" if self.queries else ""
        return f"{type(self).__name__}({self.role!r}, {self.head_dim}, {self.regions}, {self.scheme}{held})"

    def __fx_repr__(self) -> tuple[str, dict[str, type]]:
        """Return the source text of the layout in a graph, and the classes that it names."""
        named = (Layout, Regions, type(self.scheme), *self.scheme.parts.values())
        return repr(self), {c.__name__: c for c in named}

    # Regions

    @cached_property
    def sinks(self) -> int:
        """First tokens, which stay exact."""
        return self.regions.sinks

    @cached_property
    def window(self) -> int:
        """Most recent tokens that are always exact."""
        return self.regions.window

    @cached_property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.regions.page_size

    @cached_property
    def ring(self) -> int:
        """Rows of the ring of recent tokens: the residual window and the page that fills behind it."""
        return self.window + self.page_size

    @cached_property
    def token_rows(self) -> int:
        """Exact rows of tokens: sinks and ring."""
        return self.sinks + self.ring

    @cached_property
    def query_rows(self) -> int:
        """Exact rows of the last ``queries`` queries of each of ``shared_by`` heads, behind those of tokens."""
        return self.queries * self.shared_by

    @cached_property
    def tail_rows(self) -> int:
        """The last of the exact rows: of queries, then of what a cache found of itself."""
        return self.query_rows + self.scheme.state_rows

    @cached_property
    def exact_rows(self) -> int:
        """Exact rows: of tokens, then the tail. A cache that grows has fewer rows of tokens at first."""
        return self.token_rows + self.tail_rows

    def queries_of(self, exact: Tensor) -> Tensor:
        """Return the rows of queries of the part ``exact``, ``[B, H, query_rows, D]``."""
        first = exact.shape[2] - self.tail_rows
        return exact[:, :, first : first + self.query_rows]

    def state_of(self, exact: Tensor) -> Tensor:
        """Return the rows of the part ``exact`` in which a cache holds what it found of itself."""
        return exact[:, :, exact.shape[2] - self.scheme.state_rows :]

    def pages_at(self, length: int) -> int:
        """Return the pages that ``length`` appended tokens fill."""
        return max(0, (length - self.sinks - self.window) // self.page_size)

    def exact_row(self, token: int) -> int:
        """Return the row of ``exact`` of a token that is not packed."""
        return token if token < self.sinks else self.sinks + (token - self.sinks) % self.ring

    # Codes and parameters

    @cached_property
    def bits(self) -> float:
        """Width of a code in bits; the average for mixed pages."""
        return self.scheme.bits

    @cached_property
    def grouping(self) -> Grouping:
        """Whether a group lies inside a token or a channel."""
        return self.scheme.grouping

    @cached_property
    def group_size(self) -> int:
        """Elements that share parameters."""
        size = self.scheme.group_size
        return self.head_dim if size is None else size

    @cached_property
    def clip(self) -> float:
        """Fraction of a group's range that its codes span."""
        return self.scheme.clip

    @cached_property
    def search(self) -> bool:
        """Whether each group has a clip of its own, the best of eight."""
        return isinstance(self.scheme, Uniform) and self.scheme.search

    @cached_property
    def transform(self) -> Transform:
        """Rotation of the head dimension before coding."""
        return self.scheme.transform

    @cached_property
    def params(self) -> Params:
        """Format of the parameters."""
        return self.scheme.params

    @cached_property
    def packing(self) -> Packing:
        """How three-level codes are packed."""
        return self.scheme.packing

    @cached_property
    def couple(self) -> int:
        """Channels that share a code."""
        return self.scheme.couple

    @cached_property
    def rotary(self) -> bool:
        """Whether keys are quantized before the rotary embedding."""
        return self.scheme.rotary

    @cached_property
    def tables(self) -> str:
        """Digest of the calibration tables."""
        return self.scheme.tables

    @cached_property
    def has_tables(self) -> bool:
        """Whether the tensor has calibration tables."""
        return self.tables != NO_TABLES

    @cached_property
    def calibrated_tensors(self) -> int:
        """Tensors of calibration constants: tables, and a shift where keys are rotary."""
        return self.has_tables + self.rotary

    @cached_property
    def planes(self) -> tuple[int, ...]:
        """Widths in bits of the planes that a code is split into, low bits first."""
        return self.scheme.planes

    @cached_property
    def levels(self) -> int:
        """Steps between the lowest and the highest code."""
        return self.scheme.levels

    @cached_property
    def code_channels(self) -> int:
        """Codes of a token."""
        return self.head_dim // self.couple

    @cached_property
    def rows(self) -> int:
        """Rows of packed words in a page."""
        return self.scheme.codes_shape(self.role, self.head_dim, self.page_size)[0]

    @cached_property
    def row_words(self) -> int:
        """Packed 16-bit words in a row."""
        return self.scheme.codes_shape(self.role, self.head_dim, self.page_size)[1]

    @cached_property
    def page_words(self) -> int:
        """Packed 16-bit words of a page."""
        return self.rows * self.row_words

    @cached_property
    def row_length(self) -> int:
        """Codes in a row."""
        return self.code_channels if self.role == "key" else self.page_size

    @cached_property
    def row_places(self) -> int:
        """Codes in a row that its planes have room for; zeros follow the last of ``row_length``."""
        return self.scheme.row_places(self.row_length)

    @cached_property
    def params_shape(self) -> tuple[int, int]:
        """``groups, members`` of one page's parameters."""
        return self.scheme.params_shape(self.head_dim, self.page_size)

    @cached_property
    def param_elements(self) -> int:
        """Elements of a parameter: scale and zero point, or one byte of metadata."""
        return self.scheme.param_elements

    @cached_property
    def has_byte_params(self) -> bool:
        """Whether parameters are bytes."""
        return self.scheme.byte_params

    @cached_property
    def bits_per_element(self) -> float:
        """Bits per element of a page: codes and parameters."""
        groups, members = self.params_shape
        width = (8 if self.has_byte_params else 16) * self.param_elements
        page = WORD_BITS * self.rows * self.row_words + width * groups * members
        return page / (self.page_size * self.head_dim)

    @property
    def about(self) -> str:
        """Codes in words: ``"2-bit"``, ``"2-bit group-24"``, ``"4 channels in 8 bits"``."""
        return self.scheme.describe(self.head_dim, self.page_size)

    # Channels of different widths

    @cached_property
    def channelwise(self) -> Channelwise:
        """The scheme of pages whose channels differ in bits.

        Raises:
            TypeError: The layout has another scheme.
        """
        return as_channelwise(self.scheme)

    @cached_property
    def takes_mean(self) -> bool:
        """Whether keys are coded without their rotated mean."""
        return self.scheme.name == "channelwise" and self.channelwise.takes_mean

    @cached_property
    def mean_pairs(self) -> int:
        """Rotation pairs, in coded order, whose mean is taken off: the faster half."""
        return self.head_dim // 4 if self.takes_mean else 0

    @cached_property
    def has_frequencies(self) -> bool:
        """Whether the tables have the frequencies of rotation pairs."""
        return self.rotary or self.takes_mean

    @cached_property
    def bit_rows(self) -> int:
        """Bits of a token in pages whose channels differ in bits."""
        return self.channelwise.bit_rows(self.head_dim)

    # Mixed pages

    @cached_property
    def mixed(self) -> Mixed:
        """The scheme of pages whose tokens differ in bits.

        Raises:
            TypeError: The layout has another scheme.
        """
        return as_mixed(self.scheme)

    @cached_property
    def attentive(self) -> bool:
        """Whether the bits of a token depend on the attention it gets."""
        return self.scheme.attentive

    @cached_property
    def adaptive(self) -> Adaptive | None:
        """Options of QAQ for mixed pages after they are packed, if any."""
        return self.scheme.adaptive

    @cached_property
    def keep_exact(self) -> bool:
        """Whether host memory holds exact copies of packed tokens."""
        return self.adaptive is not None and self.adaptive.keep_exact

    @cached_property
    def requantize(self) -> bool:
        """Whether packed tokens drop bits that their target no longer needs."""
        return self.adaptive is not None and self.adaptive.requantize

    @cached_property
    def code_rows(self) -> int:
        """Rows of a mixed page, all bit planes together: its budget."""
        return int(self.mixed.bits * self.page_size)

    @cached_property
    def plane_row_words(self) -> int:
        """Packed words in a row of a bit plane of a mixed page."""
        return plane_words(self.head_dim, 1)

    @cached_property
    def outlier_fields(self) -> int:
        """Bytes of metadata of an outlier of a mixed token."""
        return self.mixed.outlier_fields(self.head_dim)

    @cached_property
    def bounds(self) -> tuple[float, ...]:
        """Bounds on the weighted error of mixed pages with a target, by length: see `target_bounds`."""
        if self.adaptive is None:
            return ()
        norm = self.adaptive.query_norm if self.role == "key" else 0.0
        return target_bounds(self.role, self.adaptive.target, norm, self.head_dim)

    def bound_at(self, end: int) -> float:
        """Return the bound of a mixed page that ends before slot ``end``; 0 where there is no target."""
        return self.bounds[length_class(end)] if self.bounds else 0.0


register_opaque_type(Layout, typ="value")


def exact_row_index(first: int, last: int, layout: Layout, device: torch.device) -> Tensor:
    """Return the rows of ``exact`` that hold the tokens ``first .. last - 1``, ``[last - first]``."""
    token = torch.arange(first, last, dtype=torch.int64, device=device)
    return torch.where(
        token < layout.sinks, token, layout.sinks + (token - layout.sinks) % layout.ring
    )
