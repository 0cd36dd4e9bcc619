"""Evaluate a part of a graph on random numbers, to see what it does whatever its operations are."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from kvq_compile.lowering.find.replay import number
from kvq_compile.lowering.nodes import (
    fixed_number,
    order_of,
    root_of,
    target_name,
    value_of,
    writers_of,
    writes_in_place,
)
from kvq_compile.lowering.sites import Refusal
from kvq_compile.lowering.unchanged import once

MIXING = (
    *("matmul", "bmm", "mm", "addmm", "baddbmm", "linear", "einsum", "softmax", "embedding"),
    *("scaled_dot_product_attention", "flex_attention", "layer_norm", "rms_norm", "group_norm"),
    *("conv1d", "conv2d", "conv3d", "batch_norm", "multi_head_attention_forward"),
)
# Those of them that turn each token into another one, whatever the others are.
BY_TOKEN = ("rms_norm", "layer_norm")
# Operations that take nothing but shape, dtype or device of their first argument.
_SHAPED = (
    *("size", "dim", "new_empty", "new_zeros", "new_ones", "new_full"),
    *("empty_like", "zeros_like", "ones_like", "full_like"),
)
EMPTY = ("empty", "new_empty", "empty_like")
CANNOT_BE_RUN = (Refusal, RuntimeError, IndexError, TypeError, ValueError, AttributeError)
_NARROW = (torch.bfloat16, torch.float16)
_MOST = 64  # steps of a trial, far more than any spelling takes
_LARGEST = 1 << 26  # elements evaluated at once; 256 MiB in float32
_SIZES = (5, 3, 7, 4, 11, 6, 13, 9)  # what symbolic sizes are set to
_FARTHEST = 2048  # numbers of steps up to which one of the sizes is set beyond them


def plain_name(node: Any) -> str:
    """Return the name of what a node calls without the overload: ``"cat"`` of ``aten.cat.default``."""
    return target_name(node).partition(".")[0]


def data_of(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose elements, not only shapes, a node depends on."""
    name = plain_name(node)
    if name in _SHAPED or (name == "getattr" and node.args[1] in ("shape", "dtype", "device")):
        return []
    if name in ("type_as", "to", "expand_as", "view_as"):
        first = node.args[0]
        return [first] if isinstance(first, fx.Node) else []
    return node.all_input_nodes


@once
def nodes_by_memory(graph: fx.Graph) -> dict[Any, list[fx.Node]]:
    """Return the nodes of a graph by the tensor whose memory they may share."""
    nodes: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        nodes.setdefault(root_of(node), []).append(node)
    return nodes


