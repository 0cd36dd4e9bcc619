"""Triton helpers that turn numbers into codes and codes into numbers: twins of the specification.

Each mirrors a function of `frame` or `reference`, operation by operation: fp32, one rounding an
operation, in that order. That is what makes bits equal, so kernels that use them are compiled
without contraction of products and sums (``enable_fp_fusion=False``).

A helper takes the whole layout as a constant (`Constants`) and asks it for what it needs. The
tables of a head come as a pointer to its words.
"""

import math
from dataclasses import replace
from functools import cached_property, lru_cache

import triton
import triton.language as tl
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.schemes import TRITS, UNIT_BITS
from kvq_compile.kernels.tables import CHANNEL_SECTIONS, NO_TABLES, section
from kvq_compile.kernels.triton.primitives import join_params, split_params

FP16_MAX = tl.constexpr(65504.0)
E4M3_MAX = tl.constexpr(448.0)
E4M3_LEAST_NORMAL = tl.constexpr(2.0**-6)
E4M3_STEPS = tl.constexpr(2.0**9)  # of subnormal numbers in one
QUARTER = tl.constexpr(1 << 30)  # of a turn
DIGITS = tl.constexpr(TRITS)
RADIANS = tl.constexpr(2.0 * math.pi / 2.0**32)
MIXED_ONLY = frozenset((
    *("mixed", "code_rows", "min_bits", "max_bits", "outliers", "fit", "soften"),
    *("param_bytes", "rank_field"),
))  # fmt: skip


# --- layouts --------------------------------------------------------------------------------------


