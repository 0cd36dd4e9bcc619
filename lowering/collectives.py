"""Steps of a model that is split over processes: whether they can be recorded, and when their recordings have to go."""

from __future__ import annotations

import atexit
import functools
from typing import Any

import torch
from torch import distributed, fx
from torch.fx import Node

from kvq_compile.lowering.nodes import target_name
from kvq_compile.lowering.steps import forget_recordings

OTHERS = "it waits for other processes"
ASK = f'{OTHERS}; options={{"mode": "reduce-overhead"}} records such steps, too'
RECORDED = (
    "nccl",
)  # backends whose collectives a CUDA graph records: the host takes no part in them


def why_not_recorded(graph: fx.Graph, device: torch.device, asked: bool) -> str | None:
    """Return why steps with the collectives of a graph are not recorded; ``None`` if they are, or where it has none.

    Where NCCL registers buffers while it records, all processes have to record the same step, which nothing here can
    promise: so it is the user who asks for it.

    Args:
        graph: The captured graph.
        device: Where it computes.
        asked: Whether the user named a mode that records steps.
    """
    collectives = [node for node in graph.nodes if "c10d" in str(node.target)]
    if not all(_is_recorded(node, device) for node in collectives):
        return OTHERS
    return ASK if collectives and not asked else None


def _is_recorded(node: Node, device: torch.device) -> bool:
    if target_name(node) == "wait_tensor":
        return True
    group: Any = node.args[-1] if node.args else None  # or its name
    if isinstance(group, str):
        group = torch._C._distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    if not isinstance(group, distributed.ProcessGroup):
        return False
    return group._get_backend(device).name() in RECORDED


def watch_groups() -> None:
    """Give up recorded steps before a process group is shut down, and when the process ends.

    NCCL waits until no CUDA graph holds its operations. Recordings do not go with ``torch._dynamo.reset()``: Dynamo
    keeps what it compiled of a function with collectives for good (torch 2.11 to 2.13, with any backend).
    """
    if not distributed.is_available():
        return
    original = distributed.ProcessGroup.shutdown
    if getattr(original, "_kvq_watches", False):
        return

    @functools.wraps(original)
    def shutdown(self: Any) -> None:
        forget_recordings()
        original(self)

    shutdown._kvq_watches = True  # type: ignore[attr-defined]
    distributed.ProcessGroup.shutdown = shutdown  # type: ignore[method-assign]
    atexit.register(forget_recordings)
