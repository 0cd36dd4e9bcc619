"""Find by which angle each pair of channels of a key is rotated, whatever spelling the rotation has.

Rotary embeddings are written in many ways: ``k * cos + rotate_half(k) * sin``, halves or interleaved pairs
written out, complex products; with frequencies, tables or slices of tables; of all channels or of some.
None of them is matched here. From the key backwards the graph is cut into two parts::

    source   the one tensor of the tokens behind which nothing depends on positions any more
    angles   what else reaches the key: constants of the model and integer positions

What lies between is a linear map of the source. It is *evaluated*, on the CPU in float64, at position 0, where
it says which channel comes from where, at two more for the pairs, and at positions of doubling distance for the
frequencies. The rotation that was read off must then repeat what the graph does to random keys at all sampled
positions, else it is refused. Casts to fewer bits are left out, so the frequencies are those of the
model's own constants and not of their rounding.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.lowering.find.replay import (
    Leaf,
    Replay,
    dtype_of,
    is_integer,
    number,
    operands,
    quietly,
)
from kvq_compile.lowering.nodes import (
    VIEWS,
    argument,
    getitem_index,
    order_of,
    same,
    shape_of,
    target_name,
    value_of,
)
from kvq_compile.lowering.sites import Refusal
from kvq_compile.lowering.unchanged import once

TURN = 1 << 32  # frequencies count parts of a turn
FARTHEST = 1 << 14  # positions are sampled up to here, or to the end of the model's table
NOT_ROTATED = "the key is not rotated"
_DENSE = 64  # positions below this are all sampled
Origin = Leaf | str
_TOKENS = "tokens"  # the leaf that stands for everything computed from the tokens themselves
_PRODUCTS = (
    *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d"),
    *("embedding", "layer_norm", "rms_norm", "softmax", "scaled_dot_product_attention"),
)


@dataclass(frozen=True)
class Rotation:
    """How a key was rotated: by ``position * frequency`` in each pair of channels.

    Attributes:
        order: ``D`` channels; entries ``c`` and ``c + D/2`` are a pair ``(a, b)`` that was rotated into
            ``(a cos - b sin, b cos + a sin)``, ``a`` being the lower channel.
        frequencies: ``D/2`` angles for one position, in units of 2**-32 turns, in ``[-2**31, 2**31)``; 0 for
            channels that are not rotated, which are paired among themselves.
        position: Node of the integer positions of the new tokens, ``[T]``, ``[1, T]`` or ``[B, T]``; ``None``
            where the graph has none, as where rows of a table are taken by a slice.
    """

    order: tuple[int, ...]
    frequencies: tuple[int, ...]
    position: fx.Node | None = None


def find_rotation(
    key: fx.Node,
    example_inputs: Mapping[fx.Node, Any] | Sequence[Any],
    known: dict[Hashable, Rotation] | None = None,
) -> Rotation:
    """Return the rotation of a key.

    Args:
        key: Node of the call's own keys as attention reads them, ``[B, Hkv, T, D]``; tokens of earlier calls in
            front of them are taken to be rotated alike.
        example_inputs: Arguments of the call that is being compiled, in the order of the placeholders or by
            placeholder; only constants of the model are read.
        known: Rotations found in the same graph, where this one is looked for and kept: layers share their angles,
            and evaluating a rotation takes a third of a second.

    Raises:
        Refusal: The key is not rotated, or not by an angle proportional to the position.
    """
    placeholders = [node for node in key.graph.nodes if node.op == "placeholder"]
    if not isinstance(example_inputs, Mapping):
        example_inputs = dict(zip(placeholders, example_inputs, strict=True))
    key = _newest(key)
    shape = shape_of(key)
    if shape is None or len(shape) != 4:
        raise Refusal(f"the key must be [B, H, T, D], got {shape}")
    tokens, width = number(shape[2]), number(shape[3])
    if width % 2:
        raise Refusal(f"{NOT_ROTATED}: it has an odd number of channels, {width}")
    leaves = _leaves(key.graph, example_inputs)
    source, angles = _cut(key, leaves, example_inputs)
    shared = frozenset(_shared(node) for node in angles)
    alike_keys = (shared, width, _operators(key, source, angles))
    if known is not None and alike_keys in known:
        return known[alike_keys]
    reasons: list[str] = []
    for alike in _positions(frozenset().union(*(leaves[node] for node in angles)), tokens):
        try:
            with quietly():
                order, frequencies = _read(Replay(key, source, alike, example_inputs))
            found = Rotation(order, frequencies, _position_node(alike[0], tokens))
            if known is not None:
                known[alike_keys] = found
            return found
        except Refusal as reason:
            reasons.append(str(reason))
    raise Refusal(reasons[0])


# The cut


def _newest(key: fx.Node) -> fx.Node:
    """Return the call's own keys, without the earlier ones that the call was given."""
    while target_name(key) in ("cat", "concat") and argument(key, 1, "dim") in (2, -2):
        *past, new = argument(key, 0, "tensors")
        if any(n.op != "placeholder" and len(shape_of(n) or ()) == 4 for n in past):
            break
        key = new
    return key


