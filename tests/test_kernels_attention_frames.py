"""Fused attention over calibrated caches: channel tables, rotary keys, codebooks, fp8 parameters, trits.

The same claim as in `test_kernels_attention`: the error is that of the same computation in the query's
dtype.
"""

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_site import (
    DTYPES,
    SHARED,
    Side,
    Site,
    assert_right_under_any_mask,
    assert_shares_do_not_matter,
    causal,
    starts,
)
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated
from kvq_compile.kernels.schemes import Scheme, Uniform, scheme_of
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import Tables
from kvq_compile.methods import hadamard_values
from kvq_compile.testing import changed
from kvq_compile.testing.small_tables import framed_layouts, random_tables
from native import CONVERSIONS, examples
from thorough import spread

pytestmark = CONVERSIONS
EXAMPLES = examples(Fraction(1, 2))


def make_scheme(head_dim: int, seed: int, **options: Any) -> tuple[Scheme, Tables]:
    """Return a scheme with random tables."""
    couple = options.get("couple")
    tables = random_tables(
        2, head_dim, group_size=options.get("group_size") or head_dim, seed=seed,
        rotary=options.get("rotary", False),
        codebook=None if couple is None else (couple, options["bits"]),
    )  # fmt: skip
    rotary = options.pop("rotary", False)
    return scheme_of(options, tables.digest, rotary), tables


def make_side(role: Any, head_dim: int = 64, page: int = 32, seed: int = 0, **options: Any) -> Any:
    """Return a layout with random tables, and its frame."""
    scheme, tables = make_scheme(head_dim, seed, **options)
    layout = Layout(role, head_dim, Regions(3, 20, page), scheme)
    shift = torch.tensor([5, -3], dtype=torch.int32) if layout.rotary else None
    return layout, Calibrated(tables.words, shift)


@st.composite
def sites(draw: st.DrawFn) -> Site:
    pages = (draw(st.sampled_from((32, 32, 64))),)
    dims = (40, 64, 72, 80, 96, 120, 128)
    key, key_frame = draw(framed_layouts("key", head_dims=dims, page_sizes=pages))
    plain = draw(st.sampled_from(("none", "none", "key", "value")))
    value, value_frame = draw(framed_layouts("value", head_dims=dims, page_sizes=pages))
    value = changed(value, sinks=key.sinks, window=key.window)
    spec = CacheSpec(Uniform(4), Uniform(2), key.sinks, key.window, pages[0])
    sides: tuple[Side, Side] = (key, key_frame), (value, value_frame)
    if plain == "key":
        sides = (spec.layout("key", key.head_dim), UNCALIBRATED), sides[1]
    elif plain == "value":
        sides = sides[0], (spec.layout("value", value.head_dim), UNCALIBRATED)
    lengths = draw(st.sampled_from(starts(key))), draw(st.sampled_from([1, 1, 2, 5])), 0
    return Site(sides, (2, draw(st.sampled_from(SHARED))), lengths, draw(st.sampled_from(DTYPES)))


@EXAMPLES
@given(sites(), st.data())
def test_attention_has_the_error_of_the_same_computation_in_low_precision(
    site: Site, data: st.DataObject
) -> None:
    assert_right_under_any_mask(site, data)


KEYS = {
    "rotary": {"bits": 2, "rotary": True, "group_size": 32, "params": "fp8"},
    "rotary by channel": {"bits": 3, "rotary": True, "grouping": "channel", "group_size": 32},
    "rotary trits": {"bits": 1.5, "rotary": True, "packing": "trits", "params": "fp8"},
    "rotary codebook": {"bits": 8, "rotary": True, "couple": 4},
    "odd codebook": {"bits": 3, "rotary": True, "couple": 2},
    "tables": {"bits": 4, "transform": "hadamard"},
    "codebook": {"bits": 10, "couple": 4},
}
VALUES = {
    "trits": {"bits": 1.5, "packing": "trits", "group_size": 32, "params": "fp8"},
    "three levels": {"bits": 1.5, "group_size": 32, "params": "fp8"},
    "hadamard": {"bits": 2, "transform": "hadamard", "params": "fp8"},
    "codebook": {"bits": 8, "couple": 8},
    "small groups": {"bits": 8, "group_size": 16},
    "wide codebook": {"bits": 10, "couple": 4},
}


@pytest.mark.parametrize(("key", "value"), spread(["rotary", "codebook"], VALUES, 2))
def test_any_keys_go_with_any_values(key: str, value: str) -> None:
    sides = make_side("key", **KEYS[key]), make_side("value", seed=1, **VALUES[value])
    site = Site(sides, (2, 4), (100, 1, 0), torch.float32)
    site.assert_low_precision_error(site.attend(None), None)


@pytest.mark.parametrize(("key", "bits"), spread(["rotary", "rotary codebook"], [2, 4], 2))
def test_calibrated_keys_go_with_values_after_hadamard(key: str, bits: int) -> None:
    value = Layout("value", 64, Regions(3, 20, 32), hadamard_values(bits))
    sides = make_side("key", **KEYS[key]), (value, UNCALIBRATED)
    site = Site(sides, (2, 4), (100, 1, 0), torch.float32)
    site.assert_low_precision_error(site.attend(None), None)


@pytest.mark.long(but=["rotary trits", "rotary by channel", "odd codebook"])
@pytest.mark.parametrize("key", KEYS)
def test_a_page_in_two_halves_and_a_chunk_of_queries_are_right(key: str) -> None:
    sides = make_side("key", page=64, **KEYS[key]), make_side("value", page=64, bits=4)
    site = Site(sides, (2, 4), (160, 9, 0), torch.float32)
    site.assert_low_precision_error(site.attend(causal(site)), causal(site))


def test_other_tables_and_another_shift_change_the_result() -> None:
    sides = make_side("key", **KEYS["rotary"]), make_side("value", **VALUES["trits"])
    site = Site(sides, (2, 2), (100, 1, 0), torch.float32)
    before = site.attend(None)
    assert (before - site.expected(None, torch.float64)).abs().max() < 1e-4
    (_, keys), (_, values) = sides
    for other in (
        {"key_frame": keys._replace(shift=keys.shift + 1)},
        {"key_frame": keys._replace(tables=keys.tables.flip(0))},
        {"value_frame": values._replace(tables=values.tables.flip(0))},
    ):
        assert (site.attend(None, **other) - before).abs().max() > 1e-3


def test_a_prompt_without_history_attends_to_itself() -> None:
    sides = make_side("key", **KEYS["rotary"]), make_side("value", **VALUES["trits"])
    site = Site(sides, (2, 2), (0, 9, 0), torch.float32)
    site.assert_low_precision_error(site.attend(None, by_position=False), None)


def test_the_number_of_shares_does_not_change_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = make_side("key", **KEYS["rotary"]), make_side("value", **VALUES["three levels"])
    site = Site(sides, (2, 4), (120, 1, 0), torch.float32)
    assert_shares_do_not_matter(site, 1000, monkeypatch)
