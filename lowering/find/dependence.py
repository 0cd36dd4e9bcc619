"""Ask what depends on a tensor: which nodes may, and whether its elements do decide on those of another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.lowering.find.replay import is_integer
from kvq_compile.lowering.find.trial import (
    CANNOT_BE_RUN,
    Trial,
    data_of,
    nodes_by_memory,
    plain_name,
    random_like,
    run_step,
    size_of_trial,
)
from kvq_compile.lowering.nodes import order_of, root_of, value_of, writers_of, writes_in_place
from kvq_compile.lowering.unchanged import once

PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm", "sum")
_TRIALS = 3
_MOST = 128  # steps of a trial, far more than stand between a cache and a product


def dependent(first: fx.Node, last: fx.Node, ends: Collection[str] = ()) -> list[fx.Node]:
    """Return the nodes between two whose elements depend on those of the first: in order, the last included.

    Writes into memory of their own count, those into a tensor that something else has made do not. Nodes between them
    that call something of ``ends`` depend on nothing.
    """
    place, writers = order_of(last.graph), writers_of(last.graph)
    kept = root_of(first) if plain_name(first) not in PRODUCTS else None

    def written(node: fx.Node) -> list[fx.Node]:
        memory = root_of(node)
        found = [] if memory is kept else writers.get(memory, [])
        return [each for each in found if each is not node and place[each] <= place[last]]

    behind = _behind(first, last, kept, ends)
    upward: set[fx.Node] = set()
    stack = [last]
    while stack:
        node = stack.pop()
        if node not in upward and node in behind:
            upward.add(node)
            stack += [*data_of(node), *written(node)]
    touched = {first}
    for node in sorted(upward, key=place.__getitem__):
        if touched.intersection((*data_of(node), *written(node))):
            touched.add(node)
    return sorted(touched - {first}, key=place.__getitem__)


def _behind(
    first: fx.Node, last: fx.Node, kept: fx.Node | None, ends: Collection[str]
) -> set[fx.Node]:
    """Return the nodes from one to another that its elements may reach, by uses and by writes but into ``kept``."""
    place, sharing = order_of(last.graph), nodes_by_memory(last.graph)
    found: set[fx.Node] = set()
    stack = [first]
    while stack:
        node = stack.pop()
        if node in found or not place[first] <= place[node] <= place[last]:
            continue
        if node is not first and node is not last and plain_name(node) in ends:
            continue
        found.add(node)
        stack += [user for user in node.users if node in data_of(user)]
        if node.op in ("call_function", "call_method") and node.args and writes_in_place(node):
            memory = root_of(node.args[0])
            stack += [] if memory is kept else sharing.get(memory, [])
    return found


@once
def carries(cache: fx.Node, result: fx.Node) -> bool:
    """Return whether elements of ``cache`` ``[B, H, S, D]`` decide on those of ``result``, which its users lead to.

    Where several caches are joined and a part of that is taken, nodes alone do not tell whose part it is. So the steps
    in between are run twice, with other elements of ``cache`` and the same of all else. If they cannot be run, it may.
    """
    if cache is result:
        return True
    steps = _with_indices(dependent(cache, result))
    if result not in steps or len(steps) > _MOST:
        return True  # by way of writes that are no steps between the two
    trial = Trial(result, [cache], ())
    trial.steps = steps
    trial.ignored = {node for step in steps for node in data_of(step)} - {cache, *steps}
    ran = False
    for sizes in trial.assignments(_TRIALS, far=False):
        try:
            if _differs(cache, trial, trial.with_room(sizes, cache)):
                return True
        except CANNOT_BE_RUN:
            continue
        ran = True
    return not ran


def _with_indices(steps: Sequence[fx.Node]) -> list[fx.Node]:
    """Return steps and what computes the integers that they take elements by, in order."""
    found, stack = set(steps), list(steps)
    while stack:
        for node in data_of(stack.pop()):
            if node not in found and is_integer(node) and node.op != "placeholder":
                found.add(node)
                stack.append(node)
    return sorted(found, key=order_of(steps[0].graph).__getitem__) if steps else []


def _differs(cache: fx.Node, trial: Trial, sizes: Mapping[Any, int]) -> bool:
    given = {node: _drawn(value_of(node), sizes) for node in trial.ignored}
    results = []
    for _ in range(2):
        known = {node: value.clone() for node, value in given.items() if isinstance(value, Tensor)}
        known[cache] = random_like(value_of(cache), sizes)
        for step in trial.steps:
            known[step] = run_step(step, known, sizes)
        results.append(torch.nan_to_num(known[trial.result]))
    return not torch.equal(*results)


def _drawn(like: Any, sizes: Mapping[Any, int]) -> Any:
    """Return elements of a tensor: integers in a row, as positions are, others at random."""
    if not isinstance(like, Tensor):
        return None
    if like.is_floating_point():
        return random_like(like, sizes)
    shape = [size_of_trial(size, sizes) for size in like.shape]
    if like.dtype == torch.bool:
        return torch.rand(shape, dtype=torch.float32, device="cpu") < 0.5
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=like.dtype, device="cpu").reshape(shape)
