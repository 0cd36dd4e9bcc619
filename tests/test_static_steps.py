"""Steps of a static cache that are replayed give what steps give that are launched, whatever happens in between."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from kvq_compile import KVQWarning
from kvq_compile.lowering import guards, slots
from recorded_steps import OPTIONS, Recorder, llama
from versions import need_static_layers_that_count

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder.on_cpu(monkeypatch)


def static_model(recorder: Recorder, layers: int = 1, **options: Any) -> tuple[Any, StaticCache]:
    need_static_layers_that_count()
    model = llama(layers)
    model.compile(backend="kvq", options={**OPTIONS, "window": 32, **options})
    cache = StaticCache(config=model.config, max_cache_len=96)
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


@pytest.mark.long(but=["rewound", "written_before", "deepcopy"])
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


def test_what_is_noted_after_such_a_step_is_what_is_noted_after_one_that_was_looked_at(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, noted = slots.SlotCheck.note, []

    def known(check: slots.SlotCheck, args: Any) -> list[Any]:
        lineages = [args[write.argument]._lineage for write in check.writes]  # type: ignore[index]
        return [(lineage.counted, lineage.counter) for lineage in lineages]

    def compared(check: slots.SlotCheck, args: Any, look: slots.Look) -> None:
        if look.end is None:
            return note(check, args, look)
        note(check, args, replace(look, end=None))
        expected = known(check, args)
        for write in check.writes:
            lineage = args[write.argument]._lineage  # type: ignore[index]
            lineage.counted = lineage.counter = None
        note(check, args, look)
        assert known(check, args) == expected
        return noted.append(look.end)

    monkeypatch.setattr(slots.SlotCheck, "note", compared)
    stepped(*static_model(recorder, layers=2), 8)
    assert noted == list(range(22, 29))


def test_a_counter_that_goes_otherwise_than_the_caches_is_read_after_the_call() -> None:
    write = slots.Write("keys", 0, tokens=lambda args: 1, counter=slots.Counter(1, lambda args: 2))
    assert not slots.SlotCheck(None, (write,))._count_alike
    alike = replace(write, counter=slots.Counter(1, write.tokens))
    assert slots.SlotCheck(None, (alike,))._count_alike


def test_static_layers_of_the_default_method_are_looked_at_once(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: each layer had a copy of equal tables, so that Dynamo looked at the keys of every layer."""
    counts: list[int] = []
    share = guards.share_guards
    monkeypatch.setattr(
        "kvq_compile.backend.share_guards", lambda *args: counts.append(share(*args))
    )
    need_static_layers_that_count()
    model = llama(3)
    model.compile(backend="kvq", options={"method": "tc", "inner": "eager"})
    cache = StaticCache(config=model.config, max_cache_len=96)
    cache.early_initialization(1, 2, 32, torch.float32, torch.device("cpu"))
    for (
        layer
    ) in cache.layers:  # as an uncompiled prompt does: the buffers are quantized by the first step
        layer.update(torch.ones(1, 2, 20, 32), torch.ones(1, 2, 20, 32))
    stepped(model, cache, 4)
    assert counts[-1] == 2 * 3 - 2
    assert len({id(layer.keys.tables) for layer in cache.layers}) == 1
    assert recorder.replays


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
