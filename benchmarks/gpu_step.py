"""Time whole decoding steps of a model of the shape of Llama-3-8B with random weights, on a GPU.

Caches are filled with random tokens, so that no prompt is computed. Times are milliseconds: medians of steps *waited*
for and of the *host* until a call returns; *ahead* is the mean from one step to the next without waiting.

    python benchmarks/gpu_step.py [--layers 32] [--shapes 1x4096,1x32768] [--runs hf-static,int4,tc:bits=3] [--out FILE]
    python benchmarks/gpu_step.py --check       # replayed steps against launched ones, token by token, on small models
"""

from __future__ import annotations

import argparse
import cProfile
import csv
import math
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from kvq_compile import QuantizedKV, backend
from kvq_compile.evaluation.runner import parse_method
from kvq_compile.history import graphs
from kvq_compile.lowering import steps as stepping

WARM, TIMED = 8, 24
FEW = 8  # sequences that are made; more are copies of them
SPARE = 4 * TIMED
recorded: list[float] = []  # seconds that each recording took


def counted(run: Callable[[], Any]) -> Any:
    """Record a step and note how long that took."""
    start = time.perf_counter()
    replay = stepping.record_on_gpu(run)
    torch.cuda.synchronize()
    recorded.append(time.perf_counter() - start)
    return replay


def llama(layers: int, small: bool = False) -> LlamaForCausalLM:
    """Return a model with random bf16 weights, made on the GPU."""
    sizes = {
        "hidden_size": 512 if small else 4096, "intermediate_size": 1024 if small else 14336,
        "num_attention_heads": 8 if small else 32, "num_key_value_heads": 2 if small else 8,
        "vocab_size": 1024 if small else 128256, "num_hidden_layers": layers,
    }  # fmt: skip
    config = LlamaConfig(
        **sizes, rope_theta=5e5, max_position_embeddings=131072 + 4096, dtype=torch.bfloat16
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):  # no default device: it would cost time at every call
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def options(run: str) -> dict[str, Any]:
    """Return the options of a run."""
    mode = {"mode": "default"} if run.endswith("unrecorded") else {}
    return {**(parse_method(run.split("-")[0]).options or {}), **mode}


def short_cache(run: str) -> DynamicCache:
    """Return a cache of a model of one layer, which shows how those of all layers are laid out."""
    model = llama(1)
    model.compile(backend="kvq", options=options(run) | {"inner": "eager"})
    cache = DynamicCache(config=model.config)
    model(torch.zeros(1, 40, dtype=torch.long, device="cuda"), past_key_values=cache)
    torch._dynamo.reset()
    return cache


