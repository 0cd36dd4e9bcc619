"""Packed caches of random tokens, for every method: those that learn get random tables, which cost as much to read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvq_compile.calibration.artifact import LayerTables
from kvq_compile.evaluation.runner import parse_options
from kvq_compile.kernels import ops
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.schemes import Channelwise, Role
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import Tables
from kvq_compile.options import make_options, make_spec, method_class

ROLES: tuple[Role, Role] = ("key", "value")
THETA = 5e5  # base of the rotary embedding


@dataclass(frozen=True)
class Shape:
    """What a decoding step attends over: ``batch`` sequences of ``context`` tokens."""

    batch: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128

    def __post_init__(self) -> None:
        for name in ("batch", "context", "heads", "kv_heads", "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )


@dataclass(frozen=True)
class Cache:
    """The keys or the values of a step, as the operators take them.

    Attributes:
        layout: How they are coded.
        parts: See `Packed`.
        constants: See `Calibrated`.
    """

    layout: Layout
    parts: list[Tensor]
    constants: list[Tensor]

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes and parameters."""
        return sum(part.numel() * part.element_size() for part in self.parts[:2])


def random_spec(method: str, shape: Shape) -> CacheSpec:
    """Return the spec of a method, ``NAME:OPTION=VALUE,...``, with random tables where it needs some.

    Keys of methods that use the rotation of keys are coded as before it, as in a model whose rotation is known.

    Raises:
        ValueError: The method or an option is unknown, or what it does follows from a model alone.
    """
    name, options = parse_options(method)
    if name == "auto":
        raise ValueError(
            "method must be one whose widths are known without a model, got 'auto'; name them"
        )
    if not method_class(name).calibrated:
        return _turned(make_spec(name, **options), shape)
    made = make_options(name, options)
    couple, bits = getattr(made, "couple", None), getattr(made, "bits", 0)
    rotary = bool(getattr(made, "pre_rope", False))
    learned = getattr(made, "values", "") != "hadamard"
    tables = LayerTables(
        key=_random_tables(shape, rotary, couple, int(bits)),
        value=_random_tables(shape, False, couple, int(bits)) if learned else None,
        rotary=rotary,
    )
    return replace(made.spec(tables), method=name)


def _random_tables(shape: Shape, rotary: bool, couple: int | None, bits: int) -> Tables:
    """Return tables of roughly normal tokens: some order, means and scales; a codebook if channels couple."""
    heads, D = shape.kv_heads, shape.head_size
    half = torch.rand(heads, D // 2, dtype=torch.float32, device="cpu").argsort(-1)
    scale = (0.5 + torch.rand(heads, D // 2, dtype=torch.float32, device="cpu")).repeat(1, 2)
    book = None
    if couple is not None:
        book = torch.randn(heads, D // couple, 1 << bits, couple, dtype=torch.float32, device="cpu")
    return Tables.build(
        order=torch.cat([half, half + D // 2], -1),
        mean=0.5 * torch.randn(heads, D, dtype=torch.float32, device="cpu"),
        scale=scale,
        margin=torch.zeros(heads, D, dtype=torch.float32, device="cpu"),
        frequency=_frequencies(half, D) if rotary else None,
        codebook=book,
    )


def _frequencies(pair: Tensor, head_size: int) -> Tensor:
    """Return the turns of pairs from one token to the next, in units of ``2 ** -32``."""
    turns = THETA ** -(pair.double() / (head_size // 2)) / (2 * torch.pi)
    return (2.0**32 * turns).round().long().int()


def _turned(spec: CacheSpec, shape: Shape) -> CacheSpec:
    """Return a spec whose keys are coded without their turned mean, if their scheme knows one."""
    if not isinstance(spec.key, Channelwise) or spec.key.pairs != "halves":
        return spec
    D = shape.head_size
    channel = torch.arange(D, dtype=torch.int64, device="cpu")
    ones = torch.ones(shape.kv_heads, D, dtype=torch.float32, device="cpu")
    tables = Tables.build(
        order=channel.expand(shape.kv_heads, -1),
        mean=0 * ones,
        scale=ones,
        margin=0 * ones,
        frequency=_frequencies(channel[: D // 2].expand(shape.kv_heads, -1), D),
    )
    return replace(spec, key=replace(spec.key, tables=tables.digest), key_tables=tables)


def tokens(
    shape: Shape, heads: int, count: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return normal tokens ``[B, heads, count, D]``; one token is strided as a projection leaves it."""
    sizes = shape.batch, count, heads, shape.head_size
    if count == 1:
        return torch.randn(sizes, dtype=dtype, device=device).transpose(1, 2)
    return torch.randn(sizes[0], heads, count, sizes[3], dtype=dtype, device=device)


def filled(
    spec: CacheSpec, role: Role, shape: Shape, dtype: torch.dtype, device: torch.device, grows: bool = False
) -> Cache:  # fmt: skip
    """Return a cache of ``shape.context`` random tokens, written as a prompt is.

    One that grows has the room that such a cache is given, another one room for one more page.

    Channels differ in spread and have means, as those of keys do; few tokens matter much.
    """
    layout = spec.layout(role, shape.head_size, shape.heads // shape.kv_heads)
    tables = spec.tables(role)
    constants = [] if tables is None else [tables.on(device)]
    if layout.rotary:  # sequences begin at different positions
        constants.append(torch.arange(shape.batch, dtype=torch.int32, device=device))
    x = tokens(shape, shape.kv_heads, shape.context, dtype, device)
    if role == "key":
        spread = torch.logspace(-1, 0.5, shape.head_size, dtype=torch.float32, device=device)
        spread = spread[torch.randperm(shape.head_size, dtype=torch.int64, device=device)].to(dtype)
        x = x.mul_(spread).add_(spread)
    weights = None
    if layout.attentive:
        sizes = shape.batch, shape.kv_heads, shape.context
        weights = torch.rand(sizes, dtype=torch.float32, device=device) ** 8
    asked = tokens(shape, shape.heads, 1, dtype, device) if layout.queries else None
    slots = shape.context if grows else boundary(layout, shape.context)
    parts = ops.quantize(x, slots, grows, layout, constants, weights, asked)
    return Cache(layout, parts, constants)


def _first_of_page(layout: Layout, context: int) -> int:
    """Return the tokens at which the page before the next one filled."""
    return layout.sinks + layout.window + layout.pages_at(context) * layout.page_size


def boundary(layout: Layout, context: int) -> int:
    """Return the tokens at which the next page fills."""
    return _first_of_page(layout, context) + layout.page_size
