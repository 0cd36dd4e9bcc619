"""Where kernels choose by scheme, in Triton: each function here asks that of the scheme's file.

Of pages that differ in bits, mixed and channelwise, only `load_elements` knows: they are written and attended to in
ways of their own (`mixed_write`, `mixed`, `channelwise_write`, `channelwise`).
"""

import triton
import triton.language as tl

from kvq_compile.kernels.triton import channelwise, codebook, mixed, uniform


@triton.jit
def load_elements(page, book, token, channel, exists, CONSTANTS: tl.constexpr):
    """Return the elements (fp32) that a page stands for, in the basis in which they were coded."""
    if CONSTANTS.scheme == "mixed":
        return mixed.load_elements(page, token, channel, exists, CONSTANTS)
    elif CONSTANTS.scheme == "channelwise":
        return channelwise.load_elements(page, token, channel, exists, CONSTANTS)
    elif CONSTANTS.scheme == "codebook":
        y = codebook.load_elements(page.codes, book, token, channel, exists, CONSTANTS)
        return y.to(tl.float32)
    else:
        return uniform.load_elements(page, token, channel, exists, CONSTANTS)


@triton.jit
def write_params(
    source, page, scratch, calibration, CONSTANTS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Write the parameters of a page, or find what its codes follow from and keep that in scratch."""
    if CONSTANTS.scheme == "codebook":
        codebook.find_entries(scratch, calibration.book, CONSTANTS, TILE)
    else:
        uniform.write_params(source, page.params, scratch, calibration.tables, CONSTANTS, TILE)


@triton.jit
def page_codes(source, page, scratch, token, part, exists, CONSTANTS: tl.constexpr):
    """Return the codes (int32) of a page, ``part`` counting those of a token."""
    if CONSTANTS.scheme == "codebook":
        return codebook.page_codes(scratch, token, part, exists, CONSTANTS)
    else:
        return uniform.page_codes(source, page.params, scratch, token, part, exists, CONSTANTS)


@triton.jit
def read_keys(codes, book, channel, exists, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return a page of keys: codes, which lack their parameters, or centroids."""
    if KEY.scheme == "codebook":
        return codebook.read_keys(codes, book, channel, exists, KEY, LAUNCH)
    else:
        return uniform.read_keys(codes, channel, exists, KEY, LAUNCH)


@triton.jit
def read_key_halves(
    codes, params, book, KEY: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr,
    LAUNCH: tl.constexpr,
):  # fmt: skip
    """Return ``ROWS`` keys of a page from ``FIRST`` on, dequantized, as two tiles ``[ROWS, columns / 2]``."""
    HALF: tl.constexpr = KEY.head_dim // 2
    channel, exists = uniform.tile_channels(KEY.columns // 2, HALF, KEY)
    if KEY.scheme == "codebook":
        return codebook.read_key_halves(codes, book, channel, exists, KEY, FIRST, ROWS, LAUNCH)
    else:
        a, b = uniform.read_key_halves(codes, channel, exists, KEY, FIRST, ROWS, LAUNCH)
        a = uniform.dequantize_keys(params, a, channel, exists, KEY, FIRST, 0, LAUNCH.fast)
        b = uniform.dequantize_keys(
            params, b, HALF + channel, exists, KEY, FIRST, HALF, LAUNCH.fast
        )
        return a, b


@triton.jit
def read_values(codes, held, book, VALUE: tl.constexpr, FOLD: tl.constexpr, LAUNCH: tl.constexpr):
    """Return a page of values: codes, which lack their parameters (``FOLD``: in any order and place), or centroids."""
    if VALUE.scheme == "codebook":
        return codebook.read_values(codes, book, VALUE, LAUNCH)
    else:
        return uniform.read_values(codes, held, VALUE, FOLD, LAUNCH)
