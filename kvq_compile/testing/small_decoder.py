"""A decoder small enough to be drawn: attention alone, with the caches that custom models write.

`testing.decoders` draws one; `Decoder.run` compiles it and hands out every attention of every call with
what `testing.assert_within_bound` and `testing.assert_matches_dequantized` want to know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.arrangement import FOLDED, PIECE, Arrangement
from kvq_compile.kernels.cache.tensor import Kind, QuantizedKV
from kvq_compile.options import make_spec

# Axes of what a model keeps, as `Arrangement` names them: in any order, heads folded into the batch or beside their
# channels, keys and values in one tensor, along an axis of their own or along that of the channels.
LAYOUTS = (
    *("BHSD", "BSHD", "SBHD", "BHDS", "FSD", "BS(HD)"),
    *("PBHSD", "BPHSD", "BSPHD", "BHS(PD)"),
)


@dataclass(frozen=True)
class Call:
    """What one attention of one call of a `Decoder` saw and returned.

    Attributes:
        query, key, value: ``[B, Hq, T, D]`` and, of the call's own tokens, ``[B, Hkv, T, D]``.
        output: ``[B, Hq, T, D]``.
        mask: What it was given.
        caches: Its keys and values before the call; ``None`` if there were none.
        history: All exact tokens up to and with this call, ``[B, Hkv, S, D]`` each.
        held: Tokens in the cache before the call.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    mask: Tensor | None
    caches: tuple[QuantizedKV, QuantizedKV] | None
    history: tuple[Tensor, Tensor]
    held: int


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


