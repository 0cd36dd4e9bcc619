"""Saved caches: what `torch.save` writes of a `QuantizedKV`, and the way back.

A layout is saved as a dictionary of plain Python values with a format version, and loading runs the checks of `Layout`
again. This file imports little, so that `rebuild` can be registered as safe for `torch.load` when the package is
imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvq_compile.kernels.cache.arranged import ArrangedKV
    from kvq_compile.kernels.cache.tensor import Kind, QuantizedKV
    from kvq_compile.kernels.layout import Layout

FORMAT = 5
OLDER_FORMATS = (2, 3, 4)  # and 1, whose files name `rebuild_old` and no version
# Fields of a layout in files of format 1, a comma-separated text.
OLD_FIELDS = (
    *("role", "bits", "grouping", "group_size", "clip", "transform", "sinks", "window"),
    *("page_size", "head_dim", "scheme", "params", "packing", "couple", "rotary", "tables"),
    *("min_bits", "max_bits", "outliers", "fit", "soften", "attentive", "target", "query_norm"),
    *("requantize", "keep_exact", "queries", "shared_by"),
)
OLD_WORDS = frozenset(("role", "grouping", "transform", "scheme", "params", "packing", "tables"))
ADAPTIVE = ("target", "query_norm", "requantize", "keep_exact")


def plain_layout(layout: Layout) -> dict[str, Any]:
    """Return the fields of a layout as plain Python values; `load_layout` is the inverse."""
    from kvq_compile.kernels.schemes import plain_scheme

    own = {name: getattr(layout, name) for name in ("role", "head_dim", "queries", "shared_by")}
    return {**own, **asdict(layout.regions), **plain_scheme(layout.scheme)}


def load_layout(plain: Mapping[str, Any]) -> Layout:
    """Return the layout from what `plain_layout` returned.

    Raises:
        ValueError: A field is missing, unknown or out of its range.
    """
    from kvq_compile.kernels.layout import Layout, Regions
    from kvq_compile.kernels.schemes import load_scheme

    fields = dict(plain)
    try:
        own = {name: fields.pop(name) for name in ("role", "head_dim", "queries", "shared_by")}
        regions = Regions(**{name: fields.pop(name) for name in ("sinks", "window", "page_size")})
        return Layout(regions=regions, scheme=load_scheme(fields), **own)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the layout of a saved cache must be whole, got {plain}: {error}"
        ) from error


def load_old_layout(text: str) -> Layout:
    """Return the layout of a text of format 1.

    Raises:
        ValueError: It is none, or one of a version before that format was settled.
    """
    words = text.split(",")
    if len(words) != len(OLD_FIELDS):
        raise ValueError(
            f"the layout of a saved cache must have {len(OLD_FIELDS)} fields, got {len(words)}; load it with "
            "the version of kvq-compile that saved it, and save its dequantize()"
        )
    old: dict[str, Any] = {
        name: word if name in OLD_WORDS else _old_number(word)
        for name, word in zip(OLD_FIELDS, words, strict=True)
    }
    keep = {
        "uniform": ("bits", "grouping", "group_size", "clip", "transform", "params", "packing"),
        "codebook": ("bits", "couple"),
        "mixed": (
            *("bits", "min_bits", "max_bits", "outliers", "params", "fit", "soften"),
            *("attentive", "transform"),
        ),
    }.get(old["scheme"])
    if keep is None:
        raise ValueError(f"scheme must be uniform, codebook or mixed, got {old['scheme']!r}")
    names = ("role", "head_dim", "queries", "shared_by", "sinks", "window", "page_size", "scheme")
    plain = {name: old[name] for name in (*names, *keep, "rotary", "tables")}
    if old["target"] or old["keep_exact"]:
        plain |= {name: old[name] for name in ADAPTIVE}
    return load_layout(plain)


def _old_number(word: str) -> int | float | bool:
    if word in ("True", "False"):
        return word == "True"
    return int(word) if word.isdecimal() else float(word)


def rebuild(
    version: int,
    layout: Mapping[str, Any],
    kind: Kind,
    length: int,
    parts: list[Tensor],
    calibrated: list[Tensor],
    first: int | None = None,
) -> QuantizedKV:
    """Wrap the contents of a file of the current format, or of one before whose pages are the same.

    Raises:
        ValueError: It is of another format, or its layout is not one.
    """
    from kvq_compile.kernels.cache.tensor import wrap_loaded

    if version not in (FORMAT, *OLDER_FORMATS):
        raise _of_another_format(version)
    found = load_layout(layout)
    check_pages(version, found)
    return wrap_loaded(parts, calibrated, found, kind, length, first)


def check_pages(version: int, layout: Layout) -> None:
    """Check that pages of this layout in a file of this format are packed as today.

    Raises:
        ValueError: They are not.
    """
    changed = 1  # the format since which they are packed as today
    if layout.scheme.name == "channelwise":
        changed = 3  # fields of two bits
    elif layout.scheme.name == "uniform" and layout.scheme.bits == 3:
        changed = 4  # thirds
    elif layout.scheme.name == "uniform" and layout.scheme.packing == "trits":
        changed = 5  # planes of four words
    if version < changed:
        raise _of_another_format(version)


def _of_another_format(version: int) -> ValueError:
    return ValueError(
        f"a saved cache must be of format {FORMAT}, got {version}; load it with the version of kvq-compile "
        "that saved it, and save its dequantize()"
    )


def receive(
    parts: list[Tensor],
    calibrated: list[Tensor],
    layout: Layout,
    kind: Kind,
    length: int,
    first: int | None = None,
) -> QuantizedKV:
    """Wrap the tensors that another process of the same program sent; they may be in memory shared with it."""
    from kvq_compile.kernels.cache.tensor import wrap

    received = wrap(parts, calibrated, layout, kind, length, first)
    received._lineage.share()
    return received


def rebuild_old(
    codes: Tensor,
    params: Tensor,
    exact: Tensor,
    cursor: Tensor,
    layout: str,
    kind: Kind,
    length: int,
    tables: Tensor | None = None,
    shift: Tensor | None = None,
    originals: Tensor | None = None,
) -> QuantizedKV:
    """Wrap the contents of a file of format 1, which names this function ``kvq_compile.kernels.cache.rebuild``.

    Raises:
        ValueError: Its layout is not one, or its pages are packed otherwise today.
    """
    from kvq_compile.kernels.cache.tensor import wrap_loaded

    found = load_old_layout(layout)
    check_pages(1, found)
    parts = [codes, params, exact, cursor, *([] if originals is None else [originals])]
    calibrated = [tensor for tensor in (tables, shift) if tensor is not None]
    return wrap_loaded(parts, calibrated, found, kind, length)


def rebuild_arranged(
    caches: list[QuantizedKV], axes: str, sizes: tuple[int, ...], heads: int
) -> ArrangedKV:
    """Wrap the caches of a file, which were checked one by one.

    Raises:
        TypeError, ValueError: They are no caches, or not those of one tensor.
    """
    from kvq_compile.kernels.cache.arranged import ArrangedKV
    from kvq_compile.kernels.cache.arrangement import Arrangement
    from kvq_compile.kernels.cache.tensor import QuantizedKV

    if not caches or not all(isinstance(cache, QuantizedKV) for cache in caches):
        raise TypeError(f"caches must be of QuantizedKV, got {[type(c).__name__ for c in caches]}")
    if len({cache.shape for cache in caches}) != 1:
        raise ValueError(f"caches must have one shape, got {[list(c.shape) for c in caches]}")
    return ArrangedKV(caches, Arrangement(axes, tuple(sizes), heads))


torch.serialization.add_safe_globals(
    [rebuild, rebuild_arranged, (rebuild_old, "kvq_compile.kernels.cache.rebuild")]
)
