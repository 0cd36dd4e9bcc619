"""Propose where the axes ``[B, H, S, D]`` lie in the tensors that a model keeps its keys and values in.

Start from the products of an attention: each says which axis of its operand is the tokens and which the channels. A
tensor that the operand is made of is filled with its coordinates along one axis after another, and what lies between
is run: where the operand changes tells which axis of it that is. Nothing is proved here: a graph that is laid out as
proposed computes the same, and the passes that follow prove, on that, what its caches are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product as pairs_of
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.arrangement import FOLDED, PIECE, Arrangement
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.contraction import (
    product_before,
    product_behind,
)
from kvq_compile.lowering.find.dependence import PRODUCTS, dependent
from kvq_compile.lowering.find.trial import (
    CANNOT_BE_RUN,
    MIXING,
    Trial,
    data_of,
    plain_name,
    run_step,
    size_of_trial,
)
from kvq_compile.lowering.find.updates import ALLOCATIONS
from kvq_compile.lowering.nodes import (
    argument,
    calls,
    is_weight,
    order_of,
    same,
    shape_of,
    target_name,
    value_of,
    writers_of,
)
from kvq_compile.lowering.sites import unexpected
from kvq_compile.lowering.unchanged import once, unchanged

# The second operand has its tokens last in one product, first in the other.
_TURNED = ("matmul", "bmm", "baddbmm")
_WEIGHING = ("softmax", "exp", "exp2", "relu", "sigmoid")  # what makes weights of scores
_WHOLE = ("scaled_dot_product_attention", "flex_attention")
_LARGEST = 1 << 26  # elements that are filled with coordinates
_REACH = 32  # steps between a cache and a product, more than any spelling takes
_STEP = 97  # coordinates are told modulo this, which each dtype holds


@dataclass(frozen=True)
class _Operand:
    """Keys or values as they enter a product: the axes of their tokens and of their channels.

    Attributes:
        node: The operand.
        tokens, channels: Axes of it.
        softmax: That of the attention, or what is an attention as a whole.
        lead: Sizes of batch and heads, where these may be folded into one axis.
    """

    node: fx.Node
    tokens: int
    channels: int
    lead: tuple[Any, ...] = ()
    softmax: fx.Node | None = None


@once
def behind(last: fx.Node) -> dict[fx.Node, None]:
    """Return what `above` yields."""
    return dict.fromkeys(above(last))


def above(last: fx.Node) -> Iterator[fx.Node]:
    """Yield a tensor and those that its elements may come from, nearest first; products end the way."""
    seen = {last}
    front = [last]
    for _ in range(_REACH):
        following: list[fx.Node] = []
        for node in front:
            if shape_of(node) is not None:
                yield node
            if plain_name(node) in MIXING:
                continue
            for other in data_of(node):
                if other not in seen:
                    seen.add(other)
                    following.append(other)
        front = following


def is_packed(graph: fx.Graph) -> set[fx.Node]:
    """Return the arguments that are packed already, and say themselves how they are laid out."""
    return {x for x in graph.find_nodes(op="placeholder") if isinstance(value_of(x), ArrangedKV)}


def propose(graph: fx.Graph) -> dict[fx.Node, Arrangement]:
    """Return how the caches among arguments and results are laid out, where that is not as ``[B, H, S, D]``."""
    known = {node: value_of(node).arrangement for node in is_packed(graph)}
    try:
        with unchanged(graph):
            known |= _followed(graph, known)
            known |= _proposed(graph, known)
            known |= _led_to(graph, known)
    except Exception as error:  # nothing hangs on a proposal
        unexpected(error)
    return {tensor: how for tensor, how in known.items() if not how.is_plain}


def _followed(graph: fx.Graph, known: Mapping[fx.Node, Arrangement]) -> dict[fx.Node, Arrangement]:
    """Return how results are laid out that may be packed arguments with further tokens, whatever reads them."""
    found: dict[fx.Node, Arrangement] = {}
    for cache in is_packed(graph):
        how, held = known[cache], value_of(cache).caches[0]
        tokens, mine = how.axis("S"), how.shape(held.shape)  # as results are computed from
        for result in graph.output_node().all_input_nodes:
            theirs = shape_of(result) or ()
            if result in known or result.op == "placeholder" or len(theirs) != len(mine):
                continue
            rest = (same(mine[at], theirs[at]) for at in range(len(mine)) if at != tokens)
            if all(rest) and cache in behind(result):
                found[result] = how
    return found


def _led_to(graph: fx.Graph, known: Mapping[fx.Node, Arrangement]) -> dict[fx.Node, Arrangement]:
    """Return how arguments are laid out that results are updated copies of, though attention reads only new tokens.

    That is so in the first call of a cache, all of which is written or cut off; or which holds no token yet, and so
    nothing that could be followed to an attention.
    """
    found: dict[fx.Node, Arrangement] = {}
    results = [x for x in graph.output_node().all_input_nodes if x in known]
    arguments = [x for x in kept_by(graph) if x.op == "placeholder" and x not in known]
    tracer = _Tracer()
    for result, taken in pairs_of(results, arguments):
        mine, theirs = shape_of(taken) or (), shape_of(result) or ()
        if result is taken or len(mine) != len(theirs) or taken not in behind(result):
            continue
        others = [at for at in range(len(mine)) if not same(mine[at], theirs[at])]
        if others:
            if others == [known[result].axis("S")] and same(mine[others[0]], 0):
                found[taken] = known[result]
            continue
        moves = tracer.moves(taken, result)
        if moves is not None and all(axes <= {at} for at, axes in enumerate(moves)):
            found[taken] = known[result]
    return found


def _proposed(graph: fx.Graph, known: Mapping[fx.Node, Arrangement]) -> dict[fx.Node, Arrangement]:
    found: dict[fx.Node, set[Arrangement | None]] = {}
    tracer = _Tracer()
    operands = [(operand, behind(operand.node)) for operand in operands_of(graph)]
    for tensor in dict.fromkeys(kept_by(graph)):
        if tensor in known:
            continue
        # What layers have in common, as angles, is behind all of them: it is looked at where nothing reads the tensor.
        readers = [each for each in operands if tensor in each[1]] or operands
        for operand, made_of in readers:
            if (source := _source(tensor, made_of)) is not None:
                told = tracer.arrangement(source, tensor, operand)
                found.setdefault(tensor, set()).add(told)
    return {
        tensor: how
        for tensor, told in found.items()
        for how in told
        if how is not None and len(told - {None}) == 1
    }


def kept_by(graph: fx.Graph) -> list[fx.Node]:
    """Return the arguments and results that may be caches: what is written, and what leaves with further tokens."""
    results = [x for x in graph.output_node().all_input_nodes if _may_be_cache(x)]
    arguments = [x for x in graph.find_nodes(op="placeholder") if _may_be_cache(x)]
    writers = writers_of(graph)
    return [*(x for x in arguments if x in writers or _is_kept(x, results)), *results]


def kept_and_read(graph: fx.Graph) -> list[fx.Node]:
    """Return those of the tensors that may be caches which keys or values of an attention are made of."""
    with unchanged(graph):
        kept = dict.fromkeys(kept_by(graph))
        made_of = [behind(operand.node) for operand in operands_of(graph)]
        scores = [dict.fromkeys(_scored(node)) for node in calls(graph, *_WEIGHING)]
        return [
            x
            for x in kept
            if any(_source(x, each) is not None for each in made_of)
            or (len(shape_of(x) or ()) >= 4 and any(x in each for each in scores))
        ]


def _scored(weights: fx.Node) -> Iterator[fx.Node]:
    """Yield what scores are made of, through the product of queries and keys, however that is written."""
    scores = [node for given in weights.all_input_nodes for node in above(given)]
    yield from scores
    for product in scores:
        if plain_name(product) in PRODUCTS:
            for operand in product.all_input_nodes:
                yield from above(operand)


def can_be_allocated(tensor: fx.Node, how: Arrangement) -> bool:
    """Return whether a tensor is one that the call allocates, and could allocate in another layout."""
    if target_name(tensor) not in ALLOCATIONS:
        return False
    return sizes_of_allocation(tensor) is not None and not how.heads and not how.is_joined


def _may_be_cache(node: fx.Node) -> bool:
    value = value_of(node)
    if not isinstance(value, Tensor) or is_weight(node) or isinstance(value, QuantizedKV):
        return False
    return value.is_floating_point() and 3 <= value.dim() <= 6


def _is_kept(tensor: fx.Node, results: Sequence[fx.Node]) -> bool:
    """Return whether a result may be a tensor with further tokens, or with some of them written."""
    mine = shape_of(tensor) or ()
    for result in results:
        theirs = shape_of(result) or ()
        if result is tensor:
            return True
        if len(theirs) != len(mine) or tensor not in behind(result):
            continue
        if sum(not same(a, b) for a, b in zip(mine, theirs, strict=True)) <= 1:
            return True
    return False


def _source(tensor: fx.Node, made_of: Mapping[fx.Node, None]) -> fx.Node | None:
    """Return the nearest tensor that a kept one and an operand are made of; that is ``made_of`` these."""
    if tensor in made_of:
        return tensor
    if tensor.op == "placeholder":
        return None
    return next((node for node in behind(tensor) if node in made_of), None)


def operands_of(graph: fx.Graph) -> Iterator[_Operand]:
    """Yield what may be the keys and the values of the attentions of a graph."""
    for node in calls(graph, *_WHOLE):
        for place, name in ((1, "key"), (2, "value")):
            given = argument(node, place, name)
            dims = len(shape_of(given) or ())
            if dims >= 3:
                lead = (shape_of(given) or ())[:-2]
                yield _Operand(given, dims - 2, dims - 1, lead if len(lead) == 2 else (), node)
    for softmax in calls(graph, "softmax"):
        before, behind = product_before(softmax), product_behind(softmax)
        if before is None or behind is None:
            continue
        for product, is_first in ((before, True), (behind, False)):
            operand = _operand(product, is_first)
            if operand is not None:
                wide = len(shape_of(operand.node) or ()) > 3
                lead = _lead(operand) if wide else (shape_of(softmax) or ())[:-2]
                two = lead[:2] if len(lead) in (2, 3) else ()  # queries may have an axis of groups
                yield replace(operand, lead=two, softmax=softmax)


def _lead(operand: _Operand) -> tuple[Any, ...]:
    """Return the sizes of the axes that are neither tokens nor channels."""
    own = operand.tokens, operand.channels
    return tuple(n for at, n in enumerate(shape_of(operand.node) or ()) if at not in own)


def _operand(product: fx.Node, of_keys: bool) -> _Operand | None:
    name = plain_name(product)
    if name in _TURNED:
        place = 2 if name == "baddbmm" else 1
        given = argument(product, place, {"bmm": "mat2", "baddbmm": "batch2"}.get(name, "other"))
        dims = len(shape_of(given) or ())
        tokens, channels = (dims - 1, dims - 2) if of_keys else (dims - 2, dims - 1)
        return _Operand(given, tokens, channels) if dims >= 3 else None
    return _of_einsum(product, of_keys) if name == "einsum" else None


def _of_einsum(product: fx.Node, of_keys: bool) -> _Operand | None:
    """Return the keys of ``bthd,bshd->bhts``, or the values of ``bhts,bshd->bthd``."""
    equation, *operands = product.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "..." in equation:
        return None
    given, result = equation.replace(" ", "").split("->")
    letters = given.split(",")
    if len(letters) != 2 or len(operands) != 2:
        return None
    for place, other in ((1, 0), (0, 1)):
        mine, theirs = letters[place], letters[other]
        summed = [x for x in mine if x in theirs and x not in result]
        own = [x for x in mine if x in result and x not in theirs]
        if len(summed) == len(own) == 1:
            tokens, channels = (own, summed) if of_keys else (summed, own)
            if of_keys and result[-1] != tokens[0]:
                continue  # the queries
            if not of_keys and theirs[-1] != tokens[0]:
                continue  # the weights
            node: Any = operands[place]
            return _Operand(node, mine.index(tokens[0]), mine.index(channels[0]))
    return None


def sizes_of_allocation(node: fx.Node) -> list[Any] | None:
    """Return the sizes that an allocation is given, numbers or nodes; ``None`` where it is given none."""
    if target_name(node) not in ("zeros", "new_zeros", "empty", "new_empty"):
        return None
    given: Any = node.args[1:] if target_name(node).startswith("new_") else node.args
    given = given or (node.kwargs.get("size"),)
    sizes = given[0] if isinstance(given[0], (tuple, list)) else given
    return list(sizes) if len(sizes) == len(shape_of(node) or ()) else None


class _Tracer:
    """Runs what lies between tensors on coordinates; what it has run once it does not run again."""

    def __init__(self) -> None:
        self._known: dict[Any, list[set[int]] | None] = {}
        self._between: dict[tuple[fx.Node, fx.Node], list[set[int]] | None] = {}

    def arrangement(self, source: fx.Node, kept: fx.Node, operand: _Operand) -> Arrangement | None:
        """Return where the axes of caches lie in a kept tensor, if an operand tells; both are made of ``source``."""
        to_operand = self.moves(source, operand.node)
        to_kept = self.moves(source, kept)
        if to_operand is None or to_kept is None:
            return None
        axes: list[tuple[set[int], Any]] = [(set(), size) for size in shape_of(kept) or ()]
        for mine, theirs in zip(to_kept, to_operand, strict=True):
            if len(mine) == 1:
                axes[next(iter(mine))][0].update(theirs)
            elif mine:
                return None  # an axis that is split or joined on the way
        return _named(axes, operand)

    def moves(self, source: fx.Node, result: fx.Node) -> list[set[int]] | None:
        """Return, for each axis of ``source``, the axes of ``result`` along which its coordinate changes."""
        if source is result:
            return [{axis} for axis in range(len(shape_of(source) or ()))]
        if (source, result) not in self._between:
            steps = dependent(source, result, MIXING)  # nothing is a coordinate behind these
            steps = [*_indices(steps), *steps]
            key = _signature(source, steps)
            if key not in self._known:
                self._known[key] = _run(source, result, steps)
            self._between[source, result] = self._known[key]
        return self._between[source, result]


def _indices(steps: Sequence[fx.Node]) -> list[fx.Node]:
    """Return what computes the integers that steps take elements by, where no argument is among it."""
    place, found = order_of(steps[0].graph), set[fx.Node]()
    for step in steps:
        for other in step.all_input_nodes:
            value = value_of(other)
            if not isinstance(value, Tensor) or value.is_floating_point() or other in steps:
                continue
            made, stack = set[fx.Node](), [other]
            while stack and len(made) < _REACH:
                node = stack.pop()
                if node not in made and not isinstance(value_of(node), (int, torch.SymInt)):
                    made.add(node)
                    stack += data_of(node)
            if not stack and all(node.op != "placeholder" for node in made):
                found |= made
    return sorted(found.difference(steps), key=place.__getitem__)


def _signature(source: fx.Node, steps: Sequence[fx.Node]) -> Any:
    """Return what tells steps that do the same from others."""
    number = {source: 0} | {step: place + 1 for place, step in enumerate(steps)}

    def plain(x: fx.Node) -> Any:
        return ("step", number[x]) if x in number else ("other", str(shape_of(x)), str(value_of(x)))

    told = [(str(shape_of(source)), str(value_of(source).dtype))]
    for step in steps:
        args = fx.node.map_arg((step.args, step.kwargs), plain)
        told.append((plain_name(step), str(args)))
    return tuple(told)


def _run(source: fx.Node, result: fx.Node, steps: Sequence[fx.Node]) -> list[set[int]] | None:
    trial = Trial(result, [source], ())
    trial.steps = list(steps)
    tried = [*trial.assignments(3)]
    axes = [at for at, size in enumerate(shape_of(source) or ()) if isinstance(size, torch.SymInt)]
    roomy = (trial.with_room(sizes, source, axis) for axis in axes for sizes in tried)
    for sizes in (*tried, *roomy):
        try:
            return _changes(source, result, steps, sizes)
        except CANNOT_BE_RUN:
            continue
    return None


def _changes(
    source: fx.Node, result: fx.Node, steps: Sequence[fx.Node], sizes: Any
) -> list[set[int]] | None:
    shape = [size_of_trial(size, sizes) for size in shape_of(source) or ()]
    if torch.Size(shape).numel() > _LARGEST:
        return None
    found: list[set[int]] = []
    for axis, size in enumerate(shape):
        if size == 1:
            found.append(set())
            continue
        line = torch.arange(size, dtype=torch.int64, device="cpu") % _STEP + 1
        line = line.view([-1 if at == axis else 1 for at in range(len(shape))])
        known: dict[fx.Node, Any] = {source: line.expand(shape).to(value_of(source).dtype).clone()}
        for step in steps:
            known[step] = run_step(step, known, sizes)
        found.append(_axes_of_change(known[result]))
    return found


def _axes_of_change(x: Tensor) -> set[int]:
    """Return the axes along which the coordinates in a tensor change; what is no coordinate is zero."""
    axes = set()
    for axis, size in enumerate(x.shape):
        one, other = x.narrow(axis, 0, size - 1), x.narrow(axis, 1, size - 1)
        if bool(((one != other) & (one != 0) & (other != 0)).any()):
            axes.add(axis)
    return axes


def _named(axes: list[tuple[set[int], Any]], operand: _Operand) -> Arrangement | None:
    """Return the arrangement of a tensor whose axes are those of the operand."""
    names: list[str] = []
    rest: list[int] = []
    sizes: list[Any] = []
    heads = 0
    for place, (theirs, size) in enumerate(axes):
        if theirs == {operand.tokens}:
            names.append("S")
        elif operand.channels in theirs:
            times = _times(size, (shape_of(operand.node) or ())[operand.channels])
            if times == 1 and len(theirs) == 1:
                names.append("D")
            elif len(theirs) == 1:
                names.append(f"({PIECE}D)")
                sizes.append(times)
            elif len(theirs) == 2:
                names.append("(HD)")
                heads = times
            else:
                return None
        elif theirs or same(size, 1):
            names.append("")
            rest.append(place)
        else:
            names.append(PIECE)
            sizes.append(size)
    if len(rest) > 2 - bool(heads) or not rest:
        return None
    if len(rest) == 1 and not heads:
        heads = _folded(axes[rest[0]][1], operand.lead)
        given = FOLDED if heads else "B"
    else:
        given = "BH"[: len(rest)]
    if [axes[place][0] for place in rest] == [{1}, {0}]:
        given = given[::-1]
    for name, place in zip(given, rest, strict=True):
        names[place] = name
    try:
        how = Arrangement("".join(names), (1,) * len(sizes), heads)
    except ValueError:
        return None  # an axis is missing, or there are two
    known = [_guarded(size) for size in sizes]  # no sooner: what is taken for pieces may be tokens
    return (
        replace(how, sizes=tuple(known)) if all(isinstance(x, int) and x for x in known) else None
    )


def _guarded(size: Any) -> Any:
    """Return how many caches an axis numbers, guarding on a size that Dynamo keeps symbolic."""
    known = isinstance(size, torch.SymInt) and size.node.has_hint()
    return int(size) if known else size


def _times(size: Any, channels: Any) -> int:
    """Return how often an axis holds the channels; 0 where that is no number."""
    if not isinstance(size, int) or not isinstance(channels, int):
        return int(same(size, channels))
    return size // channels if size % channels == 0 else 0


def _folded(size: Any, lead: tuple[Any, ...]) -> int:
    """Return the heads in an axis of batch and heads, perhaps repeated later; 0 where it holds only one of these."""
    if not lead or not isinstance(lead[1], int):
        return 0
    times = (n for n in range(1, lead[1]) if lead[1] % n == 0)
    return next((lead[1] // n for n in times if same(size, lead[0] * (lead[1] // n))), 0)