class Decoder(nn.Module):
    """A small decoder, attention alone, that keeps its cache as custom models do, and what to feed it.

    Attributes:
        kind: ``"grown"``: a tuple of keys and values for each layer, grown by ``torch.cat``.
            ``"static"``: module buffers, written at positions.
        options: Options of the backend.
        chunks: Tokens of each call; the first is the prompt.
        spec: What ``options`` ask for.
        layout: One of `LAYOUTS`.
        spelling: One of `SPELLINGS`: how attention is written.
        write: One of `WRITES`: how a static cache is written.
    """

    def __init__(
        self,
        layers: int,
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        kind: Kind,
        chunks: tuple[int, ...],
        padding: tuple[int, ...],
        mask_kind: str,
        options: dict[str, Any],
        seed: int,
        layout: str = "BHSD",
        spelling: str = "sdpa",
        write: str = "assigned",
    ) -> None:
        super().__init__()
        pieces = (2,) if PIECE in layout else ()
        shared = FOLDED in layout or "(HD)" in layout
        self.arrangement = Arrangement(layout, pieces, heads[1] if shared else 0)
        self.layout, self.spelling, self.write = layout, spelling, write
        self.heads, self.head_dim, self.dtype, self.kind = heads, head_dim, dtype, kind
        self.chunks, self.padding, self.mask_kind = chunks, padding, mask_kind
        self.layers, self.slots = layers, sum(chunks) + 3
        self.options, self.spec, self.width = options, make_spec(**options), 32
        generator = torch.Generator().manual_seed(seed)
        query, kv = heads
        sizes = [(self.width, (query + 2 * kv) * head_dim), (query * head_dim, self.width)]
        for layer in range(layers):
            for name, (rows, columns) in zip(("project", "merge"), sizes, strict=True):
                weight = _normal(generator, rows, columns) * rows**-0.5
                self.register_buffer(f"{name}_{layer}", weight.to(dtype))
        self.inputs = _normal(generator, len(padding), sum(chunks), self.width).to(dtype)
        if kind == "static":
            shape = self.arrangement.shape((len(padding), kv, self.slots, head_dim))
            for layer in range(layers):
                for number in range(1 if pieces else 2):
                    empty = torch.zeros(shape, dtype=dtype, device="cpu")
                    self.register_buffer(f"cache_{layer}_{number}", empty)

    def __repr__(self) -> str:
        names = (
            "layers",
            "heads",
            "head_dim",
            "dtype",
            "kind",
            "chunks",
            "padding",
            "mask_kind",
            "options",
            "layout",
            "spelling",
            "write",
        )
        return f"Decoder({', '.join(f'{name}={getattr(self, name)}' for name in names)})"

    def forward(self, x: Tensor, mask: Tensor | None, position: Tensor, past: Any) -> Any:
        """Return new hidden states, the caches, and query, key, value and output of each attention."""
        present, seen = [], []
        for layer in range(self.layers):
            query, kv = self.heads
            split = (
                (x @ getattr(self, f"project_{layer}"))
                .unflatten(-1, (-1, self.head_dim))
                .transpose(1, 2)
            )
            q, k, v = split.split((query, kv, kv), 1)
            held = self._update(layer, self._laid_out(k, v), position, past)
            keys, values = self._apart(held)
            output = SPELLINGS[self.spelling](q, keys, values, mask)
            x = x + output.transpose(1, 2).flatten(2) @ getattr(self, f"merge_{layer}")
            present.append(held)
            # What is attended to and returned, or a copy of it, comes back quantized.
            seen.append((q + 0, k + 0, v + 0, output))
        return x, present if self.kind == "grown" else None, seen

    def _laid_out(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Return keys and values as the decoder keeps them."""
        join = self.arrangement.join
        return (join([k, v]),) if self.arrangement.sizes else (join([k]), join([v]))

    def _apart(self, held: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return the keys and values ``[B, H, S, D]`` of what the decoder keeps."""
        keys, values = [x for tensor in held for x in self.arrangement.split(tensor)]
        return keys, values

    def _update(
        self, layer: int, new: tuple[Tensor, ...], position: Tensor, past: Any
    ) -> tuple[Tensor, ...]:
        """Return what is kept of a layer, the tokens of this call included."""
        axis = self.arrangement.axis("S")
        if self.kind == "grown":
            pairs = () if past is None else zip(past[layer], new, strict=True)
            return tuple(torch.cat(pair, axis) for pair in pairs) or new
        held = tuple(getattr(self, f"cache_{layer}_{number}") for number in range(len(new)))
        for tensor, tokens in zip(held, new, strict=True):
            WRITES[self.write](tensor, axis, position, tokens)
        return held

    def mask(self, start: int, tokens: int) -> Tensor | None:
        """Return the mask of one call: causal, sequences padded on the left, own slot always seen."""
        if self.mask_kind == "none":
            return None
        slots = self.slots if self.kind == "static" else start + tokens
        column = torch.arange(slots, dtype=torch.int64, device="cpu")
        row = torch.arange(start, start + tokens, dtype=torch.int64, device="cpu")[:, None]
        padding = torch.tensor(self.padding, dtype=torch.int64, device="cpu")[:, None, None, None]
        seen = (column <= row) & (column >= padding) | (column == row)
        if self.mask_kind == "bool":
            return seen
        hidden = torch.zeros(seen.shape, dtype=self.dtype, device="cpu")
        return hidden.masked_fill(~seen, torch.finfo(self.dtype).min)

    def run(self, **options: Any) -> Iterator[Call]:
        """Compile the decoder and yield every attention of every call."""
        compiled = torch.compile(
            self.forward, backend="kvq", options={"strict": True, **self.options, **options}
        )
        past: Any = None
        history: list[list[Tensor]] = [[] for _ in range(self.layers)]
        start = 0
        for tokens in self.chunks:
            mask = self.mask(start, tokens)
            position = torch.arange(start, start + tokens, dtype=torch.int64, device="cpu")
            caches = [self._caches(layer, past) for layer in range(self.layers)]
            with torch.no_grad():
                _, past, seen = compiled(
                    self.inputs[:, start : start + tokens], mask, position, past
                )
            for layer, (q, k, v, output) in enumerate(seen):
                pairs = zip(history[layer], (k, v), strict=True)
                history[layer] = [torch.cat(pair, 2) for pair in pairs] if start else [k, v]
                before = history[layer][0], history[layer][1]
                yield Call(q, k, v, output, mask, caches[layer], before, start)
            start += tokens

    def _caches(self, layer: int, past: Any) -> tuple[QuantizedKV, QuantizedKV] | None:
        if self.kind == "static":
            numbers = range(1 if self.arrangement.sizes else 2)
            held = [getattr(self, f"cache_{layer}_{number}") for number in numbers]
        else:
            held = [] if past is None else list(past[layer])
        caches = [
            x.clone_packed()
            for tensor in held
            for x in _inside(tensor)
            if isinstance(x, QuantizedKV)
        ]
        return (caches[0], caches[1]) if len(caches) == 2 else None


def _inside(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the caches of what a decoder keeps; an ordinary tensor itself."""
    return tensor.caches if isinstance(tensor, ArrangedKV) else (tensor,)


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _products(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    times = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(times, 1) for x in (keys, values))
    scores = _masked(query @ keys.transpose(-1, -2) * query.shape[3] ** -0.5, mask)
    return scores.float().softmax(-1).to(query.dtype) @ values


def _einsum(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    times = query.shape[1] // keys.shape[1]
    keys, values = (x.transpose(1, 2).repeat_interleave(times, 2) for x in (keys, values))
    scores = torch.einsum("bhtd,bshd->bhts", query * query.shape[3] ** -0.5, keys)
    weights = _masked(scores, mask).float().softmax(-1).to(query.dtype)
    return torch.einsum("bhts,bshd->bhtd", weights, values)


SPELLINGS = {"sdpa": _sdpa, "products": _products, "einsum": _einsum}


def _assign(cache: Tensor, axis: int, position: Tensor, tokens: Tensor) -> None:
    cache[(slice(None),) * axis + (position,)] = tokens


def _index_copy(cache: Tensor, axis: int, position: Tensor, tokens: Tensor) -> None:
    cache.index_copy_(axis, position, tokens)


def _scatter(cache: Tensor, axis: int, position: Tensor, tokens: Tensor) -> None:
    shape = [-1 if dim == axis else 1 for dim in range(cache.dim())]
    cache.scatter_(axis, position.view(shape).expand_as(tokens), tokens)


WRITES = {"assigned": _assign, "index_copy_": _index_copy, "scatter_": _scatter}
