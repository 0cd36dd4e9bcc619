"""Find attentions by what they compute, however their products are spelled.

`find.attention` follows the spelling that most models have. What it cannot read comes here. From a softmax, the caches
on both sides of it, the query, and all that is added or hidden in between are *evaluated* on random numbers, at several
sizes where sizes are symbols of the graph. It is an attention if, every time,

    scores = scale * query . key,    input of the softmax = scores + mask,    output = softmax(scores + mask) . value

for some order of the axes (sequence, KV head, query head of it, token, channel) in each of the tensors: einsum, heads
folded into the batch, an axis of groups, scales on either side, several masks, biases of positions and heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.score import Score
from kvq_compile.lowering.find.attention import (
    ADDITIONS,
    BENDS,
    CASTS,
    DIFFERENCES,
    DROPS,
    SCALE_IN_GRAPH,
    SCALINGS,
    WHO_USES,
    drops,
    not_hidden,
)
from kvq_compile.lowering.find.chain import JOINS, Chain
from kvq_compile.lowering.find.dependence import PRODUCTS, dependent
from kvq_compile.lowering.find.evaluation import Evaluation, Order, Orders, Steps, hint_of
from kvq_compile.lowering.find.hiding import HIDING, hides, hiding, is_constant, is_number
from kvq_compile.lowering.find.reasons import NO_CACHE, is_kept
from kvq_compile.lowering.find.trial import (
    CANNOT_BE_RUN,
    MIXING,
    data_of,
    plain_name,
)
from kvq_compile.lowering.find.updates import ALLOCATIONS
from kvq_compile.lowering.nodes import (
    VIEWS,
    argument,
    order_of,
    root_of,
    same,
    shape_of,
    value_of,
    writers_of,
)
from kvq_compile.lowering.sites import Life, Refusal, State

_MOVES = (*VIEWS, *CASTS, "clone", "swapaxes", "swapdims", "mT", "squeeze_", "unsqueeze_", "chunk")
_REPEATS = ("repeat_interleave", "repeat", "tile", "stack", "cat", "gather", "index_select")
# What may lie between an operand and its product; between the scores and the softmax; and behind it. Anything else
# could do nothing to random numbers and something to those of a model; what caps and clamps do is read from the graph.
_OF_OPERANDS = (*_MOVES, *_REPEATS, *SCALINGS)
_DIFFERENCES = (*DIFFERENCES, "rsub")
_LARGEST = ("max", "amax", "maximum")
_OF_WEIGHTS = (*_MOVES, *HIDING, "dropout")
_OF_SCORES = (
    *_MOVES, *SCALINGS, *ADDITIONS, *_DIFFERENCES, *HIDING,
    *_LARGEST, *BENDS, *JOINS, "neg",
)  # fmt: skip
_PARTS = {
    "queries": "product", "keys": "product", "scores": "softmax", "weights": "product", "values": "product",
}  # fmt: skip
_REACH = 24  # steps followed from a softmax to a cache, more than any spelling takes
NOT_BORNE_OUT = "what is computed around its softmax is not softmax(scale * query . key + mask) . value, by evaluation"
Find = Callable[[fx.Node], State]


@dataclass(frozen=True)
class Contraction:
    """An attention, and where its axes are.

    An *order* tells which of the axes ``B, Hkv, G, T`` and a last one come one after another in a tensor, joined or
    not. ``G`` query heads share a KV head.

    Attributes:
        output: The product with the values.
        query, key, value: The operands; the last two are read from caches, ``[B, Hkv, S, D]``.
        new: The call's own keys, ``[B, Hkv, T, D]``.
        product: The product of queries and keys.
        scores: What enters the softmax.
        groups: ``G``.
        score: What is done to ``query . key``, factors that are tensors apart.
        masked: Whether a tensor is added to the scores, or hides some.
        chain: What lies between product and scores, factors that are tensors among it.
        query_order, product_order, base_order, scores_order, output_order: The orders of these tensors.
        steps: The nodes from the chain's base, left out, to the scores, in order.
    """

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    product: fx.Node
    scores: fx.Node
    new: fx.Node
    groups: int
    score: Score
    masked: bool
    chain: Chain
    query_order: Order
    product_order: Order
    base_order: Order
    scores_order: Order
    output_order: Order
    steps: tuple[fx.Node, ...]


def find_contraction(softmax: fx.Node, find: Find) -> Contraction | None:
    """Return the attention over a cache that a softmax belongs to, if evaluation bears it out.

    Args:
        softmax: The node.
        find: Returns the state of a node that is a cache; raises `Refusal` for any other.

    Raises:
        Refusal: It is one, with a step in between that is not understood, or with weights that are used elsewhere.
    """
    shape, product, output = shape_of(softmax), product_before(softmax), product_behind(softmax)
    if shape is None or argument(softmax, 1, "dim") not in (-1, len(shape) - 1):
        return None
    if output is None or product is None:
        return None
    scores = _as_written(argument(softmax, 0, "input"), softmax)
    behind = set(dependent(softmax, output))
    values = [n for n in _above(output.all_input_nodes, MIXING) if n not in behind]
    key = _first_cache(_above(product.all_input_nodes, MIXING), find)
    value = _first_cache(values, find)
    if key is None or value is None:
        return None
    of_keys = {*_above([key[0]], MIXING), *dependent(key[0], product)}
    queries = [n for n in _above(product.all_input_nodes, MIXING) if n not in of_keys]
    refusal: Refusal | None = None
    own = (shape_of(own_tokens(key[1])) or ())[2]
    some = [shape[-2]] if hint_of(shape[-2]) < hint_of(own) else []  # a chunk of the queries
    given = [(query, n) for n in (own, *some) for query in _queries(queries, key, n)]
    for query, tokens in given:
        try:
            about = query, tokens, key, value[0]
            found = _Candidate(softmax, scores, product, output, *about).found()
        except Refusal as reason:
            refusal = refusal or reason
        else:
            if found is not None:
                return found
    if refusal is not None:
        raise refusal
    return None


def why_none(softmax: fx.Node, find: Find) -> str:
    """Return why a softmax between two products is none that `find_contraction` returns."""
    shape, dim = shape_of(softmax) or (), argument(softmax, 1, "dim")
    if dim not in (-1, len(shape) - 1):
        return f"softmax runs over dimension {dim}, not over the last"
    product, output = product_before(softmax), product_behind(softmax)
    if product is None or output is None:
        return "what enters the softmax is no product of queries and keys"
    behind = set(dependent(softmax, output))
    values = [n for n in _above(output.all_input_nodes, MIXING) if n not in behind]
    for nodes in (_above(product.all_input_nodes, MIXING), values):
        reasons: list[str] = []
        if _first_cache(nodes, find, reasons) is None:
            told = [reason for reason in reasons if reason != NO_CACHE]
            return (told or [NO_CACHE])[-1]  # the farthest is what the others are made of
    return NOT_BORNE_OUT


def product_before(softmax: fx.Node) -> fx.Node | None:
    """Return the product nearest to a softmax of those that its scores are made of."""
    scores = argument(softmax, 0, "input")
    above = _above([scores], ()) if isinstance(scores, fx.Node) else ()
    return next((node for node in above if plain_name(node) in PRODUCTS), None)


def _as_written(scores: fx.Node, softmax: fx.Node) -> fx.Node:
    """Return the last write into ``scores`` before the softmax, which reads what it left; ``scores`` without one."""
    place = order_of(scores.graph)
    writers = writers_of(scores.graph).get(root_of(scores), ())
    before = [writer for writer in writers if place[scores] < place[writer] < place[softmax]]
    return max(before, key=place.__getitem__, default=scores)


def product_behind(softmax: fx.Node) -> fx.Node | None:
    """Return the product that the weights enter."""
    front = [softmax]
    for _ in range(_REACH):
        users = [user for node in front for user in node.users]
        product = next((user for user in users if _is_product(user)), None)
        if product is not None:
            return product
        front = users
    return None


def _is_product(node: fx.Node) -> bool:
    """Return whether a node is a product; a sum is one only of factors."""
    if plain_name(node) != "sum":
        return plain_name(node) in PRODUCTS
    factors: Any = node.args[0]
    while plain_name(factors) in CASTS:
        factors = factors.args[0]
    return plain_name(factors) in SCALINGS


def _above(nodes: Sequence[fx.Node], ends: Collection[str]) -> Iterator[fx.Node]:
    """Yield nodes and the tensors that they are made of, nearest first; operations named in ``ends`` end the way."""
    seen: set[fx.Node] = set()
    front = list(nodes)
    for _ in range(_REACH):
        following: list[fx.Node] = []
        for node in front:
            if node in seen or shape_of(node) is None:
                continue
            seen.add(node)
            yield node
            if plain_name(node) not in ends:
                following += data_of(node)
        front = following


def _first_cache(
    nodes: Iterator[fx.Node] | list[fx.Node], find: Find, reasons: list[str] | None = None
) -> tuple[fx.Node, State] | None:
    """Return the nearest node that is a cache; ``reasons`` takes why others, which are kept, are none."""
    for node in nodes:
        if len(shape_of(node) or ()) != 4:
            continue
        try:
            return node, find(node)
        except Refusal as reason:
            if reasons is not None and is_kept(node, set(node.graph.output_node().all_input_nodes)):
                reasons.append(str(reason))
    return None


def own_tokens(state: State) -> fx.Node:
    """Return the call's own tokens, ``[B, Hkv, T, D]``: those that are joined to a cache that is not quantized yet."""
    return argument(state.new, 0, "tensors")[-1] if state.life is Life.GROWN_PLAIN else state.new


