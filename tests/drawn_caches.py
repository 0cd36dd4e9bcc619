"""How hand-written decoders keep keys and values: in which layout, written in which way, held in what.

Each is a small function of its own, so that any of them makes a program with any of the others.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

SLOTS = 64
Write = Callable[
    [Tensor, int, Tensor, int, Tensor], Any
]  # cache, axis, positions, the first, tokens

# Layouts


@dataclass(frozen=True)
class Layout:
    """Where the axes of keys and values lie in the tensors that a decoder keeps.

    Attributes:
        keys, values: The axes of one tensor: ``B``, ``H``, ``S``, ``D``; ``F`` for batch and heads in one, ``E`` for
            heads and channels in one.
        joined: What one tensor holds: ``""``: keys or values; ``"stack"``: both, along a first axis; ``"apart"``: the
            same, written one after the other; ``"last"``: both, along the channels; ``"layers"``: those of all layers.
    """

    keys: str
    values: str = ""
    joined: str = ""

    def axes(self, number: int) -> str:
        return self.values if number and self.values else self.keys

    def axis(self, number: int) -> int:
        """Return the axis of tokens of keys (0) or values (1)."""
        return self.axes(number).index("S")

    @property
    def tensors(self) -> int:
        """How many tensors a layer has."""
        return 1 if self.joined else 2

    def join(self, pair: Sequence[Tensor]) -> Tensor:
        if self.joined == "last":
            return torch.cat(list(pair), -1)
        return torch.stack(list(pair))

    def part(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a tensor that holds both."""
        if self.joined == "last":
            size = kept.shape[-1] // 2
            return kept[..., :size], kept[..., size:]
        return kept[0], kept[1]


LAYOUTS = {
    "[B, H, S, D]": Layout("BHSD"),
    "[B, S, H, D]": Layout("BSHD"),
    "[S, B, H, D]": Layout("SBHD"),
    "[B, H, D, S] keys": Layout("BHDS", "BHSD"),
    "[B*H, S, D]": Layout("FSD"),
    "[B*H, D, S] keys": Layout("FDS", "FSD"),
    "[B, S, H*D]": Layout("BSE"),
    "[2, B, H, S, D]": Layout("BHSD", joined="stack"),
    "[2, B, S, H, D] by halves": Layout("BSHD", joined="apart"),
    "[B, H, S, 2*D]": Layout("BHSD", joined="last"),
    "[B, S, H, 2*D]": Layout("BSHD", joined="last"),
    "[L, 2, B, H, S, D]": Layout("BHSD", joined="layers"),
    "[L, 2, B, S, H, D]": Layout("BSHD", joined="layers"),
}
KEEP: dict[str, Callable[[Tensor], Tensor]] = {  # from [B, H, T, D]
    "BHSD": lambda x: x,
    "BSHD": lambda x: x.transpose(1, 2),
    "SBHD": lambda x: x.permute(2, 0, 1, 3),
    "BHDS": lambda x: x.mT,
    "FSD": lambda x: x.reshape(-1, x.shape[2], x.shape[3]),
    "FDS": lambda x: x.mT.reshape(-1, x.shape[3], x.shape[2]),
    "BSE": lambda x: x.transpose(1, 2).flatten(2),
}
SHOW: dict[str, Callable[[Tensor, int], Tensor]] = {  # to [B, H, S, D], of so many heads
    "BHSD": lambda x, heads: x,
    "BSHD": lambda x, heads: x.transpose(1, 2),
    "SBHD": lambda x, heads: x.permute(1, 2, 0, 3),
    "BHDS": lambda x, heads: x.transpose(-1, -2),
    "FSD": lambda x, heads: x.view(-1, heads, x.shape[1], x.shape[2]),
    "FDS": lambda x, heads: x.mT.unflatten(0, (-1, heads)),
    "BSE": lambda x, heads: x.unflatten(2, (heads, -1)).transpose(1, 2),
}

# Writes


def at(axis: int, part: Any) -> tuple[Any, ...]:
    return (slice(None),) * axis + (part,)


