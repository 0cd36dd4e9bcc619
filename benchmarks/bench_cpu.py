"""Time decoding on this CPU: a plain cache under Inductor against quantized ones, at one context length.

Every method decodes the same tokens on the same model in turn, round after round, so that a change in the
machine's speed meets all of them. What counts is the median over single tokens; compilation and the
prompt do not. Rows are appended to ``results/cpu_decode.csv``.

    python benchmarks/bench_cpu.py --model examples/models/kvq-tiny-2.6m --context 1500
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
from pathlib import Path

import torch

from kvq_compile.evaluation.runner import Runner, held, make_runners, parse_method
from kvq_compile.loading import DEMO_MODEL, DEMO_TEXT

RESULTS = Path(__file__).parent / "results" / "cpu_decode.csv"


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--text", default=str(DEMO_TEXT))
    parser.add_argument("--context", type=int, default=1500)
    parser.add_argument("--tokens", type=int, default=24, help="tokens a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", action="append", default=None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    text = Path(options.text).read_text(encoding="utf-8")[: 12 * options.context]
    ids = torch.tensor(AutoTokenizer.from_pretrained(options.model)(text)["input_ids"])
    needed = options.context + options.tokens * options.rounds + 4
    if len(ids) < needed:
        raise SystemExit(f"the text must have {needed} tokens, got {len(ids)}; pass another --text")

    methods = [parse_method(text) for text in options.method or ["int8", "int4", "int2", "kivi"]]
    runners = make_runners(model, methods)
    for runner in runners:
        runner.start()
        runner.prefill(ids[: options.context])
        for token in ids[
            options.context : options.context + 4
        ]:  # compiles: first step, then dynamic
            runner.feed(token[None])
    first = options.context + 4
    for round_number in range(options.rounds):
        at = first + round_number * options.tokens
        for runner in runners:
            for token in ids[at : at + options.tokens]:
                runner.feed(token[None], timed=True)
    _write(runners, options.model, options.context)


def _write(runners: list[Runner], model: str, context: int) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    speeds = [1 / statistics.median(runner.seconds) for runner in runners]
    rows = []
    for runner, speed in zip(runners, speeds, strict=True):
        found = held(runner.cache, runner.method)
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "commit": commit.stdout.strip(),
                "cpu": _cpu(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "model": Path(model).name,
                "context": context,
                "method": runner.method.label,
                "tokens_per_second": round(speed, 2),
                "times_plain": round(speed / speeds[0], 2),
                "bytes": found.bytes,
                "effective_bits": round(found.effective_bits, 2),
            }
        )
        times = rows[-1]["times_plain"]
        name = runner.method.label
        print(f"{name:12s} {speed:8.2f} tokens/s  {times:5.2f} x plain  {found.bytes:12,d} bytes")
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _cpu() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


if __name__ == "__main__":
    main()
