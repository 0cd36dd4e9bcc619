"""Look into decoding steps on a GPU: what ``kvq bench decode`` times, for those who change how steps are replayed.

python benchmarks/gpu_step.py --check       # replayed steps against launched ones, token by token, on small models
python benchmarks/gpu_step.py --profile [--run int4] [--shape 1x4096]        # where the host's time goes
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kvq_compile.bench import steps
from kvq_compile.commands.bench import read_shape
from kvq_compile.history import graphs

CHECKS: dict[str, tuple[int, dict[str, Any]]] = {
    "one sequence": (1, {}),
    "left padding": (3, {}),
    "assisted": (1, {"assistant": True}),
    "beams": (2, {"num_beams": 2}),
    "static": (1, {"cache_implementation": "static", "disable_compile": True}),
}


def check() -> None:
    """Compare generations whose steps are replayed with those whose steps are launched, token by token."""
    device = torch.device("cuda")
    model, assistant = (steps.make_model("small", layers, device) for layers in (2, 1))
    for method, name in [("int4", name) for name in CHECKS] + [
        ("tc", "left padding"),
        ("tc", "static"),
        ("qaq", "one sequence"),
    ]:
        batch, more = CHECKS[name]
        rest = {"assistant_model": assistant} if "assistant" in more else more
        tokens = []
        with steps.Recordings() as recorded:
            for mode in ("default", None):
                torch._dynamo.reset()
                options = {"method": method, "mode": mode, "inner": "eager"}
                model.compile(backend="kvq", options=options)
                ids = torch.randint(
                    1, 1000, (batch, 30), generator=torch.Generator().manual_seed(1)
                )
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


def profiled(more: Iterator[Callable[[], Any]]) -> None:
    """Print where the host's time goes."""
    with cProfile.Profile() as profile:
        for _ in range(steps.TIMED):
            next(more)()
    torch.cuda.synchronize()
    pstats.Stats(profile).sort_stats("tottime").print_stats(28)


def main() -> None:
    """Check or profile."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare replayed with launched steps")
    parser.add_argument("--profile", action="store_true", help="print where the host's time goes")
    parser.add_argument("--run", action="append", help="may be repeated [default: int4]")
    parser.add_argument("--shape", action="append", help="may be repeated [default: 1x4k]")
    parser.add_argument("--layers", type=int, default=32)
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    if given.check:
        return check()
    if not given.profile:
        parser.error("--check or --profile must be given; kvq bench decode times steps")
    model = steps.make_model("llama-3-8b", given.layers, torch.device("cuda"))
    shapes = [read_shape(text) for text in given.shape or ["1x4k"]]
    for row in steps.run_all(model, "llama-3-8b", given.run or ["int4"], shapes, look=profiled):
        print(row, flush=True)


if __name__ == "__main__":
    main()
