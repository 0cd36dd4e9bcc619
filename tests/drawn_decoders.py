"""Whole decoders, drawn: what each keeps, how it attends, in which mode it runs; and what it is fed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from drawn_attention import (
    ATTENTIONS,
    BY_SDPA,
    MASKS,
    ROTATIONS,
    SCALES,
    SHARING,
    SOFTMAX,
    How,
    Scores,
    attend,
    scaled,
)  # fmt: skip
from drawn_caches import (
    CONTAINERS,
    FUNCTIONAL,
    GROWING,
    IN_PLACE,
    KEEP,
    LAYOUTS,
    SHOW,
    SLOTS,
    WRITES,
    shape_of_kept,
)  # fmt: skip
from kvq_compile import QuantizedKV
from kvq_compile.kernels.cache.arranged import ArrangedKV

H, G, D, WIDTH = 2, 2, 16, 32
# A page is packed at 37 tokens.
OPTIONS = {"method": "int8", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"}
MODES = ("no_grad", "inference_mode", "autocast", "bf16")
ENDINGS = ("none", "none", "none", "again", "again, emptied", "another batch")


@dataclass(frozen=True)
class Drawn:
    """What is drawn of a decoder: names of the functions that make it, and sizes.

    ``spare``: sequences that its tensors have room for besides those of a call.
    """

    layout: str
    write: str
    container: str
    attention: str
    sharing: str
    scale: str
    softmax: str
    rotation: str
    mask: str
    mode: str
    dynamic: bool | None
    layers: int
    batch: int
    prompt: tuple[int, ...]
    steps: tuple[int, ...]
    chunk: int
    sliced: bool
    ending: str
    spare: int = 0

    @property
    def grows(self) -> bool:
        return self.write in GROWING

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.mode == "bf16" else torch.float32

    @property
    def kept_dtype(self) -> torch.dtype:
        return torch.float32 if self.mode in ("no_grad", "inference_mode") else torch.bfloat16

    @property
    def kept(self) -> int:
        """How many tensors it keeps."""
        layout = LAYOUTS[self.layout]
        return 1 if layout.joined == "layers" else layout.tensors * self.layers


class Decoder(nn.Module):
    """A decoder, attention alone. What it keeps is held by a container, which a call takes and returns.

    Attributes:
        drawn: What it is made of.
        seen: Where a list, query, keys and values of each attention are left there.
    """

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.drawn, self.seen = drawn, None
        self.layout, self.container = LAYOUTS[drawn.layout], CONTAINERS[drawn.container]
        generator = torch.Generator().manual_seed(0)
        sizes = [(WIDTH, (H * G + 2 * H) * D), (H * G * D, WIDTH)]
        for layer in range(drawn.layers):
            for name, (rows, columns) in zip(("project", "merge"), sizes, strict=True):
                weight = torch.randn(rows, columns, generator=generator) * rows**-0.5
                self.register_buffer(f"{name}_{layer}", weight.to(drawn.dtype))
        self.scale = nn.Parameter(torch.full((), 0.3, dtype=drawn.dtype))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, H * G + 1).to(drawn.dtype))
        self.register_buffer("sinks", torch.linspace(-1, 2, H * G).to(drawn.dtype))

    def forward(self, x: Tensor, position: Tensor, first: int, *held: Any) -> tuple[Tensor, Any]:
        drawn = self.drawn
        kept = held if drawn.container == "arguments" else held[0]
        pieces: list[Sequence[Tensor]] = []
        for layer in range(drawn.layers):
            split = (x @ getattr(self, f"project_{layer}")).unflatten(-1, (-1, D)).transpose(1, 2)
            query, key, value = split.split((H * G, H, H), 1)
            rotate = ROTATIONS[drawn.rotation]
            query, key = rotate(query, position), rotate(key, position)
            kept, pair = self.update(kept, layer, (key, value), position, first)
            pieces.append(pair)
            output = self.attend(query, pair, position, first + x.shape[1])
            output = output.transpose(1, 2).flatten(2)
            x = x + output @ getattr(self, f"merge_{layer}")
        if self.layout.joined == "layers" and drawn.write not in IN_PLACE:
            whole = torch.stack([torch.stack(list(pair)) for pair in pieces])
            kept = self.container.store(kept, 0, whole, self)
        return x, kept

    def update(
        self, kept: Any, layer: int, new: Sequence[Tensor], position: Tensor, first: int
    ) -> tuple[Any, Sequence[Tensor]]:
        """Return what is kept once tokens are written, and the keys and values of the layer, as they are laid out."""
        layout, container = self.layout, self.container
        new = [KEEP[layout.axes(number)](x) for number, x in enumerate(new)]
        lead = {"layers": 2, "stack": 1, "apart": 1}.get(layout.joined, 0)
        if layout.joined == "layers":
            whole = self.taken(container.read(kept, 0, self), 0, new[0], lead)
            pair = (None, None) if whole is None else (whole[layer, 0], whole[layer, 1])
            return kept, [
                self.write(*of, position, first) for of in zip(pair, (0, 1), new, strict=True)
            ]
        if layout.joined:
            held = self.taken(container.read(kept, layer, self), 0, new[0], lead)
            if layout.joined == "apart" and self.drawn.write in IN_PLACE:
                for number, x in enumerate(new):
                    self.write(held[number], number, x, position, first)
            else:
                held = self.write(held, 0, layout.join(new), position, first, lead)
                if not self.drawn.spare:
                    kept = container.store(kept, layer, held, self)
            return kept, layout.part(held)
        pair = []
        for number, x in enumerate(new):
            held = self.taken(container.read(kept, 2 * layer + number, self), number, x)
            held = self.write(held, number, x, position, first)
            if self.drawn.write not in IN_PLACE:
                kept = container.store(kept, 2 * layer + number, held, self)
            pair.append(held)
        return kept, pair

    def taken(self, held: Any, number: int, new: Tensor, lead: int = 0) -> Any:
        """Return those rows of a tensor that a call has tokens for."""
        if not self.drawn.spare:
            return held
        axes = self.layout.axes(number)
        batch = axes.index("F" if "F" in axes else "B")
        return held.narrow(batch + lead, 0, new.shape[batch])

    def write(
        self, held: Any, number: int, new: Tensor, position: Tensor, first: int, lead: int = 0
    ) -> Tensor:
        """Return a tensor with tokens of keys (0) or values (1) written."""
        if held is None:
            return new.contiguous()
        axis = self.layout.axis(number) + lead
        written = WRITES[self.drawn.write](held, axis, position, first, new)
        return held if self.drawn.write in IN_PLACE else written

    def attend(self, query: Tensor, pair: Sequence[Tensor], position: Tensor, end: int) -> Tensor:
        drawn, shown = self.drawn, []
        for number, x in enumerate(pair):
            if drawn.sliced and not drawn.grows:
                x = x.narrow(self.layout.axis(number), 0, end)
            shown.append(SHOW[self.layout.axes(number)](x, H))
        if self.seen is not None:
            self.seen.append((query, *shown))
        columns = torch.arange(shown[0].shape[2])
        about = drawn.mask, drawn.softmax, position, columns, self.slopes, self.sinks
        how = How(G, SHARING[drawn.sharing], lambda x, at: scaled(x, at, drawn.scale, self.scale))
        return attend(drawn.attention, query, *shown, Scores(*about), how, drawn.chunk)

    def start(self, batch: int) -> Any:
        """Return a container of empty caches."""
        return self.hold([self.empty(number, batch) for number in range(self.drawn.kept)])

    def empty(self, number: int, batch: int) -> Tensor | None:
        drawn, layout = self.drawn, self.layout
        is_module = "uffer" in drawn.container
        if drawn.grows and not is_module:
            return None
        sizes = {"B": batch + drawn.spare, "H": H, "S": 0 if drawn.grows else SLOTS, "D": D}
        shape = shape_of_kept(layout, number % 2 * (layout.tensors == 2), sizes, drawn.layers)
        return torch.zeros(shape, dtype=drawn.kept_dtype)

    def axis(self, place: int) -> int:
        """Return the axis of tokens of a tensor that is kept."""
        lead = {"layers": 2, "stack": 1, "apart": 1}.get(self.layout.joined, 0)
        return self.layout.axis(place % self.layout.tensors) + lead

    def hold(self, tensors: Sequence[Any]) -> Any:
        return self.container.make(list(tensors), self)

    def held(self, kept: Any) -> list[Any]:
        return self.container.tensors(kept, self.drawn.kept, self)


def dense(x: Any) -> Any:
    """Return what a cache stands for, in memory of its own."""
    if isinstance(x, (QuantizedKV, ArrangedKV)):
        return x.dequantize()
    return None if x is None else x.clone()


@dataclass(frozen=True)
class Call:
    """What a call is given and returns.

    Attributes:
        run: The decoder, compiled or not.
        x, first: Hidden states, and the first position.
    """

    x: Tensor
    first: int
    fresh: bool = False
    emptied: bool = False


def calls(drawn: Drawn) -> Iterator[Call]:
    """Yield what a decoder is fed; ``fresh`` calls begin with caches of their own."""
    generator = torch.Generator().manual_seed(1)

    def some(batch: int, counts: Sequence[int], **about: bool) -> Iterator[Call]:
        first = 0
        for count in counts:
            x = torch.randn(batch, count, WIDTH, generator=generator)
            yield Call(x.to(drawn.dtype), first, **(about if first == 0 else {}))
            first += count

    yield from some(drawn.batch, (*drawn.prompt, *drawn.steps), fresh=True)
    if drawn.ending == "again":
        yield from some(drawn.batch, (39, 1), fresh=drawn.grows)
    elif drawn.ending == "again, emptied":
        yield from some(drawn.batch, (39, 1), fresh=drawn.grows, emptied=True)
    elif drawn.ending == "another batch":
        yield from some(drawn.batch + 1, (39, 1), fresh=True)


def drawn_by(choose: Callable[[Sequence[Any]], Any]) -> Drawn:
    """Return a decoder, each part of it chosen from all that fit the parts before."""

    def of(names: Any) -> Any:
        return choose(tuple(names))

    layout, attention = of(LAYOUTS), of(ATTENTIONS)
    mask = of(BY_SDPA if "sdpa" in attention else MASKS)
    write = of(of((GROWING, IN_PLACE, IN_PLACE, FUNCTIONAL)))
    return Drawn(
        layout=layout,
        write=write,
        container=of(CONTAINERS),
        attention=attention,
        sharing=of(SHARING),
        scale=of(SCALES),
        softmax=of(SOFTMAX),
        rotation=of(ROTATIONS),
        mask=mask,
        mode=of(MODES),
        dynamic=of((None, True)),
        layers=2 if LAYOUTS[layout].joined == "layers" else of((1, 1, 2)),
        batch=of((1, 2)),
        prompt=of(((40,), (40,), (40,), (24, 17), (2, 38))),
        steps=of(((1, 1), (1, 3))),
        chunk=of((99, 99, 99, 16)),
        sliced=mask == "none" or of((False, True)),
        ending=of(ENDINGS),
        spare=of((0, 0, 0, 2)) if write in IN_PLACE else 0,
    )


PLAIN = Drawn(
    layout="[B, H, S, D]",
    write="cat",
    container="tuple",
    attention="sdpa_of_groups",
    sharing="expand",
    scale="query",
    softmax="plain",
    rotation="half",
    mask="boolean",
    mode="no_grad",
    dynamic=None,
    layers=1,
    batch=2,
    prompt=(40,),
    steps=(1, 3),
    chunk=99,
    sliced=False,
    ending="none",
)


AXES = tuple(
    field.name for field in fields(Drawn) if field.name not in ("layers", "batch", "spare")
)


def ordinary_but_for(number: int, parts: int = 4) -> Drawn:
    """Return a decoder that is `PLAIN` but for some of its parts, which a number chooses."""
    random = Random(number)
    drawn = drawn_by(random.choice)
    chosen = {name: getattr(drawn, name) for name in random.sample(AXES, parts)}
    made = replace(PLAIN, **chosen)
    if made.mask not in BY_SDPA and "sdpa" in made.attention:
        made = replace(made, attention="matmul")
    layers = 2 if LAYOUTS[made.layout].joined == "layers" else 1
    return replace(made, layers=layers, sliced=made.sliced or made.mask == "none")


def covering(count: int) -> list[int]:
    """Return numbers below ``count`` whose decoders have every kind of every part that any of these has."""
    kinds = {
        number: {(name, getattr(ordinary_but_for(number), name)) for name in AXES}
        for number in range(count)
    }
    left, chosen = set().union(*kinds.values()), []
    while left:
        chosen.append(max(kinds, key=lambda number: len(kinds[number] & left)))
        left -= kinds[chosen[-1]]
    return sorted(chosen)


def decoders() -> st.SearchStrategy[Drawn]:
    """Draw a decoder: by a number, so that one example is as unlike the next as any other."""
    return st.integers(0, 2**32).map(lambda seed: drawn_by(Random(seed).choice))


def modes(drawn: Drawn) -> ExitStack:
    """Return the modes of PyTorch that a decoder runs in."""
    stack = ExitStack()
    stack.enter_context(
        torch.inference_mode() if drawn.mode == "inference_mode" else torch.no_grad()
    )
    if drawn.mode == "autocast":
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
    return stack


def compiled(decoder: Decoder, backend: Any, **options: Any) -> Callable[..., Any]:
    return torch.compile(
        decoder.forward, backend=backend, dynamic=decoder.drawn.dynamic, fullgraph=True, **options
    )


def run(
    call: Callable[..., Any], decoder: Decoder, x: Tensor, first: int, kept: Any
) -> tuple[Tensor, Any]:
    position = torch.arange(first, first + x.shape[1])
    held = kept if decoder.drawn.container == "arguments" else (kept,)
    return call(x, position, first, *held)


def exact(decoder: Decoder) -> Decoder:
    """Return a decoder that computes in fp64."""
    twin = deepcopy(decoder).double()
    twin.seen = []
    return twin
