"""Whole decoding steps of a model of a known shape with random weights, over caches of random tokens.

Caches are filled without computing a prompt. Times are milliseconds: medians of steps *waited* for and of the *host*
until a call returns; *ahead* is the mean from one step to the next without waiting.

A run is named by what its cache is: a method, ``int4`` or ``tc:bits=3``, with a dynamic cache, or with a static one as
``int4-static``; ``int4-unrecorded`` launches its steps one by one; ``hf-static`` and ``hf-dynamic`` are transformers'
caches in 16 bit, compiled; ``hf-quanto``, ``hf-hqq`` its quantized cache, which does not compile. Behind any that is
compiled ``-tuned`` has Inductor try tiles for the model's own products (``coordinate_descent_tuning``).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvq_compile import backend
from kvq_compile.bench.memory import held_bytes
from kvq_compile.bench.rows import reason
from kvq_compile.evaluation.runner import parse_method
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.loading import cache_argument, require_transformers
from kvq_compile.lowering import steps as stepping
from kvq_compile.reports import report

BASELINE = "hf-static"
TUNED = "-tuned"
QUANTIZED_PEERS = ("hf-quanto", "hf-hqq")
PEERS = (BASELINE, "hf-dynamic", *QUANTIZED_PEERS)
RUNS = (BASELINE, "int4", "tc:bits=4", "int4-static", *QUANTIZED_PEERS)
SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "num_hidden_layers": 32,
    },
    "llama-2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "num_hidden_layers": 32,
    },
    "small": {
        "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 1024, "num_hidden_layers": 2,
    },
}  # fmt: skip
WARM, TIMED, FEW = (
    8,
    24,
    8,
)  # steps before those that are timed; timed; sequences that are made: more are copies
SPARE = 4 * TIMED
CASE = ("model", "layers", "run", "batch", "context")


@dataclass(frozen=True)
class Row:
    """What was measured of a run at one shape; ``None`` where it was not.

    Attributes:
        waited, ahead, host: Milliseconds a step; see the module.
        compiled_s: Seconds of the first three steps, which compile.
        records: How often a step was recorded as a CUDA graph.
        peak_gib: Most memory on the GPU from the first step on.
        cache_bytes: Of the cache behind the last step.
        refused: Why nothing was measured.
    """

    model: str
    layers: int
    run: str
    batch: int
    context: int
    waited: float | None = None
    ahead: float | None = None
    host: float | None = None
    compiled_s: float | None = None
    records: int | None = None
    peak_gib: float | None = None
    cache_bytes: int | None = None
    refused: str = ""


def check_run(run: str) -> None:
    """Make sure that there is a run of this name.

    Raises:
        ValueError: There is none.
    """
    if run.startswith("hf-"):
        if run not in (*PEERS, BASELINE + TUNED, "hf-dynamic" + TUNED):
            raise ValueError(f"run must be a method or one of {', '.join(PEERS)}, got {run!r}")
    else:
        parse_method(method_of(run))


def method_of(run: str) -> str:
    """Return the method of a run."""
    return run.removesuffix(TUNED).removesuffix("-static").removesuffix("-unrecorded")


def options_of(run: str) -> dict[str, Any]:
    """Return the options of a run of a method."""
    mode = {"mode": "default"} if run.removesuffix(TUNED).endswith("-unrecorded") else {}
    tuning = {"inductor": _tuning(run)} if run.endswith(TUNED) else {}
    return {**(parse_method(method_of(run)).options or {}), **mode, **tuning}


def _tuning(run: str) -> dict[str, Any]:
    """Return Inductor's settings for a run."""
    return {"coordinate_descent_tuning": True} if run.endswith(TUNED) else {}


