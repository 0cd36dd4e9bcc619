"""Bytes that a layer's cache takes against the tokens that it holds: exact tokens and spare room counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvq_compile.bench.caches import ROLES, Shape, filled, random_spec, tokens
from kvq_compile.bench.rows import reason

PLAIN = "16 bit"
PEERS = (PLAIN, "hf-quanto", "hf-hqq")
METHODS = (
    *("int8", "int4", "int2", "kivi:bits=2", "tc:bits=4", "tc:bits=3", "tc:bits=2"),
    *("skvq:bits=2", "qaq:bits=2.3", "cq-4c8b", "cq-8c8b"),
)
CASE = ("method", "batch", "context", "heads", "kv_heads", "head_size")


@dataclass(frozen=True)
class Row:
    """What a layer's keys and values take; ``None`` where nothing was measured, ``refused`` says why.

    Attributes:
        bytes: All that is held.
        plain_bytes: What the same tokens take in 16 bit.
    """

    method: str
    batch: int
    context: int
    heads: int
    kv_heads: int
    head_size: int
    bytes: int | None = None
    plain_bytes: int = 0
    refused: str = ""

    @property
    def saving(self) -> float | None:
        """How many times less than in 16 bit."""
        return None if not self.bytes else self.plain_bytes / self.bytes

    @property
    def bits(self) -> float | None:
        """Bits an element."""
        return None if self.bytes is None else 16 * self.bytes / self.plain_bytes


@torch.no_grad()
def measure(methods: Sequence[str], shapes: Sequence[Shape], device: torch.device) -> Iterator[Row]:
    """Fill caches that grow, as a prompt does, and yield what each takes; methods by name, peers among them."""
    for shape in shapes:
        for method in methods:
            plain = 2 * 2 * shape.batch * shape.kv_heads * shape.context * shape.head_size
            sizes: dict[str, Any] = asdict(shape)
            row = Row(method, **sizes, plain_bytes=plain)
            try:
                yield replace(row, bytes=_bytes(method, shape, device))
            except Exception as error:  # whatever stops one method is told, and the others go on
                yield replace(row, refused=reason(error))


def _bytes(method: str, shape: Shape, device: torch.device) -> int:
    like = torch.bfloat16, device
    if method == PLAIN:
        pair = [tokens(shape, shape.kv_heads, shape.context, *like) for _ in ROLES]
        return held_bytes(pair)
    if method in PEERS:
        return held_bytes(_quantized_layer(method, shape, *like))
    spec = random_spec(method, shape)
    caches = [filled(spec, role, shape, *like, grows=True) for role in ROLES]
    return held_bytes([cache.parts for cache in caches])


def _quantized_layer(method: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a layer of transformers' quantized cache that holds random tokens in 4 bits."""
    from transformers import LlamaConfig, QuantizedCache

    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        hidden_size=shape.heads * shape.head_size, head_dim=shape.head_size,
    )  # fmt: skip
    cache = QuantizedCache(backend=method.removeprefix("hf-"), config=config, nbits=4)
    pair = [tokens(shape, shape.kv_heads, shape.context, dtype, device) for _ in ROLES]
    cache.update(*pair, 0)
    return cache.layers[0]


def held_bytes(x: Any) -> int:
    """Return the bytes of the memory behind all tensors that something holds, each piece of memory once."""
    seen: dict[int, int] = {}
    for tensor in _tensors(x, set()):
        memory = tensor.untyped_storage()
        seen[memory.data_ptr()] = memory.nbytes()
    return sum(seen.values())


def _tensors(x: Any, met: set[int]) -> Iterator[Tensor]:
    if id(x) in met or isinstance(x, (str, bytes, int, float, torch.dtype, torch.device, type)):
        return
    met.add(id(x))
    if isinstance(x, Tensor):
        inner = getattr(x, "__tensor_flatten__", None)
        if type(x) is Tensor or inner is None:
            yield x
            return
        for name in inner()[0]:
            yield from _tensors(getattr(x, name), met)
        return
    parts: Iterable[Any] = ()
    if isinstance(x, dict):
        parts = x.values()
    elif isinstance(x, (list, tuple, set)):
        parts = x
    elif hasattr(x, "__dict__"):
        parts = vars(x).values()
    for part in list(parts):
        yield from _tensors(part, met)