def _shared(angle: fx.Node) -> tuple[fx.Node, tuple[str, ...]]:
    """Return the node behind an angle that layers have in common, and what is done to it."""
    steps: list[str] = []
    while len(angle.all_input_nodes) == 1:
        rest = [a for a in (*angle.args, *angle.kwargs.values()) if not isinstance(a, fx.Node)]
        steps.append(f"{target_name(angle)} {rest}")
        angle = angle.all_input_nodes[0]
    return angle, tuple(steps)


def _operators(key: fx.Node, source: fx.Node, angles: Iterable[fx.Node]) -> tuple[str, ...]:
    """Return the operators between the cut and a key, in the order of the graph."""
    ends, between, waiting = {source, *angles}, {key}, [key]
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node not in ends and node not in between:
                between.add(node)
                waiting.append(node)
    return tuple(str(target_name(node)) for node in key.graph.nodes if node in between)


@once
def _leaves(graph: fx.Graph, inputs: Mapping[fx.Node, Any]) -> dict[fx.Node, frozenset[Origin]]:
    """Return for each node what it is computed from, constants left out."""
    found: dict[fx.Node, frozenset[Origin]] = {}
    for node in graph.nodes:
        found[node] = _leaves_of(node, found, inputs)
    return found


def _leaves_of(
    node: fx.Node, found: Mapping[fx.Node, frozenset[Origin]], inputs: Mapping[fx.Node, Any]
) -> frozenset[Origin]:
    dtype = dtype_of(node)
    if dtype is None or node.op == "get_attr":
        return frozenset()
    if not (dtype.is_floating_point or dtype.is_complex):
        source = node.args[0] if node.args else None
        repeats = isinstance(source, fx.Node) and _repeats_integers(node, source)
        return found[source] if repeats else frozenset((node,))  # type: ignore[index]
    if node.op == "placeholder":
        return frozenset() if _is_constant(node) else frozenset((_TOKENS,))
    if target_name(node) == "arange":
        return frozenset((node,))
    tensors = [n for n in operands(node) if dtype_of(n) is not None]
    looks_up = any(is_integer(n) for n in tensors)
    if looks_up and any(isinstance(inputs.get(n), torch.nn.Parameter) for n in tensors):
        return frozenset((_TOKENS,))  # an embedding
    together = frozenset().union(*(found[n] for n in tensors))
    return together or frozenset((node, dim) for dim in _sliced(node))


def _repeats_integers(node: fx.Node, source: fx.Node) -> bool:
    """Return whether a node holds the integers of ``source`` in another shape."""
    if not is_integer(source):
        return False
    old, new = shape_of(source) or (), shape_of(node) or ()
    if target_name(node) in ("repeat", "expand", "expand_as"):
        return True
    return target_name(node) in (*VIEWS, "long", "int", "clone") and same(
        math.prod(old), math.prod(new)
    )


