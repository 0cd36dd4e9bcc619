"""The codebook scheme in Triton: coupled channels of a token share an index into learned vectors.

Writing mirrors the specification bit by bit: distances in its order, the first entry among equals. Indices are found
over a whole page and kept in scratch behind the page's coded form until they are packed. Reading for attention is one
vector load for each code, where sizes are powers of two, or a load for each element.
"""

import triton
import triton.language as tl

from kvq_compile.kernels.triton.formats import bounded
from kvq_compile.kernels.triton.packing import load_codes

# --- elements to codes ----------------------------------------------------------------------------


@triton.jit
def _nearest_entry(y, book, CONSTANTS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the entries (int32) of the part of a codebook that are nearest, the first among equals.

    ``y`` has one tensor of tokens for each of the coupled channels. Each lane keeps the nearest of the entries that it
    sees, one in ``BLOCK``, so that lanes meet once.
    """
    TOKENS: tl.constexpr = y[0].shape[0]
    ENTRIES: tl.constexpr = CONSTANTS.levels + 1
    COUPLE: tl.constexpr = CONSTANTS.couple
    lane = tl.arange(0, BLOCK)
    least = tl.full((BLOCK, TOKENS), float("inf"), tl.float32)
    found = lane[:, None] + tl.zeros((BLOCK, TOKENS), tl.int32)
    for block in range(0, ENTRIES, BLOCK):
        entry = block + lane
        distance = tl.zeros((BLOCK, TOKENS), tl.float32)
        for channel in tl.static_range(COUPLE):
            centroid = tl.load(book + entry * COUPLE + channel).to(tl.float32)
            difference = y[channel][None, :] - centroid[:, None]
            distance += difference * difference
        nearer = distance < least
        least = tl.where(nearer, distance, least)
        found = tl.where(nearer, entry[:, None], found)
    is_least = least == tl.min(least, 0)[None, :]
    return tl.min(tl.where(is_least, found, ENTRIES), 0)


@triton.jit
def find_entries(scratch, book, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Find the entries of the page in scratch and write them behind it, ``[code_channels, page_size]``."""
    PAGE: tl.constexpr = CONSTANTS.page_size
    ENTRIES: tl.constexpr = CONSTANTS.levels + 1
    COUPLE: tl.constexpr = CONSTANTS.couple
    BLOCK: tl.constexpr = min(ENTRIES, max(1, TILE // PAGE))
    token = tl.arange(0, PAGE)
    for part in range(CONSTANTS.code_channels):
        y = ()
        for channel in tl.static_range(COUPLE):
            where = scratch + token * CONSTANTS.head_dim + part * COUPLE + channel
            y += (bounded(tl.load(where)),)  # type: ignore[assignment]  # a tuple that grows
        entry = _nearest_entry(y, book + part * (ENTRIES * COUPLE), CONSTANTS, BLOCK)
        where = scratch + PAGE * CONSTANTS.head_dim + part * PAGE + token
        tl.store(where, entry.to(tl.float32))


@triton.jit
def page_codes(scratch, token, part, exists, CONSTANTS: tl.constexpr):
    """Return the codes (int32) of a page whose entries have been found, ``part`` counting those of a token."""
    where = CONSTANTS.page_size * CONSTANTS.head_dim + part * CONSTANTS.page_size + token
    return tl.load(scratch + where, mask=exists, other=0.0).to(tl.int32)


# --- codes to elements ----------------------------------------------------------------------------


@triton.jit
def load_elements(codes, book, token, channel, exists, CONSTANTS: tl.constexpr):
    """Return elements (fp16) of centroids, each by loads of its own."""
    COUPLE: tl.constexpr = CONSTANTS.couple
    code = load_codes(codes, token, channel // COUPLE, exists, CONSTANTS)
    entry = channel // COUPLE * (CONSTANTS.levels + 1) + code
    return tl.load(book + (entry * COUPLE + channel % COUPLE), mask=exists, other=0)


@triton.jit
def _gather(codes, book, token, FIRST: tl.constexpr, GROUPS: tl.constexpr, CONSTANTS: tl.constexpr):
    """Return centroids ``[tokens, GROUPS * couple]`` of the groups of channels from ``FIRST`` on."""
    COUPLE: tl.constexpr = CONSTANTS.couple
    group = FIRST + tl.arange(0, GROUPS)
    code = load_codes(codes, token[:, None], group[None, :], None, CONSTANTS)
    first = (group[None, :] * (CONSTANTS.levels + 1) + code) * COUPLE
    rows = tl.load(book + first[:, :, None] + tl.arange(0, COUPLE)[None, None, :])
    return tl.reshape(rows, (token.shape[0], GROUPS * COUPLE))


@triton.jit
def read_keys(codes, book, channel, exists, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return a page of keys ``[page_size, columns]``."""
    token = tl.arange(0, KEY.page_size)
    if KEY.gathers:
        k = _gather(codes, book, token, 0, KEY.code_channels, KEY)
    else:
        k = load_elements(codes, book, token[:, None], channel[None, :], exists[None, :], KEY)
    return k.to(LAUNCH.dtype)


@triton.jit
def read_key_halves(
    codes, book, channel, exists, KEY: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr,
    LAUNCH: tl.constexpr,
):  # fmt: skip
    """Return ``ROWS`` keys of a page from ``FIRST`` on as two tiles ``[ROWS, columns / 2]``."""
    HALF: tl.constexpr = KEY.head_dim // 2
    token = FIRST + tl.arange(0, ROWS)
    if KEY.gathers:
        a = _gather(codes, book, token, 0, HALF // KEY.couple, KEY)
        b = _gather(codes, book, token, HALF // KEY.couple, HALF // KEY.couple, KEY)
    else:
        ok = exists[None, :]
        a = load_elements(codes, book, token[:, None], channel[None, :], ok, KEY)
        b = load_elements(codes, book, token[:, None], HALF + channel[None, :], ok, KEY)
    return a.to(LAUNCH.dtype), b.to(LAUNCH.dtype)


@triton.jit
def read_values(codes, book, VALUE: tl.constexpr, LAUNCH: tl.constexpr):
    """Return a page of values ``[channels, page_size]``."""
    token = tl.arange(0, VALUE.page_size)
    if VALUE.gathers:
        v = tl.trans(_gather(codes, book, token, 0, VALUE.code_channels, VALUE))
    else:
        channel = tl.arange(0, VALUE.channels)
        exists = (channel < VALUE.head_dim)[:, None]
        v = load_elements(codes, book, token[None, :], channel[:, None], exists, VALUE)
    return v.to(LAUNCH.dtype)