def _queries(nodes: Sequence[fx.Node], key: tuple[fx.Node, State], tokens: Any) -> list[fx.Node]:
    """Return what may be the query: tensors of as many elements as heads of it would have, the cache's dtype first."""
    B, H, _, D = (hint_of(size) for size in shape_of(key[0]) or ())
    rows = B * H * D * hint_of(tokens)
    if rows == 0:
        return []
    dtype = value_of(key[0]).dtype
    fitting = [
        node
        for node in nodes
        if value_of(node).is_floating_point()
        and math.prod(map(hint_of, shape_of(node) or ())) % rows == 0
    ]
    return sorted(fitting, key=lambda node: value_of(node).dtype != dtype)[:2]


class _Candidate:
    """One candidate: what it computes on random numbers."""

    def __init__(
        self, softmax: fx.Node, scores: fx.Node, product: fx.Node, output: fx.Node, query: fx.Node,
        tokens: Any, key: tuple[fx.Node, State], value: fx.Node,
    ) -> None:  # fmt: skip
        self._nodes = output, query, key[0], value, product, scores
        self._softmax = softmax
        self._new, self._tokens = own_tokens(key[1]), tokens
        self._parts = [
            (dependent(query, product), _OF_OPERANDS),
            (dependent(key[0], product), _OF_OPERANDS),
            (dependent(product, scores), _OF_SCORES),
            (dependent(softmax, output), _OF_WEIGHTS),
            (dependent(value, output), _OF_OPERANDS),
        ]
        self._chain = tuple(self._parts[2][0])
        self._read = Chain.read(product, self._chain, self._parts[3][0])

    def found(self) -> Contraction | None:
        """Return the attention, if all trials agree on one."""
        output, query, key, value, product, scores = self._nodes
        self._check_steps()
        sides = self._sides()
        if sides is None:
            return None
        whole = Steps(output, (query, key, value, *sides), ())
        base = self._read.base
        whole.watched, whole.sized = (product, base), (self._new,)
        roots = map(root_of, (key, value))
        whole.given = [x for x in roots if x.op == "placeholder" or plain_name(x) in ALLOCATIONS]
        chain = Steps(scores, (base, *sides), ())
        if not whole.collect() or not (scores is base or chain.collect()):
            return None
        for number in range(4):  # masks are drawn, and may hide all that they see
            try:
                with torch.autocast("cpu", enabled=False):
                    found = self._agreed(whole, chain, sides, number < 3, number % 2 == 0)
            except CANNOT_BE_RUN:
                continue
            if found is not None:
                groups, score, masked, orders = found
                place = 0 if base is product else self._chain.index(base) + 1
                return Contraction(
                    *(*self._nodes, self._new),
                    groups,
                    score,
                    masked,
                    self._read,
                    *orders,
                    steps=self._chain[place:],
                )
        return None

    def _check_steps(self) -> None:
        """Make sure that nothing but known steps lies between the parts, read by nothing else.

        Raises:
            Refusal: Something does.
        """
        output, _, key, _, product, scores_node = self._nodes
        scores, weights = {product, *self._chain}, {self._softmax, *self._parts[3][0]} - {output}
        for name, nodes in (("scores", scores), ("attention weights", weights)):
            readers = {user for node in nodes for user in node.users if node in data_of(user)}
            if readers - scores - weights - {output}:
                hint = f" {WHO_USES}" if nodes is weights else ""
                raise Refusal(f"the {name} are used outside attention{hint}")
        for (name, end), (between, known) in zip(_PARTS.items(), self._parts, strict=True):
            for node in between:
                if node in (product, output):
                    continue
                if plain_name(node) not in known:
                    raise Refusal(f"the {name} pass through {plain_name(node)} before the {end}")
                if plain_name(node) == "dropout" and drops(node):
                    raise Refusal(DROPS)
                if not self._is_told_by_numbers(node, name):
                    if name == "scores" and plain_name(node) in SCALINGS:
                        raise Refusal(SCALE_IN_GRAPH)
                    what = f"a tensor in {plain_name(node)} before the {end}"
                    raise Refusal(f"the {name} meet {what}, which may change with the call")
        more = 0 if self._read.sinks is None else self._read.sinks.count
        if not same((shape_of(scores_node) or (0,))[-1], (shape_of(key) or (0, 0, 0))[2] + more):
            raise Refusal("the scores have another number of columns than there are keys")

    def _is_told_by_numbers(self, node: fx.Node, part: str) -> bool:
        """Return whether what a step does to its operand is the same at every size, and so shows in a trial.

        A tensor may be added to scores or hide some: it is read as it is in each call. So is a factor of rows and so
        are logits of sinks (`chain`). Another factor may not be one, nor an index: it could be 1, or take all, at the
        sizes of the trials alone.

        Raises:
            Refusal: Scores are set to what does not hide them.
        """
        inside = {node for nodes, _ in self._parts for node in nodes} | {
            *self._nodes,
            self._softmax,
        }
        name = plain_name(node)
        moved = [other for other in data_of(node) if other in inside]
        others = [other for other in node.all_input_nodes if other not in inside]
        if part == "weights" and name in HIDING:
            return self._is_hidden_before(node, moved)
        if part != "scores":
            read = (other for other in others if other in data_of(node))
            return all(is_constant(other) for other in read if shape_of(other) is not None)
        of_rows = [other for other in moved if self._is_of_rows(other)]
        if len(moved) - (len(of_rows) if name in _DIFFERENCES else 0) != 1:
            return False
        if name in HIDING:
            mask, *given = hiding(node)
            for fill in given:
                if fill not in moved and not hides(fill):
                    raise not_hidden(fill)
            return mask not in moved
        if (
            name in _LARGEST
        ):  # of rows; with another tensor it is a clamp, which may leave hidden what is hidden
            return all(other not in moved and hides(other) for other in node.all_input_nodes[1:])
        if name in (*ADDITIONS, *_DIFFERENCES, *JOINS) or node in self._read.scaled:
            return True
        return name in _MOVES or all(is_constant(other) for other in others)

    def _is_hidden_before(self, node: fx.Node, moved: Sequence[fx.Node]) -> bool:
        """Return whether weights are set where a mask hides their scores, which a trial shows to be to zero."""
        mask, *given = hiding(node)
        fills = [fill for fill in given if fill not in moved]
        steps = [step for step in self._chain if plain_name(step) in HIDING]
        alike = any(
            plain_name(step).rstrip("_") == plain_name(node).rstrip("_") and hiding(step)[0] is mask
            for step in steps
        )
        return alike and mask not in moved and all(is_number(fill) for fill in fills)

    def _is_of_rows(self, node: fx.Node) -> bool:
        """Return whether a tensor is the largest of each row of scores."""
        while plain_name(node) in _MOVES:
            node = node.args[0]  # type: ignore[assignment]
        return plain_name(node) in _LARGEST and len(node.all_input_nodes) == 1

    def _sides(self) -> list[fx.Node] | None:
        """Return what else the parts read and no trial can compute: masks and biases; ``None`` if not only those."""
        output, query, key, value, product, _ = self._nodes
        inside = {query, key, value, product, self._softmax, output}
        for nodes, _ in self._parts:
            inside |= set(nodes)
        sides: dict[fx.Node, None] = {}
        made = sorted(inside - {query, key, value}, key=order_of(output.graph).__getitem__)
        stack = [read for node in made for read in data_of(node)]
        while stack:
            node = stack.pop()
            if node in inside or node in sides or shape_of(node) is None:
                continue
            if not _needs_arguments(node):
                continue
            if not value_of(node).is_floating_point() and value_of(node).dtype != torch.bool:
                return None
            sides[node] = None
        return list(sides)

    def _agreed(
        self, whole: Steps, chain: Steps, sides: Sequence[fx.Node], exact: bool, few: bool
    ) -> tuple[int, Score, bool, Orders] | None:
        """Return groups, score, whether there is a mask, and the orders that hold in all trials."""
        common: dict[Orders, None] | None = None
        scales: list[tuple[float, float]] = []
        groups = 0
        for sizes in whole.assignments(3):
            trial = Evaluation(self._nodes, self._tokens, sizes, sides, exact, few, self._read)
            found = trial.orders(whole, chain)
            common = found if common is None else {o: None for o in common if o in found}
            if not common:
                return None
            scales.append(trial.scales)
            groups = trial.groups
        if common is None:
            return None
        for told in zip(*scales, strict=True):
            if max(told) - min(told) > 1e-3 * abs(told[0]):
                return None
        apart = {*self._chain, self._nodes[4], *(factor for factor, _ in self._read.factors)}
        others = {other for step in self._chain for other in data_of(step)} - apart
        masked = self._read.sinks is not None or any(
            shape_of(other) is not None for other in others
        )  # nothing at the sizes of trials may hide later
        before, behind = scales[0]
        if self._read.base is self._nodes[4]:
            score = Score(_rounded(before * behind))
        else:
            bent = self._read.score
            score = replace(bent, scale=_rounded(bent.scale * before)).times(_rounded(behind))
        return groups, score, masked, next(iter(common))


def _rounded(scale: float) -> float:
    """Return a scale without the noise of its measurement where it is a power of two or a root of an integer."""
    for candidate in (
        1.0,
        2.0 ** round(math.log2(abs(scale))),
        1 / math.sqrt(max(1, round(scale**-2))),
    ):
        if abs(candidate - scale) <= 1e-4 * abs(scale):
            return candidate
    return scale


def _needs_arguments(node: fx.Node) -> bool:
    """Return whether a tensor is made of an argument of the graph, or of more than a trial should compute."""
    stack, seen = [node], set[fx.Node]()
    while stack:
        each = stack.pop()
        if each in seen or (each.op == "placeholder" and shape_of(each) is None):
            continue
        if each.op == "placeholder" or plain_name(each) in MIXING or len(seen) > _REACH:
            return True
        seen.add(each)
        stack += each.all_input_nodes
    return False