def _sliced(node: fx.Node) -> Iterator[int]:
    """Yield where in an index a constant table is cut by a slice; ``[:T]`` counts even if there are T rows."""
    for place, cut in enumerate(getitem_index(node) or ()):
        whole = isinstance(cut, slice) and cut.start is None and cut.stop is None
        if isinstance(cut, slice) and cut.step in (None, 1) and not whole:
            yield place


def _cut(
    key: fx.Node, leaves: Mapping[fx.Node, frozenset[Origin]], inputs: Mapping[fx.Node, Any]
) -> tuple[fx.Node, list[fx.Node]]:
    """Return the node that is rotated and the nodes from which the angles come.

    Nodes are opened latest first, so that a node which is alone has all others behind it.
    """
    place = order_of(key.graph)
    front = {key}
    while True:
        data = sorted((n for n in front if _TOKENS in leaves[n]), key=place.__getitem__)
        angles = [n for n in front if _TOKENS not in leaves[n] and leaves[n]]
        if not data:
            raise Refusal("the key does not depend on the tokens")
        if len(data) == 1 and angles and isinstance(value_of(data[0]), Tensor):
            return data[0], angles
        latest = data[-1]
        inner = [n for n in operands(latest) if dtype_of(n) is not None]
        is_product = target_name(latest) in _PRODUCTS or any(
            isinstance(inputs.get(n), torch.nn.Parameter) for n in inner
        )
        rotated = any(leaves[n] and _TOKENS not in leaves[n] for n in inner)
        if not inner or (is_product and not rotated):
            raise Refusal(_why_no_cut(data))
        front.remove(latest)
        front.update(inner)


def _why_no_cut(data: Sequence[fx.Node]) -> str:
    if len(data) == 1:
        return f"{NOT_ROTATED}: it comes straight from {target_name(data[0]) or data[0].name}"
    names = " and ".join(node.name for node in data)
    return (
        f"the key is made from {names}, which all depend on the tokens; "
        "only a rotation by position is understood"
    )


def _positions(leaves: frozenset[Origin], tokens: int) -> list[list[Leaf]]:
    """Return the leaves that may be the positions, the likeliest first, those that are equal together.

    Raises:
        Refusal: There is none, or more inputs than one decide on the angle.
    """
    known = sorted((leaf for leaf in leaves if not isinstance(leaf, str)), key=str)
    given = [leaf for leaf in known if isinstance(leaf, fx.Node) and not _is_closed(leaf)]
    if len(given) > 1:
        names = " and ".join(str(node) for node in given)
        raise Refusal(f"the rotation depends on {names}, not on positions alone")
    alike: dict[str, list[Leaf]] = {}
    for leaf in given or known:
        if _fits(leaf, tokens):
            alike.setdefault(_spelling(leaf), []).append(leaf)
    if not alike:
        raise Refusal("the positions by which the key is rotated were not found in the graph")
    return sorted(alike.values(), key=lambda group: isinstance(group[0], tuple))


def _spelling(leaf: Leaf) -> str:
    """Return what two leaves have in common that hold the same elements, as ``cos[:T]`` and ``sin[:T]``."""
    if isinstance(leaf, tuple):
        return str((getitem_index(leaf[0]) or ())[leaf[1]])
    return f"{target_name(leaf)} {leaf.args} {leaf.kwargs}" if leaf.args else leaf.name


def _fits(leaf: Leaf, tokens: int) -> bool:
    """Return whether a leaf has an entry for each token."""
    node, dim = leaf if isinstance(leaf, tuple) else (leaf, -1)
    shape = [number(size) for size in shape_of(node) or ()]
    if isinstance(leaf, tuple):
        index = getitem_index(node) or ()
        dim = sum(not isinstance(i, int) for i in index[:dim])
    return math.prod(shape) == 1 == tokens or (bool(shape) and shape[dim] == tokens)


def _is_closed(node: fx.Node) -> bool:
    """Return whether a node depends on no input of the call but on sizes and the model's constants."""
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current.op == "placeholder" and dtype_of(current) is not None:
            if not _is_constant(current):
                return False
        elif current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return True


