"""Count what a cache holds, from its storages: bytes by part, effective bits, what 16 bit would take."""

from __future__ import annotations

import html
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvq_compile.errors import KVQError
from kvq_compile.history import graphs, unmet_layers, why_dense, why_plain
from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.packed import CALIBRATED, PARTS
from kvq_compile.lowering.sites import DENSE

PLAIN = "plain"
NAMES = (*PARTS, *CALIBRATED)


@dataclass(frozen=True)
class TensorReport:
    """One key or value tensor of a cache.

    Attributes:
        name: Where it was found.
        shape: ``[B, H, S, D]``.
        held: Tokens it holds, in the longest row.
        parts: Bytes of each part; an unquantized tensor has the one part ``"plain"``. Memory that tensors
            share counts for the first of them.
        kept_exact: Tokens among ``held`` that are exact.
        packed_bits: Bits per element of a packed token; ``None`` where nothing is packed.
        host_bytes: Bytes of exact copies in host memory, which are no part of ``parts``.
        read_bits: Those of them that attention reads, fewer where tokens use fewer than their page has room for.
        note: Why it is in 16 bit or read dense, or what happened to it outside compiled code; empty where there is
            nothing to say.
        rows: Tokens of each row, where rows have lengths of their own; else empty.
        dense_read: Bytes of the ordinary tensor that its attention reads in each call, where that is not understood.
    """

    name: str
    shape: tuple[int, ...]
    held: int
    parts: dict[str, int]
    kept_exact: int
    packed_bits: float | None = None
    read_bits: float | None = None
    host_bytes: int = 0
    note: str = ""
    dense_read: int = 0
    rows: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """Elements that the tensor stands for: those of the tokens held."""
        B, H, _, D = self.shape
        tokens = sum(self.rows) if self.rows else B * self.held
        return H * tokens * D