def along(axis: int, x: Tensor, like: Tensor) -> Tensor:
    """Return a vector as a tensor that broadcasts along an axis."""
    return x.view([-1 if dim == axis else 1 for dim in range(like.dim())])


def assign(cache, axis, position, first, new):
    cache[at(axis, position)] = new


def assign_slice(cache, axis, position, first, new):
    cache[at(axis, slice(first, first + new.shape[axis]))] = new


def copy_into_slice(cache, axis, position, first, new):
    cache[at(axis, slice(first, first + new.shape[axis]))].copy_(new)


def copy_into_narrow(cache, axis, position, first, new):
    cache.narrow(axis, first, new.shape[axis]).copy_(new)


def index_copy_in_place(cache, axis, position, first, new):
    cache.index_copy_(axis, position, new)


def scatter_in_place(cache, axis, position, first, new):
    cache.scatter_(axis, along(axis, position, new).expand_as(new), new)


def places(cache, axis, position):
    """Return indices of all axes up to that of tokens."""
    sizes = [*cache.shape[:axis], position.shape[0]]
    indices = (*(torch.arange(n) for n in cache.shape[:axis]), position)
    return tuple(
        index.view([-1 if dim == place else 1 for dim in range(len(sizes))])
        for place, index in enumerate(indices)
    )


def index_put_in_place(cache, axis, position, first, new):
    cache.index_put_(places(cache, axis, position), new)


def spread(cache, axis, position, new):
    """Return where tokens go, 1 or 0, and the tokens in these places."""
    hot = one_hot(position, SLOTS).to(new.dtype)
    shape = [1] * (new.dim() + 1)
    shape[axis], shape[axis + 1] = new.shape[axis], SLOTS
    return along(axis, hot.sum(0), cache), (new.unsqueeze(axis + 1) * hot.view(shape)).sum(axis)


def one_hot_in_place(cache, axis, position, first, new):
    hot, tokens = spread(cache, axis, position, new)
    cache.mul_(1 - hot)
    cache.add_(tokens)


def where_in_place(cache, axis, position, first, new):
    hot, tokens = spread(cache, axis, position, new)
    cache.copy_(torch.where(hot > 0, tokens, cache))


def inside(cache, axis, first, new):
    slots = torch.arange(SLOTS)
    own = (slots >= first) & (slots < first + new.shape[axis])
    return along(axis, own, cache).expand(cache.shape)


def masked_scatter_in_place(cache, axis, position, first, new):
    cache.masked_scatter_(inside(cache, axis, first, new), new)


def index_copy(cache, axis, position, first, new):
    return cache.index_copy(axis, position, new)


def scatter(cache, axis, position, first, new):
    return cache.scatter(axis, along(axis, position, new).expand_as(new), new)


def index_put(cache, axis, position, first, new):
    return torch.index_put(cache, places(cache, axis, position), new)


def one_hot_sum(cache, axis, position, first, new):
    hot, tokens = spread(cache, axis, position, new)
    return cache * (1 - hot) + tokens


def where(cache, axis, position, first, new):
    hot, tokens = spread(cache, axis, position, new)
    return torch.where(hot > 0, tokens, cache)


def masked_scatter(cache, axis, position, first, new):
    return cache.masked_scatter(inside(cache, axis, first, new), new)


def slice_scatter(cache, axis, position, first, new):
    return torch.slice_scatter(cache, new, axis, first, first + new.shape[axis])


def joined_around(cache, axis, position, first, new):
    before, behind = (
        cache.narrow(axis, 0, first),
        cache[at(axis, slice(first + new.shape[axis], None))],
    )
    return torch.cat([before, new, behind], axis)


def cat(cache, axis, position, first, new):
    return torch.cat([cache, new], axis)


def padded(cache, axis, position, first, new):
    longer = pad(cache, [0, 0] * (cache.dim() - 1 - axis) + [0, new.shape[axis]])
    longer[at(axis, slice(cache.shape[axis], None))] = new
    return longer