class Trial:
    """The steps between some tensors and a result.

    Args:
        result: What is evaluated.
        cuts: Where its evaluation begins: nodes that are given.
        ends: Names of operations that no step may be.

    Attributes:
        given: Tensors, writes into which are none of the steps: they are given as they were left.
        ignores: Whether the result may be made of other tensors as well, none of whose elements is in it: these are
            random, and others in each run.
        ignored: These tensors.
    """

    given: Collection[Any] = ()
    ignores = False

    def __init__(self, result: fx.Node, cuts: Sequence[fx.Node], ends: Collection[str]) -> None:
        self.result, self.cuts, self._ends = result, tuple(cuts), ends
        self.steps: list[fx.Node] = []
        self.ignored: set[fx.Node] = set()

    def collect(self) -> bool:
        """Collect the nodes to run; say whether nothing but they decides on the result."""
        needed = self._needed([self.result], self._ends, _MOST)
        if needed is None:
            return False
        place = order_of(self.result.graph)
        self.steps = sorted(needed, key=place.__getitem__)
        end = place[self.steps[-1]]
        if any(self._is_changed(cut, needed, end) for cut in self.cuts):
            return False
        last = max((place[node] for node in self.steps if writes_in_place(node)), default=-1)
        memory = root_of(self.result)
        readers = [user for node in self.steps if root_of(node) is memory for user in node.users]
        return all(place[user] > last for user in readers if user not in needed)

    def _needed(
        self, results: Sequence[fx.Node], ends: Collection[str], most: int
    ) -> set[fx.Node] | None:
        """Return the nodes between the cuts and some results, writes among them; ``None`` if they cannot all be run."""
        writers = writers_of(self.result.graph)
        needed: set[fx.Node] = set()
        stack = [*results]
        while stack:
            node = stack.pop()
            if node in needed or node in self.cuts or node in self.ignored:
                continue
            if isinstance(value_of(node), torch.SymFloat) and fixed_number(node) is not None:
                continue
            is_argument = node.op not in ("call_function", "call_method", "get_attr")
            if is_argument and isinstance(value_of(node), (torch.SymInt, int)):
                continue
            if is_argument or plain_name(node) in ends:
                if not (self.ignores and _is_ignored(node)):
                    return None
                self.ignored.add(node)
                continue
            if len(needed) > most:
                return None
            needed.add(node)
            if not isinstance(value_of(node), torch.SymInt):
                stack.extend(data_of(node))
            memory = root_of(node)
            if memory not in self.given:
                stack.extend(writers.get(memory, ()))
        return needed

    def assignments(self, trials: int, far: bool = True) -> Iterator[Mapping[Any, int]]:
        """Yield the sizes to try for the symbols of the graph, a mapping a trial; without symbols only one.

        ``far``: also sizes beyond the numbers of the steps, one symbol after another.
        """
        ordered = self._symbols()
        for trial in range(trials if ordered else 1):
            tried = {
                symbol: _SIZES[(place + trial) % len(_SIZES)] + len(_SIZES) * (place // len(_SIZES))
                for place, symbol in enumerate(ordered)
            }
            yield tried
        reach = largest_number(self.steps)
        if far and reach > min(_SIZES):  # what a step does from there on must show
            beyond = ({**tried, symbol: tried[symbol] + reach} for symbol in ordered)
            yield from (sizes for sizes in beyond if self._are_sizes(sizes))

    def with_room(
        self, sizes: Mapping[Any, int], cache: fx.Node, axis: int = 2
    ) -> Mapping[Any, int]:
        """Return sizes to try by which a cache has more slots, along an axis, than all the other sizes together."""
        slots = value_of(cache).shape[axis]
        own = slots.node.expr.free_symbols if isinstance(slots, torch.SymInt) else ()
        room = sum(sizes.values())
        return {symbol: size + room * (symbol in own) for symbol, size in sizes.items()}

    def _symbols(self) -> list[Any]:
        """Return the symbols that the steps may depend on: those of sizes, and of numbers that steps are given."""
        symbols: set[Any] = set()

        def note(size: Any) -> Any:
            if isinstance(size, torch.SymInt):
                symbols.update(size.node.expr.free_symbols)
            return size

        for node in (*self.steps, *self.cuts, *self.ignored):
            value = value_of(node)
            for size in value.shape if isinstance(value, Tensor) else (value,):
                note(size)
        for step in self.steps:
            fx.node.map_aggregate((step.args, step.kwargs), lambda x: note(value_of(x)))
        return sorted(symbols, key=str)

    def _are_sizes(self, sizes: Mapping[Any, int]) -> bool:
        """Return whether no tensor has a negative size then: the symbols of a graph may depend on one another."""
        values = (value_of(node) for node in (*self.steps, *self.cuts, *self.ignored))
        shapes = (value.shape for value in values if isinstance(value, Tensor))
        return all(size_of_trial(size, sizes) >= 0 for shape in shapes for size in shape)

    def run(self, sizes: Mapping[Any, int], given: Mapping[fx.Node, Any]) -> Any:
        """Return the result for given values of the cuts.

        Raises:
            one of `CANNOT_BE_RUN`: A step cannot be run.
        """
        return self.run_all(sizes, given)[self.result]

    def run_all(self, sizes: Mapping[Any, int], given: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """Return what every step gives, for given values of the cuts.

        Raises:
            one of `CANNOT_BE_RUN`: A step cannot be run.
        """
        known = {node: random_like(value_of(node), sizes) for node in self.ignored} | dict(given)
        for node in self.steps:
            known[node] = run_step(node, known, sizes)
        return known

    def _is_changed(self, cut: fx.Node, needed: set[fx.Node], last: int) -> bool:
        """Return whether a cut changes before the steps, which end at place ``last``, have moved it."""
        place, writers = order_of(cut.graph), writers_of(cut.graph)
        changes = [place[node] for node in writers.get(root_of(cut), ())]
        return any(place[cut] < change <= last for change in changes)


def _is_ignored(node: fx.Node) -> bool:
    """Return whether a node is what a trial that ignores others may fill at random."""
    value = value_of(node)
    return isinstance(value, Tensor) and value.is_floating_point()


def largest_number(steps: Sequence[fx.Node]) -> int:
    """Return the largest number among the arguments of steps, up to `_FARTHEST`; 0 if there are none."""
    found = [0]

    def note(x: Any) -> Any:
        if isinstance(x, torch.SymInt):
            found.extend(abs(int(n)) for n in x.node.expr.atoms(sympy.Integer))
        elif isinstance(x, (int, float)) and math.isfinite(x):
            found.append(math.ceil(abs(x)))
        return x

    for node in steps:
        fx.node.map_aggregate((node.args, node.kwargs), note)
        if isinstance(value_of(node), torch.SymInt):
            note(value_of(node))
    return max(number for number in found if number <= _FARTHEST)


def random_like(like: Tensor, sizes: Mapping[Any, int]) -> Tensor:
    """Return random elements on the CPU, of both signs and from 2^-6 to 2^12: what clamps or rectifies them shows.

    Raises:
        Refusal: They would be too many.
    """
    shape = [size_of_trial(size, sizes) for size in like.shape]
    count = 1
    for size in shape:
        count *= size
    if count > _LARGEST:
        raise Refusal("the cache is too large to be evaluated")
    power, side = (torch.rand(shape, dtype=torch.float32, device="cpu") for _ in range(2))
    made = torch.where(side < 0.5, -1.0, 1.0) * torch.exp2(18 * power - 6)
    return made.to(like.dtype)


def size_of_trial(size: Any, sizes: Mapping[Any, int]) -> int:
    """Return a size as a trial sets it."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = sympy.sympify(size.node.expr).xreplace(
        {symbol: sympy.Integer(chosen) for symbol, chosen in sizes.items()}
    )
    return int(expression) if expression.is_number else number(size)


def run_step(
    node: fx.Node, known: Mapping[fx.Node, Any], sizes: Mapping[Any, int], wide: bool = False
) -> Any:
    """Evaluate one node on the CPU; ``wide``: in fp32 where it would compute in fewer bits."""

    def fill(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return known[x] if x in known else blank(x, sizes, wide)
        if isinstance(x, torch.dtype):
            return torch.float32 if wide and x in _NARROW else x
        if isinstance(x, torch.device) or (isinstance(x, str) and x.startswith("cuda")):
            return torch.device("cpu")
        return size_of_trial(x, sizes) if isinstance(x, torch.SymInt) else x

    value = value_of(node)
    if isinstance(value, torch.SymInt):
        return size_of_trial(value, sizes)
    if node.op == "get_attr":
        made = _constant(node)
        return made.float() if wide and made.dtype in _NARROW else made
    args: Any = fx.node.map_aggregate(node.args, fill)
    kwargs: Any = fx.node.map_aggregate(node.kwargs, fill)
    target: Any = "float" if wide and node.target in ("bfloat16", "half") else node.target
    if node.op == "call_method":
        result = getattr(args[0], target)(*args[1:], **kwargs)
    else:
        result = target(*args, **kwargs)
    if plain_name(node) in EMPTY and result.is_floating_point():
        result.fill_(float("nan"))  # no element of it may pass for one that was moved here
    return result


def blank(node: fx.Node, sizes: Mapping[Any, int], wide: bool = False) -> Any:
    """Return what stands for a node of which only shape, dtype and device count."""
    value = value_of(node)
    if isinstance(value, Tensor):
        shape = [size_of_trial(size, sizes) for size in value.shape]
        dtype = torch.float32 if wide and value.dtype in _NARROW else value.dtype
        return torch.zeros((), dtype=dtype, device="cpu").expand(shape)
    if isinstance(value, torch.SymFloat):
        return fixed_number(value)
    return size_of_trial(value, sizes)


def _constant(node: fx.Node) -> Any:
    value: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value.detach().cpu() if isinstance(value, Tensor) else value
