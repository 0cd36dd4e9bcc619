"""Steps of models that are split over processes: which of them are recorded, why others are not, and what ends them."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed._functional_collectives import all_gather_tensor, all_reduce

from kvq_compile import backend
from kvq_compile.lowering import collectives
from kvq_compile.lowering.collectives import APART, ASK, DISTRIBUTED, OTHERS, why_not_recorded
from recorded_steps import REPLAYED, Recorder, attended, compared

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder.on_cpu(monkeypatch)


@pytest.fixture
def group() -> Iterator[Any]:
    about = {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    distributed.init_process_group("gloo", **about)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def reduced(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
    output, past = attended(query, key, value, past)
    return all_reduce(output, "sum", distributed.group.WORLD), past


def gathered(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
    output, past = attended(query, key, value, past)
    return all_gather_tensor(output, 0, distributed.group.WORLD), past


def summed_by_name(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
    output, past = attended(query, key, value, past)
    name = distributed.group.WORLD.group_name
    begun = torch.ops._c10d_functional.all_reduce(output, reduce_op="sum", group_name=name)
    return torch.ops._c10d_functional.wait_tensor(begun), past


def divided(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
    output, held = reduced(query, key, value, past)
    return output / past[0].shape[2], held


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("backends", "mode", "told"),
    [
        (("nccl",), None, f"are not recorded: {OTHERS}"),
        (("nccl",), "reduce-overhead", f"are not recorded: {OTHERS}"),
        (("gloo",), None, f"are not recorded: {OTHERS}{ASK}"),
        (("gloo",), "reduce-overhead", REPLAYED),
    ],
)
def test_steps_with_collectives_are_recorded_where_they_can_be_and_a_mode_asks_for_it(
    backends: tuple[str, ...],
    mode: str | None,
    told: str,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host takes part in those of gloo. On a CPU it takes part in everything."""
    monkeypatch.setattr(collectives, "RECORDED", backends)
    assert compared(reduced, recorder, mode) == told
    assert bool(recorder.tapes) == (told == REPLAYED)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("function", "mode", "told"),
    [
        (gathered, "reduce-overhead", REPLAYED),
        (summed_by_name, "reduce-overhead", REPLAYED),
        (divided, None, "depends on the length of a cache"),
        (divided, "reduce-overhead", "depends on the length of a cache"),
    ],
)
def test_what_is_told_of_a_step_with_collectives_is_true(
    function: Callable[..., Any],
    mode: str | None,
    told: str,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: a mode was asked for that would not have led to a recording."""
    monkeypatch.setattr(collectives, "RECORDED", ("gloo",))
    assert told in compared(function, recorder, mode)


def test_a_group_that_checks_its_collectives_is_not_recorded(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: it has the name of what it wraps, and has processes talk before each collective."""
    monkeypatch.setattr(collectives, "RECORDED", ("gloo",))
    level = distributed.get_debug_level()
    distributed.set_debug_level(distributed.DebugLevel.DETAIL)
    try:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    finally:
        distributed.set_debug_level(level)
    told = compared(reduced, recorder, "reduce-overhead")
    distributed.destroy_process_group()
    assert told == f"are not recorded: {OTHERS}"


@pytest.mark.parametrize("name", ["of another device", "of none"])
def test_a_group_that_has_no_part_on_the_device_is_no_fault(name: str, group: Any) -> None:
    """Regression: compiling failed where another device's tensors are summed, or where the group is gone."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    begun = graph.call_function(
        torch.ops._c10d_functional.all_reduce.default, (x, "sum", group.group_name)
    )
    graph.output(graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (begun,)))
    assert why_not_recorded(graph, torch.device("meta"), True) == OTHERS
    begun.update_arg(2, name)
    assert why_not_recorded(graph, torch.device("cpu"), True) == OTHERS


@pytest.mark.parametrize("waits", [False, True])
def test_a_collective_is_waited_for_in_the_graph_that_begins_it(
    waits: bool, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a step copies what it returns and what it is given, which was still to come."""
    monkeypatch.setattr(collectives, "RECORDED", ("gloo",))
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    ops = torch.ops._c10d_functional
    if waits:
        graph.output(graph.call_function(ops.wait_tensor, (x,)))
    else:
        graph.output(graph.call_function(ops.all_reduce, (x, "sum", group.group_name)))
    assert why_not_recorded(graph, torch.device("cpu"), True) == APART


def test_a_name_alone_is_no_collective() -> None:
    graph = torch.fx.Graph()
    graph.output(graph.placeholder("c10d_tokens"))
    assert why_not_recorded(graph, torch.device("cpu"), False) is None


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_steps_over_distributed_tensors_are_asked_for_too(
    mode: str | None, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: their collectives are not in the graph that Dynamo captures."""
    tensor = pytest.importorskip("torch.distributed.tensor")
    monkeypatch.setattr(collectives, "RECORDED", ("gloo",))
    monkeypatch.setitem(backend.RECORDERS, "cpu", lambda run: run)  # tapes do not know them
    mesh = distributed.init_device_mesh("cpu", (1,))
    scale = torch.nn.Parameter(tensor.distribute_tensor(torch.ones(32), mesh), requires_grad=False)

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, *about: Any) -> Any:
            output, past = attended(*about)
            return output * self.scale.to_local(), past

    told = compared(Scaled(), recorder, mode)
    assert told == (REPLAYED if mode else f"are not recorded: {DISTRIBUTED}{ASK}")


def test_recordings_of_other_groups_stay(
    group: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: processes that do not know a group replayed a step which those that shut it down recorded anew."""
    monkeypatch.setattr(collectives, "RECORDED", ("gloo",))
    assert compared(reduced, recorder, "reduce-overhead") == REPLAYED
    gone: list[bool] = []
    weakref.finalize(recorder.tapes.pop(), lambda: gone.append(True))
    recorder.tapes.clear()
    distributed.destroy_process_group(distributed.new_group(backend="gloo"))
    assert not gone
    group.abort()
    assert gone


def test_a_group_may_go_while_a_step_is_recorded(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: steps of one thread failed with a `KeyError` when another one shut a group down."""

    def interrupted(run: Callable[[], Any]) -> Callable[[], Any]:
        collectives.forget_recordings()
        return recorder(run)

    monkeypatch.setitem(backend.RECORDERS, "cpu", interrupted)
    assert compared(attended, recorder) == REPLAYED
    assert len(recorder.tapes) > 2


def test_recordings_go_before_the_group_that_they_wait_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL would wait for them for ever; compiled code with collectives stays where it is."""
    monkeypatch.setattr(collectives, "RECORDED", ("gloo",))
    recorder = Recorder.on_cpu(monkeypatch)
    gone: list[bool] = []  # whether there was a group, then
    for _ in range(2):  # steps with the next group are recorded anew
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        assert compared(reduced, recorder, "reduce-overhead") == REPLAYED
        while recorder.tapes:
            weakref.finalize(
                recorder.tapes.pop(), lambda: gone.append(distributed.is_initialized())
            )
        torch._dynamo.reset()
        assert not gone
        distributed.destroy_process_group()
        assert gone
        assert all(gone)
        gone.clear()
