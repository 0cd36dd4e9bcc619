"""Steps that are replayed give what steps give that are launched, whatever the length."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from kvq_compile import QuantizedKV, backend
from kvq_compile.history import watching
from kvq_compile.kernels.packed import check_room, room_of
from kvq_compile.lowering.rewrite.fix_lengths import PARTS
from kvq_compile.lowering.steps import UNSTEADY
from kvq_compile.testing.small_decoder import Decoder
from recorded_steps import LAYOUTS, OPTIONS, REPLAYED, Recorder, attended, compared, llama
from thorough import few

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder.on_cpu(monkeypatch)


def outputs(decoder: Decoder) -> list[Tensor]:
    torch._dynamo.reset()
    return [call.output for call in decoder.run(inner="eager")]


STEPS = (*[1] * 14, 3, *[1] * 8)


@settings(  # an example takes seconds
    max_examples=few(3), phases=set(Phase) - {Phase.explain, Phase.shrink}
)
@given(
    prompt=st.integers(2, 150),
    padding=st.sampled_from(((0,), (3, 0))),
    mask=st.sampled_from(("none", "bool", "additive")),
    method=st.sampled_from(("int2", "kivi", "tc", "qaq")),
    kind=st.sampled_from(("grown", "static")),
    seed=st.integers(0, 99),
)
def test_a_replayed_step_is_the_step_bit_by_bit(
    prompt: int, padding: tuple[int, ...], mask: str, method: str, kind: Any, seed: int
) -> None:
    """Through growth, a chunk in the middle and pages that fill up."""
    if kind == "static" and mask == "none":
        mask = "bool"
    about = torch.float32, kind, (prompt, *STEPS), padding if mask != "none" else (0,), mask
    options = {"method": method, "window": 8, "page_size": 32, "sinks": 2}
    decoder, same = (Decoder(2, (4, 2), 32, *about, options, seed) for _ in range(2))
    launched = outputs(decoder)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder.on_cpu(patch)
        replayed = outputs(same)
    assert all(map(torch.equal, launched, replayed))
    assert recorder.replays > len(STEPS) // 2 or kind == "static"


def generated(model: Any, batch: int, options: dict[str, Any], **more: Any) -> Tensor:
    torch._dynamo.reset()
    model.compile(backend="kvq", options=options)
    ids = torch.randint(1, 96, (batch, 17), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1:, :5] = 0
    about = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **about, **more)


@pytest.mark.long(but=["1-int2", "3-tc"])
@pytest.mark.parametrize("method", ["int2", "tc"])
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_without_arguments_replays_its_steps(
    method: str, batch: int, recorder: Recorder
) -> None:
    """A batch is padded on the left. 17 tokens to 57 are five sizes of the exact rows: a recording each."""
    model, options = llama(layers=1), {**OPTIONS, "method": method}
    if method == "tc":
        options.pop("window")
    launched = generated(model, batch, options | {"mode": "default"})
    assert not recorder.tapes
    with watching() as graphs:
        assert torch.equal(launched, generated(model, batch, options))
    assert [graph.steps for graph in graphs] == ["", REPLAYED]
    assert len(recorder.tapes) <= 6
    assert recorder.replays >= 39 - 2 * len(recorder.tapes)


@pytest.mark.long
def test_assisted_decoding_replays_its_steps(recorder: Recorder) -> None:
    """The cache is cropped where a draft is rejected, and drafts have several lengths."""
    model, options = llama(), OPTIONS
    assistant = llama(layers=1, seed=1)
    launched = generated(model, 1, options | {"mode": "default"}, assistant_model=assistant)
    assert torch.equal(launched, generated(model, 1, options, assistant_model=assistant))
    assert recorder.replays > 10


def test_beams_replay_their_steps(recorder: Recorder) -> None:
    """Caches of beams are gathered in place at every step."""
    model = llama(layers=1)
    launched = generated(model, 2, OPTIONS | {"mode": "default"}, num_beams=2)
    assert torch.equal(launched, generated(model, 2, OPTIONS, num_beams=2))
    assert recorder.replays >= 39 - 2 * len(recorder.tapes)
    assert len(recorder.tapes) <= 6


def test_a_graph_whose_steps_are_not_replayed_any_more_says_so(recorder: Recorder) -> None:
    """Each step is given another cache."""
    model = llama(layers=1)
    model.compile(backend="kvq", options=OPTIONS)
    ids = torch.arange(1, 41)[None]
    with watching() as graphs, torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        for _ in range(66):
            model(ids[:, :1], past_key_values=copy.deepcopy(cache))
    assert [graph.steps for graph in graphs] == ["", f"are not recorded any more: {UNSTEADY}"]


def test_two_generations_in_turn_have_their_own_steps(recorder: Recorder) -> None:
    model = llama()
    model.compile(backend="kvq", options=OPTIONS | {"window": 32})
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        several = [model(ids + i, use_cache=True).past_key_values for i in range(2)]
        alone = model(ids, use_cache=True).past_key_values
        expected = [model(ids[:, :1], past_key_values=alone).logits for _ in range(8)]
        found = []
        for _ in range(8):
            found += [model(ids[:, :1], past_key_values=cache).logits for cache in several]
    assert all(map(torch.equal, found[::2], expected))
    assert not torch.equal(found[1], expected[0])
    assert recorder.replays >= 12


def test_results_outlive_the_next_step(recorder: Recorder) -> None:
    model = llama()
    model.compile(backend="kvq", options=OPTIONS)
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        logits, copies = [], []
        for token in range(6):
            logits.append(model(ids[:, token : token + 1], past_key_values=cache).logits)
            copies.append(logits[-1].clone())
    assert recorder.replays >= 3
    assert all(map(torch.equal, logits, copies))


def divided(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
    output, caches = attended(query, key, value, past)
    return output / past[0].shape[2], caches


def filled(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
    output, caches = attended(query, key, value, past)
    return output * torch.full((1,), past[0].shape[2], dtype=torch.float32), caches


def summed(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
    output, caches = attended(query, key, value, past)
    return output + torch.arange(past[0].shape[2]).sum(), caches


def returned(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
    output, caches = attended(query, key, value, past)
    return (output, torch.ones(past[0].shape[2])), caches


def from_the_end(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
    slots = torch.arange(past[0].shape[2] + key.shape[2])
    return attended(query, key, value, past, (slots.flip(0) % 3 == 0)[None, None, None])


def from_far(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
    slots = torch.arange(past[0].shape[2] + key.shape[2])
    return attended(query, key, value, past, (slots.flip(0) < 60)[None, None, None])


def read_dense(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
    output, caches = attended(query, key, value, past)
    return output + past[1].sum(), caches


def added(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
    output, caches = attended(query, key, value, past)
    return output + past[0].shape[2], caches


def with_positions(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
    held = past[0].shape[2]
    position = torch.arange(held, held + key.shape[2])
    angle = position[:, None] * 0.01
    slots = torch.arange(held + key.shape[2])
    mask = (slots <= position[:, None]) & (slots > position[:, None] - 50)
    return attended(query * angle.cos(), key * angle.cos(), value, past, mask)


def with_strides(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
    output, past = attended(query, key, value, past)
    return output * torch.empty(output.shape, device="meta").stride(-1), past


@pytest.mark.parametrize("function", [attended, added, with_positions, with_strides])
def test_a_length_that_is_understood_comes_from_the_device(
    function: Callable[..., Any], recorder: Recorder
) -> None:
    assert compared(function, recorder) == REPLAYED
    assert recorder.replays > 6


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (divided, "depends on the length of a cache"),
        (filled, "depends on the length of a cache"),
        (summed, "depends on the length of a cache"),
        (returned, "is returned"),
        (from_the_end, "depends on how many columns it has"),
        (from_far, "depends on how many columns it has"),
        (read_dense, "is read as an ordinary tensor"),
    ],
)
def test_a_length_that_is_not_understood_leaves_steps_unrecorded(
    function: Callable[..., Any], reason: str, recorder: Recorder
) -> None:
    assert reason in compared(function, recorder)
    assert not recorder.tapes


class Scaled(torch.nn.Module):
    """What a model multiplies with is made of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.load(1.0)

    def load(self, scale: float) -> None:
        parts = TwoTensor(torch.full((32,), scale), torch.ones(32))
        self.scale = torch.nn.Parameter(parts, requires_grad=False)

    def forward(self, *about: Any, scale: Any = None) -> Any:
        output, past = attended(*about)
        return output * (self.scale if scale is None else scale), past


