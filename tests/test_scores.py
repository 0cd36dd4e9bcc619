"""What an attention does to its scores besides a scale: soft caps, clamps, logits of sinks in the softmax.

Kernels on a GPU are held to the specification with all of these by the tests of attention; here are the CPU's, and how
the three are found in a graph.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attention_site import Site, bend, plain_sides, random_mask, starts
from kvq_compile import KVQWarning, QuantizedKV
from kvq_compile.backend import compile_graph
from kvq_compile.kernels import ops, reference
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Packed
from kvq_compile.kernels.reference.attention import apply_score
from kvq_compile.kernels.reference.importance import recent_importance
from kvq_compile.kernels.schemes import Channelwise, Mixed, Scheme, Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.lowering.nodes import target_name
from kvq_compile.lowering.pipeline import lower
from kvq_compile.options import make_config
from kvq_compile.testing import changed
from kvq_compile.testing.small_tables import framed_layouts
from thorough import spread

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# --- what a score is ------------------------------------------------------------------------------

NUMBERS = st.floats(-8, 8).filter(lambda x: abs(x) > 1e-2)


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Draw steps that a score may pass through: at most one of them is a hyperbolic tangent."""
    bounds = st.tuples(st.floats(-3, 3), st.floats(-3, 3))
    linear = st.one_of(st.tuples(st.just("times"), NUMBERS), st.tuples(st.just("clamped"), bounds))
    capped = draw(st.lists(st.just(("tanh", None)), max_size=1))
    return draw(st.lists(linear, max_size=3)) + capped + draw(st.lists(linear, max_size=3))


@given(steps())
def test_a_score_is_what_its_steps_make_one_after_another(steps: list[tuple[str, Any]]) -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    score, expected = Score(0.5), x * 0.5
    for name, given_ in steps:
        if name == "times":
            score, expected = score.times(given_), expected * given_
        elif name == "tanh":
            score, expected = score.tanh(), expected.tanh()
        else:
            score, expected = score.clamped(*given_), expected.clamp(*given_)
    torch.testing.assert_close(apply_score(x, score), expected, rtol=1e-9, atol=1e-12)
    assert eval(repr(score), {"Score": Score}) == score


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": -1.0}, "cap must be 0 or from"),
        ({"cap": math.inf}, "cap must be 0 or from"),
        ({"lowest": 2.0, "highest": 1.0}, "lowest must be at most highest, 1.0, got 2.0"),
        ({"lowest": math.nan}, "lowest must be at most highest"),
    ],
)
def test_a_score_that_means_nothing_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Score(1.0, **options)


# --- on a CPU -------------------------------------------------------------------------------------


def schemes() -> st.SearchStrategy[tuple[Scheme, Scheme]]:
    mixed, turned = Mixed(2.5, 0, 4), Uniform(2, "token", None, 1.0, "hadamard")
    return st.sampled_from(
        ((Uniform(4), Uniform(2)), (Channelwise(3), turned), (mixed, mixed), (Uniform(8), turned))
    )


@st.composite
def sites(draw: st.DrawFn) -> Site:
    """Draw a site, calibrated or not, of a query or of many: these are attended to in another way."""
    if draw(st.booleans()):
        key, key_frame = draw(framed_layouts("key", head_dims=(64,), page_sizes=(32,)))
        value, value_frame = draw(framed_layouts("value", head_dims=(64,), page_sizes=(32,)))
        value = changed(value, sinks=key.sinks, window=key.window)
        sides: Any = (key, key_frame), (value, value_frame)
    else:
        sides = plain_sides(CacheSpec(*draw(schemes()), 3, 20, 32), (64, 64), 3)
    start = draw(st.sampled_from(starts(sides[0][0])))
    return Site(sides, (2, 3), (start, draw(st.sampled_from((1, 3, 9))), 0), torch.float32)


