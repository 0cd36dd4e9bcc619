"""Where many query tokens begin: times of both ways to attend, from which `many_queries.MANY_ROWS` is chosen.

python benchmarks/many_queries.py [--method tc:bits=4] [--context 65536] [--queries 32 64 128 256 512]

A line gives milliseconds: of the kernel that unpacks pages for tiles of queries, of dequantized pieces, and of flash
attention to 16 bit; then what dequantizing takes, and how the time of pieces depends on their size.
"""

from __future__ import annotations

import argparse

import torch

from kvq_compile.bench.caches import Shape
from kvq_compile.bench.chunks import BASELINE, Chunk, measure
from kvq_compile.bench.clock import launched
from kvq_compile.kernels import many_queries

SIZES = (8, 16, 32, 64, 128)  # MiB


def main() -> None:
    """Print a line a number of queries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="tc:bits=4")
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--queries", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = Shape(1, given.context)
    rows, size = many_queries.MANY_ROWS, many_queries.SCRATCH_BYTES
    for queries in given.queries:
        (flash,) = (
            row
            for row in measure((), [shape], [queries], torch.bfloat16, device)
            if row.method == BASELINE
        )
        with torch.no_grad():
            chunk = Chunk(given.method, shape, queries, torch.bfloat16, device)
            times = {}
            for name, least in (("kernel", 1 << 30), ("pieces", 1)):
                many_queries.MANY_ROWS = {device.type: least}
                many_queries.MANY_TOKENS = 1
                times[name] = 1e3 * launched(chunk.attend, device)
            times["flash"], times["dequantizing"] = flash.ms, 1e3 * launched(chunk.read, device)
            for mib in SIZES:
                many_queries.SCRATCH_BYTES = mib << 20
                times[f"{mib} MiB"] = 1e3 * launched(chunk.attend, device)
        many_queries.MANY_ROWS, many_queries.SCRATCH_BYTES = rows, size
        told = ", ".join(f"{name} {ms:.3f}" for name, ms in times.items() if ms is not None)
        print(f"{queries} queries: {told}", flush=True)


if __name__ == "__main__":
    main()
