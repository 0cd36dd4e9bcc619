"""What the finders find: an attention, the cache tensors it reads, and why one was left alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.tables import Tables

logger = logging.getLogger("kvq_compile")

DENSE = "stored quantized, read dense"  # the outcome of an attention that was refused, over caches that were not


class Refusal(Exception):
    """A reason to leave a site as it is; its text is what `explain` shows."""


def unexpected(error: Exception) -> Refusal:
    """Return a refusal that carries an error nobody has thought of."""
    logger.debug("an analysis failed", exc_info=error)
    text = " ".join(str(error).split())[:200]
    return Refusal(
        f"the analysis failed ({type(error).__name__}: {text}); this is a fault of kvq-compile: please report it"
    )


class Contradiction(ValueError):
    """The call contradicts what the model is compiled for: an error, since no numbers would be right."""


class LostWrite(NotImplementedError):
    """A write that a quantized cache cannot take: an error, since it would be lost."""


@dataclass(frozen=True)
class Attention:
    """One softmax attention: an SDPA call, or matmul, scale, mask, softmax, matmul.

    Attributes:
        output: Node of the result, ``[B, Hq, T, Dv]``.
        query, key, value: Its operands as they reach the products, ``key`` not transposed.
        mask: Boolean (True: attend) or additive mask, or ``None``.
        score: What is done to products of queries and keys before the mask.
        causal: Whether query ``i`` sees cache positions up to ``i`` only, counted from cache position 0.
        grouped: Whether query heads share KV heads without a repeat in the graph.
        mask_hides: Whether a boolean ``mask`` marks what is hidden instead of what is seen.
        sink_logits: Further logits of the softmax, whose weights are left out, ``[B, Hq, T, n]``, or one a row without
            a last axis; or ``None``. Where each row has the same, their log-sum-exp as a number.
    """

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    score: Score
    causal: bool
    grouped: bool
    mask_hides: bool = False
    sink_logits: fx.Node | float | None = None


class Life(Enum):
    """How a cache tensor enters a graph and leaves it."""

    FRESH = "built in this call and returned"
    GROWN_PLAIN = "16-bit tensor grown by cat"
    GROWN = "quantized tensor grown by cat"
    ALLOCATED = "allocated in this call, written and returned"
    BUFFER_PLAIN = "16-bit buffer written in place"
    BUFFER = "quantized buffer written in place"
    RING_FRESH = "allocated in this call, filled with its last tokens and returned"
    RING_PLAIN = "16-bit buffer that keeps the last tokens"
    RING = "quantized buffer that keeps the last tokens"


RINGS = (Life.RING_PLAIN, Life.RING)  # what the call was given


@dataclass(frozen=True)
class State:
    """The cache tensor behind the key or the value of an attention.

    Attributes:
        life: How it enters and leaves the graph.
        base: The node that attention reads, before heads are repeated or cache positions are cut off.
        new: The call's own tokens, ``[B, Hkv, T, D]``.
        past: Placeholder or allocation that held the earlier tokens, if any; or rows taken from such a placeholder.
        source: That placeholder, where ``past`` is rows taken from it.
        kept: What is returned of the tokens, if that is only the last of them (a sliding window).
        write: The node that writes ``new`` into ``past``, in place or, where it is ``base``, into a copy.
        position: Cache positions of the new tokens, a node; or their first cache position, a number. Of a ring, how
            many of its slots come before them, ``None`` for all.
        repeats: Query heads for one KV head, as repeated in the graph.
        slots: How many leading cache positions attention reads; ``None`` for all.
        last: How many of the last tokens of a dynamic cache or a ring attention reads; ``None`` for all.
        readers: What reads a buffer before it is written again.
        is_read_elsewhere: Whether some of these lead to something else than attentions.
    """

    life: Life
    base: fx.Node
    new: fx.Node
    past: fx.Node | None = None
    write: fx.Node | None = None
    position: Any = None
    repeats: Any = 1
    slots: Any = None
    source: fx.Node | None = None
    kept: fx.Node | None = None
    last: Any = None
    readers: tuple[fx.Node, ...] = ()
    is_read_elsewhere: bool = False

    @property
    def returned(self) -> fx.Node:
        """The node that stands for the cache behind the call."""
        return self.base if self.kept is None else self.kept

    @property
    def whole(self) -> fx.Node:
        """The tensor of which a sliding window is cut, and which its attention reads; else ``base``."""
        return self.new if self.kept is self.base else self.base

    @property
    def is_update(self) -> bool:
        """Whether the call returns an updated cache and leaves the tensor that it was given as it was."""
        return self.write is not None and self.write is self.base

    @property
    def by_row(self) -> bool:
        """Whether each row is written at positions of its own, ``[B, T]``."""
        position = self.position
        value = position.meta.get("example_value") if isinstance(position, fx.Node) else None
        return isinstance(value, Tensor) and value.dim() == 2

    @property
    def how(self) -> str:
        """How the cache enters the graph and leaves it, in words."""
        if self.by_row:
            return self.life.value + ", each row at positions of its own"
        if not self.is_update:
            return self.life.value + (
                "" if self.kept is None else ", of which the last tokens are kept"
            )
        held = "quantized" if self.life is Life.BUFFER else "16-bit"
        return f"{held} cache of fixed size, of which an updated one is returned"

    @property
    def cache(self) -> fx.Node | None:
        """The argument or allocation that holds the earlier tokens, if any."""
        return self.past if self.source is None else self.source


@dataclass(frozen=True)
class Projection:
    """A linear map of the channels of a kept token to some channels of a key or a value.

    Attributes:
        first, last: The channels that it makes, ``first .. last - 1``.
        heads: How many differ: all of those of keys or values, or 1.
        views: Methods and their arguments that make ``[heads, kept channels, channels]`` of the weight, without a copy.
        weight: The node of the weight; ``None`` where channels are those that are kept.
    """

    first: int
    last: int
    heads: int
    views: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    weight: fx.Node | None = None

    def matrix(self, weight: Tensor | None) -> Tensor:
        """Return the map ``[heads, kept channels, channels]``, of an element or the elements of a weight."""
        if weight is None:
            return torch.eye(self.last - self.first, dtype=torch.float64, device="cpu")[None]
        for name, arguments in self.views:
            weight = getattr(weight, name)(*arguments)
        return weight


@dataclass(frozen=True)
class Expansion:
    """How keys and values are made of two kept tensors, token by token: keys of both, values of latents.

    Attributes:
        key: From the kept tensor that stands for keys to keys; ``None``: nothing of these comes from there.
        latent_key: From latents to keys; ``None`` as well.
        value: From latents to values.
    """

    key: Projection | None
    latent_key: Projection | None
    value: Projection


@dataclass(frozen=True)
class Quantization:
    """How one cache tensor is quantized: its layout and its calibration tables.

    Attributes:
        layout: Where each bit lies.
        tables: What calibration found, where the layout has tables.
    """

    layout: Layout
    tables: Tables | None = None


@dataclass(frozen=True)
class AttentionSite:
    """An attention together with the key and value state that it reads; ready to be rewritten.

    Attributes:
        layer: Number of its layer in the model.
        order: Its number in the order in which the graph runs its attentions.
        where: The module it runs in, or the cache it reads.
        attention: The attention.
        key, value: Its cache tensors.
        key_quantization, value_quantization: What they are quantized to.
        expansion: How keys and values are made of the two, where they are not what is kept.
    """

    layer: int
    order: int
    where: str
    attention: Attention
    key: State
    value: State
    key_quantization: Quantization
    value_quantization: Quantization
    expansion: Expansion | None = None

    def shares(self, other: AttentionSite) -> bool:
        """Return whether two attentions read the same caches, filled by the same write."""
        pairs = ((self.key, other.key), (self.value, other.value))
        return all(mine.base is its.base and mine.write is its.write for mine, its in pairs)

    def states(self) -> tuple[tuple[State, Quantization], tuple[State, Quantization]]:
        """Return keys and values, each with its quantization."""
        return (self.key, self.key_quantization), (self.value, self.value_quantization)


@dataclass(frozen=True)
class Step:
    """One step of the graph around an attention.

    Attributes:
        name: Of its node.
        does: What it calls, or what it is: ``"cat"``, ``"kvq.attend"``, ``"cache"``.
        about: Dtype and shape, or what a packed cache holds.
        lane: Whether it belongs to the ``"query"``, the ``"keys"`` or the ``"values"``.
        kind: ``"input"``, ``"cache"``, ``"packed"``, ``"step"``, ``"attention"`` or ``"write"``.
        inputs: Names of the steps whose results it takes.
        label: How the model names it, where that is another name.
    """

    name: str
    does: str
    about: str
    lane: str
    kind: str
    inputs: tuple[str, ...] = ()
    label: str = ""


Flow = tuple[Step, ...]


@dataclass(frozen=True)
class SiteFacts:
    """What is known of an attention and its cache; ``None`` where it is not.

    Attributes:
        query_heads, kv_heads: Heads.
        key_size, value_size: Channels of a head.
        cache: How the cache enters the graph and leaves it.
        dtype: The model's dtype.
        bytes_before: Bytes that a token's keys and values take in it.
        bytes_after: Bytes that they take packed, parameters included.
    """

    query_heads: int | None = None
    kv_heads: int | None = None
    key_size: int | None = None
    value_size: int | None = None
    cache: str = ""
    dtype: str = ""
    bytes_before: float | None = None
    bytes_after: float | None = None


@dataclass(frozen=True)
class SiteReport:
    """What became of one attention.

    Attributes:
        layer: Number of its layer in the model; its number in the order of execution where ``where`` says so.
        node: Name of its output node.
        source: Line of the model's source that called it, where known.
        outcome: ``"rewritten"``, ``DENSE`` or ``"left alone"``.
        detail: What it became, or the reason why it was not rewritten.
        expected: Whether a reason is one that needs no warning (no cache kept, or the user's option).
        where: The module it runs in, or the cache it reads.
        stack: The lines of source behind it, the innermost last.
        facts: Its heads, its cache and what that takes.
        before, after: The graph around it, as captured and as rewritten; empty where it is not known or was not.
    """

    layer: int
    node: str
    source: str
    outcome: str
    detail: str
    expected: bool = False
    where: str = ""
    stack: tuple[str, ...] = ()
    facts: SiteFacts | None = None
    before: Flow = ()
    after: Flow = ()


@dataclass(frozen=True)
class StateReport:
    """What became of one cache.

    Attributes:
        name: How the model names it.
        shape: Its shape as the graph has it.
        outcome: ``"quantized"``, ``DENSE`` or ``"left alone"``.
        detail: How it enters and leaves the graph, or the reason why its attention was not rewritten.
        expected: Whether a reason is one that needs no warning.
    """

    name: str
    shape: tuple[str, ...]
    outcome: str
    detail: str
    expected: bool = False