@given(sites(), st.data())
def test_attention_on_a_cpu_bends_scores_and_counts_sinks(site: Site, data: st.DataObject) -> None:
    bend(site, data)
    end = site.start + site.query.shape[2]
    mask = random_mask(site, data.draw(st.sampled_from(("none", "tokens", "additive"))), end)
    constants = [x for _, frame in site.sides for x in frame[:2] if x is not None]
    if site.sink_logits is not None:
        constants.append(site.sink_logits)
    found = ops.attend(
        site.query, *site.new, *map(list, site.parts), constants, mask, None, site.start,
        site.score, *(layout for layout, _ in site.sides),
    )  # fmt: skip
    expected = site.expected(mask, torch.float64)
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-5 * size)


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_row_that_sees_nothing_gives_zeros_whatever_its_sinks(tokens: int) -> None:
    site = Site(
        plain_sides(CacheSpec(Uniform(4), Uniform(4), 3, 20, 32), (64, 64)), (2, 3),
        (100, tokens, 0), torch.float32,
    )  # fmt: skip
    score = replace(site.score, has_sinks=True)
    mask = torch.ones(tokens, 100 + tokens, dtype=torch.bool)
    mask[0] = False
    for size in (-1e30, 0.0, 40.0):
        found = ops.attend(
            site.query, *site.new, *map(list, site.parts), [torch.full((1,), size)], mask, None,
            100, score, *(layout for layout, _ in site.sides),
        )  # fmt: skip
        assert not found[:, :, 0].any()
        assert found.isfinite().all()


def test_sinks_take_the_weight_that_their_logit_says() -> None:
    """Against the definition: a token more, whose key gives the logit and whose value is zero."""
    query, key, value = (torch.randn(1, 2, n, 16, dtype=torch.float64) for n in (5, 30, 30))
    logits = torch.randn(2, 1, 1, dtype=torch.float64)
    scores = torch.cat([query @ key.mT * 0.25, logits.expand(1, 2, 5, 1)], -1)
    expected = scores.softmax(-1)[..., :-1] @ value
    found = reference.softmax_attention(query, key, value, None, Score(0.25), logits)
    torch.testing.assert_close(found, expected)


@given(st.sampled_from((Score(0.3, cap=0.7), Score(0.3, 1.0, -0.4, 0.6))), st.integers(1, 7))
def test_bits_on_a_cpu_follow_scores_that_are_bent(score: Score, new: int) -> None:
    layout = Layout("key", 32, Regions(3, 9, 32), Mixed(2.5, 0, 4), 5, 2)
    held = 3 + 9 + 64 - 1
    generator = torch.Generator().manual_seed(new)
    x, query = (torch.randn(1, heads, held + new, 32, generator=generator) for heads in (2, 4))
    parts = Packed.empty(x, 4, layout)
    reference.append_(*parts, x[:, :, :held], 0, layout, UNCALIBRATED, None, query[:, :, :held])
    own = query[:, :, held:], x[:, :, held:]
    found = ops.importance(
        *own, list(parts), [], None, None, held, held + new, score, True, 5, layout
    )
    expected = recent_importance(
        *own, parts, None, held, held + new, score, True, 5, layout, UNCALIBRATED
    )
    assert expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --- in a graph -----------------------------------------------------------------------------------

B, H, G, D = 2, 2, 3, 16
EXACT = {"method": "int8", "sinks": 1, "window": 256, "page_size": 32, "inner": "eager"}
Scored = Callable[[Tensor], Tensor]


class Watch:
    """A backend that keeps what the calls of the last graph are, and with which scores."""

    def __init__(self) -> None:
        self.config = make_config(EXACT)
        self.details: list[str] = []
        self.scores: list[Score] = []

    def __call__(self, gm, inputs, **_):
        lowered = lower(gm, inputs, self.config.spec)
        self.details = [site.detail for site in lowered.reports]
        nodes = lowered.module.graph.nodes
        self.scores = [
            arg for node in nodes for arg in node.args
            if target_name(node) == "attend.default" and isinstance(arg, Score)
        ]  # fmt: skip
        return compile_graph(gm, inputs, self.config)


