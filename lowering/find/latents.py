"""Find keys and values that are computed anew, token by token, from two tensors that a model keeps (latent attention).

What lies between the kept tensors and the attention is *evaluated*, in double precision on the CPU, whatever its
operations are. First with the elements of all weights numbered through and the kept tokens set to unit vectors: the
result says of which elements of which weight each channel of each head is made. Then on random numbers, of which the
maps that were read so must make the same. A step that is not linear, or that mixes tokens, shows there; a weight that
depends on the call is none.

With ``key = [up @ latent, rotary]`` and ``value = down @ latent`` attention can do without either::

    query . key = (query[nope] @ up) . latent + query[rope] . rotary
    sum(weights * values) = down @ sum(weights * latents)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.lowering.find.evaluation import Steps
from kvq_compile.lowering.find.replay import SYMBOLIC, WIDER_METHODS, widened
from kvq_compile.lowering.find.states import find_state
from kvq_compile.lowering.find.trial import (
    CANNOT_BE_RUN,
    EMPTY,
    blank,
    data_of,
    plain_name,
    size_of_trial,
)
from kvq_compile.lowering.find.trims import kept_of
from kvq_compile.lowering.find.updates import ALLOCATIONS
from kvq_compile.lowering.graph import Graph
from kvq_compile.lowering.nodes import (
    is_weight,
    root_of,
    same,
    shape_of,
    target_name,
    value_of,
    writers_of,
)
from kvq_compile.lowering.sites import Attention, Expansion, Projection, Refusal, State

NOT_LINEAR = "its keys and values are no linear maps, token by token, of two tensors that are kept"
_ENDS = ("softmax", "scaled_dot_product_attention", "flex_attention", "embedding")
_REACH = 64  # nodes between attention and what is kept, more than any spelling takes
_SIZED = (
    *("view", "reshape", "expand", "broadcast_to", "unflatten", "narrow", "empty", "zeros"),
    *("ones", "full", "new_empty", "new_zeros", "new_ones", "new_full"),
)
_AMBIGUOUS = 6  # sizes that may be those of the tokens by chance
_FIRST = 2  # number of the first element of a weight; 1 is an element that is kept as it is
_TOKENS = 3  # of a trial on random numbers


def find_expansion(
    graph: Graph, attention: Attention, outputs: set[fx.Node], reason: Refusal
) -> tuple[State, State, Expansion]:
    """Return two caches of which keys and values are made, that of latents last, and how.

    Args:
        graph: The graph.
        attention: The attention.
        outputs: Nodes that the graph returns.
        reason: Why its keys and values are no caches themselves.

    Raises:
        Refusal: They are not made so; ``reason`` where they are not made of two caches at all.
    """
    kept, weights = _kept(graph, attention, outputs)
    cuts = list(kept)
    if len(cuts) != 2 or not all(_is_one_head(node, cuts[0]) for node in cuts):
        raise reason
    trials = [_Expanded(operand, cuts, weights) for operand in (attention.key, attention.value)]
    if not all(trial.collect() for trial in trials):
        raise Refusal(NOT_LINEAR)
    used = {node for trial in trials for step in trial.steps for node in step.all_input_nodes}
    weights = [node for node in weights if node in used]
    signature = tuple(trial.signature(weights) for trial in trials)
    if signature not in graph.expansions:
        graph.expansions[signature] = _read_or_refuse(trials, weights)
    found = graph.expansions[signature]
    if isinstance(found, Refusal):
        raise found
    of_key, of_value = ({at: part.named(weights) for at, part in parts.items()} for parts in found)
    ((latent, down),) = of_value.items()
    expansion = Expansion(of_key.get(1 - latent), of_key.get(latent), down)
    _check(attention, expansion)
    return kept[cuts[1 - latent]], kept[cuts[latent]], expansion


def _check(attention: Attention, expansion: Expansion) -> None:
    """Make sure that heads and dtypes are those that the rewriting knows.

    Raises:
        Refusal: They are not.
    """
    query = value_of(attention.query)
    for part in (expansion.key, expansion.latent_key, expansion.value):
        if part is None:
            continue
        shared = attention.grouped or part.heads == 1
        groups = shared and same(query.shape[1] % part.heads, 0)
        if not groups and not same(query.shape[1], part.heads):
            raise Refusal(f"{query.shape[1]} query heads do not match {part.heads} heads of keys")
        weight = query if part.weight is None else value_of(part.weight)
        if weight.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise Refusal(
                f"queries and weights must have one dtype, got {query.dtype} and {weight.dtype}"
            )


def _kept(
    graph: Graph, attention: Attention, outputs: set[fx.Node]
) -> tuple[dict[fx.Node, State], list[fx.Node]]:
    """Return the caches that keys and values are made of, nearest to the attention, and the weights."""
    writers = writers_of(graph.fx)
    kept: dict[fx.Node, State] = {}
    weights: list[fx.Node] = []
    seen: set[fx.Node] = set()
    front = [attention.value, attention.key]
    while front and len(seen) < _REACH:
        node = front.pop(0)
        if node in seen:
            continue
        seen.add(node)
        state = _state(node, graph, attention, outputs)
        if state is not None:
            kept[node] = state
        elif node.op == "get_attr" or is_weight(node):
            weights.append(node)
        elif plain_name(node) not in _ENDS:
            memory = root_of(node)
            is_own = memory.op != "placeholder" and memory not in outputs
            front += [*data_of(node), *(writers.get(memory, ()) if is_own else ())]
    return kept, weights


def _state(
    node: fx.Node, graph: Graph, attention: Attention, outputs: set[fx.Node]
) -> State | None:
    """Return the cache that a node is, if it is one as it stands."""
    value = value_of(node)
    if not isinstance(value, Tensor) or value.dim() != 4 or is_weight(node):
        return None
    known = node.op == "placeholder" or node in graph.updates or node in graph.rings
    cut = target_name(node) in ("getitem", "narrow", *ALLOCATIONS)
    if not (known or cut or kept_of(node, outputs) is not None):
        return None
    try:
        state = find_state(node, outputs, graph.updates, attention.output, graph.rings)
    except Refusal:
        return None
    return state if same(state.repeats, 1) else None


def _is_one_head(node: fx.Node, like: fx.Node) -> bool:
    """Return whether a kept tensor is ``[B, 1, S, D]``, with the sequences and tokens of another one."""
    shape, other = shape_of(node) or (), shape_of(like) or ()
    fixed = isinstance(shape[3], int) and same(shape[1], 1)
    return fixed and same(shape[0], other[0]) and bool(shape[2] == other[2])


# --- evaluation -----------------------------------------------------------------------------------


class _Expanded(Steps):
    """Keys or values as a function of what is kept and of weights, for any number of tokens.

    Where tokens are a number in the graph, that is replaced where operations take sizes; ``stays`` are the places, in
    order, where it means something else.
    """

    stays: frozenset[int] = frozenset()

    def __init__(
        self, result: fx.Node, kept: Sequence[fx.Node], weights: Sequence[fx.Node]
    ) -> None:
        super().__init__(result, (*kept, *weights), _ENDS)
        self.kept, self.given = tuple(kept), {root_of(node) for node in kept}
        self._replaced = 0

    def signature(self, weights: Sequence[fx.Node]) -> Hashable:
        """Return what those have in common that compute the same of tensors of the same shapes."""
        nodes = (*self.kept, *weights, *self.steps)
        place = {node: number for number, node in enumerate(nodes)}

        def name(x: Any) -> Any:
            if isinstance(x, fx.Node):
                return f"%{place[x]}" if x in place else f"%{value_of(x)}"
            return str(x) if isinstance(x, SYMBOLIC) else x

        steps = [
            str((str(step.target), fx.node.map_aggregate((step.args, step.kwargs), name)))
            for step in self.steps
        ]
        cuts = [str((shape_of(node), value_of(node).dtype)) for node in (*self.kept, *weights)]
        return (*steps, *cuts, place[self.result])

    def sizes_for(self, rows: int) -> tuple[int, int, Mapping[Any, int]]:
        """Return sequences, tokens and symbols of a trial with ``rows`` tokens of all sequences or more."""
        batch, _, tokens, _ = value_of(self.kept[0]).shape
        known = [value_of(node) for node in (*self.steps, *self.cuts)]
        sizes = [size for x in known for size in (x.shape if isinstance(x, Tensor) else (x,))]
        symbols = {
            s for n in sizes if isinstance(n, torch.SymInt) for s in n.node.expr.free_symbols
        }
        sequences = size_of_trial(batch, dict.fromkeys(symbols, 2))
        each = max(_TOKENS, -(-rows // sequences))
        chosen = dict.fromkeys(symbols, each)
        if isinstance(batch, torch.SymInt):
            chosen |= dict.fromkeys(batch.node.expr.free_symbols, 2)
        count = size_of_trial(tokens, chosen) if isinstance(tokens, torch.SymInt) else each
        return sequences, count, chosen

    def apply(self, given: Mapping[fx.Node, Tensor], sizes: Mapping[Any, int]) -> Tensor:
        """Return the result ``[B, H, S, D]``.

        Raises:
            one of `CANNOT_BE_RUN`: A step cannot be run; the result has other sequences or tokens than what is given.
        """
        known: dict[fx.Node, Any] = dict(given)
        self._replaced = 0
        batch, _, tokens, _ = given[self.kept[0]].shape
        for node in self.steps:
            known[node] = self._step(node, known, sizes, tokens)
        result: Tensor = known[self.result].double()
        if result.dim() != 4 or (result.shape[0], result.shape[2]) != (batch, tokens):
            raise Refusal(NOT_LINEAR)
        return result

    def _step(
        self, node: fx.Node, known: Mapping[fx.Node, Any], sizes: Mapping[Any, int], tokens: int
    ) -> Any:
        if isinstance(value_of(node), torch.SymInt):
            return size_of_trial(value_of(node), sizes)
        was = value_of(self.kept[0]).shape[2]
        sized = plain_name(node) in _SIZED and not isinstance(was, torch.SymInt)

        def fill(x: Any) -> Any:
            if isinstance(x, fx.Node):
                x = known[x] if x in known else blank(x, sizes)
                return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            if isinstance(x, torch.SymInt):
                return size_of_trial(x, sizes)
            if sized and type(x) is int and x == was:
                self._replaced += 1
                return x if self._replaced in self.stays else tokens
            return widened(x)

        args: Any = fx.node.map_aggregate(node.args, fill)
        kwargs: Any = fx.node.map_aggregate(node.kwargs, fill)
        target: Any = node.target
        if node.op == "call_method":
            result = getattr(args[0], WIDER_METHODS.get(target, target))(*args[1:], **kwargs)
        else:
            result = target(*args, **kwargs)
        if plain_name(node) in EMPTY and result.is_floating_point():
            result.fill_(math.nan)  # no element of it may pass for one that was made
        return result

    def settle(self, weights: Sequence[fx.Node]) -> None:
        """Find the places where a number that is that of the tokens means something else: where it must stay.

        Raises:
            Refusal: The steps cannot be run for another number of tokens.
        """
        *about, sizes = self.sizes_for(1)
        given = {**self.random_kept(*about), **_drawn(weights)}
        for self.stays in _choices():
            try:
                self.apply(given, sizes)
            except CANNOT_BE_RUN:
                continue
            return
        raise Refusal(NOT_LINEAR)

    def random_kept(self, sequences: int, tokens: int) -> dict[fx.Node, Tensor]:
        """Return random numbers for what is kept."""
        widths = {node: int(value_of(node).shape[3]) for node in self.kept}
        return {
            node: torch.randn(sequences, 1, tokens, width, dtype=torch.float64, device="cpu")
            for node, width in widths.items()
        }


def _choices() -> Iterator[frozenset[int]]:
    """Yield sets of a few of the first places, the smallest first."""
    for count in range(_AMBIGUOUS):
        for places in itertools.combinations(range(1, _AMBIGUOUS + 1), count):
            yield frozenset(places)


def _drawn(weights: Sequence[fx.Node]) -> dict[fx.Node, Tensor]:
    """Return random numbers for weights."""
    shapes = {node: [int(size) for size in value_of(node).shape] for node in weights}
    return {
        node: torch.randn(shape, dtype=torch.float64, device="cpu")
        for node, shape in shapes.items()
    }


def _numbered(weights: Sequence[fx.Node]) -> dict[fx.Node, Tensor]:
    """Return weights whose elements are numbered through."""
    found, first = {}, _FIRST
    for node in weights:
        shape = [int(size) for size in value_of(node).shape]
        last = first + math.prod(shape)
        numbers = torch.arange(first, last, dtype=torch.float64, device="cpu")
        found[node], first = numbers.view(shape), last
    return found


# --- what an evaluation says ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A projection whose weight is told by its number among weights; ``None`` for none."""

    weight: int | None
    projection: Projection

    def named(self, weights: Sequence[fx.Node]) -> Projection:
        """Return the projection with its weight."""
        return replace(
            self.projection, weight=None if self.weight is None else weights[self.weight]
        )