class Constants(Layout):
    """A layout as a constant of a kernel, with what only kernels ask it for.

    Triton's cache on disk knows a constant by its text, which therefore holds derived sizes too. What
    is in the tables does not change a kernel, so their digest is left out.
    """

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(layout: Layout) -> "Constants":
        """Return what kernels for ``layout`` are compiled for: the same whatever is in its tables."""
        scheme = replace(layout.scheme, tables="tables" if layout.has_tables else NO_TABLES)
        values = layout.role, layout.head_dim, layout.regions, scheme, layout.queries
        return Constants(*values, layout.shared_by)

    def __repr__(self) -> str:
        derived = [
            name
            for c in (Constants, Layout)
            for name, x in vars(c).items()
            if isinstance(x, (property, cached_property)) and not name.startswith("_")
            if self.coder == "mixed" or name not in MIXED_ONLY
        ]
        return f"{super().__repr__()} {[(name, getattr(self, name)) for name in derived]}"

    @property
    def in_coded_form(self) -> bool:
        """Whether a page goes to scratch first, for tokens are coded as something other than what they
        are, or read in more than one shape."""
        return self.has_tables or self.transform != "none" or self.coder == "mixed"

    @property
    def scratch_numbers(self) -> int:
        """Numbers of scratch for a page: its coded form and, behind it, the entries of a codebook, or of
        each token of mixed bits its span, bits and rank."""
        coded = self.page_size * self.head_dim if self.in_coded_form else 0
        rows = {"codebook": self.code_channels, "mixed": 4}.get(self.coder, 0)
        return coded + self.page_size * rows

    @property
    def page_words(self) -> int:
        """Words of the codes of a page: units, or bytes where they hold trits."""
        return self.rows * self.units * (2 if self.packing == "trits" else 1)

    @property
    def page_params(self) -> int:
        """Groups of a page, each of which has one word of parameters; or bytes of its records."""
        groups, members = self.params_shape
        return groups * members

    @property
    def min_bits(self) -> int:
        """Least bits of a token of a mixed page."""
        return self.mixed.min_bits

    @property
    def max_bits(self) -> int:
        """Most bits of a token of a mixed page."""
        return self.mixed.max_bits

    @property
    def outliers(self) -> int:
        """Elements of a token of a mixed page that are kept exactly."""
        return self.mixed.outliers

    @property
    def fit(self) -> bool:
        """Whether the reach of a token is fitted."""
        return self.mixed.fit

    @property
    def soften(self) -> bool:
        """Whether importance counts softened."""
        return self.mixed.soften

    @property
    def param_bytes(self) -> int:
        """Bytes of a centre or a reach."""
        return self.mixed.param_bytes

    @property
    def rank_field(self) -> int:
        """Field of the rank."""
        return self.mixed.rank_field

    @property
    def plane_units(self) -> tuple[int, ...]:
        """Units of a row of each plane."""
        return tuple(self.row_length * width // UNIT_BITS for width in self.planes)

    @property
    def section_starts(self) -> tuple[tuple[str, int], ...]:
        """First word of each section of the tables."""
        names = (*CHANNEL_SECTIONS, "frequency", "codebook")
        return tuple((name, section(name, self.head_dim, self.rotary)[0]) for name in names)


@triton.constexpr_function
def below(numbers, plane):
    """Return the sum over the planes below one."""
    return sum(numbers[:plane])


@triton.constexpr_function
def section_start(name, layout):
    """Return the first word of a section of the tables."""
    return dict(layout.section_starts)[name]


# --- tables ---------------------------------------------------------------------------------------


@triton.jit
def load_table(tables, channel, exists, NAME: tl.constexpr, LAYOUT: tl.constexpr):
    """Load a section of the tables for coded channels."""
    word = tl.load(tables + section_start(NAME, LAYOUT) + channel, mask=exists, other=0)
    if NAME == "order" or NAME == "frequency":
        return word
    else:
        return word.to(tl.float32, bitcast=True)


@triton.jit
def load_share(tables, channel, exists, LAYOUT: tl.constexpr):
    """Load the share of their range that groups lose at each end, if the layout has tables."""
    return load_table(tables, channel, exists, "margin", LAYOUT) if LAYOUT.has_tables else 0.0


@triton.jit
def from_units(y, tables, channel, exists, LAYOUT: tl.constexpr):
    """Return ``y`` in coded units as numbers of the model."""
    scale = load_table(tables, channel, exists, "scale", LAYOUT)
    return y * scale + load_table(tables, channel, exists, "mean", LAYOUT)


@triton.jit
def to_units(x, tables, channel, exists, LAYOUT: tl.constexpr):
    """Undo `from_units`."""
    mean = load_table(tables, channel, exists, "mean", LAYOUT)
    return (x - mean) * load_table(tables, channel, exists, "inverse", LAYOUT)


@triton.jit
def cosine_and_sine(phase):
    """Return cosine and sine of angles in units of 2 ** -32 turns (int32, which wraps as they do)."""
    quarters = (phase + QUARTER // 2) >> 30  # of which the lowest two bits count
    t = (phase - (quarters << 30)).to(tl.float32) * RADIANS
    square = t * t
    s = 2.7557314e-6 * square + -1.9841270e-4
    s = s * square + 8.3333333e-3
    s = s * square + -1.6666667e-1
    s = s * square * t + t
    c = 2.4801587e-5 * square + -1.3888889e-3
    c = c * square + 4.1666667e-2
    c = c * square + -0.5
    c = c * square + 1.0
    odd, half = (quarters & 1) != 0, (quarters & 2) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    # a product keeps the sign of zero, which a difference from zero would not
    return cosine * tl.where(half ^ odd, -1.0, 1.0), sine * tl.where(half, -1.0, 1.0)


# --- group parameters -----------------------------------------------------------------------------


@triton.jit
def params_index(token, channel, LAYOUT: tl.constexpr):
    """Return which of a page's groups a number is in."""
    if LAYOUT.grouping == "channel":
        index = (token // LAYOUT.group_size) * LAYOUT.head_dim + channel
    else:
        index = (channel // LAYOUT.group_size) * LAYOUT.page_size + token
    return index


@triton.jit
def param_values(word, LAYOUT: tl.constexpr):
    """Return ``scale, zero`` (fp32) of words of parameters, of 32 bits, or 16 for fp8."""
    if LAYOUT.params == "fp8":
        bits = word.to(tl.int32)
        return e4m3_value(bits & 0xFF), e4m3_value(bits >> 8)
    else:
        scale, zero = split_params(word)
        return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def group_params(x, exists, share, AXIS: tl.constexpr, LAYOUT: tl.constexpr):
    """Return the parameters, as words, of groups that lie along ``AXIS`` of ``x`` (fp32).

    ``share`` of a group's range is cut off at each end, where the layout has tables.
    """
    finite = exists & (tl.abs(x) < float("inf"))
    lo = tl.min(tl.where(finite, bounded(x), float("inf")), AXIS)
    hi = tl.max(tl.where(finite, bounded(x), float("-inf")), AXIS)
    hi = tl.where(lo == float("inf"), 0.0, hi)
    lo = tl.where(lo == float("inf"), 0.0, lo)
    if LAYOUT.has_tables:
        margin = (hi - lo) * share
        lo, hi = lo + margin, hi - margin
    elif LAYOUT.clip < 1.0:
        margin = (hi - lo) * ((1.0 - LAYOUT.clip) / 2.0)
        lo, hi = lo + margin, hi - margin
    levels = tl.full(lo.shape, LAYOUT.levels, tl.float32)
    if LAYOUT.params == "fp8":
        zero = round_e4m3(lo)
        step = tl.div_rn(hi - e4m3_value(zero), levels)
        return (round_e4m3(tl.maximum(step, 0.0)) | (zero << 8)).to(tl.uint16)
    else:
        zero = _round_down_fp16(lo)
        step = tl.div_rn(hi - zero.to(tl.float32), levels)
        return join_params(round_up_fp16(tl.minimum(step, FP16_MAX)), zero)


@triton.jit
def _round_down_fp16(x):
    half = x.to(tl.float16)
    bits = half.to(tl.int16, bitcast=True)
    below = tl.where(half > 0, bits - 1, bits + 1).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where(half.to(tl.float32) > x, below, half)


@triton.jit
def round_up_fp16(x):
    half = x.to(tl.float16)
    above = (half.to(tl.int16, bitcast=True) + 1).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where(half.to(tl.float32) < x, above, half)


@triton.jit
def round_e4m3(x):
    """Return the e4m3 number nearest to ``x`` (fp32, finite) as an integer 0 .. 255."""
    magnitude = tl.minimum(tl.abs(x), E4M3_MAX)
    subnormal = tl.floor(magnitude * E4M3_STEPS + 0.5).to(tl.int32)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + (1 << 19)) >> 20) - (120 << 3)  # exponent bias 127 becomes 7
    byte = tl.where(magnitude < E4M3_LEAST_NORMAL, subnormal, normal)
    return byte + tl.where(x < 0, 128, 0)


@triton.jit
def e4m3_value(byte):
    """Return the number (fp32) that the integer ``byte`` stands for."""
    half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)  # the same fields, read with fp16's bias
    return half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256


# --- codes ----------------------------------------------------------------------------------------


@triton.jit
def bounded(x):
    """Return ``x`` (fp32) with NaN as zero, within the range of fp16."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX), 0.0)


@triton.jit
def encode(x, word, LAYOUT: tl.constexpr):
    """Return the codes (int32) of ``x`` (fp32) in groups with parameters ``word``."""
    scale, zero = param_values(word, LAYOUT)
    codes = tl.floor(tl.div_rn(bounded(x) - zero, tl.where(scale > 0, scale, 1.0)) + 0.5)
    codes = tl.minimum(tl.maximum(codes, 0.0), LAYOUT.levels)
    return tl.where(scale > 0, codes, 0.0).to(tl.int32)


@triton.jit
def nearest_centroid(y, codebook, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """Return the entries (int32) of a group's ``codebook`` that are nearest, the first among equals.

    ``y`` has one tensor of tokens for each of the coupled channels. Each lane keeps the nearest of
    the entries that it sees, one in ``BLOCK``, so that lanes meet once.
    """
    TOKENS: tl.constexpr = y[0].shape[0]
    ENTRIES: tl.constexpr = LAYOUT.levels + 1
    COUPLE: tl.constexpr = LAYOUT.couple
    lane = tl.arange(0, BLOCK)
    least = tl.full((BLOCK, TOKENS), float("inf"), tl.float32)
    found = lane[:, None] + tl.zeros((BLOCK, TOKENS), tl.int32)
    for block in range(0, ENTRIES, BLOCK):
        entry = block + lane
        distance = tl.zeros((BLOCK, TOKENS), tl.float32)
        for channel in tl.static_range(COUPLE):
            centroid = tl.load(codebook + entry * COUPLE + channel).to(tl.float32)
            difference = y[channel][None, :] - centroid[:, None]
            distance += difference * difference
        nearer = distance < least
        least = tl.where(nearer, distance, least)
        found = tl.where(nearer, entry[:, None], found)
    is_least = least == tl.min(least, 0)[None, :]
    return tl.min(tl.where(is_least, found, ENTRIES), 0)


@triton.jit
def coded_value(codes, params, codebook, token, channel, exists, LAYOUT: tl.constexpr):
    """Return the numbers (fp32) that a page's codes stand for, in the basis they were coded in."""
    part = channel // LAYOUT.couple
    if LAYOUT.role == "key":
        code = load_code(codes, token, part, exists, LAYOUT)
    else:
        code = load_code(codes, part, token, exists, LAYOUT)
    if LAYOUT.coder == "codebook":
        entry = part * (LAYOUT.levels + 1) + code
        where = entry * LAYOUT.couple + channel % LAYOUT.couple
        return tl.load(codebook + where, mask=exists, other=0.0).to(tl.float32)
    else:
        where = params_index(token, channel, LAYOUT)
        scale, zero = param_values(tl.load(params + where, mask=exists, other=0), LAYOUT)
        return code.to(tl.float32) * scale + zero


@triton.jit
def load_code(codes, row, index, exists, LAYOUT: tl.constexpr):
    """Return the codes (int32) of index ``index`` in packed rows ``row``: units, or bytes of trits."""
    if LAYOUT.packing == "trits":
        where = row * (2 * LAYOUT.units) + index % LAYOUT.row_bytes
        code = tl.load(codes + where, mask=exists, other=0).to(tl.int32)
        digit = index // LAYOUT.row_bytes
        for below_it in tl.static_range(DIGITS - 1):
            code = tl.where(digit > below_it, code // 3, code)
        code %= 3
    else:
        code = tl.zeros((1, 1), tl.int32)
        for plane in tl.static_range(len(LAYOUT.planes)):
            code += _load_plane(codes, row, index, exists, LAYOUT, plane)
    return code


@triton.jit
def _load_plane(codes, row, index, exists, LAYOUT: tl.constexpr, PLANE: tl.constexpr):
    WIDTH: tl.constexpr = LAYOUT.planes[PLANE]
    UNITS: tl.constexpr = LAYOUT.plane_units[PLANE]
    where = row * LAYOUT.units + below(LAYOUT.plane_units, PLANE) + index % UNITS
    word = tl.load(codes + where, mask=exists, other=0).to(tl.int32)
    part = (word >> (index // UNITS * WIDTH)) & ((1 << WIDTH) - 1)
    return part << below(LAYOUT.planes, PLANE)
