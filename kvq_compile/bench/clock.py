"""How long a call takes, with nothing of what it reads in the processor's caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

COLD_BYTES = 256 << 20  # written before each call: more than caches hold
ROUNDS = {"cuda": 100, "cpu": 15}


def microseconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call: replayed from a CUDA graph on a GPU, waited for on a CPU."""
    step()
    cold = torch.empty(COLD_BYTES // 4, dtype=torch.int32, device=device)
    return _on_gpu(step, cold) if device.type == "cuda" else _on_cpu(step, cold)


def _on_gpu(step: Callable[[], object], cold: torch.Tensor) -> float:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS["cuda"])
    ]
    for start, end in events:
        cold.zero_()  # while it runs, the host launches what is timed
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = [float(start.elapsed_time(end)) for start, end in events]
    return 1e3 * statistics.median(times)


def _on_cpu(step: Callable[[], object], cold: torch.Tensor) -> float:
    seconds = []
    for round_number in range(ROUNDS["cpu"]):
        cold.fill_(round_number)
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)