_Parts = dict[int, _Part]  # by the number of the kept tensor


def _read_or_refuse(
    trials: Sequence[_Expanded], weights: Sequence[fx.Node]
) -> tuple[_Parts, _Parts] | Refusal:
    """Return what keys and what values are made of; or that they are made otherwise."""
    try:
        of_key, of_value = (_read(trial, weights) for trial in trials)
    except CANNOT_BE_RUN:
        return Refusal(NOT_LINEAR)
    (parts,) = [[*of_value.values()]]
    width = int(value_of(trials[1].result).shape[3])
    whole = len(parts) == 1 and (parts[0].projection.first, parts[0].projection.last) == (0, width)
    return (of_key, of_value) if whole else Refusal(NOT_LINEAR)


def _read(trial: _Expanded, weights: Sequence[fx.Node]) -> _Parts:
    """Return of which channels of what is kept keys or values are made, and by which weights.

    Raises:
        Refusal: They are not linear maps of single tokens, each element of which is one of a weight.
    """
    trial.settle(weights)
    parts: _Parts = {}
    numbers = _numbered(weights)
    for place, node in enumerate(trial.kept):
        part = _part(_units(trial, node, numbers), [*numbers.values()])
        if part is not None:
            parts[place] = part
    *about, sizes = trial.sizes_for(1)
    given = {**trial.random_kept(*about), **_drawn(weights)}
    result = trial.apply(given, sizes)
    expected = torch.zeros_like(result)
    for place, part in parts.items():
        made, tokens = part.projection, given[trial.kept[place]]
        weight = None if part.weight is None else given[weights[part.weight]]
        expected[..., made.first : made.last] += tokens @ made.matrix(weight)
    if not torch.allclose(result, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().amax())):
        raise Refusal(NOT_LINEAR)
    return parts