@torch.no_grad()
def watch(attend: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Watch:
    """Feed tokens to a decoder's step with a cache that grows; hold it to the same step uncompiled."""

    def step(query, key, value, keys, values):
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return attend(query, keys, values), keys, values

    recorder = Watch()
    compiled = torch.compile(step, backend=recorder)
    torch.manual_seed(0)
    plain = packed = [torch.randn(B, H, 40, D, dtype=dtype) for _ in range(2)]
    eps = torch.finfo(dtype).eps
    for new in (1, 1, 3):
        own = [torch.randn(B, n, new, D, dtype=dtype) for n in (H * G, H, H)]
        wanted, *plain = step(*own, *plain)
        output, *packed = compiled(*own, *packed)
        assert output.dtype == wanted.dtype
        torch.testing.assert_close(output, wanted, rtol=16 * eps, atol=16 * eps)
    assert all(isinstance(cache, QuantizedKV) for cache in packed)
    return recorder


def hidden(new: int, slots: int) -> Tensor:
    return torch.ones(new, slots, dtype=torch.bool).triu(slots - new + 1)


def eager(bent: Scored, mask: str = "none", sinks: str = "none", shifts: bool = False):
    """Return an attention as models write it out."""
    logits = torch.linspace(-2, 3, H * G)

    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = keys.repeat_interleave(G, 1), values.repeat_interleave(G, 1)
        scores = bent(query @ keys.transpose(2, 3))
        if mask == "added":
            scores = scores + torch.zeros(scores.shape[-2:], dtype=scores.dtype).masked_fill(
                hidden(*scores.shape[-2:]), torch.finfo(scores.dtype).min
            )
        elif mask == "filled":
            scores = scores.masked_fill(hidden(*scores.shape[-2:]), -math.inf)
        cut: Any = slice(None)
        if sinks == "learned":
            own = (
                logits.to(query.dtype)
                .reshape(1, -1, 1, 1)
                .expand(len(query), -1, scores.shape[2], 1)
            )
            scores, cut = torch.cat([scores, own], -1), slice(None, -1)
        elif sinks == "in front":
            scores, cut = torch.cat([torch.ones_like(scores[..., :2]), scores], 3), slice(2, None)
        elif sinks == "off by one":
            scores, cut = torch.nn.functional.pad(scores, (0, 1)), slice(None, -1)
        elif sinks == "three":
            own = query.mean(-1, keepdim=True).expand(-1, -1, -1, 3) * torch.arange(1, 4)
            scores, cut = (
                torch.cat((scores, own.to(scores.dtype)), dim=-1),
                slice(None, keys.shape[2]),
            )
        if shifts:
            scores = scores - scores.max(dim=-1, keepdim=True).values
        weights = scores.softmax(-1)
        if sinks != "none":
            weights = weights[..., cut]
        return weights @ values

    return attend


BENDS: dict[str, tuple[Scored, Score]] = {
    "Gemma 2": (lambda x: torch.tanh(x * 0.25 / 5.0) * 5.0, Score(0.25, cap=5.0)),
    "Grok": (lambda x: 3 * torch.tanh(x * (0.25 / 3)), Score(0.25, cap=3.0)),
    "clamp": (lambda x: (x / 4).clamp(-1, 1.5), Score(0.25, lowest=-1.0, highest=1.5)),
    "clamped above": (lambda x: (x * 0.5).clamp(max=1.0) / 2, Score(0.25, highest=0.5)),
    "clamped, capped": (
        lambda x: torch.clamp_min(x * 0.25, -2.0).tanh().mul(-2.0),
        Score(-0.5, 2.0, -math.inf, 2 * math.tanh(2.0)),
    ),
}


@pytest.mark.long(
    but=[
        "Gemma 2-none",
        "Grok-added",
        "clamp-filled",
        "clamped above-added",
        "clamped, capped-none",
    ]
)
@pytest.mark.parametrize(("name", "mask"), spread(BENDS, ["none", "added", "filled"], 2))
def test_scores_that_are_capped_or_clamped_are_read_packed(name: str, mask: str) -> None:
    bent, wanted = BENDS[name]
    (found,) = watch(eager(bent, mask)).scores
    given_ = [x for score in (found, wanted) for x in (score.scale, *score.bend)]
    assert given_[:4] == pytest.approx(given_[4:])


SINKS = ("learned", "in front", "off by one", "three")
WAYS = [(mask, shifts) for shifts in (False, True) for mask in ("none", "added", "filled")]


@pytest.mark.long(
    but=[
        "three-way9",
        "learned-way2",
        "learned-way0",
        "in front-way4",
        "off by one-way7",
        "three-way11",
    ]
)
@pytest.mark.parametrize(("sinks", "way"), spread(SINKS, WAYS, 2))
def test_logits_of_sinks_are_read_packed(sinks: str, way: tuple[str, bool]) -> None:
    mask, shifts = way
    (found,) = watch(eager(lambda x: x * 0.25, mask, sinks, shifts)).scores
    assert found == Score(0.25, has_sinks=True)


def gated(query, keys, values, weigh=lambda sums: sums):
    """What sinks leave to the tokens, as a factor behind attention."""
    keys, values = keys.repeat_interleave(G, 1), values.repeat_interleave(G, 1)
    scores = torch.matmul(query, keys.mT) * 0.25
    scores = scores.masked_fill(hidden(*scores.shape[-2:]), -math.inf)
    kept = weigh(scores.logsumexp(-1)) - torch.linspace(-2, 3, H * G).view(1, -1, 1)
    weights = torch.softmax(scores, -1, dtype=torch.float32)
    return weights @ values * kept.float().sigmoid().unsqueeze(-1)


def test_a_gate_by_the_weight_that_sinks_leave_is_read_packed() -> None:
    assert watch(gated).scores == [Score(0.25, has_sinks=True)]


def gated_otherwise(query, keys, values):
    return gated(query, keys, values, lambda sums: sums * 0.5)


def test_caps_and_sinks_go_together_in_low_precision() -> None:
    (found,) = watch(eager(BENDS["Gemma 2"][0], "added", "learned", True), torch.bfloat16).scores
    assert found.cap == pytest.approx(5.0)
    assert found.has_sinks


def capped_twice(query, keys, values):
    return eager(lambda x: torch.tanh(torch.tanh(x) * 3))(query, keys, values)


def capped_behind_the_mask(query, keys, values):
    """What the mask hides is not hidden."""
    keys, values = keys.repeat_interleave(G, 1), values.repeat_interleave(G, 1)
    scores = query @ keys.mT * 0.25
    scores = scores.masked_fill(hidden(*scores.shape[-2:]), -1e9)
    return (torch.tanh(scores / 5) * 5).softmax(-1) @ values


def capped_by_the_query(query, keys, values):
    return eager(lambda x: torch.tanh(x / 5) * query.abs().mean())(query, keys, values)


def clamped_by_the_query(query, keys, values):
    return eager(lambda x: x.clamp(max=query.abs().amax()))(query, keys, values)


def sinks_that_are_kept(query, keys, values):
    """The first token's weight is left out in place of the sink's."""
    keys, values = keys.repeat_interleave(G, 1), values.repeat_interleave(G, 1)
    scores = query @ keys.mT * 0.25
    scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1)
    return scores.softmax(-1)[..., 1:] @ values


