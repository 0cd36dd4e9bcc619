"""Steps of hand-written decoders, fed with tokens: plain and compiled they must give the same numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import QuantizedKV
from kvq_compile.history import watching
from kvq_compile.kernels.cache.arranged import ArrangedKV

# All tokens lie in the exact window, so that any slip of an axis or a slot shows at full size.
EXACT = {"method": "int8", "sinks": 1, "window": 256, "page_size": 32, "inner": "eager"}
B, H, G, D, SLOTS = 2, 3, 2, 16, 64
Caches = list[Tensor]
Step = Callable[..., tuple[Tensor, Caches]]


def tokens(count: int, heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + count)
    return torch.randn(B, count, heads * D, generator=generator)


def with_heads(step: Step) -> Step:
    """Return a step that takes tokens ``[B, T, H * D]``, as a projection gives them."""

    def call(query, key, value, *rest):
        return step(*(x.unflatten(2, (-1, D)) for x in (query, key, value)), *rest)

    return call


def feed(
    step: Step, held: Caches | None, lengths: Sequence[int] = (40, 1, 1, 3), first: int = 0
) -> tuple[list[Tensor], Caches]:
    """Feed tokens ``[B, T, H * D]``, their positions and a mask to a step that returns its output and its caches."""
    outputs, is_static = [], held is not None and held[0].numel() > 0
    for count in lengths:
        columns = SLOTS if is_static else first + count
        position = torch.arange(first, first + count)
        mask = torch.arange(columns) <= position[:, None]
        new = [tokens(count, heads, seed) for seed, heads in enumerate((H * G, H, H))]
        with torch.no_grad():
            output, held = step(*new, held, position, mask)
        outputs.append(output)
        first += count
    assert held is not None
    return outputs, held


def compared(
    step: Step, make: Callable[[], Caches | None], **fed: Any
) -> tuple[Caches, list[str], list[str]]:
    """Check a compiled step against the plain one; return what it leaves of its caches, its outcomes and reasons."""
    expected, plain = feed(with_heads(step), make(), **fed)
    compiled = torch.compile(with_heads(step), backend="kvq", options=EXACT)
    with watching() as graphs:
        outputs, held = feed(compiled, make(), **fed)
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    for cache, wanted in zip(held, plain, strict=True):
        dense = cache.dequantize() if isinstance(cache, (ArrangedKV, QuantizedKV)) else cache
        torch.testing.assert_close(dense, wanted)
    sites = [site for graph in graphs for site in graph.sites]
    return held, [site.outcome for site in sites], [site.detail for site in sites]


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attend to keys and values ``[B, S, H, D]``."""
    operands = (x.transpose(1, 2) for x in (query, keys, values))
    return sdpa(*operands, mask, enable_gqa=True).transpose(1, 2)


def nothing() -> None:
    return None


def buffers() -> Caches:
    return [torch.zeros(B, SLOTS, H, D) for _ in range(2)]


def empty() -> Caches:
    return [torch.zeros(B, 0, H, D) for _ in range(2)]


def grown(query, key, value, held, position, mask):
    if held is not None:
        key, value = torch.cat([held[0], key], 1), torch.cat([held[1], value], 1)
    else:
        key, value = key * 1, value * 1
    return attend(query, key, value, mask), [key, value]
