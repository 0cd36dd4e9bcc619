"""A decoder written by hand is right, whatever it is made of, and told of where it is not served.

Layouts, writes, containers, spellings of attention, rotations, masks and modes are drawn; the decoder is compiled and
each call held to PyTorch's own and to one in fp64, over the tokens that its caches stand for.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, event, given, reject, settings
from torch import Tensor

from drawn_attention import CAP
from drawn_caches import SLOTS
from drawn_decoders import (
    OPTIONS,
    PLAIN,
    Call,
    Decoder,
    Drawn,
    calls,
    compiled,
    covering,
    decoders,
    dense,
    exact,
    modes,
    ordinary_but_for,
    run,
)
from kvq_compile import KVQWarning
from kvq_compile.history import watching
from kvq_compile.testing import rounding_bound
from thorough import THOROUGH

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

EXAMPLES = 2000 if THOROUGH else 3
ORDINARY = range(60) if THOROUGH else covering(60)
PACKED = {"QuantizedKV", "ArrangedKV"}
NOT_CAPTURED = "must be a plain tensor"  # of a buffer that was one when the graph was captured
LARGEST_SCALE = 0.3  # of scores; the learned one
# What is added to scores that are shown, at most: 2^-1 a token, a cap around them, a sink's logit.
BIASES = {"alibi": SLOTS / 2, "soft cap": CAP, "sinks": 2.0}


class Comparison:
    """A decoder, compiled, and its twins: one that PyTorch runs, and one in fp64."""

    def __init__(self, drawn: Drawn, backend: Any, **options: Any) -> None:
        self.drawn = drawn
        self.decoder, self.plain = Decoder(drawn), Decoder(drawn)
        self.exact = exact(self.plain)
        self.call = compiled(self.decoder, backend, **options)
        self.kept: Any = None

    def take(self, call: Call) -> None:
        """Make a call; hold what it returns and keeps to the twins, which begin with what the caches stand for."""
        if call.fresh:
            self.kept = self.decoder.start(call.x.shape[0])
        for tensor in self.decoder.held(self.kept) if call.emptied else ():
            if tensor is not None:  # a cache that has yet to grow
                tensor.zero_()
        before = [dense(x) for x in self.decoder.held(self.kept)]
        output, self.kept = run(self.call, self.decoder, call.x, call.first, self.kept)
        after = [dense(x) for x in self.decoder.held(self.kept)]
        expected, plain = self.twin(self.plain, before, call)
        with torch.autocast("cpu", enabled=False):
            wanted, best = self.twin(self.exact, before, call)
        assert_close(output, expected, wanted, self.rounding())
        end = call.first + call.x.shape[1]  # what lies behind may have been forgotten
        for place, found in enumerate(zip(after, plain, best, strict=True)):
            axis = self.decoder.axis(place)
            assert_kept(*(x.narrow(axis, 0, end) for x in found))

    def twin(
        self, model: Decoder, before: Sequence[Any], call: Call
    ) -> tuple[Tensor, list[Tensor]]:
        is_exact = model is self.exact
        held = [x if x is None else x.double() if is_exact else x.clone() for x in before]
        x = call.x.double() if is_exact else call.x
        output, kept = run(model, model, x, call.first, model.hold(held))
        return output, model.held(kept)

    def rounding(self) -> float:
        """Bound what arithmetic in fp32 may change, in any order: in each layer, and in those behind it.

        In fp32 this is less than what quantizing the tokens of a call changes, which attention is to see as they are.
        """
        found = self.exact.seen
        assert found is not None
        about: dict[str, Any] = {"scale": LARGEST_SCALE, "bias": BIASES.get(self.drawn.mask, 0.0)}
        bounds = [rounding_bound(*(x.float() for x in seen), **about) for seen in found]
        found.clear()
        return 8 * sum(bounds)


def assert_close(output: Tensor, expected: Tensor, wanted: Tensor, rounding: float) -> None:
    assert output.shape == expected.shape
    assert output.dtype == expected.dtype
    unit = 2 * torch.finfo(output.dtype).eps * float(wanted.abs().max())
    bound = 4 * float((expected.double() - wanted).abs().max()) + unit + rounding
    error = float((output.double() - wanted).abs().max())
    assert error <= bound, f"output off by {error:.3g}, but must be within {bound:.3g}"


def assert_kept(held: Tensor, plain: Tensor, best: Tensor) -> None:
    """Check what is kept: it may differ by a step of 8-bit codes, whose parameters are fp16."""
    assert held.shape == plain.shape
    largest = float(best.abs().max())
    step = 2 * largest / 255 + largest * 2.0**-10
    unit = 2 * torch.finfo(plain.dtype).eps * largest
    bound = step + unit + 4 * float((plain.double() - best).abs().max())
    error = float((held.double() - best).abs().max())
    assert error <= bound, f"cache off by {error:.3g}, but must be within {bound:.3g}"


def check(drawn: Drawn) -> tuple[set[str], list[str], list[str]]:
    """Check a decoder; return the outcomes of its attentions, the reasons, and the kinds of the tensors it keeps."""
    torch._dynamo.reset()
    with modes(drawn), watching() as graphs, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pair = Comparison(drawn, "kvq", options=OPTIONS)
        for call in calls(drawn):
            try:
                pair.take(call)
            except AssertionError:
                raise
            except Exception:
                if not runs_elsewhere(drawn):
                    reject()  # PyTorch cannot capture it
                raise
    kinds = [type(x).__name__ for x in pair.decoder.held(pair.kept)]
    sites = [site for graph in graphs for site in graph.sites]
    assert not any(NOT_CAPTURED in site.detail for site in sites), "a graph ran on other arguments"
    warned = [str(x.message) for x in told if issubclass(x.category, KVQWarning)]
    assert warned or {*kinds} <= PACKED, "a cache stays in 16 bit, and nothing tells of it"
    return {site.outcome for site in sites}, sorted({site.detail for site in sites}), kinds


def runs_elsewhere(drawn: Drawn) -> bool:
    """Return whether PyTorch's backend that does nothing runs a decoder."""
    torch._dynamo.reset()
    try:
        with modes(drawn), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pair = Comparison(drawn, "eager")
            for call in calls(drawn):
                pair.take(call)
    except Exception:
        return False
    return True