def sinks_between(query, keys, values):
    keys, values = keys.repeat_interleave(G, 1), values.repeat_interleave(G, 1)
    scores = query @ keys.mT * 0.25
    scores = torch.cat([scores, scores[..., :1] * 0], -1)
    return scores.softmax(-1)[..., :-1] @ values


def some_weights_left_out(query, keys, values):
    keys, values = keys.repeat_interleave(G, 1), values.repeat_interleave(G, 1)
    return (query @ keys.mT * 0.25).softmax(-1)[..., :-1] @ values[:, :, :-1]


CHANGED = (
    capped_twice, capped_behind_the_mask, capped_by_the_query, clamped_by_the_query,
    sinks_that_are_kept, sinks_between, some_weights_left_out, gated_otherwise,
)  # fmt: skip


@pytest.mark.parametrize("attend", CHANGED, ids=lambda attend: attend.__name__)
def test_what_only_looks_like_a_cap_or_sinks_is_not_fused(attend: Callable[..., Tensor]) -> None:
    with pytest.warns(KVQWarning, match="read their caches dense"):
        recorder = watch(attend)
    assert not recorder.scores


def test_bits_that_depend_on_attention_do_not_go_with_sinks() -> None:
    attend = eager(lambda x: x * 0.25, "none", "learned")

    def step(query, key, value, keys, values):
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return attend(query, keys, values), keys, values

    compiled = torch.compile(step, backend="kvq", options={"method": "qaq", "inner": "eager"})
    own = [torch.randn(B, n, 1, D) for n in (H * G, H, H)]
    caches = [torch.randn(B, H, 40, D) for _ in range(2)]
    with torch.no_grad(), pytest.warns(KVQWarning, match="softmax has logits of sinks"):
        found = compiled(*own, *caches)
    torch.testing.assert_close(found[0], step(*own, *caches)[0])
