"""Refuse what is changed in place between where a model reads it and where the rewritten graph does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from kvq_compile.lowering.find.movement import cache_inputs
from kvq_compile.lowering.nodes import order_of, root_of, target_name, writers_of
from kvq_compile.lowering.sites import Attention, Life, Refusal, State


def check_operands(attention: Attention, states: Sequence[State], expanded: bool) -> None:
    """Make sure that an attention may read all of its operands where its result is computed.

    Before that it is several products, each of which reads some of them; ``expanded``: of keys and values that are made
    of the states, as evaluation has shown.

    Raises:
        Refusal: One is changed in between.
    """
    place, writers = order_of(attention.output.graph), writers_of(attention.output.graph)
    others = (attention.query, attention.mask, attention.sink_logits)
    operands = {node for node in others if isinstance(node, fx.Node)}
    bases = [state.base for state in states]
    made = [attention.key, attention.value] if expanded else bases
    steps = _steps(attention.output, {*operands, *bases, *made})
    written = {root_of(state.past) for state in states if state.write is not None}  # looked at
    for memory, first in _reads(steps, place).items():
        since = place[memory] if memory in steps else first  # what is in between is not looked at
        for writer in () if memory in written else writers.get(memory, ()):
            is_step = writer in steps and bool(writer.users)
            if not is_step and since < place[writer] < place[attention.output]:
                raise Refusal(
                    f"what attention reads is changed in place by {target_name(writer)} before its result is computed"
                )
    for state in states:
        check_joined(state)


def check_joined(state: State) -> None:
    """Make sure that nothing changes a cache in place once new tokens have joined it.

    Raises:
        Refusal: Something does.
    """
    if state.life not in (Life.GROWN, Life.GROWN_PLAIN):
        return
    place, memory = order_of(state.base.graph), root_of(state.base)
    changes = [x for x in writers_of(state.base.graph).get(memory, ()) if place[x] > place[memory]]
    if changes:
        raise Refusal(_grown_is_changed(changes))


def check_growth(cache: fx.Node, returned: Iterable[fx.Node]) -> None:
    """Make sure of the same, of all tensors that tokens of a quantized cache are among.

    Raises:
        Refusal: Something does.
    """
    kept = {root_of(node) for node in returned}
    for memory, changes in writers_of(cache.graph).items():
        if memory in kept and memory is not cache and cache in cache_inputs(memory):
            raise Refusal(_grown_is_changed(changes))


def _grown_is_changed(changes: Sequence[fx.Node]) -> str:
    return f"the tokens that a cache has grown to are changed in place by {target_name(changes[0])}"


def _steps(output: fx.Node, ends: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes that compute ``output`` from ``ends``, as far as these have any part in them."""
    found: dict[fx.Node, None] = {}
    stack = [output]
    while stack:
        node = stack.pop()
        if node not in found and node not in ends:
            found[node] = None
            stack += node.all_input_nodes
    place = order_of(output.graph)
    made = {*ends}
    for node in sorted(found, key=place.__getitem__):
        if made.intersection(node.all_input_nodes):
            made.add(node)
    return made - ends


def _reads(steps: Iterable[fx.Node], place: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """Return where each tensor is read first."""
    first: dict[fx.Node, int] = {}
    for step in steps:
        for node in step.all_input_nodes:
            memory = root_of(node)
            first[memory] = min(place[step], first.get(memory, place[step]))
    return first
