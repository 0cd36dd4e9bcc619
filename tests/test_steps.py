"""Steps that are replayed give what steps give that are launched, whatever the length."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed
from torch.distributed._functional_collectives import all_reduce
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from kvq_compile import KVQWarning, QuantizedKV, backend
from kvq_compile.history import watching
from kvq_compile.kernels import ops
from kvq_compile.kernels.packed import check_room, room_of
from kvq_compile.lowering import slots
from kvq_compile.testing.small_decoder import Decoder
from thorough import few

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS: dict[str, Any] = {"method": "int2", "window": 4, "page_size": 32, "inner": "eager"}
LAYOUTS = [backend.make_config(OPTIONS).spec.layout(role, 32) for role in ("key", "value")]
WRITES = (ops.append_, ops.append_both_)
REPLAYED = "are replayed from CUDA graphs"


class Tape(TorchDispatchMode):
    """Notes calls as a CUDA graph does: with their numbers, on their memory. Writes to arguments wait for a replay."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.own: set[int] = set()  # memory that was allocated meanwhile

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        waits = func._schema.is_mutable and memory(given[0]) not in self.own
        result = (None if func in WRITES else args[0]) if waits else func(*args, **kwargs)
        made = {memory(x) for x in tree_leaves(result) if isinstance(x, Tensor)}
        self.own |= made - {memory(x) for x in given}
        self.calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            anew = func(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(anew), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@dataclass
class Recorder:
    """Stands for CUDA graphs where there is no GPU."""

    tapes: list[Tape] = field(default_factory=list)
    replays: int = 0

    def __call__(self, run: Callable[[], Sequence[Any]]) -> Callable[[], Sequence[Any]]:
        with Tape() as tape:
            results = run()
        self.tapes.append(tape)

        def replay() -> Sequence[Any]:
            self.replays += 1
            tape.replay()
            return results

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setitem(backend.RECORDERS, "cpu", made)
    return made


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
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backend.RECORDERS, "cpu", recorder)
        replayed = outputs(same)
    assert all(map(torch.equal, launched, replayed))
    assert recorder.replays > len(STEPS) // 2 or kind == "static"


def llama(layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def generated(model: Any, batch: int, options: dict[str, Any], **more: Any) -> Tensor:
    torch._dynamo.reset()
    model.compile(backend="kvq", options=options)
    ids = torch.randint(1, 96, (batch, 17), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1:, :5] = 0
    about = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **about, **more)


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


def test_assisted_decoding_replays_its_steps(recorder: Recorder) -> None:
    """The cache is cropped where a draft is rejected, and drafts have several lengths."""
    model, options = llama(), OPTIONS
    assistant = llama(layers=1, seed=1)
    launched = generated(model, 1, options | {"mode": "default"}, assistant_model=assistant)
    assert torch.equal(launched, generated(model, 1, options, assistant_model=assistant))
    assert recorder.replays > 10


def test_beams_run_as_they_did(recorder: Recorder) -> None:
    """Caches of beams are gathered anew at every step: what is recorded holds for memory that was used before."""
    model = llama()
    launched = generated(model, 2, OPTIONS | {"mode": "default"}, num_beams=2)
    assert torch.equal(launched, generated(model, 2, OPTIONS, num_beams=2))


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


def attended(query: Tensor, key: Tensor, value: Tensor, past: Any, mask: Any = None) -> Any:
    keys, values = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
    return sdpa(query, keys, values, mask), (keys, values)


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


def compared(function: Callable[..., Any], recorder: Recorder) -> str:
    """Check that steps are what they are unrecorded; return what is told of them."""
    results = []
    for mode in ("default", None):
        torch._dynamo.reset()
        generator = torch.Generator().manual_seed(0)
        compiled = torch.compile(function, backend="kvq", options={**OPTIONS, "mode": mode})
        x = torch.randn(3, 1, 2, 70, 32, generator=generator)
        past: Any = tuple(
            QuantizedKV.from_dense(part, layout)
            for part, layout in zip(x[1:], LAYOUTS, strict=True)
        )
        with torch.no_grad(), watching() as graphs:
            for _ in range(12):
                step = torch.randn(3, 1, 2, 1, 32, generator=generator)
                output, past = compiled(*step, past)
                results.append(output)
    ours, theirs = results[:12], results[12:]
    for one, other in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    return graphs[-1].steps


@pytest.mark.parametrize("function", [attended, added, with_positions])
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


