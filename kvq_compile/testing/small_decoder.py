"""A decoder small enough to be drawn: attention alone, with the caches that custom models write.

`testing.decoders` draws one; `Decoder.run` compiles it and hands out every attention of every call with
what `testing.assert_within_bound` and `testing.assert_matches_dequantized` want to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvq_compile.kernels.cache.tensor import Kind, QuantizedKV
from kvq_compile.options import make_spec


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
    ) -> None:
        super().__init__()
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
            for layer in range(layers):
                for name in ("keys", "values"):
                    empty = torch.zeros(
                        len(padding), kv, self.slots, head_dim, dtype=dtype, device="cpu"
                    )
                    self.register_buffer(f"{name}_{layer}", empty)

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
            if self.kind == "static":
                keys, values = getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}")
                keys[:, :, position] = k
                values[:, :, position] = v
            elif past is None:
                keys, values = k, v
            else:
                keys, values = torch.cat([past[layer][0], k], 2), torch.cat([past[layer][1], v], 2)
            output = nn.functional.scaled_dot_product_attention(
                q, keys, values, mask, enable_gqa=True
            )
            x = x + output.transpose(1, 2).flatten(2) @ getattr(self, f"merge_{layer}")
            present.append((keys, values))
            seen.append(
                (q, k.clone(), v.clone(), output)
            )  # the keys themselves come back quantized
        return x, present if self.kind == "grown" else None, seen

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
            pair = getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}")
        else:
            pair = past[layer] if past is not None else (None, None)
        if not all(isinstance(cache, QuantizedKV) for cache in pair):
            return None
        return pair[0].clone(), pair[1].clone()
