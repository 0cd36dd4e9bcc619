"""Kernels compile ahead of time for GPUs that are not there; on Hopper their state stays in registers."""

from pathlib import Path

import pytest

import aot
import compiled_kernels
from compiled_kernels import (
    BENT,
    BY_ROW,
    DECODING,
    GROUPED,
    LATENTS,
    MASKED,
    READING,
    SIZES,
    SMALL,
    WEIGHING,
    WRITING,
    WRITING_BOTH,
)
from thorough import THOROUGH
from versions import need_triton_of_budgets

SM_REGISTERS, SM_SHARED = 65536, 227 * 1024  # of Hopper: 32-bit registers, bytes of shared memory
# Of a thread, on the stack. Attention does not read that way; a page is written once in 128 steps; with values of three
# bits a third program to an SM is worth more than a few registers.
A_FEW_BYTES = {"read tc": 48, "write both kivi-2": 8, "tc-3": 16, "tc-3 mean": 48}
SPILLING = {"weigh large", "weigh fp32", "weigh fp32, large"}
ALONE = {"skvq-2", "skvq-3", *(name for name in DECODING if name.startswith("cq"))}
ELSEWHERE = ["int4", "kivi-2", "skvq-2", "cq-8c8b", "qaq-2.3", "tc-3 mean", "write fp8-trits", "write rotary-codebook",
             "write searched channels", "write qaq", "write tc", "requantize qaq", "read rotary", "read tc",
             "read qaq-outliers", "weigh decode", "skvq-2-trits"]  # fmt: skip
TARGETS = ["sm_80", "sm_100", "gfx942"]


def usage_of(target: str, names: list[str]) -> dict[str, aot.Usage]:
    used = aot.run(Path(compiled_kernels.__file__), target, names)
    assert list(used) == names
    return used


def budgeted(names: list[str]) -> dict[str, aot.Usage]:
    """Return what kernels take on Hopper; under a Triton that budgets were not chosen with, only hold them to an SM."""
    used = usage_of("sm_90", names)
    for name, use in used.items():
        assert use["shared"] <= SM_SHARED, name
    need_triton_of_budgets()
    return used


def test_one_kernel_of_each_kind_stays_in_registers() -> None:
    """The quick part of the long tests below."""
    names = [
        next(iter(kind))
        for kind in (DECODING, BENT, MASKED, GROUPED, WRITING, WRITING_BOTH, READING)
    ]
    for name, used in budgeted([*names, "join sinks"]).items():
        assert used["stack"] <= (48 if name in MASKED else 0), name


def test_one_kernel_of_each_size_fits_an_sm() -> None:
    for name, used in usage_of(
        "sm_90", [next(iter(kind)) for kind in (SIZES, LATENTS, WEIGHING)]
    ).items():
        assert used["shared"] <= SM_SHARED, name


@pytest.mark.long
def test_decoding_keeps_its_state_in_registers_and_two_programs_share_an_sm() -> None:
    for name, used in budgeted([*DECODING]).items():
        assert used["shared"] * 2 <= SM_SHARED, name
        assert used["stack"] <= A_FEW_BYTES.get(name, 0), name
        assert name in ALONE or used["registers"] * 128 * 2 <= SM_REGISTERS, name


@pytest.mark.long
def test_scores_are_bent_in_registers() -> None:
    for name, used in budgeted([*BENT]).items():
        assert used["shared"] * 2 <= SM_SHARED, name
        assert used["stack"] <= A_FEW_BYTES.get(name, 0), name


@pytest.mark.long
def test_under_a_mask_as_many_programs_share_an_sm() -> None:
    """Regression: a mask took registers of which three programs to an SM were to have a share, so that two ran."""
    for name, used in budgeted([*MASKED]).items():
        share = 2 if name.startswith("tc-4") else 3
        assert used["stack"] <= 48, name
        assert used["shared"] * share <= SM_SHARED, name
        assert used["registers"] * 128 * share <= SM_REGISTERS, name


@pytest.mark.long
def test_decoding_fits_an_sm_whatever_the_size_of_heads() -> None:
    used = usage_of("sm_90", [*SIZES])
    assert {name: use["shared"] <= SM_SHARED for name, use in used.items()} == dict.fromkeys(
        SIZES, True
    )


@pytest.mark.long
def test_groups_that_fill_no_tile_are_read_in_registers() -> None:
    """Regression: parameters loaded for each element, three pages ahead, asked for 276 KiB at 96 channels."""
    used = usage_of("sm_90", [*GROUPED])
    for name, use in used.items():
        assert use["shared"] * 2 <= SM_SHARED, name
        assert use["stack"] == 0, name


@pytest.mark.long
def test_attention_to_latents_fits_an_sm() -> None:
    """A key and a latent of 576 channels, and the queries of all heads, leave room for one program."""
    used = usage_of("sm_90", [*LATENTS])
    assert {name: use["shared"] <= SM_SHARED for name, use in used.items()} == dict.fromkeys(
        LATENTS, True
    )


@pytest.mark.long
def test_small_heads_and_single_tokens_compile() -> None:
    assert set(usage_of("sm_90", [*SMALL])) == set(SMALL)


@pytest.mark.long
def test_writing_and_reading_stay_in_registers() -> None:
    cases = [*WRITING, *WRITING_BOTH, *READING]
    used = budgeted(cases)
    assert {name: use["stack"] for name, use in used.items()} == dict.fromkeys(cases, 0) | {
        name: stack for name, stack in A_FEW_BYTES.items() if name in cases
    }


def test_small_pages_that_are_cut_open_are_written() -> None:
    """Regression: a scan of a tile of one row did not compile in the layout that these sizes lead to."""
    used = usage_of("sm_90", ["reopen tc"])["reopen tc"]
    assert used["shared"] <= SM_SHARED


@pytest.mark.long
def test_weighing_fits_an_sm() -> None:
    for name, used in usage_of("sm_90", [*WEIGHING]).items():
        assert used["shared"] <= SM_SHARED, name
        assert name in SPILLING or used["stack"] == 0, name


@pytest.mark.long(but=["gfx942"])
@pytest.mark.parametrize("place", range(len(TARGETS)), ids=TARGETS)
def test_kernels_compile_for_other_gpus(place: int) -> None:
    """On AMD hardware those that write do not spill either; of others the tiles are chosen for Hopper.

    The quick profile compiles each kernel for one of these, for another than the one before it.
    """
    target = TARGETS[place]
    names = ELSEWHERE if THOROUGH else ELSEWHERE[place :: len(TARGETS)]
    used = usage_of(target, names)
    written = [name for name in names if name.startswith(("write", "requantize"))]
    assert written
    assert target != "gfx942" or {used[name]["stack"] for name in written} == {0}


def test_tiles_of_pairs_of_fields_compile_for_blackwell() -> None:
    """Regression: Triton 3.8 found no layout in shared memory for a tile that ended as a reshape of pairs."""
    names = ["int3", "tc-4 mean", "qaq-2.3"]
    assert set(usage_of("sm_100", names)) == set(names)


@pytest.mark.long
def test_rows_of_lengths_of_their_own_cost_no_more_than_a_few_registers() -> None:
    one = usage_of("sm_90", [*BY_ROW])
    each = usage_of("sm_90", [f"{name}, by row" for name in BY_ROW])
    for name in BY_ROW:
        by_row = each[f"{name}, by row"]
        assert by_row["stack"] <= one[name]["stack"] + 16, name
        assert by_row["registers"] <= one[name]["registers"] + 16, name