# Each was wrong, or silent, or crashed once.
LOST = replace(PLAIN, layout="[2, B, S, H, D] by halves", write="copy_into_slice", batch=1)
CRASHED = replace(
    PLAIN, layout="[L, 2, B, S, H, D]", write="assign_slice", attention="sdpa", sharing="stack"
)
SILENT = replace(
    PLAIN, layout="[B, S, H, 2*D]", write="padded", attention="folded_query", scale="key"
)
UNTOLD = replace(
    PLAIN,
    layout="[2, B, H, S, D]",
    write="one_hot_in_place",
    container="nn.Buffer",
    attention="baddbmm",
    sharing="repeat_interleave",
    scale="learned query",
    softmax="float",
    mask="none",
    mode="bf16",
    batch=1,
    prompt=(40,),
    chunk=16,
    sliced=True,
    ending="again, emptied",
)
UNSEEN = replace(
    PLAIN,
    layout="[B, S, H, 2*D]",
    write="one_hot_sum",
    container="nn.Buffer",
    attention="baddbmm",
    sharing="repeat_interleave",
    scale="score",
    softmax="fp32",
    mask="additive",
    layers=2,
    batch=1,
    ending="another batch",
)
FLAT = replace(PLAIN, layout="[B, S, H*D]")
THAWED = replace(
    PLAIN,
    layout="[B, H, D, S] keys",
    write="index_put_in_place",
    attention="einsum_of_groups",
    scale="learned score",
    mask="alibi",
    ending="another batch",
)
# A head whose attention was not found did not see the call's own tokens, silently.
PARTLY = replace(
    PLAIN,
    write="scatter",
    container="dataclass",
    attention="head",
    scale="divided",
    rotation="none",
    mask="window",
    dynamic=True,
    prompt=(2, 38),
    steps=(1, 1),
    chunk=16,
)
RESIZED = replace(
    PLAIN,
    layout="[B*H, D, S] keys",
    write="padded",
    container="dataclass",
    attention="baddbmm",
    sharing="repeat",
    scale="learned query",
    rotation="none",
    mask="-1e9",
    mode="inference_mode",
    dynamic=True,
    batch=1,
    prompt=(24, 17),
    steps=(1, 1),
    sliced=True,
    ending="another batch",
)
IN_A_DICT = replace(
    PLAIN,
    layout="[2, B, S, H, D] by halves",
    write="index_put_in_place",
    container="dict",
    attention="einsum_of_groups",
    sharing="stack",
    scale="learned query",
    rotation="partial",
    mask="sinks",
    mode="inference_mode",
    dynamic=True,
    batch=1,
    sliced=True,
)