@pytest.fixture
def group() -> Iterator[Any]:
    about = {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    distributed.init_process_group("gloo", **about)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_a_step_that_waits_for_other_processes_is_launched(group: Any, recorder: Recorder) -> None:
    def reduced(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
        output, past = attended(query, key, value, past)
        return all_reduce(output, "sum", group), past

    assert "waits for other processes" in compared(reduced, recorder)
    assert not recorder.tapes


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


def static_model(recorder: Recorder, layers: int = 1, **options: Any) -> tuple[Any, StaticCache]:
    model = llama(layers)
    model.compile(backend="kvq", options={**OPTIONS, "window": 32, **options})
    cache = StaticCache(config=model.config, max_cache_len=96)
    if not hasattr(cache.layers[0], "cumulative_length"):
        pytest.skip(
            "static caches of this transformers do not count their tokens, but read themselves"
        )
    return model, cache


def stepped(model: Any, cache: Any, count: int, first: int = 0) -> list[Tensor]:
    """Return the logits of ``count`` steps, after a prompt if the cache is empty."""
    ids = torch.randint(1, 96, (1, 96), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        if not cache.get_seq_length():
            model(ids[:, :20], past_key_values=cache)
        return [
            model(ids[:, at : at + 1], past_key_values=cache).logits
            for at in range(first, first + count)
        ]


def test_steps_of_a_static_cache_are_replayed(recorder: Recorder) -> None:
    found = stepped(*static_model(recorder, layers=2), 12)
    assert recorder.replays == 11
    torch._dynamo.reset()
    launched = stepped(*static_model(recorder, layers=2, mode="default"), 12)
    assert recorder.replays == 11
    assert all(map(torch.equal, found, launched))


def test_a_step_of_a_static_cache_does_not_wait_for_the_device(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host reads numbers of the device once: the last call tells what they are."""
    model, cache = static_model(recorder)
    stepped(model, cache, 3)
    read: list[int] = []
    on_host = slots.on_host
    monkeypatch.setattr(slots, "on_host", lambda x: read.append(len(x)) or on_host(x))
    stepped(model, cache, 6)
    assert not any(read)


def rewound(cache: Any) -> None:
    for layer in cache.layers:
        layer.cumulative_length.fill_(22)


def emptied(cache: Any) -> None:
    cache.reset()


def written_before(cache: Any) -> None:
    """Two tokens are written eagerly, and counted."""
    x = torch.ones(1, 2, 2, 32)
    for layer in cache.layers:
        layer.update(x, x)


def counted_elsewhere(cache: Any) -> None:
    for layer in cache.layers:
        layer.cumulative_length = layer.cumulative_length - 1


def shared(cache: Any) -> None:
    """Another process may write it from now on."""
    for layer in cache.layers:
        layer.keys.share_memory_()
        layer.values.share_memory_()


@pytest.mark.parametrize(
    "change", [rewound, emptied, written_before, counted_elsewhere, shared, copy.deepcopy]
)
def test_what_is_done_to_a_static_cache_between_two_steps_is_noticed(
    change: Callable[[Any], Any], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the host takes for granted from the last call is what it finds if it looks."""
    results = []
    for knows in (True, False):
        torch._dynamo.reset()
        if not knows:
            monkeypatch.setattr(slots.Counter, "known", lambda *args: None)
        model, cache = static_model(recorder)
        stepped(model, cache, 5)
        cache = change(cache) or cache
        if not knows:
            for layer in cache.layers:
                layer.keys._lineage.counted = layer.values._lineage.counted = None
        results.append(stepped(model, cache, 5, 40))
        held = [int(layer.keys.cursor[0]) for layer in cache.layers]
        assert held == [int(layer.cumulative_length) for layer in cache.layers]
    assert all(map(torch.equal, *results))


def test_what_is_seen_of_a_step_at_a_glance_is_what_looking_at_its_writes_finds(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    glance, found = slots.SlotCheck._goes_on, []

    def compared_glance(check: slots.SlotCheck, args: Any) -> Any:
        seen = glance(check, args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slots.SlotCheck, "_goes_on", lambda *args: None)
            found.append((seen, check.look(args)))
        return seen

    monkeypatch.setattr(slots.SlotCheck, "_goes_on", compared_glance)
    stepped(*static_model(recorder), 8)
    assert all(seen in (None, looked) for seen, looked in found)
    assert sum(seen is not None for seen, _ in found) >= 7


def test_a_counter_of_one_layer_that_goes_back_is_noticed(recorder: Recorder) -> None:
    """The mask goes by the first layer's: tokens behind the second's would be read."""
    model, cache = static_model(recorder, layers=2)
    stepped(model, cache, 5)
    cache.layers[1].cumulative_length.sub_(2)
    with pytest.raises(KVQWarning, match="overwritten that attention goes on to read"):
        stepped(model, cache, 1)


def test_nothing_is_taken_for_granted_of_memory_that_other_processes_share(
    recorder: Recorder,
) -> None:
    model, cache = static_model(recorder)
    stepped(model, cache, 3)
    shared(cache)
    stepped(model, cache, 2)
    for layer in cache.layers:
        assert layer.keys._lineage.counted is None
        assert layer.keys._lineage.counter is None


def test_what_a_replayed_step_writes_counts_as_written(recorder: Recorder) -> None:
    model, cache = static_model(recorder)
    stepped(model, cache, 4)
    counter = cache.layers[0].cumulative_length
    version, replays = counter._version, recorder.replays
    stepped(model, cache, 1)
    assert recorder.replays == replays + 1
    assert counter._version > version
