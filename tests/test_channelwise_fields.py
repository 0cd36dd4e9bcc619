"""Where the bits of keys lie whose channels differ in bits, and what cuts codes out of words where they lie."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvq_compile.kernels.channelwise_scheme import BLOCK_WORDS, FIELDS, MAX_WIDTH
from kvq_compile.kernels.reference.channelwise import bit_places, pack_bits, unpack_bits
from kvq_compile.kernels.triton import primitives
from kvq_compile.kernels.words import WORD_BITS

BLOCK = BLOCK_WORDS * FIELDS  # fields


@st.composite
def widths(draw: st.DrawFn) -> torch.Tensor:
    """Draw the widths of a head's channels, whose bits fill whole words."""
    dim = draw(st.sampled_from([16, 20, 64, 128, 200, 576]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    width = torch.randint(0, MAX_WIDTH + 1, (dim,), generator=generator)
    width *= torch.rand(dim, generator=generator) < draw(st.sampled_from([0.3, 1.0]))
    for channel in torch.randperm(dim, generator=generator).tolist():  # down to whole words
        width[channel] -= min(int(width[channel]), int(width.sum()) % WORD_BITS)
    width[0] += WORD_BITS // 2 * (width.sum() == 0)
    width[1] += WORD_BITS // 2 * (width.sum() == WORD_BITS // 2)
    return width.float()


@given(widths())
def test_a_token_has_each_bit_of_each_code_once(width: torch.Tensor) -> None:
    rows = int(width.sum())
    channel, bit = bit_places(width, rows)
    assert bool((bit >= 0).all()) and bool((bit < width[channel]).all())
    assert len(set(zip(channel.tolist(), bit.tolist(), strict=True))) == rows


@given(widths())
def test_a_field_is_a_digit_or_holds_two_highest_bits_and_lies_in_the_first_blocks(
    width: torch.Tensor,
) -> None:
    channel, bit = (x.view(-1, 2) for x in bit_places(width, int(width.sum())))
    digit = (channel[:, 0] == channel[:, 1]) & (bit[:, 0] % 2 == 0) & (bit[:, 1] == bit[:, 0] + 1)
    left_over = ~digit
    assert bool((width[channel[left_over]] == bit[left_over] + 1).all())
    assert bool((width[channel[left_over]] % 2 == 1).all())
    blocks = -(-len(width) // (2 * BLOCK))
    assert not left_over[blocks * BLOCK :].any()


@given(widths(), st.integers(0, 99))
def test_unpacking_what_was_packed_gives_every_bit_back(width: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (2, 32, int(width.sum())), generator=generator, dtype=torch.int32)
    assert torch.equal(unpack_bits(pack_bits(bits)), bits)


def test_fields_lie_in_words_as_codes_of_two_bits_do() -> None:
    """The second block has one word a token; field ``f W + w`` of a block is field ``f`` of word ``w``."""
    field = torch.arange(BLOCK + FIELDS)
    bits = torch.stack([field * 5 % 2, field * 5 // 2 % 2], -1).flatten().expand(32, -1).int()
    words = pack_bits(bits).flatten().int() & 0xFFFF
    first, second = words[: 32 * BLOCK_WORDS].view(32, BLOCK_WORDS), words[32 * BLOCK_WORDS :]
    for number in range(BLOCK):
        word = first[:, number % BLOCK_WORDS]
        assert bool(((word >> 2 * (number // BLOCK_WORDS) & 3) == number * 5 % 4).all())
    for number in range(FIELDS):
        assert bool(((second >> 2 * number & 3) == (BLOCK + number) * 5 % 4).all())


# What kernels read on NVIDIA hardware: PTX, run here.


def run(program: str, inputs: list[int], outputs: int) -> list[int]:
    """Return what instructions on 32-bit registers leave in ``$0 ...``; ``inputs`` are the registers behind these."""
    held = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> int:
        return held[name] if name in held else int(name, 0)

    for name, arguments in re.findall(r"(mov|shl|shr|and|lop3)\.[bu]32 ([^;]+);", program):
        to, *of = (word.strip() for word in arguments.split(","))
        x = [value(word) for word in of]
        held[to] = {
            "mov": lambda x: x[0],
            "shl": lambda x: x[0] << x[1],
            "shr": lambda x: x[0] >> x[1],
            "and": lambda x: x[0] & x[1],
            "lop3": lambda x: x[0] & x[1] | x[2],  # 0xEA
        }[name](x) & 0xFFFFFFFF
    return [held[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize(
    ("bits", "mask", "program"),
    [
        (8, 0xFF, primitives.CUT_8),
        (4, 15, primitives.CUT_4),
        (3, 7, primitives.CUT_3),
        (2, 3, primitives.CUT_2),
        (2, 1, primitives.CUT_LOWER),
        (2, 2, primitives.CUT_HIGHER),
        (1, 1, primitives.CUT_1),
    ],
)
def test_a_code_cut_out_of_a_word_reads_as_a_small_number(
    bits: int, mask: int, program: object
) -> None:
    places, parts = primitives.PLACES[bits], 3 if bits == 3 else 1
    generator = torch.Generator().manual_seed(bits)
    for words in torch.randint(1 << 32, (200, parts), generator=generator).tolist():
        cut = run(program.value, words, len(places))  # type: ignore[attr-defined]
        for half in (0, 16):
            for field, place in enumerate(places):
                if field == 15 and bits == 3:
                    code = sum((word >> half + 15 & 1) << i for i, word in enumerate(words))
                else:
                    word, inside = divmod(field, 5) if bits == 3 else (0, field)
                    code = words[word] >> half + inside * bits & (1 << bits) - 1
                number = torch.tensor(cut[field] >> half & 0xFFFF, dtype=torch.int32)
                read = number.to(torch.int16).view(torch.float16)
                assert float(read) == (code & mask) * 2.0 ** (place - 24)
