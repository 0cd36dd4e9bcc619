"""Compile-time constants of kernels, derived from a layout in this one place.

A kernel that only reads packed pages takes `ReadConstants`, so that layouts which differ in how they are written
share it; one that writes them takes `WriteConstants`, which hold the same and more. Nothing depends on what is in
calibrated tables.

Equal constants are one object. So a launch hashes and compares them by identity, and Triton's cache on disk, which
knows a constant by its text, finds every derived size in it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton

from kvq_compile.kernels.channelwise_scheme import BLOCK_WORDS
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.tables import CHANNEL_SECTIONS, section
from kvq_compile.kernels.words import THIRDS, WORD_BITS


@dataclass(frozen=True, eq=False)
class ReadConstants:
    """Regions of a cache, and the place and the meaning of each bit of a packed page.

    Attributes:
        role: Whether rows of packed words are tokens (``"key"``) or channels (``"value"``).
        head_dim, page_size: Channels of a head, tokens of a page.
        sinks, window, ring: Exact tokens: the first, the recent ones, rows of the ring that recent ones lie in.
        token_rows, tail_rows, query_rows: Exact rows: of tokens, where there are all; the last, which are the tail; of
            these the first, of held queries.
        queries, shared_by: Held queries, and query heads to a KV head, where queries are held.
        scheme: ``"uniform"``, ``"codebook"``, ``"mixed"`` or ``"channelwise"``.
        bits: Of a code as packed: 2 for three levels; of mixed tokens the most.
        levels: Steps between the lowest and the highest code.
        packing, grouping, group_size, params, transform, couple, rotary, has_tables: As the layout has them.
        code_channels: Codes of a token.
        row_length, row_places, row_words: Of a row: its codes, what its planes have room for, its 16-bit words.
        page_words, page_params: Of a page: its words; its pairs of scale and zero point, or bytes of metadata.
        in_fields, gathers: How elements are read: from bit fields in registers, or a vector for each code.
        channels: Of a tile of tokens, padded.
        columns: Of a tile of keys (of mixed values too), padded.
        block: Rotary keys that are rotated at once; all blocks of a page by the same angles.
        sections: First word of each section of the tables.
        param_bytes, rank_field, outliers, outlier_fields: Of the metadata of a mixed token: bytes of a zero point,
            the field of its rank, outliers, fields of each.
        bit_rows, bit_blocks, last_words, twice_read: Of a token whose channels differ in bits: its bits, its blocks of
            words, the words of the last of them, and how many of the first have fields of two channels; else 0.
        takes_mean, mean_pairs, mean_places: Whether keys are coded without their rotated mean; rotation pairs that have
            one, and places for them in a tile.
        by_row: Whether rows have lengths of their own, and positions.
    """

    role: str
    head_dim: int
    page_size: int
    sinks: int
    window: int
    ring: int
    token_rows: int
    tail_rows: int
    query_rows: int
    queries: int
    shared_by: int
    scheme: str
    bits: int
    levels: int
    packing: str
    grouping: str
    group_size: int
    params: str
    transform: str
    couple: int
    rotary: bool
    has_tables: bool
    code_channels: int
    row_length: int
    row_places: int
    row_words: int
    page_words: int
    page_params: int
    in_fields: bool
    gathers: bool
    channels: int
    columns: int
    block: int
    sections: tuple[tuple[str, int], ...]
    param_bytes: int
    rank_field: int
    outliers: int
    outlier_fields: int
    bit_rows: int
    bit_blocks: int
    last_words: int
    twice_read: int
    takes_mean: bool
    mean_pairs: int
    mean_places: int
    by_row: bool

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(layout: Layout, by_row: bool = False) -> "ReadConstants":
        """Return what reading kernels for ``layout`` are compiled for."""
        return _one_object(ReadConstants, **_read_values(layout), by_row=by_row)


@dataclass(frozen=True, eq=False)
class WriteConstants(ReadConstants):
    """What `ReadConstants` hold, and how codes are chosen.

    Attributes:
        clip: Fraction of a group's range that codes span.
        search: Whether each group has a clip of its own.
        in_coded_form: Whether a page goes to scratch first, for tokens are coded as something other than what they
            are, or read in more than one shape.
        scratch_size: Elements of scratch for a page: its coded form and, behind it, the entries of a codebook, or
            of each mixed token its span, bits and rank; where channels differ in bits, the codes, the worth of each
            channel and the place of each bit.
        min_bits, code_rows, bounds, fit, soften: Of mixed pages: least bits of a token, rows of all bit planes,
            bounds on the weighted error, how codes are placed, how importance counts.
        pairs: Which channels the rotary embedding mixes, where they differ in bits.
    """

    clip: float
    search: bool
    in_coded_form: bool
    scratch_size: int
    min_bits: int
    code_rows: int
    bounds: tuple[float, ...]
    fit: bool
    soften: bool
    pairs: str

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(layout: Layout, by_row: bool = False) -> "WriteConstants":
        """Return what writing kernels for ``layout`` are compiled for."""
        values = _read_values(layout) | {"by_row": by_row} | _write_values(layout)
        return _one_object(WriteConstants, **values)


_objects: dict[object, Any] = {}


def _one_object(kind: type, **values: object) -> Any:
    return _objects.setdefault((kind, *values.values()), kind(**values))


def _read_values(layout: Layout) -> dict[str, object]:
    dim, scheme = layout.head_dim, layout.scheme.name
    mixed = layout.mixed if scheme == "mixed" else None
    bits = sum(layout.planes) if mixed is None else mixed.max_bits
    in_fields = scheme in ("uniform", "channelwise") and layout.packing == "fields"
    if layout.rotary:  # halves of a padded row are not halves of its words
        in_fields = in_fields and layout.row_places == layout.row_length
    per_word = 1
    if scheme == "mixed":
        per_word = 16  # of a bit plane
    elif in_fields:
        per_word = 16 if bits == THIRDS else 16 // bits  # or in three words, of thirds
    channels = pad_channels(dim)
    even = all(n & (n - 1) == 0 for n in (dim, layout.couple))
    groups, members = layout.params_shape
    names = (*CHANNEL_SECTIONS, "frequency", "codebook")
    param_bytes = 1 if layout.params == "fp8" else 2
    bit_rows = layout.bit_rows if scheme == "channelwise" else 0
    bit_blocks = triton.cdiv(bit_rows, BLOCK_WORDS * WORD_BITS)
    return {
        "role": layout.role,
        "head_dim": dim,
        "page_size": layout.page_size,
        "sinks": layout.sinks,
        "window": layout.window,
        "ring": layout.ring,
        "token_rows": layout.token_rows,
        "tail_rows": layout.tail_rows,
        "query_rows": layout.query_rows,
        "queries": layout.queries,
        "shared_by": layout.shared_by,
        "scheme": scheme,
        "bits": bits,
        "levels": layout.levels,
        "packing": layout.packing,
        "grouping": layout.grouping,
        "group_size": layout.group_size,
        "params": layout.params,
        "transform": layout.transform,
        "couple": layout.couple,
        "rotary": layout.rotary,
        "has_tables": layout.has_tables,
        "code_channels": layout.code_channels,
        "row_length": layout.row_length,
        "row_places": layout.row_places,
        "row_words": layout.row_words,
        "page_words": layout.rows * layout.row_words,
        "page_params": groups * members,
        "in_fields": in_fields,
        "gathers": scheme == "codebook" and even and channels == dim and layout.code_channels > 1,
        "channels": channels,
        "columns": pad_channels(per_word * triton.next_power_of_2(triton.cdiv(dim, per_word))),
        "block": min(layout.page_size, max(32, layout.page_size // 2)),
        "sections": tuple((name, section(name, dim, layout.has_frequencies)[0]) for name in names),
        "param_bytes": param_bytes,
        "rank_field": 2 * param_bytes,
        "outliers": 0 if mixed is None else mixed.outliers,
        "outlier_fields": 0 if mixed is None else layout.outlier_fields,
        "bit_rows": bit_rows,
        "bit_blocks": bit_blocks,
        "last_words": (bit_rows // WORD_BITS - 1) % BLOCK_WORDS + 1 if bit_rows else 0,
        "twice_read": min(bit_blocks, triton.cdiv(dim, BLOCK_WORDS * WORD_BITS)),
        "takes_mean": layout.takes_mean,
        "mean_pairs": layout.mean_pairs,
        "mean_places": max(8, triton.next_power_of_2(layout.mean_pairs)),
    }


def _write_values(layout: Layout) -> dict[str, object]:
    mixed = layout.mixed if layout.scheme.name == "mixed" else None
    in_coded_form = mixed is not None or layout.has_tables or layout.transform != "none"
    channelwise = layout.scheme.name == "channelwise"
    rows = layout.head_dim if in_coded_form or channelwise else 0
    rows += {"codebook": layout.code_channels, "mixed": 4}.get(layout.scheme.name, 0)
    more = layout.head_dim + layout.bit_rows if channelwise else 0
    return {
        "clip": layout.clip,
        "search": layout.search,
        "in_coded_form": in_coded_form,
        "scratch_size": rows * layout.page_size + more,
        "min_bits": 0 if mixed is None else mixed.min_bits,
        "code_rows": 0 if mixed is None else layout.code_rows,
        "bounds": layout.bounds,
        "fit": mixed is not None and mixed.fit,
        "soften": mixed is not None and mixed.soften,
        "pairs": layout.channelwise.pairs if channelwise else "none",
    }


@triton.constexpr_function
def pad_channels(dim):
    """Return how many channels a tile has for heads of ``dim``: a power of two that the matrix instruction takes."""
    return max(16, triton.next_power_of_2(dim))


@triton.constexpr_function
def in_thirds(constants):
    """Return whether rows are packed in thirds."""
    return constants.scheme == "uniform" and constants.bits == THIRDS


@triton.constexpr_function
def plane_words(constants, width):
    """Return the words of a plane in a row of packed codes."""
    return -(-constants.row_places * width // 16)


@triton.constexpr_function
def first_word(constants, width):
    """Return the first word of a plane in a row: the planes before it are wider."""
    words = 0
    for wider in (2, 4, 8):
        if wider > width and constants.bits & wider:
            words += -(-constants.row_places * wider // 16)
    return words


@triton.constexpr_function
def section_start(name, constants):
    """Return the first word of a section of the tables."""
    return dict(constants.sections)[name]
