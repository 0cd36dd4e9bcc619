"""Time two checkouts beside each other, or launch settings: ``kvq bench kernels`` for those who change kernels.

    python benchmarks/gpu_decode.py --compare OTHER_CHECKOUT [--method int4] [--shape 1x128k] ...
    python benchmarks/gpu_decode.py --tune [--method int4] ...

The first form runs ``kvq bench kernels --writes`` of the other checkout and of this one in turn, each in processes of
their own, and prints both side by side; the best of two runs each. The second prints times over launch settings.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from kvq_compile.bench import kernels
from kvq_compile.bench.caches import Shape
from kvq_compile.bench.place import place
from kvq_compile.bench.rows import read_rows
from kvq_compile.commands.bench import read_shape

TIMES = ("us", "append_us", "flush_us")
Times = dict[
    tuple[str, ...], float
]  # microseconds of method, batch, context, head size and what is timed


def run_checkout(checkout: Path, options: list[str]) -> Times:
    """Return the times that a checkout measures in a process of its own.

    Raises:
        SystemExit: It fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "kvq_compile",
            "bench",
            "kernels",
            "--writes",
            "--out",
            folder,
        ]
        done = subprocess.run(
            [*command, *options], cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{checkout} failed:\n{done.stdout}\n{done.stderr}")
        rows = read_rows(Path(folder) / "kernels.csv")
    about = "method", "batch", "context", "head_size"
    return {
        (*(row[name] for name in about), what): float(row[what])
        for row in rows
        for what in TIMES
        if row.get(what)
    }


def compare(other: Path, options: list[str], tolerance: float = 0.02) -> None:
    """Print the times of another checkout and of this one, the best of two runs each, taken in turn.

    Raises:
        SystemExit: A benchmark fails, or this checkout is slower than the other by more than the tolerance.
    """
    own = Path(__file__).resolve().parent.parent
    runs = [run_checkout(checkout, options) for checkout in (other, own, own, other)]
    best = [{key: min(a[key], b[key]) for key in a} for a, b in ((runs[0], runs[3]), runs[1:3])]
    slower = []
    print(
        f"{'method':28} {'batch':>5} {'context':>7} {'size':>4} {'what':9} {'other':>8} {'this':>8} {'ratio':>6}"
    )
    for key in [key for key in best[0] if key in best[1]]:
        before, after = best[0][key], best[1][key]
        method, batch, context, size, what = key
        mark = " slower" * (method not in kernels.PEERS and after > (1 + tolerance) * before)
        slower += [key] * bool(mark)
        print(
            f"{method:28} {batch:>5} {context:>7} {size:>4} {what:9} {before:8.2f} {after:8.2f}"
            f" {after / before:6.3f}{mark}"
        )
    print(", ".join(place(torch.device("cuda")).values()))
    if slower:
        sys.exit(f"{len(slower)} times are more than {tolerance:.0%} longer than those of {other}")


def tune(methods: list[str], shapes: list[Shape]) -> None:
    """Print times over launch settings."""
    from kvq_compile.kernels.triton import launch

    device = torch.device("cuda")
    for case in kernels.cases(methods, (), shapes, torch.bfloat16):
        for launch.BLOCK_EXACT in (64, 32):
            for launch.PROGRAMS_PER_SM in (2, 3, 4, 6):
                launch.attend_settings.cache_clear()
                launch.count_splits.cache_clear()
                row = next(iter(kernels.measure([case], device)))
                print(
                    f"{row.method:28} {row.batch} x {row.context} block {launch.BLOCK_EXACT}"
                    f" programs {launch.PROGRAMS_PER_SM}: {row.refused or f'{row.us:6.1f} us'}"
                )


def main() -> None:
    """Compare or tune."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", type=Path, help="another checkout to be timed beside this one")
    parser.add_argument("--tune", action="store_true", help="launch settings")
    parser.add_argument("--method", action="append", help="may be repeated [default: all]")
    parser.add_argument(
        "--shape", action="append", help="BATCHxCONTEXT; may be repeated [default: 1x128k]"
    )
    given = parser.parse_args()
    methods, shapes = given.method or list(kernels.METHODS), given.shape or ["1x128k"]
    if given.tune:
        return tune(methods, [Shape(*read_shape(text)) for text in shapes])
    if given.compare is None:
        parser.error("--compare or --tune must be given; kvq bench kernels measures one checkout")
    options = ["--peer", "none"]
    for method in methods:
        options += ["--method", method]
    for shape in shapes:
        options += ["--shape", shape]
    compare(given.compare.resolve(), options)


if __name__ == "__main__":
    main()
