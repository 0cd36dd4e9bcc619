"""Kernels that compile ahead of time, by name: attention, writes and reads of each scheme, in bf16 unless told.

This file is also the program that compiles them for `test_kernels_compile`: see `aot`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import aot
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.schemes import Adaptive, Channelwise, Mixed, Uniform, scheme_of
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import QUERIES
from kvq_compile.kernels.triton import adaptive, backend
from kvq_compile.options import make_spec
from kvq_compile.testing.small_tables import random_tables
from thorough import THOROUGH
from written_caches import calibrated

CAPACITY = 4  # pages
HEADS, SHARED = 2, 4  # KV heads, and query heads to each of them
PLAIN = Score(1.0)
Options = dict[str, Any]
Side = tuple[Layout, Calibrated]


def side(role: Any, options: Options) -> Side:
    """Return a layout, over 128 channels unless told, and what it is coded relative to: random tables or nothing."""
    options = dict(options)
    if "pairs" in options:
        return by_channel_side(role, options)
    dim = options.pop("head_dim", 128)
    if "max_bits" in options:
        return Layout(role, dim, Regions(), Mixed(**options), QUERIES, SHARED), UNCALIBRATED
    rotary, couple = options.pop("rotary", False), options.get("couple")
    if not (options.pop("tables", False) or rotary or couple):
        return Layout(role, dim, Regions(), Uniform(**options)), UNCALIBRATED
    tables = random_tables(
        HEADS, dim, group_size=options.get("group_size", dim), rotary=rotary, seed=0,
        codebook=None if couple is None else (couple, options["bits"]),
    )  # fmt: skip
    layout = Layout(role, dim, Regions(), scheme_of(options, tables.digest, rotary))
    return layout, calibrated(layout, tables)


def by_channel_side(role: Any, options: Options) -> Side:
    """Return a layout whose channels differ in bits; with tables keys are coded without their mean."""
    frame = UNCALIBRATED
    if options.pop("tables", False):
        tables = random_tables(HEADS, 128, group_size=128, rotary=True, seed=0, codebook=None)
        options["tables"], frame = tables.digest, Calibrated(tables.words)
    return Layout(role, 128, Regions(), Channelwise(**options), QUERIES, SHARED), frame


def token(heads: int, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(1, heads, 1, dim, dtype=dtype)


def compile_attend(
    key: Options, value: Options, target: str, score: Score = PLAIN,
    kernel: str = "attend_kernel", mask: torch.Tensor | None = None, by_row: bool = False,
) -> Any:  # fmt: skip
    """Compile what decodes one token in bf16, of rows of one length or of lengths of their own."""
    (key_layout, key_frame), (value_layout, value_frame) = side("key", key), side("value", value)
    dim, position = key_layout.head_dim, torch.zeros(1, dtype=torch.int64)
    x = token(HEADS, dim)
    parts = [Packed.empty(x, CAPACITY, layout) for layout in (key_layout, value_layout)]
    if by_row:
        parts, position = list(map(counting_rows, parts)), position[None]
    with aot.launches(target) as compiled:
        backend.attend(
            token(HEADS * SHARED, dim), x, x, *parts, key_frame, value_frame, mask, position, None,
            score, key_layout, value_layout,
            torch.zeros(HEADS * SHARED, 1, 1, dtype=torch.bfloat16) if score.has_sinks else None,
        )  # fmt: skip
    return compiled[kernel]


def compile_latents(
    name: str, shared: int, target: str, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """Compile what decodes one token over rotary channels and latents of the sizes of DeepSeek V3."""
    spec = make_spec(name)
    layouts = spec.layout("key", 64, 0, 512), spec.layout("value", 512, 0, 512)
    query, key, value = (
        torch.zeros(1, h, 1, dim, dtype=dtype) for h, dim in ((shared, 576), (1, 64), (1, 512))
    )
    parts = [Packed.empty(x, CAPACITY, at) for x, at in zip((key, value), layouts, strict=True)]
    position = torch.zeros(1, dtype=torch.int64)
    with aot.launches(target) as compiled:
        backend.attend(
            query, key, value, *parts, UNCALIBRATED, UNCALIBRATED, None, position, None,
            Score(1.0, of_values=True), *layouts,
        )  # fmt: skip
    return compiled["attend_kernel"]


def compile_small(name: str, dim: int, target: str) -> Any:
    """Compile what decodes one token of heads of few channels."""
    layouts = [make_spec(name).layout(role, dim, SHARED) for role in ("key", "value")]
    x = token(HEADS, dim)
    parts = [Packed.empty(x, CAPACITY, layout) for layout in layouts]
    with aot.launches(target) as compiled:
        backend.attend(
            token(HEADS * SHARED, dim), x, x, *parts, UNCALIBRATED, UNCALIBRATED, None,
            torch.zeros(1, dtype=torch.int64), None, PLAIN, *layouts,
        )  # fmt: skip
    return compiled["attend_kernel"]


def compile_first_token(target: str) -> Any:
    """Compile what writes the first token of a cache: strides of its importance are 1, which Triton makes constants."""
    layout, frame = side("key", mixed(2.75))
    x, start = token(HEADS), torch.zeros(1, dtype=torch.int64)
    weights = torch.zeros(1, HEADS, 1, dtype=torch.float32)
    with aot.launches(target) as compiled:
        backend.append_(
            Packed.empty(x, CAPACITY, layout), frame, x, start, None, layout, weights,
            token(HEADS * SHARED) if layout.queries else None,
        )  # fmt: skip
    return next(iter(compiled.values()))


def counting_rows(parts: Packed) -> Packed:
    return parts._replace(cursor=parts.cursor[None])


def compile_append(role: str, options: Options, target: str, by_row: bool = False) -> Any:
    """Compile what writes one token in bf16, or what takes bits from older pages when it does."""
    layout, frame = side(role, options)
    x, position = token(HEADS), torch.zeros(1, dtype=torch.int64)
    parts = Packed.empty(x, CAPACITY, layout)
    if by_row:
        parts, position = counting_rows(parts), position[None]
    weights = torch.zeros(1, HEADS, 300) if layout.scheme.name == "mixed" else None
    query = token(HEADS * SHARED) if layout.queries else None
    with aot.launches(target) as compiled:
        if layout.requantize:
            adaptive.requantize_older_(parts, position, None, 1, layout, weights)
        else:
            backend.append_(parts, frame, x, position, None, layout, weights, query)
    return next(iter(compiled.values()))


def compile_append_both(key: Options, value: Options, target: str) -> Any:
    """Compile what writes the keys and the values of one token in bf16."""
    (key_layout, key_frame), (value_layout, value_frame) = side("key", key), side("value", value)
    layouts, frames = (key_layout, value_layout), (key_frame, value_frame)
    x, position = token(HEADS), torch.zeros(1, dtype=torch.int64)
    parts = [Packed.empty(x, CAPACITY, layout) for layout in layouts]
    attentive, asks = layouts[0].attentive, layouts[0].queries
    with aot.launches(target) as compiled:
        backend.append_both_(
            *parts, *frames, x, x, position, None, *layouts,
            torch.zeros(1, HEADS, 300) if attentive else None,
            token(HEADS * SHARED) if asks else None,
        )  # fmt: skip
    return compiled["append_kernel"]


def compile_reopening(target: str) -> Any:
    """Compile what writes ten tokens, which may cut a small page of small heads open."""
    layout = Layout("key", 64, Regions(4, 24, 64), Channelwise(1.0), QUERIES, SHARED)
    x, query = (torch.zeros(1, n, 10, 64, dtype=torch.float16) for n in (HEADS, HEADS * SHARED))
    with aot.launches(target) as compiled:
        parts, position = Packed.empty(x, CAPACITY, layout), torch.arange(10)
        backend.append_(parts, UNCALIBRATED, x, position, None, layout, None, query)
    return compiled["append_kernel"]


def compile_dequantize(role: str, options: Options, target: str, by_row: bool = False) -> Any:
    """Compile what reads a whole cache."""
    layout, frame = side(role, options)
    parts = Packed.empty(token(HEADS), CAPACITY, layout)
    with aot.launches(target) as compiled:
        backend.dequantize(counting_rows(parts) if by_row else parts, frame, 300, layout)
    return compiled["dequantize_kernel"]


def compile_weigh(shared: int, dim: int, page: int, options: Options, target: str) -> Any:
    """Compile what weighs the keys of a cache, under a mask."""
    dtype = options.get("dtype", torch.bfloat16)
    scheme = Mixed(2.75, **{k: v for k, v in options.items() if k != "dtype"})
    layout = Layout("key", dim, Regions(page_size=page), scheme, QUERIES, shared)
    key, query = token(HEADS, dim, dtype), token(HEADS * shared, dim, dtype)
    position = torch.zeros(1, dtype=torch.int64)
    mask = torch.ones(1, 1, 1, 700, dtype=torch.bool)
    with aot.launches(target) as compiled:
        backend.importance(
            query, key, Packed.empty(key, 4, layout), UNCALIBRATED, mask, position, None, 700,
            Score(1.0), False, QUERIES, layout,
        )  # fmt: skip
    return compiled["weigh_kernel"]


def mixed(bits: float, least: int = 0, most: int = 4, **options: Any) -> Options:
    return {"bits": bits, "min_bits": least, "max_bits": most, "params": "fp8"} | options


SKVQ = {"group_size": 64, "params": "fp8"}
TRITS = {"bits": 1.5, "packing": "trits", **SKVQ}


def by_channel(bits: float) -> Options:
    return {"bits": bits, "pairs": "halves"}


def turned(bits: float) -> Options:
    """Return the options of values that go with such keys."""
    return {"bits": bits, "transform": "hadamard", "params": "e5m3"}


DECODING = {  # keys and values
    "int8": ({"bits": 8}, {"bits": 8}),
    "int4": ({"bits": 4}, {"bits": 4}),
    "int3": ({"bits": 3}, {"bits": 3}),
    "int2": ({"bits": 2}, {"bits": 2}),
    "int2-g64": ({"bits": 2, "group_size": 64}, {"bits": 2, "group_size": 64}),
    "kivi-2": ({"bits": 2, "grouping": "channel", "group_size": 32}, {"bits": 2, "group_size": 32}),
    "skvq-2": ({"bits": 2, "rotary": True, **SKVQ}, {"bits": 2, "tables": True, **SKVQ}),
    "skvq-3": ({"bits": 3, "rotary": True, **SKVQ}, {"bits": 3, "tables": True, **SKVQ}),
    "skvq-2-trits": ({"bits": 2, "rotary": True, **SKVQ}, {"tables": True, **TRITS}),
    "cq-4c8b": ({"bits": 8, "couple": 4, "rotary": True}, {"bits": 8, "couple": 4}),
    "cq-8c8b": ({"bits": 8, "couple": 8, "rotary": True}, {"bits": 8, "couple": 8}),
    "cq-4c8b hadamard": ({"bits": 8, "couple": 4, "rotary": True}, turned(2)),
    "cq-2c6b hadamard": ({"bits": 6, "couple": 2, "rotary": True}, turned(3)),
    "cq-8c10b": ({"bits": 10, "couple": 8, "rotary": True}, {"bits": 10, "couple": 8}),
    "tc-2": (by_channel(2), turned(2)),
    "tc-3": (by_channel(3), turned(3)),
    "tc-2.5": (by_channel(3.5), turned(1.5) | {"packing": "trits"}),
    "tc-2 mean": (by_channel(2) | {"tables": True}, turned(2)),
    "tc-3 mean": (by_channel(3) | {"tables": True}, turned(3)),
    "tc-4 mean": (by_channel(4) | {"tables": True}, turned(4)),
    "tc-8": (by_channel(8), turned(8)),
    "qaq-2.3": (mixed(2.75), mixed(1.4375)),
    "qaq-3": (mixed(3.25), mixed(2.375)),
    "qaq-3 hadamard": (mixed(3.25, transform="hadamard"), mixed(2.375, transform="hadamard")),
    "six bits": (mixed(3.5, 1, 6), mixed(3, 0, 6)),
    "eight bits": (mixed(5, 0, 8), mixed(2, 0, 8)),
}
BENT = (
    {  # with a soft cap and a clamp; the largest of each kind, and one whose mean is added before
        f"{name}, capped": partial(
            compile_attend, *DECODING[name], score=Score(1.0, 50.0, -1e3, 1e3)
        )
        for name in ("int4", "kivi-2", "skvq-2", "tc-4 mean", "qaq-2.3")
    }
    | {
        "mean, capped": partial(
            compile_attend, {"bits": 4, "tables": True}, {"bits": 4}, score=Score(1.0, 50.0)
        ),
        "join sinks": partial(
            compile_attend,
            *DECODING["skvq-2"],
            score=Score(1.0, has_sinks=True),
            kernel="join_kernel",
        ),
    }
)
WRITING: dict[str, tuple[str, Options]] = {
    "write fp8-trits": ("value", {"tables": True, **TRITS}),
    "write rotary-fp8": ("key", {"bits": 2, "params": "fp8", "group_size": 32, "rotary": True}),
    "write channel-hadamard": (
        "key", {"bits": 3, "grouping": "channel", "group_size": 32, "transform": "hadamard",
                "tables": True},
    ),
    "write rotary-codebook": ("key", {"bits": 8, "couple": 2, "rotary": True}),
    "write codebook-10": ("value", {"bits": 10, "couple": 8}),
    "write qaq": ("key", mixed(2.75)),
    "write qaq-outliers": ("key", mixed(2.5, 0, 6, params="fp16", outliers=2)),
    "write qaq-hadamard": ("key", mixed(2, transform="hadamard")),
    "write qaq-target": ("key", mixed(2.75, params="fp16", soften=False, adaptive=Adaptive(0.1, 300.0))),
    "write tc": ("key", by_channel(2.5)),
    "write tc mean": ("key", by_channel(2.5) | {"tables": True}),
    "write e5m3": ("value", turned(2)),
    "write searched channels": (
        "key", {"bits": 2, "grouping": "channel", "group_size": 32, "search": True}
    ),
    "write searched tokens": ("value", {"bits": 2, "group_size": 32, "search": True}),
    "requantize qaq": ("key", mixed(2.75, adaptive=Adaptive(0.1, 9.0, requantize=True))),
}  # fmt: skip
WRITING_BOTH = {
    f"write both {name}": partial(compile_append_both, *DECODING[name])
    for name in ("int4", "kivi-2", "skvq-2", "tc-3 mean", "qaq-2.3")
}
READING: dict[str, tuple[str, Options]] = {
    "read kivi-2": ("key", {"bits": 2, "grouping": "channel", "group_size": 32}),
    "read trits": ("value", {"tables": True, **TRITS}),
    "read rotary": ("key", {"bits": 3, "rotary": True, **SKVQ}),
    "read hadamard": ("value", {"bits": 4, "transform": "hadamard", "tables": True}),
    "read codebook": ("key", {"bits": 8, "couple": 4, "rotary": True}),
    "read qaq-outliers": ("key", mixed(2.5, 0, 6, params="fp16", outliers=2)),
    "read tc": ("key", by_channel(2.5) | {"tables": True}),
}
WEIGHING: dict[str, tuple[int, int, int, Options]] = {  # heads that share, channels, page, options
    "weigh decode": (4, 128, 128, {}),
    "weigh outliers": (4, 128, 128, {"outliers": 2}),
    "weigh heads of 16": (4, 16, 128, {}),
    "weigh one KV head": (32, 128, 128, {}),
    "weigh large": (8, 256, 256, {}),
    "weigh fp32": (4, 128, 128, {"transform": "hadamard", "dtype": torch.float32}),
    "weigh fp32, large": (8, 256, 256, {"dtype": torch.float32}),
}
SIZES = {  # of heads whose rows fill no whole words, or whose tiles are the least or large
    f"{dim} channels, {name}": ({"head_dim": dim} | key, {"head_dim": dim} | value)
    for name in ("int3", "qaq-2.3")
    for key, value in (DECODING[name],)
    for dim in (8, 120, 320)
}
GROUPED = {  # several groups to a token, in rows whose words fill no tile
    f"{dim} channels, {name}": tuple(
        side | {"head_dim": dim, "group_size": 32} for side in DECODING[name]
    )
    for dim, name in ((96, "int2"), (96, "kivi-2"), (192, "int2"), (128, "skvq-2-trits"))
}
# What `generate` gives: one row of a mask for all heads.
MASKED = {
    f"{name}, masked": partial(
        compile_attend, *DECODING[name], mask=torch.ones(1, 1, 1, 700).bool()
    )
    for name in ("int8", "int4", "int2-g64", "kivi-2", "tc-4 mean", "tc-3 mean", "tc-2", "qaq-2.3")
}
LATENTS = {
    f"{name}, {shared} heads": partial(compile_latents, name, shared)
    for name, shared in (("tc", 16), ("tc", 128), ("int8", 16), ("kivi", 128))
}
SMALL = {  # a product takes 16 channels at least
    **{
        f"{name}, {dim} channels": partial(compile_small, name, dim)
        for name in ("tc", "kivi")
        for dim in ((8, 12, 40) if THOROUGH else (8,))
    },
    "one token, qaq": compile_first_token,
}
BY_ROW = {
    **{name: partial(compile_attend, *DECODING[name]) for name in ("int4", "tc-3 mean")},
    "write tc": partial(compile_append, *WRITING["write tc"]),
    "read tc": partial(compile_dequantize, *READING["read tc"]),
}
CASES: dict[str, Callable[[str], Any]] = {
    **{name: partial(compile_attend, *case) for name, case in (SIZES | GROUPED).items()},
    **{name: partial(compile_attend, *case) for name, case in DECODING.items()},
    **BENT,
    **MASKED,
    **LATENTS,
    **SMALL,
    **{name: partial(compile_append, *case) for name, case in WRITING.items()},
    **WRITING_BOTH,
    **{name: partial(compile_dequantize, *case) for name, case in READING.items()},
    **{name: partial(compile_weigh, *case) for name, case in WEIGHING.items()},
    "reopen tc": compile_reopening,
    **{f"{name}, by row": partial(case, by_row=True) for name, case in BY_ROW.items()},
}


if __name__ == "__main__":
    aot.report(CASES)