MISTAKEN = {
    "a write into a view of what is packed": LOST,
    "layers stacked in one tensor": replace(CRASHED, layers=2, scale="key", dynamic=True),
    "folded queries, scaled keys": SILENT,
    "one-hot tokens, emptied, in bf16": UNTOLD,
    "sums of one-hot tokens": UNSEEN,
    "copied into a narrowed view": replace(PLAIN, write="copy_into_narrow", dynamic=True),
    "padded, joined heads, a head at a time": replace(
        FLAT, write="padded", container="nn.Buffer", attention="head"
    ),
    "another batch under alibi": THAWED,
    "layers and keys and values in one tensor": replace(
        PLAIN, layout="[L, 2, B, S, H, D]", layers=2
    ),
    "a head at a time in a window": PARTLY,
    "folded heads of another batch": RESIZED,
    "keys and values by halves in a dict": IN_A_DICT,
    "copied into a slice of joined keys and values": replace(
        PLAIN, layout="[B, S, H, 2*D]", write="copy_into_slice", spare=2
    ),
    "more rows than a batch has, tokens first": replace(
        PLAIN, layout="[S, B, H, D]", write="assign", spare=2
    ),
}


@pytest.mark.long(
    but=[
        "a write into a view of what is packed",
        "layers stacked in one tensor",
        "folded queries, scaled keys",
        "sums of one-hot tokens",
        "another batch under alibi",
        "a head at a time in a window",
        "keys and values by halves in a dict",
        "more rows than a batch has, tokens first",
    ]
)
@pytest.mark.parametrize("name", MISTAKEN)
def test_what_was_wrong_or_silent_once_is_right_and_told(name: str) -> None:
    """Regression: a write into a view of a packed `ArrangedKV` was lost (the first); others as their names tell."""
    check(MISTAKEN[name])


@settings(
    max_examples=EXAMPLES,
    derandomize=not THOROUGH,
    phases=set(Phase) - {Phase.explain, Phase.shrink},  # either takes minutes
)
@given(drawn=decoders())
def test_a_drawn_decoder_is_right_and_what_is_not_served_is_told(drawn: Drawn) -> None:
    outcomes, _, kinds = check(drawn)
    event(f"stored quantized: { ({*kinds} <= PACKED) }, read packed: {outcomes <= {'rewritten'}}")


LAYERS = replace(PLAIN, layout="[L, 2, B, S, H, D]", write="assign", dynamic=True)
# Each was left in 16 bit once.
MENDED = {
    "layers, keys and values and heads are one symbol": replace(LAYERS, layers=2),
    "layers are a symbol": replace(LAYERS, layers=3),
    "channels are a product of symbols": replace(FLAT, write="padded", dynamic=True),
    "joined heads, filled": replace(FLAT, write="filled"),
    "keys and values in one, filled": replace(PLAIN, layout="[2, B, H, S, D]", write="filled"),
    "folded heads of one sequence, queries in groups": replace(
        PLAIN, layout="[B*H, S, D]", attention="matmul_of_groups", batch=1
    ),
    "as many tokens as a symbol tells": replace(
        PLAIN, write="assign", attention="einsum", sliced=True, dynamic=True
    ),
    "folded heads, filled": replace(PLAIN, layout="[B*H, S, D]", write="filled"),
}


