"""A model whose heads are split over two GPUs by transformers (`tp_plan="auto"`) against the same model on one.

    python benchmarks/two_gpus.py [--layers 32] [--context 4096 --context 32768] [--method int4]

The model has the shape of Llama-3-8B and random weights, which are written to a folder first, since transformers splits
what it loads. Both runs are fed the same tokens, a prompt of each length and then single ones; logits are compared, and
the step is timed. On a machine without GPUs it runs a small model in two processes with gloo, which shows that it runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from kvq_compile.bench import steps
from kvq_compile.bench.place import place
from kvq_compile.evaluation.runner import parse_method
from kvq_compile.history import graphs

CHUNK = 4096  # tokens of a prompt that are fed at once
STEPS = 24
Told = dict[str, Any]


def main() -> None:
    """Run one process, then two, and compare them; or be one of them."""
    options = read_options()
    if options.folder:
        return be_one(options)
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        shape = "llama-3-8b" if device.type == "cuda" else "small"
        steps.make_model(shape, options.layers, device).save_pretrained(folder)
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        for launcher in ((), torchrun):
            command = [sys.executable, *launcher, __file__, *sys.argv[1:], "--folder", folder]
            done = subprocess.run(command, check=False)
            if done.returncode:
                sys.exit(done.returncode)
        one, two = (torch.load(Path(folder) / f"{processes}.pt") for processes in (1, 2))
        print(place(device))
        for context in options.context:
            print(line(context, one[context], two[context]), flush=True)


def read_options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--context", type=int, action="append", help="tokens of a prompt; may be repeated [4096]"
    )
    parser.add_argument("--method", default="int4", help="or plain, a 16-bit cache under Inductor")
    parser.add_argument("--launched", action="store_true", help="record no steps as CUDA graphs")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.context = options.context or [4096]
    return options


@torch.no_grad()
def be_one(options: argparse.Namespace) -> None:
    """Be the only process, or one of two: feed every prompt, and save what came out."""
    from transformers import AutoModelForCausalLM

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    where = {"device_map": "cuda"} if torch.cuda.is_available() else {}
    split = {"tp_plan": "auto"} if processes > 1 else where
    model = AutoModelForCausalLM.from_pretrained(
        options.folder, dtype=torch.bfloat16, **split
    ).eval()
    method = parse_method(options.method)
    if method.options is None:
        model.compile()
    else:
        mode = "default" if options.launched else "reduce-overhead"
        model.compile(backend="kvq", options={**method.options, "mode": mode})
    first = int(os.environ.get("RANK", "0")) == 0
    told: Told = {}
    for context in options.context:
        start = time.perf_counter()
        told[context] = feed(model, context)
        if first:
            print(
                f"{processes}: 1 x {context} took {time.perf_counter() - start:.0f} s", flush=True
            )
    if first:
        told["steps"] = sorted({str(graph.steps) for graph in graphs()})
        print(
            processes,
            told["steps"],
            sorted({s.outcome for g in graphs() for s in g.sites}),
            flush=True,
        )
        torch.save(told, Path(options.folder) / f"{processes}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()


def feed(model: Any, context: int) -> Told:
    """Feed a prompt in chunks and then single tokens; return their logits and the milliseconds that a step took."""
    from transformers import DynamicCache

    cache, device = DynamicCache(config=model.config), model.device
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (1, context + STEPS), generator=drawn).to(
        device
    )
    for chunk in ids[:, :context].split(CHUNK, 1):
        model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits, seconds = [], []
    for step in range(STEPS):
        steps.wait(device)
        start = time.perf_counter()
        found = model(ids[:, [context + step]], past_key_values=cache, use_cache=True)
        logits.append(found.logits[0, -1].float().cpu())
        seconds.append(time.perf_counter() - start)
    return {"logits": torch.stack(logits), "ms": 1e3 * statistics.median(seconds[STEPS // 2 :])}


def line(context: int, one: Told, two: Told) -> str:
    """Return how far logits are apart, beside how far those of one step are from the next step's, and both times."""
    logits = one["logits"]
    change = (two["logits"] - logits).norm() / logits.norm()
    scale = (logits[1:] - logits[:-1]).norm() / logits.norm()
    same = (two["logits"].argmax(-1) == logits.argmax(-1)).sum()
    return (
        f"1 x {context}: logits differ by {change:.2e} (from step to step {scale:.1f}), {same} of {STEPS} "
        "likeliest tokens are the "
        f"same; a step takes {one['ms']:.1f} ms on one, {two['ms']:.1f} ms on two"
    )


if __name__ == "__main__":
    main()
