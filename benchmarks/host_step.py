"""Time what the host does for a decoding step, without what it launches: no GPU is needed.

A model of many tiny layers is compiled; a recorded step is not launched again, its results stay as they are. What is
left is Dynamo's checks, the runtime around the graph, and transformers. The floor is a 16-bit cache under a backend
that does nothing either. Times are milliseconds of processor time of one thread a step: the median and the least,
since others may use the machine. The parts of a step, each its least: what runs before Dynamo has chosen a graph
(transformers, and Dynamo's checks), gathering the graph's arguments, the backend's call, and what is done with its
results. Static caches are filled by a prompt that is not compiled, so that the first step quantizes them.

    python benchmarks/host_step.py [--layers 32] [--runs hf-static,int4,tc:bits=3-static] [--profile] [--out FILE]
"""

from __future__ import annotations

import argparse
import cProfile
import csv
import platform
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import fx
from torch._dynamo import utils
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from kvq_compile import backend
from kvq_compile.evaluation.runner import parse_method

CONTEXT, SPARE = 1920, 100  # the caches do not grow meanwhile
WARM, TIMED = 6, 60
PARTS = ("checks_ms", "arguments_ms", "call_ms", "results_ms")


class Recorder:
    """Stands for CUDA graphs, and launches nothing."""

    replays = 0

    def __call__(self, run: Callable[[], Sequence[Any]]) -> Callable[[], Sequence[Any]]:
        """Run a step, and return what stands for launching it again."""
        results = run()

        def replay() -> Sequence[Any]:
            self.replays += 1
            return results

        return replay


def idle(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph to what returns the results of its first call."""
    results: list[Any] = []

    def call(*args: Any) -> Any:
        if not results:
            results.append(gm(*args))
        return results[0]

    return call


class Clock:
    """Notes the processor time between the parts of a step."""

    def __init__(self) -> None:
        self.marks: list[int] = []
        enter, leave = (
            getattr(utils, f"record_pregraph_bytecode_{at}") for at in ("enter", "exit")
        )
        utils.record_pregraph_bytecode_enter = lambda: (self.mark(), enter())[1]
        utils.record_pregraph_bytecode_exit = lambda about: (leave(about), self.mark())[0]

    def mark(self) -> None:
        """Note the time."""
        self.marks.append(time.thread_time_ns())

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return what a backend made, noting when it begins and ends."""

        def timed(*args: Any) -> Any:
            self.mark()
            results = call(*args)
            self.mark()
            return results

        return timed

    def step(self, run: Callable[[], Any]) -> list[float]:
        """Return the milliseconds of the parts of a step, and of all of it."""
        self.marks.clear()
        self.mark()
        run()
        self.mark()
        start, chosen, _, begin, end, last = (1e-6 * mark for mark in self.marks)
        return [chosen - start, begin - chosen, end - begin, last - end, last - start]


CLOCK = Clock()
compile_graph = backend.compile_graph
backend.compile_graph = lambda *about: CLOCK.around(compile_graph(*about))


def processor() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def llama(layers: int) -> LlamaForCausalLM:
    """Return a model of tiny layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def decode(model: Any, cache: Any) -> Iterator[Callable[[], Any]]:
    """Yield the prompt, then steps as `generate` makes them."""
    ids = torch.ones(1, CONTEXT, dtype=torch.long)
    places = torch.arange(CONTEXT)[None]
    while True:
        about = {"position_ids": places, "past_key_values": cache, "use_cache": True}
        yield partial(model, ids, **about)
        ids, places = ids[:, :1], places[:, -1:] + 1


def measure(run: str, layers: int, profile: bool) -> dict[str, Any]:
    """Time one run."""
    model, recorder = llama(layers), Recorder()
    backend.RECORDERS["cpu"] = recorder
    torch._dynamo.reset()
    static = run.endswith("-static")
    slots = CONTEXT + SPARE + WARM + TIMED
    config = model.config
    cache = StaticCache(config, max_cache_len=slots) if static else DynamicCache(config=config)
    steps = decode(model, cache)
    if static:
        next(steps)()
    if run.startswith("hf-"):
        model.compile(backend=lambda *about: CLOCK.around(idle(*about)))
    else:
        method = parse_method(run.removesuffix("-static")).options or {}
        model.compile(backend="kvq", options={**method, "inner": "eager"})
    for _ in range(WARM):
        next(steps)()
    *parts, times = zip(*(CLOCK.step(next(steps)) for _ in range(TIMED)), strict=True)
    if profile:
        with cProfile.Profile() as profiler:
            for _ in range(TIMED // 2):
                next(steps)()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(24)
    about = {"run": run, "layers": layers, "context": CONTEXT, "replays": recorder.replays}
    about |= {"ms": round(statistics.median(times), 3), "least_ms": round(min(times), 3)}
    return about | {name: round(min(part), 3) for name, part in zip(PARTS, parts, strict=True)}


def main() -> None:
    """Time what was asked for and write rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", default="hf-static,int4,int4-static", help="method, or -static")
    parser.add_argument("--commit", default="", help="of the code")
    parser.add_argument(
        "--dict-tags", action="store_true",
        help="let Dynamo skip modules whose dicts have not changed, as PyTorch before 2.12 does by default",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    torch._dynamo.config.use_recursive_dict_tags_for_guards = given.dict_tags
    about = {
        "cpu": processor(), "torch": torch.__version__, "transformers": transformers.__version__,
        "commit": given.commit, "dict_tags": int(given.dict_tags),
    }  # fmt: skip
    rows = []
    for run in given.runs.split(","):
        rows.append(about | measure(run, given.layers, given.profile))
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
