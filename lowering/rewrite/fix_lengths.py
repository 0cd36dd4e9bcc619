"""Take the lengths of growing caches as values on the device, and as sizes that hold for many steps."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvq_compile.kernels import ops
from kvq_compile.lowering.find.lengths import Counting, find_counting
from kvq_compile.lowering.find.trial import (
    CANNOT_BE_RUN,
    Trial,
    largest_number,
    random_like,
    size_of_trial,
)
from kvq_compile.lowering.graph import Graph, PassReport, copy_module
from kvq_compile.lowering.lengths import ALIGNED
from kvq_compile.lowering.nodes import (
    changed_roots,
    is_static,
    root_of,
    source_name,
    target_name,
    value_of,
    writes_in_place,
)
from kvq_compile.lowering.outputs import Extended, Given, Plain
from kvq_compile.lowering.sites import Refusal, unexpected
from kvq_compile.lowering.unchanged import unchanged

# Of each operator, its arguments that may have a column a cache position; then where its position and its start are.
_ARGUMENTS = {
    ops.attend: ((6,), 7, 8),
    ops.importance: ((4,), 5, 6),
    ops.append_: ((6,), 3, 4),
    ops.append_both_: ((9,), 5, 6),
}
_ARITHMETIC = (
    *("add", "sub", "mul", "rsub", "add_", "sub_", "iadd", "isub"),
    *("lt", "le", "gt", "ge", "eq", "ne"),
)
_TRIALS = 3
MADE = "the call makes its caches anew"
HOST = "exact copies of packed tokens are kept in host memory"
FORGETS = "a cache forgets its first tokens, and how many is a number of the graph"
DEVICES = "its tensors are on several devices"
PARTS = "arguments that are made of other tensors stand elsewhere in memory at every step"
MASK = "what a mask shows of cache positions depends on how many columns it has"


def fix_lengths(graph: Graph) -> PassReport:
    """Let nothing but memory differ from one step of a growing cache to the next.

    Before:  positions = arange(T) + length; mask = arange(length + T) <= positions[:, None]
             output = kvq.attend(query, key, value, *keys, *values, mask, start=length)
             kvq.append_both_(*keys, *values, key, value, start=length)
    After:   positions = arange(T) + held[0]; mask = arange(length + T) <= positions[:, None]
             output = kvq.attend(query, key, value, *keys, *values, mask, position=held[0])
             kvq.append_both_(*keys, *values, key, value, position=held[0], start=length)
             where ``held`` is a tensor on the device, and ``length`` any bound of what it holds
    Because: the same numbers then serve every step until a cache grows, and a step can be replayed from a CUDA graph.
             Masks get columns for empty cache positions, which attention does not read.

    Leaves alone: a graph in which anything else depends on a length. That masks do so in their number of columns only
    is tried out on random numbers. `Graph.unrecorded` says what is in the way.
    """
    if not graph.caches or graph.conversions:
        return PassReport()
    try:
        device = _check_graph(graph)
        counting = find_counting(graph.inputs, graph.fx, device, graph.sizes)
        _check_writes(graph, counting)
        module = copy_module(graph.module)
        changes = _rewrite(module.graph, counting)
        with unchanged(module.graph):
            _try_masks(module.graph, counting)
        if graph.hindrance is not None:  # told where nothing else is in the way
            raise Refusal(graph.hindrance)
    except Exception as error:  # steps that are not recorded are as right as others
        graph.unrecorded = str(error if isinstance(error, Refusal) else unexpected(error))
        return PassReport((f"steps are not recorded: {graph.unrecorded}",))
    graph.module, graph.lengths = module, counting.lengths
    return PassReport(tuple(changes))


def _check_graph(graph: Graph) -> torch.device:
    """Check all but lengths: what a call returns, where it computes and what it writes; return its device."""
    if not all(isinstance(plan, (Plain, Extended, Given)) for plan in graph.plans):
        raise Refusal(MADE)
    if any(cache.layout.keep_exact for cache in graph.caches.values()):
        raise Refusal(HOST)
    if any(cache.trim is not None for cache in graph.caches.values()):
        raise Refusal(FORGETS)
    for node in graph.arguments.keys() - graph.caches.keys():
        if is_traceable_wrapper_subclass(value_of(node)) and not is_static(node):
            raise Refusal(f"{PARTS}: {source_name(node)}")
    values = (value_of(node) for node in graph.fx.nodes)
    # Nothing is launched for meta tensors, whose strides transformers asks for where heads are split over processes.
    devices = {x.device for x in values if isinstance(x, Tensor) and not x.is_meta}
    if len(devices) != 1:
        raise Refusal(f"{DEVICES}: {', '.join(sorted(map(str, devices)))}")
    return devices.pop()


def _check_writes(graph: Graph, counting: Counting) -> None:
    """Check that arguments which the graph writes into are used where they are, and not returned."""
    padded = counting.lengths.padded
    returned = {root_of(x) for x in graph.fx.output_node().all_input_nodes}
    for node in changed_roots(graph.fx.nodes) & graph.arguments.keys():
        if graph.arguments[node] in padded or node in returned:
            raise Refusal(f"it writes into its argument {node.name}")


def _rewrite(graph: fx.Graph, counting: Counting) -> list[str]:
    """Take values of lengths from a new last argument.

    Raises:
        Refusal: Something depends on a length in another way.
    """
    lengths = counting.lengths
    if not lengths.caches:
        return []
    changes = []
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        held = graph.placeholder("kvq_lengths")
    example = torch.empty(len(lengths.caches), ALIGNED, dtype=torch.int64, device="meta")
    held.meta["example_value"] = example
    held._dynamo_source = ConstantSource("kvq_lengths")  # AOTAutograd wants one
    values = _Values(graph, held, counting)
    for node in list(graph.nodes):
        if node is held or node.op == "placeholder":
            continue
        with graph.inserting_before(node):
            changed = _take_values(node, values)
        if changed:
            changes.append(f"{node.name} takes lengths from the device")
        _check_dependence(node, counting)
    return changes


class _Values:
    """Lengths on the device, as nodes of a graph at its insert point."""

    def __init__(self, graph: fx.Graph, held: fx.Node, counting: Counting) -> None:
        self._graph, self._held, self.counting = graph, held, counting
        self._slots: dict[int, fx.Node] = {}
        with graph.inserting_after(held):
            for row in reversed(range(len(counting.lengths.caches))):
                index = row, slice(0, 1)
                self._slots[row] = graph.call_function(operator.getitem, (held, index))

    def position(self, size: Any) -> fx.Node | None:
        """Return ``[1]`` of the value of a number, where that is a length and nothing else."""
        if not isinstance(value_of(size), torch.SymInt) or not self.counting.counts(value_of(size)):
            return None
        row, added = self.counting.split(value_of(size))
        if added:
            raise Refusal(f"tokens are written {added} positions behind the end of a cache")
        return self._slots[row]

    def scalar(self, size: fx.Node) -> fx.Node:
        """Return the value of a number as a tensor without dimensions."""
        row, added = self.counting.split(value_of(size))
        value = self._graph.call_function(operator.getitem, (self._held, (row, 0)))
        return self._graph.call_function(operator.add, (value, added)) if added else value


def _take_values(node: fx.Node, values: _Values) -> bool:
    """Let a node take lengths that it uses as values from the device; return whether it used any."""
    counting, graph = values.counting, node.graph
    if node.target in _ARGUMENTS:
        _, position, start = _ARGUMENTS[node.target]
        held = values.position(node.args[start])
        if held is not None:
            node.update_arg(position, held)
            if not writes_in_place(node):  # which checks that there is room for the bound
                node.update_arg(start, None)
        return held is not None
    if not isinstance(value_of(node), Tensor):
        return False
    numbers = [x for x in node.args if _is_number(x, counting)]
    if target_name(node) in _ARITHMETIC and numbers:
        for x in numbers:
            node.replace_input_with(x, values.scalar(x))  # type: ignore[arg-type]
        return True
    if target_name(node) == "arange" and numbers and not counting.counts(value_of(node)):
        if len(node.args) != 2 or set(node.kwargs) - {"device", "dtype"}:
            raise Refusal(f"{node.name} counts from a length in steps")
        begin, end = node.args
        count: Any = value_of(node).shape[0]
        if isinstance(count, torch.SymInt):
            node_of_count = graph.call_function(operator.sub, (end, begin))
            node_of_count.meta["example_value"] = count
            count = node_of_count
        if not _is_number(begin, counting):
            raise Refusal(f"{node.name} counts back from a length")
        first = values.scalar(begin)  # type: ignore[arg-type]
        node.args = (count,)
        with graph.inserting_after(node):
            moved = graph.call_function(operator.add, (node, first))
        moved.meta.update(node.meta)
        node.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
        return True
    return False


def _is_number(x: Any, counting: Counting) -> bool:
    return (
        isinstance(x, fx.Node)
        and isinstance(value_of(x), torch.SymInt)
        and counting.counts(value_of(x))
    )


def _check_dependence(node: fx.Node, counting: Counting) -> None:
    """Check that a node which depends on a length is a size, a tensor with columns for it, or reads such columns."""
    given = [x for x in node.all_input_nodes if counting.counts(value_of(x))]
    if not given:
        return
    if node.op == "output":
        raise Refusal(f"{given[0].name}, of a size that is a length, is returned")
    if node.target is ops.dequantize:
        raise Refusal("a cache is read as an ordinary tensor")
    if node.target in _ARGUMENTS:
        slotwise, _, start = _ARGUMENTS[node.target]
        read = [node.args[place] for place in (*slotwise, start) if place < len(node.args)]
        if node.target is ops.importance:
            read.append(node.args[7])
        if not all(x in read for x in given):
            raise Refusal(f"{node.name} takes tensors of a size that is a length")
        return
    value = value_of(node)
    if isinstance(value, (Tensor, torch.SymInt)) and counting.counts(value):
        return
    if isinstance(value, torch.SymInt) and not any(isinstance(value_of(x), Tensor) for x in given):
        return  # a difference of lengths
    raise Refusal(f"{node.name} ({target_name(node)}) depends on the length of a cache")


def _try_masks(graph: fx.Graph, counting: Counting) -> None:
    """Check on random numbers that further columns of masks do not change those before them.

    Raises:
        Refusal: They do, or a mask cannot be evaluated.
    """
    masks = {
        node.args[place]: None
        for node in graph.nodes
        if node.target in (ops.attend, ops.importance)
        for place in _ARGUMENTS[node.target][0]
        if isinstance(node.args[place], fx.Node)
    }
    for mask in masks:
        if counting.counts(value_of(mask)) and not _holds(mask, counting):
            raise Refusal(MASK)


def _holds(mask: fx.Node, counting: Counting) -> bool:
    sizes = value_of(mask).shape
    if any(counting.counts(size) for size in sizes[:-1]):
        return False
    cuts = [
        node
        for node in mask.graph.find_nodes(op="placeholder")
        if isinstance(value_of(node), Tensor)
    ]
    if mask in cuts:
        return True  # an argument, of which the further columns are ours
    trial = Trial(mask, cuts, ())
    if not trial.collect():
        return False
    generator = torch.Generator().manual_seed(0)
    try:
        needed = {x for step in trial.steps for x in step.all_input_nodes} & set(cuts)
        return all(
            _is_kept(trial, [cut for cut in cuts if cut in needed], sizes, counting, generator)
            for sizes in trial.assignments(_TRIALS)
        )
    except CANNOT_BE_RUN:
        return False


def _is_kept(
    trial: Trial,
    cuts: Sequence[fx.Node],
    chosen: Any,
    counting: Counting,
    generator: torch.Generator,
) -> bool:
    """Return whether a mask has the same first columns if it has further ones."""
    tokens = size_of_trial(counting.tokens, chosen)
    reach = 2 * largest_number(trial.steps)  # what a mask shows from a distance on must show
    length, bound = 5 + tokens + reach, 9 + 2 * (tokens + reach)
    results = []
    wide: dict[fx.Node, Tensor] = {}
    for slots in (bound, length):
        sizes = dict(chosen)
        for symbol, counted in counting.symbols.items():
            sizes[symbol] = slots + tokens if counted.behind else slots
        given = {}
        for cut in cuts:
            if cut.name == "kvq_lengths":
                given[cut] = torch.full(
                    value_of(cut).shape, length, dtype=torch.int64, device="cpu"
                )
            elif cut in wide:
                shape = [size_of_trial(size, sizes) for size in value_of(cut).shape]
                given[cut] = wide[cut][tuple(slice(0, size) for size in shape)]
            else:
                given[cut] = wide[cut] = _drawn(value_of(cut), sizes, generator)
        results.append(trial.run(sizes, given))
    more, fewer = results
    return torch.equal(more[..., : fewer.shape[-1]], fewer) and fewer.shape[-1] < more.shape[-1]


def _drawn(like: Tensor, sizes: Any, generator: torch.Generator) -> Tensor:
    """Return random numbers; of integers 0 and 1, which are what masks are made of and places in most tensors."""
    if like.is_floating_point():
        return random_like(like, sizes)
    shape = [size_of_trial(size, sizes) for size in like.shape]
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int64, device="cpu").to(
        like.dtype
    )