@dataclass(frozen=True, repr=False)
class Report:
    """What a cache holds.

    Attributes:
        tensors: Its key and value tensors, in the order in which they were found.
    """

    tensors: tuple[TensorReport, ...]

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part, over all tensors."""
        names = (*NAMES, PLAIN)
        total = {name: sum(tensor.parts.get(name, 0) for tensor in self.tensors) for name in names}
        return {name: size for name, size in total.items() if size}

    @property
    def bytes(self) -> int:
        """All bytes held, spare room included."""
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of exact copies in host memory, beside `bytes`: only where the option ``keep_exact`` is set."""
        return sum(tensor.host_bytes for tensor in self.tensors)

    @property
    def dense_layers(self) -> int:
        """Pairs of key and value tensors that are stored quantized and read dense."""
        return -(-sum(tensor.dense_read > 0 for tensor in self.tensors) // 2)

    @property
    def dense_read(self) -> int:
        """Bytes of the ordinary tensors that the largest such layer reads in a call, beside `bytes`, while it runs."""
        sizes = [tensor.dense_read for tensor in self.tensors]
        return max((sum(sizes[first : first + 2]) for first in range(0, len(sizes), 2)), default=0)

    @property
    def elements(self) -> int:
        """Elements that the cache stands for."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def tokens(self) -> int:
        """Tokens held by the longest tensor."""
        return max((tensor.held for tensor in self.tensors), default=0)

    @property
    def layers(self) -> int:
        """Pairs of key and value tensors."""
        return len(self.tensors) // 2

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same tokens at 16 bit."""
        return 2 * self.elements

    @property
    def effective_bits(self) -> float:
        """Bits held per element, all parts and spare room counted."""
        return 8 * self.bytes / self.elements if self.elements else 0.0

    @property
    def packed_bits(self) -> float:
        """Bits per element of packed tokens: codes, scales and zero points, spare room left out."""
        widths = [tensor.packed_bits for tensor in self.tensors if tensor.packed_bits is not None]
        return sum(widths) / len(widths) if widths else 16.0

    @property
    def read_bits(self) -> float:
        """Bits per element of packed tokens that attention reads: no more than `packed_bits`."""
        widths = [tensor.read_bits for tensor in self.tensors if tensor.read_bits is not None]
        return sum(widths) / len(widths) if widths else 16.0

    @property
    def saving(self) -> float:
        """How many times fewer bytes than at 16 bit; 0 of an empty cache."""
        return self.dense_bytes / self.bytes if self.bytes else 0.0

    def json(self) -> str:
        """Return the report as JSON: totals, bytes by part, and one object a tensor."""
        names = (
            "layers",
            "tokens",
            "bytes",
            "dense_bytes",
            "host_bytes",
            "dense_layers",
            "dense_read",
        )
        widths = ("effective_bits", "packed_bits", "read_bits")
        totals = {name: getattr(self, name) for name in (*names, *widths)}
        tensors = [asdict(tensor) for tensor in self.tensors]
        return json.dumps({**totals, "parts": self.parts, "tensors": tensors}, indent=2)

    def __str__(self) -> str:
        rows = [f"  {name:8s} {size:>14,d} bytes" for name, size in self.parts.items()]
        if self.read_bits < self.packed_bits:
            rows.append(f"  of {self.packed_bits:.2f} bits packed {self.read_bits:.2f} are read")
        if self.host_bytes:
            rows.append(f"  and {self.host_bytes:,d} bytes of exact copies in host memory")
        if self.dense_layers:
            layers = _count(self.dense_layers, "layer")
            rows.append(f"  {layers} read dense: {self.dense_read:,d} bytes more while one runs")
        for note, number in Counter(t.note for t in self.tensors if t.note).items():
            text = f"{_count(number, 'tensor')}: {note}"
            rows.append(textwrap.fill(text, 80, initial_indent="  ", subsequent_indent="    "))
        head = [
            f"{_count(self.layers, 'layer')}, {_count(self.tokens, 'token')}: {self.bytes:,d} bytes"
        ]
        if self.elements:
            less = (
                f"{self.saving:.2f} times less"
                if self.saving >= 1
                else f"{1 / self.saving:.2f} times more"
            )
            head.append(f"{self.effective_bits:.2f} bits an element, {less} than 16 bit")
        return "\n".join([*head, *rows])

    def __repr__(self) -> str:
        return f"<Report: {_count(self.layers, 'layer')}, {_count(self.tokens, 'token')}, {self.bytes:,d} bytes>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def _count(number: int, noun: str) -> str:
    return f"{number:,d} {noun}" + ("" if number == 1 else "s")


def report(cache_or_module: Any) -> Report:
    """Return what a cache holds.

    Args:
        cache_or_module: A transformers cache, a module whose buffers are caches, a tensor, or any nesting
            of tuples, lists and dictionaries of these.

    Raises:
        TypeError: Nothing in it looks like a key or value tensor ``[B, H, S, D]``.
        KVQError: The option ``layers`` named a layer that no compiled graph has met; told once.
    """
    unmet = unmet_layers(graphs())
    if unmet:
        raise KVQError(unmet)
    counted: set[int] = set()
    tensors = tuple(
        _noted(_tensor_report(name, tensor, counted), tensor, index // 2)
        for index, (name, tensor) in enumerate(cache_tensors(cache_or_module))
    )
    if not tensors:
        raise TypeError(
            "cache_or_module must hold key and value tensors [B, H, S, D], "
            f"got {type(cache_or_module).__name__}"
        )
    return Report(tensors)


def _noted(told: TensorReport, tensor: Tensor, index: int) -> TensorReport:
    """Add what compiled code did, or did not, for a tensor; its layer is ``index`` unless its name has one."""
    named = re.search(r"layers\[(\d+)\]", told.name)
    layer = int(named[1]) if named else index
    if not isinstance(tensor, QuantizedKV):
        sites = [site for graph in graphs() for site in graph.sites]
        quantizes = any(site.outcome in ("rewritten", DENSE) for site in sites)
        return replace(told, note=f"in 16 bit: {why_plain(layer)}" if quantizes else "")
    notes = []
    reason, behind = why_dense(layer), tensor.written_outside()
    if reason is not None:
        told = replace(told, dense_read=tensor.numel() * tensor.element_size())
        notes.append(f"{DENSE}: {reason}")
    if behind:
        notes.append(f"its last {_count(behind, 'token')} came outside compiled code")
    return replace(told, note="; ".join(notes))


def _tensor_report(name: str, tensor: Tensor, counted: set[int]) -> TensorReport:
    """Report on one tensor; storages in ``counted`` are another's, those of the tensor join them."""
    shape = tuple(int(size) for size in tensor.shape)
    if not isinstance(tensor, QuantizedKV):
        return TensorReport(name, shape, shape[2], {PLAIN: _bytes_once(tensor, counted)}, shape[2])
    held, layout = tensor.held(), tensor.page_layout
    cursors = tensor.cursor.view(-1, 2)
    memory, pages = cursors.amax(0).tolist()
    packed_end = layout.sinks + pages * layout.page_size
    first = tensor.first if tensor.kind == "grown" else memory - held
    packed = max(0, min(packed_end, first + held) - max(first, layout.sinks))
    width = layout.bits_per_element
    held_parts = {part: getattr(tensor, part) for part in NAMES}
    parts = {
        name: _bytes_once(part, counted) for name, part in held_parts.items() if part is not None
    }
    host = 0 if tensor.originals is None else _bytes_once(tensor.originals, counted)
    read = _read_bits(tensor, width)
    rows = tuple(tensor.held_by_row()) if tensor.by_row else ()
    about = name, shape, held, parts, held - packed, width, read, host
    return TensorReport(*about, rows=rows)


def _read_bits(cache: QuantizedKV, packed_bits: float) -> float:
    """Return the bits per element of packed pages, rows that no token uses left out."""
    layout, codes = cache.page_layout, cache.paged().codes
    cursors = cache.cursor.view(-1, 2)
    packed: list[int] = cursors[:, 1].tolist()
    if not any(packed):
        return packed_bits
    sizes = layout.head_dim, layout.page_size
    rows = codes.split(1) if cache.by_row else [codes]
    unused = [
        pages * layout.scheme.unused_bits(row[:, :, :pages], *sizes)
        for row, pages in zip(rows, packed, strict=True)
        if pages
    ]
    return packed_bits - sum(unused) / sum(packed)


def _bytes_once(tensor: Tensor, counted: set[int]) -> int:
    storage = tensor.untyped_storage()
    if storage._cdata in counted:
        return 0
    counted.add(storage._cdata)
    return storage.nbytes()


def cache_tensors(holder: Any, name: str = "cache") -> Iterator[tuple[str, Tensor]]:
    """Yield the key and value tensors of a cache, each once, with a name for each."""
    seen: set[int] = set()
    for path, tensor in _walk(holder, name, 0):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield path, tensor


def _walk(holder: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(holder, ArrangedKV):
        several = len(holder.caches) > 1
        for index, cache in enumerate(holder.caches):
            yield f"{name}[{index}]" if several else name, cache
    elif isinstance(holder, Tensor):
        if isinstance(holder, QuantizedKV) or (holder.dim() == 4 and holder.is_floating_point()):
            yield name, holder
    elif isinstance(holder, torch.nn.Module):
        for path, buffer in holder.named_buffers():
            yield from _walk(buffer, path, depth + 1)
    elif isinstance(holder, dict):
        for key, item in holder.items():
            yield from _walk(item, f"{name}[{key!r}]", depth + 1)
    elif isinstance(holder, (list, tuple)):
        for index, item in enumerate(holder):
            yield from _walk(item, f"{name}[{index}]", depth + 1)
    elif hasattr(holder, "__dict__") and depth < 4:
        for attribute in (
            "layers",
            "self_attention_cache",
            "cross_attention_cache",
            "keys",
            "values",
        ):
            if attribute in vars(holder):
                yield from _walk(vars(holder)[attribute], f"{name}.{attribute}", depth + 1)
