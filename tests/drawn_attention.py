"""How hand-written decoders spell attention: rotations, products, heads that share keys, scores and masks.

Each is a small function of its own, so that any of them makes a program with any of the others.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

WINDOW = 21  # tokens that a sliding window shows
CAP = 4.0

# Rotations


def angles(position: Tensor, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    turns = 100.0 ** (-torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    angle = position[:, None].float() * turns
    return angle.cos().to(dtype), angle.sin().to(dtype)


def half(x: Tensor, position: Tensor) -> Tensor:
    cos, sin = (torch.cat([part, part], -1) for part in angles(position, x.shape[-1], x.dtype))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def interleaved(x: Tensor, position: Tensor) -> Tensor:
    cos, sin = angles(position, x.shape[-1], x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def partial(x: Tensor, position: Tensor) -> Tensor:
    size = x.shape[-1] // 2
    return torch.cat([half(x[..., :size], position), x[..., size:]], -1)


ROTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda x, position: x,
    "half": half,
    "interleaved": interleaved,
    "partial": partial,
}

# Heads that share keys and values: from [B, H, S, D] to [B, H * G, S, D]


def gathered(x: Tensor, times: int) -> Tensor:
    heads = torch.arange(x.shape[1] * times) // times
    index = heads[None, :, None, None].expand(x.shape[0], -1, x.shape[2], x.shape[3])
    return x.gather(1, index)


SHARING: dict[str, Callable[[Tensor, int], Tensor]] = {
    "repeat_interleave": lambda x, g: x.repeat_interleave(g, 1),
    "expand": lambda x, g: x[:, :, None].expand(-1, -1, g, -1, -1).reshape(
        x.shape[0], x.shape[1] * g, x.shape[2], x.shape[3]
    ),
    "repeat": lambda x, g: x.unsqueeze(2).repeat(1, 1, g, 1, 1).flatten(1, 2),
    "stack": lambda x, g: torch.stack([x] * g, 2).flatten(1, 2),
    "index": lambda x, g: x[:, torch.arange(x.shape[1] * g) // g],
    "gather": gathered,
}  # fmt: skip

# Scales: what happens to query, keys and scores; a learned one is a tensor

SCALES = ("query", "key", "score", "divided", "learned query", "learned score")


def scaled(x: Tensor, where: str, scale: str, learned: Tensor) -> Tensor:
    """Return a query, keys or scores, scaled if it is their turn."""
    if scale == where:
        return x * 0.25
    if scale == f"learned {where}":
        return x * learned.to(x.dtype)
    if scale == "divided" and where == "score":
        return x / math.sqrt(16)
    return x


# Masks and what else happens to scores


@dataclass(frozen=True)
class Scores:
    """What happens to scores: a name of `MASKS`, and what it needs.

    Attributes:
        kind: One of `MASKS`.
        softmax: One of `SOFTMAX`.
        rows, columns: Positions of queries, ``[T]``, and of keys, ``[S]``.
        slopes, sinks: Numbers of a head, ``[Hq]``.
    """

    kind: str
    softmax: str
    rows: Tensor
    columns: Tensor
    slopes: Tensor
    sinks: Tensor

    def chunk(self, first: int, last: int) -> "Scores":
        """Return what happens to those of some queries."""
        rest = self.columns, self.slopes, self.sinks
        return Scores(self.kind, self.softmax, self.rows[first:last], *rest)

    def seen(self) -> Tensor:
        """Return which keys a query sees, ``[T, S]``."""
        seen = self.columns <= self.rows[:, None]
        if self.kind == "window":
            seen = seen & (self.columns > self.rows[:, None] - WINDOW)
        return seen

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Return what is added to scores for their place, ``[Hq, T, S]``."""
        distance = self.columns - self.rows[:, None]
        return self.slopes[:, None, None].to(dtype) * distance.to(dtype)

    def weights(self, scores: Tensor, fit: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the weights of scores, to which ``fit`` shapes a tensor ``[Hq | 1, T | 1, S | 1]``."""
        dtype = scores.dtype
        if self.kind == "soft cap":
            scores = torch.tanh(scores / CAP) * CAP
        if self.kind == "alibi":
            scores = scores + fit(self.bias(dtype))
        if self.kind != "none":
            seen = fit(self.seen()[None])
            if self.kind == "additive":
                lowest = torch.finfo(dtype).min
                scores = scores + torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, lowest)
            elif self.kind == "where":
                scores = torch.where(seen, scores, -1e4)
            else:
                fill = -1e9 if self.kind == "-1e9" else -math.inf
                scores = scores.masked_fill(~seen, fill)
        if self.kind == "sinks":
            sinks = fit(self.sinks[:, None, None].to(dtype)).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks], -1)
        weights = SOFTMAX[self.softmax](scores)
        return weights[..., :-1] if self.kind == "sinks" else weights

    def for_sdpa(self, dtype: torch.dtype) -> Tensor | None:
        """Return the mask that SDPA is given."""
        if self.kind == "none":
            return None
        seen = self.seen()
        if self.kind in ("boolean", "window"):
            return seen[None, None]
        fill = {"-1e9": -1e9, "where": -1e4}.get(self.kind, torch.finfo(dtype).min)
        hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, fill)
        return (hidden + self.bias(dtype) if self.kind == "alibi" else hidden)[None]


MASKS = (*("none", "boolean", "additive", "where", "-1e9", "alibi", "window", "soft cap", "sinks"),)
BY_SDPA = MASKS[:7]
SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x.softmax(-1),
    "fp32": lambda x: torch.softmax(x, -1, dtype=torch.float32).to(x.dtype),
    "float": lambda x: x.float().softmax(-1).type_as(x),
    "minus the maximum": lambda x: (x - x.amax(-1, keepdim=True)).softmax(-1),
}

# Products: of a query [B, Hq, T, D] with keys and values [B, H, S, D]


@dataclass(frozen=True)
class How:
    """How the heads share keys, and scales.

    Attributes:
        groups: Query heads of a KV head.
        share: Gives each query head its keys.
        scale: Scales, as `scaled` does: what, and ``"query"``, ``"key"`` or ``"score"``.
    """

    groups: int
    share: Callable[[Tensor, int], Tensor]
    scale: Callable[[Tensor, str], Tensor]

    def scaled(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale(query, "query"), self.scale(keys, "key")

    def shared(self, *kept: Tensor) -> list[Tensor]:
        return [self.share(x, self.groups) for x in kept]


def is_first(query: Tensor, keys: Tensor, scores: Scores) -> bool:
    """Return whether nothing comes before a prompt, so that no mask need be made."""
    causal = scores.kind == "none" and keys.shape[2] == query.shape[2]
    return True if causal else False  # noqa: SIM210  (PyTorch takes no symbol for `is_causal`)


def by_sdpa(query, keys, values, scores, how):
    query, keys = how.scaled(query, keys)
    first = how.scale(torch.ones(()), "score")
    keys, values = how.shared(keys, values)
    mask, causal = scores.for_sdpa(query.dtype), is_first(query, keys, scores)
    return sdpa(query * first.to(query.dtype), keys, values, mask, scale=1.0, is_causal=causal)


def by_sdpa_of_groups(query, keys, values, scores, how):
    query, keys = how.scaled(query, keys)
    mask, causal = scores.for_sdpa(query.dtype), is_first(query, keys, scores)
    return sdpa(query, keys, values, mask, is_causal=causal, enable_gqa=True)


def by_matmul(query, keys, values, scores, how):
    query, keys = how.scaled(query, keys)
    keys, values = how.shared(keys, values)
    found = how.scale(query @ keys.transpose(-1, -2), "score")
    return scores.weights(found, lambda x: x) @ values


def by_mT(query, keys, values, scores, how):
    query, keys = how.scaled(query, keys)
    keys, values = how.shared(keys, values)
    found = how.scale(torch.matmul(query, keys.mT), "score")
    return torch.matmul(scores.weights(found, lambda x: x), values)


def by_bmm(query, keys, values, scores, how):
    query, keys = how.scaled(query, keys)
    keys, values = (x.flatten(0, 1) for x in how.shared(keys, values))
    found = how.scale(torch.bmm(query.flatten(0, 1), keys.transpose(1, 2)), "score")
    weights = scores.weights(found.unflatten(0, query.shape[:2]), lambda x: x)
    return torch.bmm(weights.flatten(0, 1), values).unflatten(0, query.shape[:2])


def by_baddbmm(query, keys, values, scores, how):
    query, keys = how.scaled(query, keys)
    keys, values = (x.flatten(0, 1) for x in how.shared(keys, values))
    bias = torch.zeros(1, 1, keys.shape[1], dtype=query.dtype)
    found = torch.baddbmm(bias, query.flatten(0, 1), keys.mT, beta=0.0, alpha=0.5)
    found = how.scale(found.view(*query.shape[:3], -1), "score")
    weights = scores.weights(found, lambda x: x)
    return torch.bmm(weights.flatten(0, 1), values).view(query.shape)


def by_einsum(query, keys, values, scores, how):
    query, keys = how.scaled(query, keys)
    keys, values = how.shared(keys, values)
    found = how.scale(torch.einsum("bhtd,bhsd->bhts", query, keys), "score")
    return torch.einsum("bhts,bhsd->bhtd", scores.weights(found, lambda x: x), values)


def of_groups(groups: int) -> Callable[[Tensor], Tensor]:
    """Return what shapes a tensor ``[Hq | 1, T, S]`` to scores ``[B, H, G, T, S]``."""
    return lambda x: x.unflatten(0, (-1, groups)) if x.shape[0] > 1 else x[None]


def by_einsum_of_groups(query, keys, values, scores, how):
    query, keys = how.scaled(query.unflatten(1, (-1, how.groups)), keys)
    found = how.scale(torch.einsum("bhgtd,bhsd->bhgts", query, keys), "score")
    weights = scores.weights(found, of_groups(how.groups))
    return torch.einsum("bhgts,bhsd->bhgtd", weights, values).flatten(1, 2)


def by_matmul_of_groups(query, keys, values, scores, how):
    query, keys = how.scaled(query.unflatten(1, (-1, how.groups)), keys)
    found = how.scale(query @ keys[:, :, None].mT, "score")
    return (scores.weights(found, of_groups(how.groups)) @ values.unsqueeze(2)).flatten(1, 2)


def by_folded_query(query, keys, values, scores, how):
    query, keys = how.scaled(query, keys)
    batch, heads, new, channels = query.shape
    rows = query.reshape(batch, heads // how.groups, how.groups * new, channels)
    found = how.scale(rows @ keys.mT, "score").unflatten(2, (how.groups, new))
    weights = scores.weights(found, of_groups(how.groups)).flatten(2, 3)
    return (weights @ values).reshape(batch, heads, new, channels)


def by_head(query, keys, values, scores, how):
    query, keys = how.scaled(query, keys)
    outputs = []
    for head in range(query.shape[1]):
        own = head // how.groups
        found = how.scale(query[:, head] @ keys[:, own].transpose(1, 2), "score")
        weights = scores.weights(found, lambda x, head=head: x[head if x.shape[0] > 1 else 0])
        outputs.append(weights @ values[:, own])
    return torch.stack(outputs, 1)


def by_kv_head(query, keys, values, scores, how):
    """Query heads of a KV head at once."""
    query, keys = how.scaled(query, keys)
    outputs = []
    for head, own in enumerate(query.split(how.groups, 1)):
        turn = slice(head * how.groups, (head + 1) * how.groups)
        found = how.scale(own @ keys[:, head : head + 1].mT, "score")
        weights = scores.weights(found, lambda x, turn=turn: x[turn] if x.shape[0] > 1 else x)
        outputs.append(weights @ values[:, head : head + 1])
    return torch.cat(outputs, 1)


ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    f.__name__.removeprefix("by_"): f
    for f in (
        *(by_sdpa, by_sdpa_of_groups, by_matmul, by_mT, by_bmm, by_baddbmm, by_einsum),
        *(by_einsum_of_groups, by_matmul_of_groups, by_folded_query, by_head, by_kv_head),
    )
}


def attend(
    attention: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Scores,
    how: How,
    chunks: int,
) -> Any:
    """Attend, with so many queries at a time."""
    compute = ATTENTIONS[attention]
    if query.shape[2] <= chunks:
        return compute(query, keys, values, scores, how)
    outputs = []
    for first in range(0, query.shape[2], chunks):
        last = min(first + chunks, query.shape[2])
        outputs.append(
            compute(query[:, :, first:last], keys, values, scores.chunk(first, last), how)
        )
    return torch.cat(outputs, 2)