# Each was read dense once.
MENDED |= {
    "joined around and read in folded heads": replace(
        PLAIN, write="joined_around", attention="bmm", sliced=True
    ),
    "a cap of a module whose numbers are symbols": replace(
        PLAIN, attention="mT", mask="soft cap", scale="learned score", dynamic=True
    ),
    "a head at a time, up to a number": replace(
        PLAIN, layout="[B, H, D, S] keys", write="one_hot_in_place", attention="head", sliced=True
    ),
    "a head at a time, of scaled keys": replace(
        PLAIN, write="padded", attention="head", scale="key"
    ),
    "a first call writes all that is read of an argument": replace(
        PLAIN, layout="[2, B, H, S, D]", write="slice_scatter", sliced=True
    ),
    "a first call is added to an argument": replace(
        PLAIN, layout="[B, H, S, 2*D]", write="one_hot_sum", attention="matmul"
    ),
    "weights cast under autocast, hidden by -1e4": replace(
        PLAIN, write="assign", attention="bmm", softmax="fp32", mask="where", mode="autocast"
    ),
    "chunks that read as much as fits a buffer": replace(
        PLAIN, write="assign", attention="mT", prompt=(24, 17), chunk=16, sliced=True
    ),
    "positions of keys and of values in different shapes": replace(
        PLAIN, layout="[B, H, D, S] keys", write="scatter_in_place"
    ),
    "no mask over tokens up to a number": replace(
        PLAIN, write="where_in_place", attention="baddbmm", mask="none", sliced=True
    ),
}

JOINED = replace(PLAIN, layout="[B, S, H, 2*D]", attention="kv_head", dynamic=True, steps=(1, 1))
# Each crashed once: halves of one tensor were taken for keys in one call and for values in the next.
MENDED |= {
    "halves of one tensor, scattered into, a KV head at a time": replace(JOINED, write="scatter"),
    "halves of one tensor in a new one, a head at a time": replace(
        JOINED, layout="[B, H, S, 2*D]", write="slice_scatter", attention="head", batch=1
    ),
}


@pytest.mark.long(
    but=[
        "layers, keys and values and heads are one symbol",
        "channels are a product of symbols",
        "joined heads, filled",
        "folded heads of one sequence, queries in groups",
        "a cap of a module whose numbers are symbols",
        "a head at a time, of scaled keys",
        "a first call is added to an argument",
        "weights cast under autocast, hidden by -1e4",
        "halves of one tensor, scattered into, a KV head at a time",
    ]
)
@pytest.mark.parametrize("name", MENDED)
def test_what_was_not_served_once_is_read_packed(name: str) -> None:
    outcomes, reasons, kinds = check(MENDED[name])
    assert {*kinds} <= PACKED, reasons
    assert outcomes == {"rewritten"}, reasons


# Decoders of the next test that are not served, by number, and why.
REFUSED: dict[int, str] = {}


# Those that have most of the kinds of all.
@pytest.mark.long(but=["0", "1", "3", "7", "11", "19", "30", "37", "43", "49"])
@pytest.mark.parametrize("number", [n for n in ORDINARY if n not in REFUSED])
def test_a_decoder_that_is_ordinary_but_for_four_parts_is_read_packed(number: int) -> None:
    outcomes, reasons, kinds = check(ordinary_but_for(number))
    assert {*kinds} <= PACKED, reasons
    assert outcomes == {"rewritten"}, reasons


# Each has a graph for plain buffers that fits a later call, but for what the buffers have become.
PROMPTED_AGAIN = replace(
    PLAIN,
    layout="[B, H, D, S] keys",
    write="masked_scatter_in_place",
    container="buffers",
    attention="head",
    sharing="gather",
    mask="additive",
    mode="inference_mode",
    dynamic=True,
    sliced=True,
    ending="again",
)
WRITTEN_AGAIN = replace(
    PLAIN,
    layout="[2, B, S, H, D] by halves",
    write="index_put_in_place",
    container="dict",
    attention="einsum_of_groups",
    mask="sinks",
    dynamic=True,
    batch=1,
)


@pytest.mark.parametrize("drawn", [PROMPTED_AGAIN, WRITTEN_AGAIN], ids=["prompt", "tokens"])
def test_a_graph_for_plain_buffers_is_not_run_on_what_they_have_become(drawn: Drawn) -> None:
    """Regression: with PyTorch 2.11 tokens were quantized before attention saw them, or a write was refused."""
    check(drawn)