def _units(trial: _Expanded, node: fx.Node, numbers: Mapping[fx.Node, Tensor]) -> Tensor:
    """Return what unit vectors of one kept tensor become, the other one being zero: ``[H, its channels, channels]``."""
    width = int(value_of(node).shape[3])
    *about, sizes = trial.sizes_for(width)
    given = {**trial.random_kept(*about), **numbers}
    for other in trial.kept:
        rows = given[other].zero_().view(-1, given[other].shape[3])
        if other is node:
            rows[:width].fill_diagonal_(1)
    made = trial.apply(given, sizes).transpose(0, 1).flatten(1, 2)
    return made[:, :width]


def _part(made: Tensor, weights: Sequence[Tensor]) -> _Part | None:
    """Return the projection that has made a matrix ``[H, kept channels, channels]`` of numbers; ``None`` for zeros.

    Raises:
        Refusal: It is none of evenly spaced elements of one weight.
    """
    channels = made.ne(0).any(0).any(0).nonzero().flatten().tolist()
    if not channels:
        return None
    first, last = channels[0], channels[-1] + 1
    made = made[:, :, first:last]
    if torch.equal(made, made[:1].expand_as(made)):
        made = made[:1]
    heads, width, count = made.shape
    if torch.equal(made[0], torch.eye(width, count, dtype=made.dtype, device="cpu")):
        return _Part(None, Projection(first, last, heads))
    start = _FIRST
    for place, weight in enumerate(weights):
        if start <= float(made[0, 0, 0]) < start + weight.numel():
            projection = Projection(first, last, heads, _views(made - start, weight.numel()))
            if torch.equal(projection.matrix(weight), made):
                return _Part(place, projection)
        start += weight.numel()
    raise Refusal(NOT_LINEAR)


