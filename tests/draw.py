"""Check decoders that are drawn by number, in many processes.

    python tests/draw.py FIRST END [--processes N] [--seconds S] [--log FILE]

A line of the log has a number and what became of its attentions, or how it failed; `test_drawn_decoders` says what is
checked.
"""

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing import TimeoutError, get_context
from random import Random
from typing import TextIO


def check(number: int) -> str:
    """Return what became of a decoder, in a line."""
    import torch
    from hypothesis.errors import UnsatisfiedAssumption

    from drawn_decoders import drawn_by
    from test_drawn_decoders import PACKED
    from test_drawn_decoders import check as check_drawn

    torch.set_num_threads(1)
    try:
        outcomes, _, kinds = check_drawn(drawn_by(Random(number).choice))
    except UnsatisfiedAssumption:
        return "right: rejected by PyTorch"
    except Exception:  # one is told of, and the others go on
        return "FAILED: " + traceback.format_exc().strip().replace("\n", " | ")[-1500:]
    if outcomes <= {"rewritten"} and {*kinds} <= PACKED:
        return "right: packed"
    return "right: dense" if {*kinds} <= PACKED else "right: 16 bit, told"


def results(first: int, end: int, processes: int, seconds: float) -> Iterator[tuple[int, str]]:
    """Yield numbers and what became of them, as they are done, until time is up."""
    stop = time.monotonic() + seconds
    with get_context("spawn").Pool(processes, maxtasksperchild=40) as pool:
        waiting = pool.imap_unordered(numbered, range(first, end))
        for _ in range(first, end):
            try:
                yield waiting.next(timeout=max(1.0, stop - time.monotonic()))
            except TimeoutError:
                pool.terminate()
                return


def numbered(number: int) -> tuple[int, str]:
    return number, check(number)


def report(found: Iterator[tuple[int, str]], log: TextIO) -> Counter[str]:
    """Write a line a decoder, and return how many became what."""
    counts: Counter[str] = Counter()
    for number, outcome in found:
        counts[outcome if outcome.startswith("right") else "FAILED"] += 1
        log.write(f"{number} {outcome}\n")
        log.flush()
        if outcome.startswith("FAILED"):
            print(number, outcome[-600:], flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=int)
    parser.add_argument("end", type=int)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=86_400.0)
    parser.add_argument("--log", default=os.devnull)
    given = parser.parse_args()
    # A decoder has as many threads as its share of the machine.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    start = time.monotonic()
    with open(given.log, "a", encoding="utf-8") as log:
        counts = report(results(given.first, given.end, given.processes, given.seconds), log)
    print(dict(counts), f"{sum(counts.values())} in {time.monotonic() - start:.0f} s")
    sys.exit(1 if counts["FAILED"] else 0)


if __name__ == "__main__":
    main()
