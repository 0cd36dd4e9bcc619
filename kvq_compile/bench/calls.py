"""Whole calls of a model that are no steps: prompts, first compiled calls after prompts that were not, new processes.

Models have a known shape and random weights, as in `steps`, which names the runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvq_compile.bench.clock import launched
from kvq_compile.bench.rows import reason
from kvq_compile.bench.steps import (
    SHAPES,
    filled_cache,
    make_model,
    method_of,
    prepare,
    steps_of,
    wait,
)
from kvq_compile.loading import cache_argument

PLAIN = "hf-dynamic"  # a 16-bit dynamic cache under Inductor
RUNS = (PLAIN, "int4", "tc:bits=4")
PROMPTED, DECODED = 512, 4  # tokens of a prompt, and steps, in a new process
PROMPT_CASE = ("model", "layers", "run", "batch", "context")
START_CASE = ("model", "layers", "run", "caches")


@dataclass(frozen=True)
class Prompt:
    """What was measured of a compiled prompt; ``None`` where it was not.

    Attributes:
        ms: Time of the call [ms].
        plain_ms: That of `PLAIN` in the same run.
        first_s: Time of the first call, which compiles [s].
        peak_gib: Most memory on the GPU during a call, without the weights [GiB].
        refused: Why nothing was measured.
    """

    model: str
    layers: int
    run: str
    batch: int
    context: int
    ms: float | None = None
    plain_ms: float | None = None
    first_s: float | None = None
    peak_gib: float | None = None
    refused: str = ""


@dataclass(frozen=True)
class FirstCall:
    """What the first compiled call took onto a cache that was filled uncompiled; ``None`` where it was not measured.

    Attributes:
        cache_gib: The cache in 16 bit, before the call [GiB].
        layer_gib: Of which that of a layer.
        more_gib: Most memory on the GPU during the call, beyond weights and cache.
        after_gib: What is held after the call, beyond the weights.
        seconds: Of the call, which compiles.
        refused: Why nothing was measured.
    """

    model: str
    layers: int
    run: str
    batch: int
    context: int
    cache_gib: float | None = None
    layer_gib: float | None = None
    more_gib: float | None = None
    after_gib: float | None = None
    seconds: float | None = None
    refused: str = ""


@dataclass(frozen=True)
class Start:
    """What a new process took, in seconds; ``None`` where that was not measured.

    Attributes:
        caches: Those of PyTorch and Triton on disk: ``"cold"``, or ``"warm"``, filled by a process before.
        imports: Importing torch, transformers and this package.
        prompt: The first call, of `PROMPTED` tokens.
        first_token: From the start of the process to the first token, without making weights.
        steps: The first `DECODED` steps.
        step: The last of them.
        refused: Why nothing was measured.
    """

    model: str
    layers: int
    run: str
    caches: str
    imports: float | None = None
    prompt: float | None = None
    first_token: float | None = None
    steps: float | None = None
    step: float | None = None
    refused: str = ""


# Prompts


def prompt_call(model: Any, batch: int, context: int) -> Callable[[], Any]:
    """Return a call that computes a prompt of random tokens onto a new dynamic cache, and the logits of its end."""
    from transformers import DynamicCache

    words, name = model.config.vocab_size, cache_argument(model)
    ids = torch.randint(0, words, (batch, context), dtype=torch.int64, device=model.device)

    def call() -> Any:
        cache = DynamicCache(config=model.config)
        return model(ids, use_cache=True, logits_to_keep=1, **{name: cache})

    return call


@torch.no_grad()
def measure_prompts(
    model: Any, name: str, runs: Sequence[str], shapes: Sequence[tuple[int, int]]
) -> Iterator[Prompt]:
    """Measure prompts under `PLAIN` and then other runs, each compiled anew for each shape; yield their rows."""
    device, layers = model.device, model.config.num_hidden_layers
    for shape in shapes:
        plain: float | None = None
        for run in dict.fromkeys((PLAIN, *runs)):
            row = Prompt(name, layers, run, *shape)
            try:
                prepare(model, run)
                call = prompt_call(model, *shape)
                first = _seconds(call, device)
                ms = 1e3 * launched(call, device)
                row = replace(row, ms=ms, first_s=round(first, 1), peak_gib=_peak(call, device))
            except Exception as error:  # what stops one run is told of it, and the others go on
                row = replace(row, refused=reason(error))
            plain = row.ms if run == PLAIN else plain
            yield replace(row, plain_ms=plain)


# The first compiled call


@torch.no_grad()
def measure_first_calls(
    model: Any, name: str, runs: Sequence[str], shapes: Sequence[tuple[int, int]]
) -> Iterator[FirstCall]:
    """Measure memory of the first compiled step onto 16-bit caches, dynamic ones and static ones; yield rows."""
    device, layers = model.device, model.config.num_hidden_layers
    for shape in shapes:
        for run in runs:
            row = FirstCall(name, layers, run, *shape)
            try:
                yield _first_call(model, row, device)
            except Exception as error:  # what stops one run is told of it, and the others go on
                yield replace(row, refused=reason(error))


def _first_call(model: Any, row: FirstCall, device: torch.device) -> FirstCall:
    prepare(model, row.run)
    weights = _allocated(device)
    plain = "hf-static" if row.run.endswith("-static") else PLAIN
    cache = filled_cache(model, plain, row.batch, row.context, None)
    held = _allocated(device)
    step = next(steps_of(model, cache, row.batch, row.context))
    seconds: list[float] = []
    peak = _peak(lambda: seconds.append(_seconds(step, device)), device)
    dense = sum(
        x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values)
    )  # of the sizes that are shown, whatever they take
    after = _allocated(device)
    return replace(
        row, cache_gib=dense / 2**30, layer_gib=dense / 2**30 / len(cache.layers), more_gib=peak,
        after_gib=None if held is None or after is None or weights is None else after - weights,
        seconds=round(seconds[0], 1),
    )  # fmt: skip


def _allocated(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / 2**30


def _peak(call: Callable[[], Any], device: torch.device) -> float | None:
    """Return the most memory during a call beyond what was held before it."""
    before = _allocated(device)
    if before is None:
        call()
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30 - before


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


# New processes


def measure_starts(
    name: str, layers: int, runs: Sequence[str], device: torch.device
) -> Iterator[Start]:
    """Run a prompt and some steps in new processes, with empty caches on disk and then with those; yield rows."""
    for run in runs:
        with tempfile.TemporaryDirectory() as folder:
            for caches in ("cold", "warm"):
                row = Start(name, layers, run, caches)
                yield _start(row, device, Path(folder))


def _start(row: Start, device: torch.device, folder: Path) -> Start:
    places = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    asked = json.dumps([row.model, row.layers, row.run, str(device)])
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "kvq_compile.bench.calls", asked, str(began)],
        env=os.environ | places, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return replace(row, refused=lines[-1] if lines else f"exit status {done.returncode}")
    return replace(row, **json.loads(done.stdout.splitlines()[-1]))


@torch.no_grad()
def start(model_name: str, layers: int, run: str, device: torch.device, began: float) -> dict[str, float]:  # fmt: skip
    """Compute a prompt and some steps in this process, and return its times; ``began`` is when that was started."""
    imported = time.time() - began
    making = time.time()
    model = make_model(model_name, layers, device)
    wait(device)
    made = time.time() - making
    prepare(model, run)
    found: list[Any] = []
    call = prompt_call(model, 1, PROMPTED)
    prompt = _seconds(lambda: found.append(call()), device)
    token: Tensor = found[0].logits[:, -1].argmax(-1)
    token.tolist()
    first = time.time() - began - made
    cache = getattr(found.pop(), cache_argument(model))
    following = steps_of(model, cache, 1, PROMPTED)
    steps = [_seconds(next(following), device) for _ in range(DECODED)]
    times = {"imports": imported, "prompt": prompt, "first_token": first}
    times |= {"steps": sum(steps), "step": steps[-1]}
    return {name: round(seconds, 3) for name, seconds in times.items()}


def check_model(name: str) -> None:
    """Make sure that there is a shape of this name.

    Raises:
        ValueError: There is none.
    """
    if name not in SHAPES:
        raise ValueError(f"model must be one of {', '.join(SHAPES)}, got {name!r}")


def is_dynamic(run: str) -> bool:
    """Return whether a run has a dynamic cache that is compiled."""
    return run == PLAIN or (not run.startswith("hf-") and run == method_of(run))


if __name__ == "__main__":
    name, count, chosen, place = json.loads(sys.argv[1])
    print(json.dumps(start(name, count, chosen, torch.device(place), float(sys.argv[2]))))
