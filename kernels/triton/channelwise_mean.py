"""The channelwise scheme in Triton: what the mean that was taken off keys adds to scores.

A pair ``a, b`` of the mean ``m``, rotated by the angle of a slot, adds ``cosine (q_a m_a + q_b m_b) + sine (q_b m_a -
q_a m_b)`` to a score. The angle is that of the page's first slot, by which both terms are rotated, page by page, and
that of the token in the page, the same for all pages. So a page costs a product with the cosines and sines of its
tokens. The factors are brought near 1 by a power of two of their own, since they would underflow fp16 where keys are
small and queries large.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kvq_compile.kernels.triton.transforms import cosine_and_sine, load_table


class Mean(NamedTuple):
    """Factors on the cosines and sines of a page.

    Attributes:
        own, other: Factors ``[2 * places, queries]`` on cosines, then sines; and those of the other of both.
        angles: Cosines, then sines, of the tokens of a page, ``[page_size, 2 * places]``.
        cosine, sine: Of the angle from page to page, by which ``own`` takes from ``other``, ``[2 * places, 1]``.
        ratio: What their products are multiplied by to be in units of those with rows of fields, ``[queries]``.
    """

    own: Any
    other: Any
    angles: Any
    cosine: Any
    sine: Any
    ratio: Any


@triton.jit
def start_mean(keys, first, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return the `Mean` of keys for pages from ``first`` on; of keys without one what a loop can carry."""
    if KEY.takes_mean:
        PLACES: tl.constexpr = KEY.mean_places
        row, column = tl.arange(0, 2 * PLACES), tl.arange(0, LAUNCH.block_q)[None, :]
        pair, sign = row % PLACES, tl.where(row < PLACES, 1.0, -1.0)
        own = tl.load(keys.fields.mean + row[:, None] * LAUNCH.block_q + column)
        other = (row + PLACES) % (2 * PLACES)
        other = tl.load(keys.fields.mean + other[:, None] * LAUNCH.block_q + column)
        tables = keys.calibration.tables
        frequency = load_table(tables, pair, pair < KEY.mean_pairs, "frequency", KEY)
        cosine, sine = cosine_and_sine((KEY.sinks + first * KEY.page_size) * frequency)
        own, other = _turn(own, other, cosine[:, None], (sine * sign)[:, None])
        cosine, sine = cosine_and_sine(KEY.page_size * frequency)
        token = tl.arange(0, KEY.page_size)[:, None]
        angles = tl.load(keys.fields.angles + token * (2 * PLACES) + row[None, :])
        ratio = tl.load(keys.fields.ratio + tl.arange(0, LAUNCH.block_q))
        mean = Mean(own, other, angles, cosine[:, None], (sine * sign)[:, None], ratio)
    else:
        nothing = tl.zeros([1], tl.float32)
        mean = Mean(nothing, nothing, nothing, nothing, nothing, nothing)
    return mean


@triton.jit
def turn_mean(mean, KEY: tl.constexpr):
    """Return the `Mean` of the next page."""
    own, other = mean.own, mean.other
    if KEY.takes_mean:
        own, other = _turn(own, other, mean.cosine, mean.sine)
    return Mean(own, other, mean.angles, mean.cosine, mean.sine, mean.ratio)


@triton.jit
def mean_scores(mean, terms, LAUNCH: tl.constexpr):
    """Return what the mean adds to the scores ``[page_size, queries]`` of a page, in units of products with rows.

    ``terms``: its own factors, in the dtype of products.
    """
    # Three products in tf32, with eight warps, return wrong numbers or use an illegal address here (Triton 3.6).
    PRECISION: tl.constexpr = "ieee" if LAUNCH.dtype == tl.float32 else LAUNCH.precision
    scores = tl.dot(mean.angles, terms, input_precision=PRECISION)
    return scores * mean.ratio[None, :]


@triton.jit
def _turn(own, other, cosine, sine):
    return own * cosine + other * sine, other * cosine - own * sine