def make_model(shape: str, layers: int, device: torch.device) -> Any:
    """Return a model with random bf16 weights, made on its device.

    Raises:
        ImportError: transformers is missing.
    """
    require_transformers()
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**SHAPES[shape], "num_hidden_layers": layers}
    config = LlamaConfig(
        **sizes, rope_theta=5e5, max_position_embeddings=131072 + 4096, dtype=torch.bfloat16
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:  # no default device: it would cost time at every call
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def prepare(model: Any, run: str) -> None:
    """Compile a model for a run, whose shapes share the graphs."""
    torch._dynamo.reset()
    model._compiled_call_impl = None
    if run.startswith(BASELINE):
        graphs = {"triton.cudagraphs": model.device.type == "cuda"}
        model.compile(fullgraph=True, options={**graphs, **_tuning(run)})
    elif run.startswith("hf-dynamic"):
        model.compile(options=_tuning(run))
    elif not run.startswith("hf-"):
        model.compile(backend="kvq", options=options_of(run))


def filled_cache(model: Any, run: str, batch: int, context: int, like: Any) -> Any:
    """Return a cache of random tokens; a quantized one that grows is laid out ``like`` the layer of a short cache."""
    from transformers import DynamicCache, QuantizedCache

    config, device = model.config, model.device
    heads, size = config.num_key_value_heads, config.head_dim
    if _is_static(run):
        return _static_cache(model, batch, context)
    few = math.gcd(batch, FEW)

    def tokens() -> Tensor:
        return torch.randn(few, heads, context, size, dtype=torch.bfloat16, device=device)

    if run in QUANTIZED_PEERS:
        cache = QuantizedCache(backend=run.removeprefix("hf-"), config=config, nbits=4)
        for number in range(config.num_hidden_layers):
            pair = [tokens().repeat_interleave(batch // few, 0) for _ in range(2)]
            cache.update(*pair, number)
        return cache
    cache = DynamicCache(config=config)
    for layer in cache.layers:
        for name in ("keys", "values"):
            x: Tensor = tokens()
            if like is not None:
                short = getattr(like, name)
                x = QuantizedKV.from_dense(
                    x, short.page_layout, tables=short.tables, shift=short.shift
                )
            setattr(layer, name, x if few == batch else x.repeat_interleave(batch // few, 0))
        layer.is_initialized, layer.dtype, layer.device = True, torch.bfloat16, device
    return cache


def _is_static(run: str) -> bool:
    return run.removesuffix(TUNED).endswith("-static")


def _static_cache(model: Any, batch: int, context: int) -> Any:
    from transformers import StaticCache

    config = model.config
    cache = StaticCache(config, max_cache_len=context + WARM + SPARE)
    if not hasattr(cache.layers[0], "cumulative_length"):
        raise NotImplementedError(
            "transformers must count the tokens of static caches, got a version that does not; upgrade it"
        )
    about = torch.bfloat16, model.device
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, *about)
    for layer in cache.layers:
        layer.keys[:, :, :context].normal_()
        layer.values[:, :, :context].normal_()
        layer.cumulative_length.fill_(context)
    return cache


@torch.no_grad()
def layout_of(model: Any, run: str) -> Any:
    """Return a layer's cache of a run that grows a quantized one, as all layers are laid out; ``None`` of others."""
    if run.startswith("hf-") or _is_static(run):
        return None
    from transformers import DynamicCache, LlamaForCausalLM

    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 1})
    with model.device:
        small = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    small.compile(backend="kvq", options=options_of(run) | {"inner": "eager"})
    cache = DynamicCache(config=config)
    small(
        torch.zeros(1, 40, dtype=torch.long, device=model.device), **{cache_argument(small): cache}
    )
    return cache.layers[0]


def steps_of(model: Any, cache: Any, batch: int, context: int) -> Iterator[Callable[[], Tensor]]:
    """Yield steps as `generate` makes them: a token, its position."""
    ids = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    name, place = cache_argument(model), context
    while True:
        position = torch.full((batch, 1), place, dtype=torch.int64, device=model.device)

        def step(position: Tensor = position) -> Tensor:
            found = model(ids, position_ids=position, use_cache=True, **{name: cache})
            token: Tensor = found.logits[:, -1].argmax(-1, keepdim=True)
            return token

        yield step
        place += 1


def wait(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(steps: Iterator[Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Return milliseconds a step."""
    for _ in range(WARM):
        next(steps)()
    waited, host = [], []
    for _ in range(TIMED):
        step = next(steps)
        wait(device)
        start = time.perf_counter()
        step()
        host.append(time.perf_counter() - start)
        wait(device)
        waited.append(time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(TIMED):
        next(steps)()
    wait(device)
    ahead = (time.perf_counter() - start) / TIMED
    medians = {"waited": statistics.median(waited), "ahead": ahead, "host": statistics.median(host)}
    return {name: round(1e3 * seconds, 2) for name, seconds in medians.items()}


class Recordings(list[float]):
    """Seconds that each recording of a step took, while this is in place."""

    def __enter__(self) -> Recordings:
        self._before = backend.RECORDERS["cuda"]
        backend.RECORDERS["cuda"] = self._record
        return self

    def __exit__(self, *_: object) -> None:
        backend.RECORDERS["cuda"] = self._before

    def _record(self, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        replay = stepping.record_on_gpu(run)
        torch.cuda.synchronize()
        self.append(time.perf_counter() - start)
        return replay


Look = Callable[[Iterator[Callable[[], Any]]], object]


@torch.no_grad()
def measure(
    model: Any, row: Row, like: Any, recordings: Sequence[float], look: Look | None = None
) -> Row:
    """Measure a run at one shape; ``look`` gets further steps, as a profiler does. What does not run says why.

    ``like`` is what `layout_of` returned.
    """
    device, before = model.device, len(recordings)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        cache = filled_cache(model, row.run, row.batch, row.context, like)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        steps = steps_of(model, cache, row.batch, row.context)
        for _ in range(3):
            next(steps)()
        wait(device)
        compiled = time.perf_counter() - start
        times = timed(steps, device)
        if look is not None:
            look(steps)
    except Exception as error:  # whatever stops one run is told of it, and the others go on
        return replace(row, refused=reason(error))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return replace(
        row,
        waited=times["waited"],
        ahead=times["ahead"],
        host=times["host"],
        compiled_s=round(compiled, 1),
        records=len(recordings) - before,
        peak_gib=None if peak is None else round(peak, 1),
        cache_bytes=_bytes(cache, row.run),
    )


def _bytes(cache: Any, run: str) -> int:
    if run in QUANTIZED_PEERS:  # whose layers show the tokens only that are not quantized yet
        return held_bytes(cache.layers)
    return report(cache).bytes


def run_all(
    model: Any, name: str, runs: Sequence[str], shapes: Sequence[tuple[int, int]],
    known: Callable[[Row], bool] = lambda row: False, look: Look | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Measure runs, each over all shapes, and yield their rows; those that are known are left out."""
    with Recordings() as recordings:
        for run in runs:
            rows = [Row(name, model.config.num_hidden_layers, run, *shape) for shape in shapes]
            rows = [row for row in rows if not known(row)]
            like = None
            if rows:
                like = layout_of(model, run)
                prepare(model, run)
            for row in rows:
                yield measure(model, row, like, recordings, look)