@pytest.mark.parametrize("given", [False, True])
@torch.no_grad()
def test_tensors_that_are_made_of_others_are_those_of_the_call(
    given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: their address is 0 wherever they stand, and memory of their own was an ordinary tensor."""
    model = Scaled()
    compiled = torch.compile(model, backend="kvq", options=OPTIONS)
    monkeypatch.setitem(backend.RECORDERS, "cpu", lambda run: run)  # tapes do not know them
    x = torch.ones(3, 1, 2, 70, 32)
    past: Any = tuple(
        QuantizedKV.from_dense(part, layout) for part, layout in zip(x[1:], LAYOUTS, strict=True)
    )
    with watching() as graphs:
        for scale in (1.0, 1.0, 1.0, 2.0, 2.0, 2.0):
            if given:
                more = {"scale": TwoTensor(torch.full((32,), scale), torch.ones(32))}
            else:
                more = {}
                model.load(scale)
            output, past = compiled(*torch.ones(3, 1, 2, 1, 32), past, **more)
            torch.testing.assert_close(output.a, torch.full_like(output.a, scale))
    assert (graphs[-1].steps == REPLAYED) != given
    assert (PARTS in graphs[-1].steps) == given


@pytest.mark.parametrize(
    ("options", "records"),
    [
        ({}, True),
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune"}, True),
        ({"mode": "default"}, False),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"inductor": {"triton.cudagraphs": False}}, False),
    ],
)
def test_steps_are_recorded_unless_asked_otherwise(options: Any, records: bool) -> None:
    assert backend.make_config(options).records == records


@given(st.integers(0, 400), st.integers(0, 3))
def test_room_is_the_most_tokens_that_fit(tokens: int, method: int) -> None:
    layout = LAYOUTS[method % 2]
    cache = QuantizedKV.from_dense(torch.zeros(1, 1, tokens, 32), layout)
    room = room_of(cache.parts, layout)
    assert room >= tokens
    check_room(cache.parts, room, layout)
    with pytest.raises(ValueError, match="must have room"):
        check_room(cache.parts, room + 1, layout)


@pytest.mark.parametrize("mode", ["fast", 3])
def test_a_mode_that_pytorch_lacks_is_named(mode: Any) -> None:
    with pytest.raises(ValueError, match="mode must be one of default, reduce-overhead"):
        backend.make_config({"mode": mode})