def _is_constant(placeholder: fx.Node) -> bool:
    """Return whether an input is a tensor of a module or of the program, not an argument of the call."""
    source = getattr(placeholder, "_dynamo_source", None)
    kind = getattr(getattr(source, "guard_source", None), "name", "")
    static = "_dynamo_static_input_type" in placeholder.meta.get("tensor_dict", {})
    return static or "NN_MODULE" in kind or kind == "GLOBAL"


def _position_node(leaf: Leaf, tokens: int) -> fx.Node | None:
    if isinstance(leaf, tuple):
        return None
    shape = [number(size) for size in shape_of(leaf) or ()]
    return leaf if len(shape) in (1, 2) and shape[-1] == tokens and is_integer(leaf) else None


# The rotation


class _KeyRotation:
    """The function from keys as they are at position 0 to keys at given positions.

    At position 0 a key may differ from its source in shape, in the order of its channels and by a factor for
    each channel (YaRN). The transpose of that map is its inverse but for the square of the factor, so one
    gradient gives the source of any wanted key, and the layout of the source need not be known.

    Raises:
        Refusal: Position 0 does more to the source than that.
    """

    def __init__(self, replay: Replay) -> None:
        self._replay, self.shape = replay, replay.shape
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(
            replay.source_shape, dtype=replay.dtype, generator=generator, device="cpu"
        )
        self._start = start.requires_grad_()
        zero = torch.zeros(self.tokens, dtype=torch.int64, device="cpu")
        self._key = replay(start, zero)
        if not self._key.requires_grad or self._key.shape != self.shape:
            raise Refusal("the key is no differentiable function of what is rotated")
        self._factor = torch.ones(self.width, dtype=torch.float64, device="cpu")
        squared = self(torch.ones(self.shape, dtype=torch.float64, device="cpu"), zero)[0, 0, 0]
        self._factor = squared.clamp_min(0).sqrt()
        self.random = torch.randn(
            self.shape, dtype=torch.float64, generator=generator, device="cpu"
        )
        kept = bool((self._factor > 0).all())
        if not kept or not torch.allclose(self(self.random, zero), self.random, 1e-6, 1e-6):
            raise Refusal("the key at position 0 is not the un-rotated key times a constant")

    @property
    def tokens(self) -> int:
        """Tokens of one call."""
        return self.shape[2]

    @property
    def width(self) -> int:
        """Channels."""
        return self.shape[3]

    def __call__(self, key: Tensor, positions: Tensor) -> Tensor:
        """Return the key ``[B, H, T, D]`` rotated by ``positions`` ``[T]``."""
        (source,) = torch.autograd.grad(
            self._key, self._start, key / self._factor, retain_graph=True
        )
        with torch.no_grad():
            return self._replay(source, positions) / self._factor

    def in_calls(self, positions: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield positions as many at a time as a call has tokens, the last repeated, with their places."""
        for first in range(0, len(positions), self.tokens):
            part = positions[first : first + self.tokens]
            more = part[-1:].expand(self.tokens - len(part))
            yield slice(first, first + len(part)), torch.cat([part, more])

    def limit(self) -> int:
        """Return how many positions can be asked for: a table ends somewhere."""
        limit = FARTHEST
        while True:
            try:
                self(
                    self.random,
                    torch.full((self.tokens,), limit - 1, dtype=torch.int64, device="cpu"),
                )
            except Refusal:
                if limit <= 2:
                    raise
                limit //= 2
            else:
                return limit

    def matrix(self, position: int) -> Tensor:
        """Return the ``[D, D]`` map of the channels at a position."""
        batch, heads, tokens, width = self.shape
        identity = torch.eye(width, dtype=torch.float64, device="cpu")
        columns: list[Tensor] = []
        for units in identity.split(batch * heads * tokens):
            key = torch.zeros(batch * heads * tokens, width, dtype=torch.float64, device="cpu")
            key[: len(units)] = units
            rotated = self(
                key.view(self.shape),
                torch.full((tokens,), position, dtype=torch.int64, device="cpu"),
            )
            columns.append(rotated.reshape(-1, width)[: len(units)])
        return torch.cat(columns).T


def _read(replay: Replay) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return order and frequencies of the rotation that a replay performs.

    Raises:
        Refusal: It performs something else.
    """
    rotate = _KeyRotation(replay)
    limit = rotate.limit()
    first, second = _pairs(rotate, limit)
    rest = [channel for channel in range(rotate.width) if channel not in {*first, *second}]
    half = len(rest) // 2
    order = (*first, *rest[:half], *second, *rest[half:])
    powers = [1 << k for k in range(limit.bit_length() - 1)]
    positions = torch.tensor(
        sorted({*range(min(limit, _DENSE)), *powers, limit - 1}), dtype=torch.int64, device="cpu"
    )
    frequencies = (*_frequencies(rotate, first, second, powers), *[0] * half)
    _verify(rotate, order, frequencies, positions, replay.epsilon)
    return order, frequencies


def _pairs(rotate: _KeyRotation, limit: int) -> tuple[list[int], list[int]]:
    """Return the lower and the upper channels of the pairs."""
    mixed = rotate.matrix(1).abs() + rotate.matrix(limit - 1).abs()
    partners = mixed.fill_diagonal_(0) > 1e-12
    if not bool(partners.any()):
        raise Refusal(f"{NOT_ROTATED}: its channels do not mix at any position")
    if bool((partners.sum(1) > 1).any()) or not torch.equal(partners, partners.T):
        raise Refusal("the rotation mixes channels in more than pairs")
    first, second = partners.triu().nonzero(as_tuple=True)
    return first.tolist(), second.tolist()


def _frequencies(
    rotate: _KeyRotation, first: Sequence[int], second: Sequence[int], powers: Sequence[int]
) -> list[int]:
    """Return the angle of each pair for one position, in units of 2**-32 turns.

    The angle at a position tells the frequency up to whole turns, and more exactly the farther away the
    position is; the estimate from half the distance says how many turns those were.
    """
    unit = torch.zeros(rotate.shape, dtype=torch.float64, device="cpu")
    unit[..., list(first)] = 1.0
    angles = torch.empty(len(powers), len(first), dtype=torch.float64, device="cpu")
    for rows, positions in rotate.in_calls(torch.tensor(powers, dtype=torch.int64, device="cpu")):
        rotated = rotate(unit, positions)[0, 0, : rows.stop - rows.start]
        angles[rows] = torch.atan2(rotated[:, list(second)], rotated[:, list(first)])
    turns = angles / (2 * math.pi)
    estimate = turns[0]
    for position, seen in zip(powers[1:], turns[1:], strict=True):
        error = seen - position * estimate
        estimate = estimate + (error - error.round()) / position
    units = (estimate * TURN).round().long()
    return [(int(unit) + TURN // 2) % TURN - TURN // 2 for unit in units]


def _verify(
    rotate: _KeyRotation,
    order: Sequence[int],
    frequencies: Sequence[int],
    positions: Tensor,
    epsilon: float,
) -> None:
    """Make sure that the rotation maps random keys as the graph does.

    The tolerance is the precision of the model's tables, and what an angle computed in float32 may be off.

    Raises:
        Refusal: It does not.
    """
    half = rotate.width // 2
    lower, upper = rotate.random[..., list(order[:half])], rotate.random[..., list(order[half:])]
    for rows, chunk in rotate.in_calls(positions):
        phase = (chunk[:, None] * torch.tensor(frequencies, dtype=torch.int64, device="cpu")) % TURN
        angle = phase.double() * (2 * math.pi / TURN)
        cos, sin = angle.cos(), angle.sin()
        wanted = torch.empty(rotate.shape, dtype=torch.float64, device="cpu")
        wanted[..., list(order[:half])] = lower * cos - upper * sin
        wanted[..., list(order[half:])] = upper * cos + lower * sin
        allowed = (4 * epsilon + chunk[:, None] * 2.0**-22) * rotate.random.abs().max()
        if not bool(((rotate(rotate.random, chunk) - wanted).abs() <= 2 * allowed).all()):
            first, last = int(positions[rows][0]), int(positions[rows][-1])
            raise Refusal(
                "the key is not rotated by an angle proportional to the position "
                f"(between positions {first} and {last})"
            )
