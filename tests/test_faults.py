"""A fault of an analysis is told and costs memory: no answer changes and no call fails."""

import warnings
from dataclasses import replace

import pytest
import torch

from drawn_decoders import OPTIONS, PLAIN, calls, modes
from kvq_compile import KVQWarning
from kvq_compile.lowering import pipeline
from test_drawn_decoders import PACKED, Comparison

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

PACKED_IN_PLACE = replace(PLAIN, write="one_hot_in_place", container="nn.Buffer")
FORMS = {
    "static": PACKED_IN_PLACE,
    "dynamic": replace(PLAIN, write="cat"),
    "static, arranged": replace(PACKED_IN_PLACE, layout="[2, B, H, S, D]"),
}


def broken(graph):
    raise IndexError("nobody has thought of this")


def faults_after(number, form, monkeypatch):
    """Make the calls of a decoder, with a fault from one on; return the kinds of its caches, and what was told."""
    with modes(form), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pair = Comparison(form, "kvq", options=OPTIONS)
        for at, call in enumerate(calls(form)):
            if at == number:
                kinds = {type(x).__name__ for x in pair.decoder.held(pair.kept)} if at else set()
                torch._dynamo.reset()
                monkeypatch.setattr(pipeline, "ANALYSIS", (broken, *pipeline.ANALYSIS))
            pair.take(call)
    texts = [str(x.message) for x in told if issubclass(x.category, KVQWarning)]
    return kinds, {type(x).__name__ for x in pair.decoder.held(pair.kept)}, texts


@pytest.mark.long(but=["dynamic-1", "static, arranged-0"])
@pytest.mark.parametrize(
    ("name", "number"),
    [("static", 1), ("dynamic", 1), ("static, arranged", 0), ("static, arranged", 1)],
)
def test_a_fault_of_an_analysis_is_told_and_the_call_runs_on_ordinary_tensors(
    name, number, monkeypatch
):
    """Regression: a fault with arranged caches was silent, and writes into packed ones raised."""
    before, after, told = faults_after(number, FORMS[name], monkeypatch)
    assert before <= PACKED
    assert bool(before) == bool(number)
    assert not after & PACKED
    assert any("nobody has thought of this" in text for text in told), told
