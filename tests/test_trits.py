"""Three-level codes, five to a byte: where each lies, and what brings values from there into registers.

Kernels run natively where there is a GPU and in Triton's interpreter elsewhere.
"""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_site import Site
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED
from kvq_compile.kernels.reference.formats import pack, unpack
from kvq_compile.kernels.schemes import Uniform
from kvq_compile.kernels.triton import trits
from kvq_compile.kernels.words import TRITS, trit_planes
from native import CONVERSIONS
from test_kernels_dequantize import both, filled
from written_caches import Caches, full

pytestmark = CONVERSIONS
SIZES = [
    (64, 64),
    (128, 128),
    (80, 256),
    (128, 32),
    (80, 64),
    (64, 256),
]  # channels, tokens of a page


def layout_of(role: str, head_dim: int, page: int, group_size: int | None = None) -> Layout:
    scheme = Uniform(1.5, group_size=group_size, packing="trits")
    return Layout(role, head_dim, Regions(3, 5, page), scheme)  # type: ignore[arg-type]


@given(
    st.sampled_from(["key", "value"]), st.integers(1, 330), st.sampled_from([32, 64, 128, 256]),
    st.integers(0, 99),
)  # fmt: skip
def test_codes_lie_where_the_layout_says(role: str, head_dim: int, page: int, seed: int) -> None:
    layout = layout_of(role, head_dim, page)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(3, (2, page, head_dim), generator=generator, dtype=torch.int32)
    packed = pack(codes, layout)
    assert packed.shape == (2, layout.rows, layout.row_words)
    assert layout.row_words == -(-layout.row_length // (2 * TRITS))
    assert torch.equal(unpack(packed, layout), codes)
    rows = codes if role == "key" else codes.mT
    data = packed.flatten(1).contiguous().view(torch.uint8).view(2, -1)
    for row, place in torch.randint(1 << 20, (20, 2), generator=generator).tolist():
        row, place = row % layout.rows, place % layout.row_length
        first, width = max(p for p in trit_planes(layout.row_words) if 2 * TRITS * p[0] <= place)
        digit, byte = divmod(place - 2 * TRITS * first, 2 * width)
        at = 2 * (layout.rows * first + row * width) + byte
        assert torch.equal(data[:, at].int() // 3**digit % 3, rows[:, row, place])


@pytest.mark.parametrize("words", [1, 2, 3, 4, 7, 13, 26, 32])
def test_planes_are_all_words_of_a_row(words: int) -> None:
    planes = trit_planes(words)
    assert [i for first, width in planes for i in range(first, first + width)] == [*range(words)]
    assert {width for _, width in planes} <= {4, 2, 1}


@pytest.mark.parametrize(("head_dim", "page"), SIZES)
def test_values_are_written_and_read_as_specified(head_dim: int, page: int) -> None:
    layout = layout_of("value", head_dim, page)
    tokens = torch.randn(1, 2, full(layout, 1) + 3, head_dim, generator=torch.Generator())
    caches = Caches(layout, torch.float32)
    caches.append(tokens, 0, False)
    caches.assert_equal()
    framed = layout, UNCALIBRATED
    found, expected = both(framed, filled(framed, full(layout, 1), torch.float32), full(layout, 1))
    assert torch.equal(found, expected)


@pytest.mark.long(but=["1-64-64", "5-128-128", "5-80-64", "1-128-32"])
@pytest.mark.parametrize(("head_dim", "page"), SIZES)
@pytest.mark.parametrize("new", [1, 5])
def test_values_take_part_in_attention(head_dim: int, page: int, new: int) -> None:
    """Of one token and two query heads parameters are folded into weights, of five they are not."""
    value = layout_of("value", head_dim, page, head_dim // 2)
    key = Layout("key", head_dim, value.regions, Uniform(2))
    lengths = full(value, 1) + 9, new, 0
    sides = (key, UNCALIBRATED), (value, UNCALIBRATED)
    site = Site(sides, (2, 2), lengths, torch.float16)
    site.assert_low_precision_error(site.attend(None), None)


@pytest.mark.parametrize("group_size", [4, 32])
def test_groups_of_tokens_keep_their_parameters(group_size: int) -> None:
    """Columns of a tile change places within 16: groups of 4 tokens are read in the order that they have."""
    scheme = Uniform(1.5, "channel", group_size, packing="trits")
    value = Layout("value", 64, Regions(3, 5, 64), scheme)
    key = Layout("key", 64, value.regions, Uniform(2))
    sides = (key, UNCALIBRATED), (value, UNCALIBRATED)
    site = Site(sides, (2, 2), (full(value, 1) + 9, 1, 0), torch.float16)
    site.assert_low_precision_error(site.attend(None), None)


def test_values_that_take_part_in_scores_are_read_in_order() -> None:
    value = layout_of("value", 64, 64)
    sides = (Layout("key", 32, value.regions, Uniform(2)), UNCALIBRATED), (value, UNCALIBRATED)
    site = Site(sides, (1, 4), (full(value, 1) + 9, 1, 0), torch.float16)
    site.score_values()
    site.assert_low_precision_error(site.attend(None), None)


# What kernels do on NVIDIA hardware: PTX, run here.


def run(program: str, inputs: list[int], outputs: int) -> list[int]:
    """Return what instructions leave in the 16-bit ``$0 ...``; ``inputs`` are the registers behind these."""
    held = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> int:
        return held[name] if name in held else int(name, 0)

    def halves(bits: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        return np.array([bits & 0xFFFF, bits >> 16], np.uint16).view(np.float16).astype(np.float64)

    def rounded(numbers: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> int:
        low, high = numbers.astype(np.float16).view(np.uint16).tolist()
        return int(low | high << 16)

    for name, arguments in re.findall(r"(\w+)\.(?:rn\.)?(?:b32|u32\.u16|f16x2) ([^;]+);", program):
        if name == "reg":
            continue
        if arguments.startswith("{"):
            low, high, source = (word.strip() for word in re.sub(r"[{}]", "", arguments).split(","))
            held[low], held[high] = value(source) & 0xFFFF, value(source) >> 16
            continue
        to, *of = (word.strip() for word in arguments.split(","))
        x = [value(word) for word in of]
        if name == "prmt":
            both = x[0] | x[1] << 32
            chosen = [both >> 8 * (x[2] >> 4 * i & 7) & 0xFF for i in range(4)]
            held[to] = sum(byte << 8 * i for i, byte in enumerate(chosen))
        elif name in ("mov", "cvt"):
            held[to] = x[0]
        else:  # exact in fp64, then rounded once
            a, b, *rest = [halves(bits) for bits in x]
            done = a + b if name == "add" else a * b
            held[to] = rounded(done + rest[0] if name == "fma" else done)
    return [held[f"${i}"] for i in range(outputs)]


def number(bits: int) -> float:
    return float(np.array(bits, np.uint16).view(np.float16))


WORDS = [low | (242 - low) << 8 for low in range(3**TRITS)]  # every byte in both places


@pytest.mark.parametrize("in_place", [True, False])
def test_all_digits_of_every_byte_are_taken_at_once(in_place: bool) -> None:
    program = (trits.ALL_IN_PLACE if in_place else trits.ALL_AS_FP16).value
    for word in WORDS:
        found = [number(bits) for bits in run(program, [word], 2 * TRITS)]
        codes = [
            (word >> 8 * byte & 0xFF) // 3**digit % 3 for digit in range(TRITS) for byte in (0, 1)
        ]
        expected = [(code - 1) * 2.0**-24 if in_place else code for code in codes]
        assert found == expected, word


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("digit", range(TRITS))
def test_one_digit_of_every_byte_is_taken_from_either_half(digit: int, in_place: bool) -> None:
    program = (trits.ONE_IN_PLACE if in_place else trits.ONE_AS_FP16).value
    power = np.float32(1.0)
    for _ in range(digit):
        power = np.float32(power / np.float32(3))
    powers = (
        np.array([power, power * np.float32(1 / 3)]).astype(np.float16).view(np.uint16).tolist()
    )
    for word in WORDS:
        for half, pair in (
            (trits.LOW_HALF, word | 0x5A5A << 16),
            (trits.HIGH_HALF, word << 16 | 0x5A5A),
        ):
            places = [half.value, powers[0] | powers[1] << 16]
            found = [number(bits) for bits in run(program, [pair, *places], 2)]
            codes = [(word >> 8 * byte & 0xFF) // 3**digit % 3 for byte in (0, 1)]
            expected = [(code - 1) * 2.0**-24 if in_place else code for code in codes]
            assert found == expected, word
