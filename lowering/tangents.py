"""Refuse calls whose arguments carry tangents of forward-mode differentiation: packed caches have none.

Operators on packed caches compute no tangents, and PyTorch drops those of their arguments without a word. Whether an
argument carries one is no property that graphs are guarded by, so each call looks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.autograd import forward_ad

from kvq_compile.lowering.nodes import source_name


def refusing_tangents(gm: fx.GraphModule, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call``, which takes the arguments of a graph, so that it raises where one of them carries a tangent.

    Raises:
        NotImplementedError: When called with such an argument.
    """
    names = [source_name(node) for node in gm.graph.find_nodes(op="placeholder")]

    def checked(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            for name, x in zip(names, args, strict=True):
                if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                    raise NotImplementedError(
                        f"{name} must carry no tangent where caches are quantized, got one of forward-mode "
                        "differentiation; differentiate the model uncompiled, with caches that are not "
                        "quantized"
                    )
        return call(*args)

    return checked