def long_cache(model: Any, run: str, batch: int, context: int) -> Any:
    """Return a cache of random tokens."""
    config, slots = model.config, context + WARM + SPARE
    heads, shape = config.num_key_value_heads, (context, config.head_dim)
    if run.endswith("static"):
        cache = StaticCache(config, max_cache_len=slots)
        about = torch.bfloat16, torch.device("cuda")
        cache.early_initialization(batch, heads, config.head_dim, *about)
        for layer in cache.layers:
            layer.keys[:, :, :context].normal_()
            layer.values[:, :, :context].normal_()
            layer.cumulative_length.fill_(context)
        return cache
    short = None if run.startswith("hf") else short_cache(run).layers[0]
    cache = DynamicCache(config=config)
    for layer in cache.layers:
        for name in ("keys", "values"):
            few = math.gcd(batch, FEW)
            x = torch.randn(few, heads, *shape, dtype=torch.bfloat16, device="cuda")
            if short is not None:
                like = getattr(short, name)
                about = {"tables": like.tables, "shift": like.shift}
                x = QuantizedKV.from_dense(x, like.page_layout, **about)
            setattr(layer, name, x if few == batch else x.repeat_interleave(batch // few, 0))
        layer.is_initialized, layer.dtype, layer.device = True, torch.bfloat16, x.device
    return cache


def decode(model: Any, cache: Any, batch: int, context: int) -> Iterator[Callable[[], None]]:
    """Yield steps as `generate` makes them: a token, its position."""
    ids = torch.ones(batch, 1, dtype=torch.long, device="cuda")
    place = context
    while True:
        position = torch.full((batch, 1), place, device="cuda")

        def step(ids: Tensor = ids, position: Tensor = position) -> Tensor:
            logits = model(ids, position_ids=position, past_key_values=cache, use_cache=True).logits
            return logits[:, -1].argmax(-1, keepdim=True)

        yield step
        place += 1


def timed(steps: Iterator[Callable[[], Any]]) -> dict[str, float]:
    """Return milliseconds a step."""
    for _ in range(WARM):
        next(steps)()
    waited, host = [], []
    for _ in range(TIMED):
        step = next(steps)
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        waited.append(time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(TIMED):
        next(steps)()
    torch.cuda.synchronize()
    ahead = (time.perf_counter() - start) / TIMED
    medians = {"waited": statistics.median(waited), "ahead": ahead, "host": statistics.median(host)}
    return {name: round(1e3 * seconds, 2) for name, seconds in medians.items()}


def prepare(model: Any, run: str) -> None:
    """Compile a model for a run; its shapes share the graphs."""
    torch._dynamo.reset()
    model._compiled_call_impl = None
    if run == "hf-static":
        model.compile(mode="reduce-overhead", fullgraph=True)
    elif run == "hf-dynamic":
        model.compile()
    else:
        model.compile(backend="kvq", options=options(run))


def measure(
    model: Any, run: str, batch: int, context: int, profile: bool = False
) -> dict[str, Any]:
    """Time one run of one shape."""
    torch.cuda.empty_cache()
    recorded.clear()
    cache = long_cache(model, run, batch, context)
    start = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    steps = decode(model, cache, batch, context)
    for _ in range(3):
        next(steps)()
    torch.cuda.synchronize()
    compiled = time.perf_counter() - start
    row = timed(steps)
    if profile:
        profiled(steps)
    gib = torch.cuda.max_memory_allocated() / 2**30
    return row | {
        "compiled_s": round(compiled),
        "records": len(recorded),
        "peak_gib": round(gib, 1),
    }


CHECKS: dict[str, tuple[int, dict[str, Any]]] = {
    "one sequence": (1, {}),
    "left padding": (3, {}),
    "assisted": (1, {"assistant": True}),
    "beams": (2, {"num_beams": 2}),
}


def check() -> None:
    """Compare generations whose steps are replayed with those whose steps are launched, token by token."""
    model, assistant = llama(2, small=True), llama(1, small=True)
    for method, name in [("int4", name) for name in CHECKS] + [
        ("tc", "left padding"),
        ("qaq", "one sequence"),
    ]:
        batch, more = CHECKS[name]
        rest = {"assistant_model": assistant} if "assistant" in more else more
        tokens = []
        recorded.clear()
        for mode in ("default", None):
            torch._dynamo.reset()
            model.compile(backend="kvq", options={"method": method, "mode": mode, "inner": "eager"})
            ids = torch.randint(1, 1000, (batch, 30), generator=torch.Generator().manual_seed(1))
            ids = ids.cuda()
            mask = torch.ones_like(ids)
            mask[1:, :7] = 0
            about = {"attention_mask": mask, "max_new_tokens": 200, "pad_token_id": 0}
            tokens.append(model.generate(ids, do_sample=False, **about, **rest))
        same = tokens[0].shape == tokens[1].shape and torch.equal(*tokens)
        each = 1e3 * sum(recorded) / max(1, len(recorded))
        print(
            f"{method}, {name}: equal {same}, {len(recorded)} recorded, {each:.0f} ms each",
            flush=True,
        )
        print({graph.steps for graph in graphs()}, flush=True)


def profiled(steps: Iterator[Callable[[], Any]]) -> None:
    """Print where the host's time goes."""
    with cProfile.Profile() as profile:
        for _ in range(TIMED):
            next(steps)()
    torch.cuda.synchronize()
    pstats.Stats(profile).sort_stats("tottime").print_stats(28)


def main() -> None:
    """Time what was asked for and write rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shapes", default="1x4096,1x32768")
    parser.add_argument(
        "--runs",
        default="hf-static,int4,tc,int4-static",
        help="method, -static, -unrecorded, or hf-",
    )
    parser.add_argument("--commit", default="", help="of the code")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where the host's time goes")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    backend.RECORDERS["cuda"] = counted
    if given.check:
        return check()
    model = llama(given.layers)
    about = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "transformers": transformers.__version__, "commit": given.commit, "layers": given.layers,
    }  # fmt: skip
    rows = []
    for run in given.runs.split(","):
        prepare(model, run)
        for shape in given.shapes.split(","):
            batch, context = map(int, shape.split("x"))
            times = measure(model, run, batch, context, given.profile)
            rows.append(about | {"run": run, "batch": batch, "context": context} | times)
            print(rows[-1], flush=True)
    if given.out is not None:
        new = not given.out.exists()
        with given.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