def filled(cache, axis, position, first, new):
    sizes = list(cache.shape)
    sizes[axis] += new.shape[axis]
    longer = cache.new_empty(sizes)
    longer[at(axis, slice(0, cache.shape[axis]))] = cache
    longer.narrow(axis, cache.shape[axis], new.shape[axis]).copy_(new)
    return longer


GROWING: dict[str, Write] = {f.__name__: f for f in (cat, padded, filled)}
IN_PLACE: dict[str, Write] = {
    f.__name__: f
    for f in (
        *(assign, assign_slice, copy_into_slice, copy_into_narrow, index_copy_in_place),
        *(scatter_in_place, index_put_in_place, one_hot_in_place, where_in_place),
        masked_scatter_in_place,
    )
}
FUNCTIONAL: dict[str, Write] = {
    f.__name__: f
    for f in (
        *(index_copy, scatter, index_put, one_hot_sum, where, masked_scatter, slice_scatter),
        joined_around,
    )
}
WRITES = GROWING | IN_PLACE | FUNCTIONAL

# Containers


class Container:
    """Holds tensors, or ``None`` where there are none yet; passed to each call and returned by it."""

    def make(self, tensors: list[Any], model: nn.Module) -> Any:
        raise NotImplementedError

    def read(self, held: Any, number: int, model: nn.Module) -> Any:
        return held[number]

    def store(self, held: Any, number: int, tensor: Tensor, model: nn.Module) -> Any:
        held[number] = tensor
        return held

    def tensors(self, held: Any, count: int, model: nn.Module) -> list[Any]:
        return [self.read(held, number, model) for number in range(count)]


class InTuple(Container):
    """Also how arguments come, which are a tuple of their own."""

    def make(self, tensors, model):
        return tuple(tensors)

    def store(self, held, number, tensor, model):
        return (*held[:number], tensor, *held[number + 1 :])


class InList(Container):
    def make(self, tensors, model):
        return list(tensors)


class InDict(Container):
    def make(self, tensors, model):
        return {f"layer {number}": x for number, x in enumerate(tensors)}

    def read(self, held, number, model):
        return held[f"layer {number}"]

    def store(self, held, number, tensor, model):
        held[f"layer {number}"] = tensor
        return held


@dataclass
class Kept:
    even: list[Any] = field(default_factory=list)
    odd: list[Any] = field(default_factory=list)


class InDataclass(Container):
    def make(self, tensors, model):
        return Kept(tensors[::2], tensors[1::2])

    def read(self, held, number, model):
        return (held.odd if number % 2 else held.even)[number // 2]

    def store(self, held, number, tensor, model):
        (held.odd if number % 2 else held.even)[number // 2] = tensor
        return held


class InBuffers(Container):
    def make(self, tensors, model):
        for number, x in enumerate(tensors):
            model.register_buffer(f"kept_{number}", x, persistent=False)

    def read(self, held, number, model):
        return getattr(model, f"kept_{number}")

    def store(self, held, number, tensor, model):
        setattr(model, f"kept_{number}", tensor)


class InNewBuffers(InBuffers):
    def make(self, tensors, model):
        for number, x in enumerate(tensors):
            setattr(model, f"kept_{number}", None if x is None else nn.Buffer(x, persistent=False))


CONTAINERS: dict[str, Container] = {
    "arguments": InTuple(),
    "tuple": InTuple(),
    "list": InList(),
    "dict": InDict(),
    "dataclass": InDataclass(),
    "buffers": InBuffers(),
    "nn.Buffer": InNewBuffers(),
}


def shape_of_kept(layout: Layout, number: int, sizes: dict[str, int], layers: int) -> list[int]:
    """Return the shape of the tensor that keeps keys (0) or values (1), or both."""
    of = {"F": math.prod(sizes[x] for x in "BH"), "E": math.prod(sizes[x] for x in "HD")} | sizes
    shape = [of[name] for name in layout.axes(number)]
    if layout.joined == "last":
        shape[-1] *= 2
    lead = {"stack": [2], "apart": [2], "layers": [layers, 2]}.get(layout.joined, [])
    return [*lead, *shape]
