"""Steps of a model that is split over processes: whether they can be recorded, and when their recordings have to go."""

from __future__ import annotations

import atexit
import functools
import threading
import weakref
from typing import Any

import torch
from torch import distributed, fx
from torch.fx import Node

from kvq_compile.lowering.nodes import root_of, target_name, value_of
from kvq_compile.lowering.steps import Steps

OTHERS = "it waits for other processes"
DISTRIBUTED = "its tensors are distributed over processes"
ASK = '; options={"mode": "reduce-overhead"} records such steps, too'  # behind either
APART = f"{OTHERS}, and begins that or ends it in another graph"
# Backends whose collectives a CUDA graph records: the host takes no part in them.
RECORDED = ("nccl",)
_names: weakref.WeakKeyDictionary[Steps, frozenset[str]] = weakref.WeakKeyDictionary()
_taking_turns = threading.RLock()  # groups are shut down in other threads than graphs are compiled


def why_not_recorded(graph: fx.Graph, device: torch.device, asked: bool) -> str | None:
    """Return why steps with the collectives of a graph are not recorded; ``None`` if they are, or where it has none.

    Where NCCL registers buffers while it records, all processes have to record the same step, which nothing here can
    promise: so it is the user who asks for it.

    Args:
        graph: The captured graph.
        device: Where it computes.
        asked: Whether the user named a mode that records steps.
    """
    groups = _groups(graph)
    reason = OTHERS if any(map(_is_collective, graph.nodes)) else DISTRIBUTED
    if not all(_is_recorded(group, device) for group in groups):
        return reason
    if not _ends_what_it_begins(graph):
        return APART  # a copy of a result would be made before that is there
    return reason + ASK if groups and not asked else None


def watch(steps: Steps, graph: fx.Graph) -> None:
    """Give up recordings of a captured graph before one of the groups that it waits for is shut down."""
    names = frozenset(group.group_name for group in _groups(graph) if group is not None)
    with _taking_turns:
        _names[steps] = names


def forget_recordings(name: str | None = None) -> None:
    """Give up the recordings that may wait for a group, or all; steps that follow are recorded anew.

    Those that are known to wait for other groups alone stay: the processes of these may not know this one, and would
    replay a step which this process records.
    """
    with _taking_turns:
        known = list(_names.items())
    for steps, names in known:
        if name is None or name in names or not names:
            steps.forget()


def watch_groups() -> None:
    """Give up recorded steps before a process group is shut down or aborted, and when the process ends.

    NCCL waits until no CUDA graph holds its operations. Recordings do not go with ``torch._dynamo.reset()``: Dynamo
    keeps what it compiled of a function with collectives for good (torch 2.11 to 2.13, with any backend).
    """
    if not distributed.is_available():
        return
    for way in ("shutdown", "abort"):
        original = getattr(distributed.ProcessGroup, way)
        if getattr(original, "_kvq_watches", False):
            return
        setattr(distributed.ProcessGroup, way, _watched(original))
    atexit.register(forget_recordings)


def _watched(original: Any) -> Any:
    @functools.wraps(original)
    def leave(self: Any) -> None:
        try:
            name = self.group_name
        except RuntimeError:  # it has none
            name = None
        forget_recordings(name)
        original(self)

    leave._kvq_watches = True  # type: ignore[attr-defined]
    return leave


def _groups(graph: fx.Graph) -> list[Any]:
    """Return the groups of processes that a graph waits for; ``None`` stands for those that are not known.

    What an operation on a `DTensor` waits for, if at all, is settled where the graph is compiled.
    """
    found: list[Any] = []
    for node in graph.nodes:
        mesh = _real(getattr(value_of(node), "device_mesh", None))
        if mesh is not None:
            try:
                found += mesh.get_all_groups()
            except (AttributeError, RuntimeError):  # of a mesh without groups
                found.append(None)
        elif _is_collective(node):
            found.append(_group_of(node))
    return list(dict.fromkeys(found))


def _is_collective(node: Node) -> bool:
    return node.op == "call_function" and "c10d" in str(node.target) and not _waits(node)


def _waits(node: Node) -> bool:
    return target_name(node).startswith("wait_tensor")


def _group_of(node: Node) -> Any:
    group = _real(value_of(node.kwargs.get("group_name", node.args[-1] if node.args else None)))
    if isinstance(group, str):
        try:
            group = torch._C._distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
        except RuntimeError:  # it is gone
            return None
    return group if isinstance(group, distributed.ProcessGroup) else None


def _real(x: Any) -> Any:
    """Return what Dynamo shows to graphs as something that has no attributes."""
    return getattr(x, "real_obj", x)


def _is_recorded(group: Any, device: torch.device) -> bool:
    try:
        backend = group._get_backend(device)
        # One that checks what processes ask for has them talk to each other first.
        return backend.name() in RECORDED and not hasattr(backend, "wrapped_pg")
    except (AttributeError, RuntimeError):  # no group, or one without a backend for the device
        return False


def _ends_what_it_begins(graph: fx.Graph) -> bool:
    """Return whether a graph waits for all collectives that it has, and for no others."""
    begun = {root_of(node) for node in graph.nodes if _is_collective(node)}
    return begun == {root_of(node.args[0]) for node in graph.nodes if _waits(node)}
