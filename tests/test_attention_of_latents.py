"""Values that take part in scores, as latents do: attention is as exact as the same computation in the model's dtype.

Kernels run natively where there is a GPU and in Triton's interpreter, in fp32, elsewhere; the CPU backend always.
"""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attention_site import (
    DTYPES,
    SHARED,
    Site,
    assert_right_under_any_mask,
    assert_shares_do_not_matter,
    causal,
    plain_sides,
    starts,
)
from kvq_compile.kernels import ops
from kvq_compile.kernels.packed import UNCALIBRATED
from kvq_compile.kernels.schemes import Channelwise, Mixed, Scheme, Uniform
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.triton import backend
from kvq_compile.options import make_spec
from native import CONVERSIONS, examples

pytestmark = CONVERSIONS


class OnTheCPU(Site):
    """A site whose attention the CPU backend computes."""

    def attend(
        self, mask: Tensor | None, by_position: bool = True, start: int | None = None, **_: object
    ) -> Tensor:
        start = self.start if start is None else start
        position = torch.arange(start, start + self.query.shape[2]) if by_position else None
        constants = [] if self.sink_logits is None else [self.sink_logits]
        return ops.attend(
            self.query, *self.new, *map(list, self.parts), constants, mask, position,
            None if by_position else start, self.score, *(layout for layout, _ in self.sides),
        )  # fmt: skip


@st.composite
def value_schemes(draw: st.DrawFn, head_dim: int) -> Scheme:
    grouping = draw(st.sampled_from(["token", "channel"]))
    sizes = [g for g in (8, 16, 32) if (head_dim if grouping == "token" else 32) % g == 0]
    about = draw(st.sampled_from([None, *sizes])), 1.0, draw(st.sampled_from(["none", "hadamard"]))
    params = draw(st.sampled_from(["fp16", "e5m3"]))
    return Uniform(draw(st.sampled_from([1, 2, 3, 4, 8])), grouping, *about, params)


@st.composite
def sites(draw: st.DrawFn, kind: type[Site]) -> Site:
    dims = draw(st.sampled_from([8, 20, 64])), draw(st.sampled_from([24, 64, 80, 128]))
    key = Uniform(draw(st.sampled_from([2, 3, 8])), draw(st.sampled_from(["token", "channel"])))
    cache = CacheSpec(
        draw(st.sampled_from([key, Channelwise(3.5)])), draw(value_schemes(dims[1])),
        draw(st.integers(0, 5)), draw(st.integers(0, 40)), 32,
    )  # fmt: skip
    sides = plain_sides(cache, dims)
    lengths = draw(st.sampled_from(starts(sides[0][0]))), draw(st.sampled_from([1, 1, 2, 5]))
    extra, shared = draw(st.sampled_from([0, 0, 1, 30])), draw(st.sampled_from([*SHARED, 20]))
    heads = draw(st.sampled_from([1, 2])), shared
    site = kind(sides, heads, (*lengths, extra), draw(st.sampled_from(DTYPES)))
    site.score_values()
    return site


@examples(Fraction(1, 2))
@given(sites(Site), st.data())
def test_a_gpu_has_the_error_of_the_same_computation_in_low_precision(
    site: Site, data: st.DataObject
) -> None:
    assert_right_under_any_mask(site, data)


@examples()
@given(sites(OnTheCPU), st.data())
def test_the_cpu_has_the_error_of_the_same_computation_in_low_precision(
    site: Site, data: st.DataObject
) -> None:
    assert_right_under_any_mask(site, data)


def latents(spec: CacheSpec, **changes: object) -> Site:
    """Return a site of the sizes of DeepSeek V3: rotary channels and latents of one KV head."""
    about = {"heads": 16, "lengths": (5 + 128 + 2 * 64, 1, 0), "dtype": torch.float16} | changes
    site = Site(plain_sides(spec, (64, 512)), (1, about["heads"]), about["lengths"], about["dtype"])
    site.score_values()
    return site


@pytest.mark.parametrize("name", ["tc", "int8", "int4", "kivi"])
def test_latents_of_deepseek_are_read_packed(name: str) -> None:
    site = latents(make_spec(name))
    site.assert_low_precision_error(site.attend(None), None)


@pytest.mark.parametrize("programs", [1, 1000])
def test_the_number_of_shares_does_not_change_the_output(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CacheSpec(Uniform(4), Uniform(4), 3, 20, 32)
    site = Site(plain_sides(spec, (16, 64)), (1, 4), (140, 2, 0), torch.float32)
    site.score_values()
    assert_shares_do_not_matter(site, programs, monkeypatch)


def test_many_queries_are_attended_in_tiles() -> None:
    spec = CacheSpec(Uniform(4), Uniform(4, transform="hadamard"), 3, 20, 32)
    site = Site(plain_sides(spec, (16, 64)), (1, 4), (70, 20, 0), torch.float32)
    site.score_values()
    site.assert_low_precision_error(site.attend(causal(site)), causal(site))


def test_a_prompt_attends_to_itself() -> None:
    spec = CacheSpec(Uniform(4), Uniform(4), 3, 20, 32)
    site = Site(plain_sides(spec, (16, 64)), (1, 4), (0, 9, 0), torch.float32)
    site.score_values()
    site.assert_low_precision_error(site.attend(causal(site), False), causal(site))


def test_a_gpu_refuses_values_that_differ_in_bits() -> None:
    mixed = Mixed(2.5, 0, 4)
    site = Site(
        plain_sides(CacheSpec(mixed, mixed, 1, 4, 32), (64, 64)), (1, 2), (9, 1, 0), DTYPES[0]
    )
    site.score_values()
    layouts = [layout for layout, _ in site.sides]
    with pytest.raises(NotImplementedError, match="take part in scores"):
        backend.attend(
            site.query, *site.new, *site.parts, UNCALIBRATED, UNCALIBRATED, None, None, 9,
            site.score, *layouts,
        )  # fmt: skip