def _views(places: Tensor, elements: int) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """Return the views by which evenly spaced elements ``[H, kept channels, channels]`` are taken from a weight.

    Raises:
        Refusal: They do not lie in it as nested blocks.
    """
    offset = int(places[0, 0, 0])
    ends = places[-1:, 0, 0], places[0, -1:, 0], places[0, 0, -1:]
    gaps = [
        (int(end) - offset) // (size - 1) if size > 1 else elements
        for end, size in zip(ends, places.shape, strict=True)
    ]
    order = sorted(range(3), key=lambda axis: -gaps[axis])
    (outer, inner, least), counts = (gaps[axis] for axis in order), [places.shape[a] for a in order]
    if inner == elements:  # of one element each: the axes have no gaps
        raise Refusal(NOT_LINEAR)
    block, rest = divmod(offset, outer)
    begin, within = divmod(rest, inner)
    fits = begin * inner + counts[1] * inner <= outer and within + counts[2] <= inner
    if least != 1 or not fits or elements % outer:
        raise Refusal(NOT_LINEAR)
    return (
        ("reshape", (-1, outer)),
        ("narrow", (0, block, counts[0])),
        ("narrow", (1, begin * inner, counts[1] * inner)),
        ("unflatten", (1, (counts[1], inner))),
        ("narrow", (2, within, counts[2])),
        ("permute", tuple(order.index(axis) for axis in range(3))),
    )
