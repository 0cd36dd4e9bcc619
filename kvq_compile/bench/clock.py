"""How long a call takes in a step of many layers: each reads memory of its own, which no cache holds any more."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 256 << 20  # read before the first layer is read again: more than caches hold
LAYERS = {"cuda": 8, "cpu": 1}  # at least, so that the launch of a graph is shared
MOST_LAYERS = 64  # as many as models have: caches so short may stay in a processor's own there, too
ROUNDS = {"cuda": 15, "cpu": 15}
REPLAYS = 10  # of a CUDA graph, in a round
LAUNCHED = 15  # calls that take milliseconds


def layers_in_turn(bytes_read: int, device: torch.device) -> int:
    """Return how many layers have to be read in turn so that none is in a cache when its turn comes again."""
    cold = -(-COLD_BYTES // max(1, bytes_read))
    return max(LAYERS[device.type], min(cold, MOST_LAYERS))


def microseconds(
    layers: Sequence[Callable[[], object]],
    device: torch.device,
    first: Callable[[], object] | None = None,
) -> float:
    """Return the median time of a call: replayed from a CUDA graph on a GPU, waited for on a CPU.

    Args:
        layers: The same call on memory of each layer, made one after another.
        device: Where they run.
        first: Called before all of them, within what is timed.
    """

    def step() -> None:
        for call in (*([first] if first else []), *layers):
            call()

    step()
    seconds = _on_gpu(step) if device.type == "cuda" else _on_cpu(step)
    return 1e6 * statistics.median(seconds) / len(layers)


def launched(call: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call that no graph holds, in seconds: launched and waited for, each by itself."""
    call()
    seconds = []
    for _ in range(LAUNCHED):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _on_gpu(step: Callable[[], object]) -> list[float]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS["cuda"] + 1)]
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(REPLAYS):
            graph.replay()
        mark.record()
    torch.cuda.synchronize()
    milliseconds = [float(start.elapsed_time(end)) for start, end in itertools.pairwise(marks)]
    return [each / 1e3 / REPLAYS for each in milliseconds]


def _on_cpu(step: Callable[[], object]) -> list[float]:
    seconds = []
    for _ in range(ROUNDS["cpu"]):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds
