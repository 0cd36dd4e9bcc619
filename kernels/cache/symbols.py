"""Sizes of caches that are alike are one symbol to whoever traces them.

Dynamo makes a symbol of each size that is marked as dynamic, for 32 layers hundreds of them, which it reads, passes on
and guards one by one. Caches of one layout and kind that have equal sizes when they are traced get one symbol for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_FIRSTS = "_kvq_first_sizes"  # the attribute of a `ShapeEnv` that keeps them, and goes with it


def unify(layout: Any, kind: str, shapes: Sequence[Sequence[Any]]) -> None:
    """Let sizes of a cache that is traced be those of the first that was like it.

    Args:
        layout, kind: Of the cache.
        shapes: Of the cache and of its parts. Their symbols are merged, and a guard says that they are equal.
    """
    sizes = [size for shape in shapes for size in shape]
    symbolic = [size for size in sizes if isinstance(size, torch.SymInt)]
    if not symbolic or any(size.node.hint is None for size in symbolic):
        return
    firsts = vars(symbolic[0].node.shape_env).setdefault(_FIRSTS, {})
    hints = tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in sizes)
    for size, first in zip(sizes, firsts.setdefault((layout, kind, hints), sizes), strict=True):
        if isinstance(size, torch.SymInt) and isinstance(first, torch.SymInt):
            bool(size == first)
