"""Time one decoding step over a quantized cache against bf16 attention, and check its error, on a GPU.

Both sides are replayed from CUDA graphs with the L2 cache flushed between runs. Shapes are those of
an 8-billion-parameter Llama layer: 32 query heads, 8 KV heads of 128 channels. ``append`` is the
cost of writing one token's keys and values; ``flush`` the same when it fills a page in every
sequence, which happens once in ``page_size`` steps; both include two small copies that put the
cursors back.

Methods that need calibration get random tables: speed does not depend on what is in them, and error
is measured against fp32 attention to the tokens that the random cache stands for.

    python benchmarks/gpu_decode.py [--out results.csv] [--quick] [--check] [--only skvq-2,cq-8c8b]
    python benchmarks/gpu_decode.py --compare OTHER_CHECKOUT [--quick] [--only ...]

The second form times another checkout and this one in turn, each in processes of its own, and prints both side by side.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.testing import do_bench

from kvq_compile.kernels import reference
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.reference import mixed
from kvq_compile.kernels.schemes import Codebook, Role, Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import Tables
from kvq_compile.kernels.triton import backend, launch
from kvq_compile.options import make_spec

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ROLES: tuple[Role, ...] = ("key", "value")
QUICK_SHAPES = [(1, 32), (1, 128), (8, 32)]  # batch, context in units of 1024 tokens
SHAPES = [(1, 32), (1, 128), (8, 4), (8, 32), (32, 16)]
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def random_tables(rotary: bool, couple: int | None = None, bits: int = 8) -> Tables:
    """Return tables of normal tokens: some order, means and scales; a codebook if channels couple."""
    half = torch.rand(KV_HEADS, HEAD_DIM // 2).argsort(-1)
    order = torch.cat([half, half + HEAD_DIM // 2], -1)
    scale = (0.5 + torch.rand(KV_HEADS, HEAD_DIM // 2)).repeat(1, 2)
    frequency = (2.0**32 / 6.2832 * 5e5 ** -(half / (HEAD_DIM // 2))).round().int()
    book = None
    if couple is not None:
        book = torch.randn(KV_HEADS, HEAD_DIM // couple, 1 << bits, couple)
    mean = 0.5 * torch.randn(KV_HEADS, HEAD_DIM)
    return Tables.build(
        order=order, mean=mean, scale=scale, margin=torch.zeros(KV_HEADS, HEAD_DIM),
        frequency=frequency if rotary else None, codebook=book,
    )  # fmt: skip


def skvq(key_bits: float, value_bits: float, packing: str = "fields") -> CacheSpec:
    """Return SKVQ: reordered groups of 64 channels with fp8 parameters, keys before RoPE."""
    of_key, of_value = random_tables(rotary=True), random_tables(rotary=False)
    key = Uniform(key_bits, group_size=64, params="fp8", rotary=True, tables=of_key.digest)
    value = Uniform(
        value_bits, group_size=64, params="fp8", packing=packing, tables=of_value.digest
    )
    return CacheSpec(key, value, key_tables=of_key, value_tables=of_value)


def cq(couple: int, bits: int) -> CacheSpec:
    """Return CQ: ``couple`` channels to a code of ``bits`` bits, keys before RoPE."""
    of_key, of_value = (random_tables(rotary, couple, bits) for rotary in (True, False))
    key = Codebook(bits, couple, rotary=True, tables=of_key.digest)
    value = Codebook(bits, couple, tables=of_value.digest)
    return CacheSpec(key, value, key_tables=of_key, value_tables=of_value)


def tc(bits: float, turned: bool = True) -> CacheSpec:
    """Return transform coding, of keys whose rotation is known."""
    spec = make_spec("tc", bits=bits)
    if not turned:
        return spec
    pair = torch.arange(HEAD_DIM // 2)
    ones = torch.ones(KV_HEADS, HEAD_DIM)
    tables = Tables.build(
        order=torch.arange(HEAD_DIM).expand(KV_HEADS, -1), mean=0 * ones, scale=ones, margin=0 * ones,
        frequency=(2.0**31 / 3.1416 * 5e5 ** -(pair / (HEAD_DIM // 2))).round().int().expand(KV_HEADS, -1),
    )  # fmt: skip
    return replace(spec, key=replace(spec.key, tables=tables.digest), key_tables=tables)


SPECS = {
    "tc-4": lambda: tc(4),
    "tc-3": lambda: tc(3),
    "tc-2.5": lambda: tc(2.5),
    "tc-2": lambda: tc(2),
    "tc-3-unturned": lambda: tc(3, False),
    "int8": lambda: CacheSpec(Uniform(8), Uniform(8)),
    "int4": lambda: CacheSpec(Uniform(4), Uniform(4)),
    "int3": lambda: CacheSpec(Uniform(3), Uniform(3)),
    "int2": lambda: CacheSpec(Uniform(2), Uniform(2)),
    "int2-g64": lambda: CacheSpec(Uniform(2, group_size=64), Uniform(2, group_size=64)),
    "kivi-2": lambda: CacheSpec(Uniform(2, "channel", 32), Uniform(2, group_size=32)),
    "skvq-2": lambda: skvq(2, 2),
    "skvq-3": lambda: skvq(3, 3),
    "skvq-2-1.5": lambda: skvq(2, 1.5),
    "skvq-2-trits": lambda: skvq(2, 1.5, "trits"),
    "cq-4c8b": lambda: cq(4, 8),
    "cq-8c8b": lambda: cq(8, 8),
    "cq-8c10b": lambda: cq(8, 10),
    "qaq-2.3": lambda: make_spec("qaq", bits=2.3),
    "qaq-2.3-fp8": lambda: make_spec("qaq", bits=2.3, params="fp8"),
    "qaq-3": lambda: make_spec("qaq", bits=3),
}


def microseconds(step: Callable[[], object]) -> float:
    """Return the median time of ``step``, replayed from a CUDA graph."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return 1e3 * do_bench(graph.replay, warmup=5, rep=30, return_mode="median")


def filled(batch: int, length: int, layout: Layout, frame: Calibrated) -> Parts:
    """Return a cache of ``length`` random tokens: random codes, with parameters as of normal
    numbers."""
    pages = layout.pages_at(length)
    like = torch.empty(batch, KV_HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    codes, params, exact, cursor = parts = Packed.empty(like, pages + 1, layout)
    if layout.scheme.name == "channelwise":
        spread = torch.logspace(-1, 0.5, HEAD_DIM, device="cuda")[torch.randperm(HEAD_DIM)]
        x = torch.randn(batch, KV_HEADS, length, HEAD_DIM, device="cuda") * spread + spread
        backend.append_(parts, frame, x.bfloat16(), None, 0, layout, None, tokens(batch, HEADS))
        return parts
    exact.normal_()
    cursor.copy_(torch.tensor([length, pages]))
    if layout.scheme.name == "mixed":
        fill_mixed(codes, params, layout)
        return codes, params, exact, cursor
    codes.view(torch.int8).random_(-128, 128)
    if layout.packing == "trits":
        codes.view(torch.uint8).remainder_(243)
    elif layout.bits == 1.5:
        codes.bitwise_and_(~((codes >> 1) & 0x5555))  # no field of value 3
    if layout.params == "e5m3":
        params[..., 0].fill_(0x78 - 8 * int(math.log2(layout.levels)))  # 1 and less for wider codes
        params[..., 1].random_(118, 138)
    elif layout.params == "fp8":
        params[..., 0].random_(0x30, 0x40)  # 0.5 to 1.9, and below for wider codes
        params[..., 0].sub_(8 * int(layout.levels > 3))
        params[..., 1].random_(0xB8, 0xC4)  # -1 to -3
    else:
        params[..., 0].uniform_(4.0, 6.0).div_(layout.levels)
        params[..., 1].uniform_(-3.0, -2.0)
    return codes, params, exact, cursor


def fill_mixed(codes: Tensor, params: Tensor, layout: Layout) -> None:
    """Fill a cache with some pages of normal numbers, of which some tokens matter more, over and over."""
    x = torch.randn(64, layout.page_size, HEAD_DIM, device="cuda")
    weight = torch.rand(64, layout.page_size, device="cuda") ** 8
    some_codes, some_params = mixed.quantize_pages(x, weight, layout)
    which = torch.randint(64, codes.shape[:3], device="cuda")
    codes.copy_(some_codes[which])
    params.copy_(some_params[which])


def tokens(batch: int, heads: int) -> Tensor:
    """Return one new token, strided as a projection leaves it."""
    x = torch.randn(batch, 1, heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    return x.transpose(1, 2)


def relative_errors(run: Callable[[], Tensor], query: Tensor, new: list[Tensor], parts: list[Parts],
                    layouts: list[Layout], frames: list[Calibrated],
                    length: int) -> tuple[float, float]:  # fmt: skip
    """Return the error of ``run`` and of bf16 attention to the same tokens, against fp32."""
    exact = []
    for fresh, (codes, params, rows, cursor), layout, frame in zip(
        new, parts, layouts, frames, strict=True
    ):
        held = reference.read(codes, params, rows.float(), cursor, length, layout, frame)
        exact.append(torch.cat([held, fresh.float()], 2).repeat_interleave(HEADS // KV_HEADS, 1))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(query.double(), *(t.double() for t in exact))
    plain = F.scaled_dot_product_attention(query, *(t.bfloat16() for t in exact)).double()
    error = (run().double() - expected).norm() / expected.norm()
    return float(error), float((plain - expected).norm() / expected.norm())


def measure(
    name: str, batch: int, length: int, bf16: float, check: bool, writes: bool
) -> dict[str, object]:
    """Return one row of the table, with the costs of writing if ``writes``."""
    spec = SPECS[name]()
    layouts = [spec.layout(role, HEAD_DIM, HEADS // KV_HEADS) for role in ROLES]
    frames = [make_frame(spec, layout, batch) for layout in layouts]
    parts = [filled(batch, length, *of) for of in zip(layouts, frames, strict=True)]
    query, new = tokens(batch, HEADS), [tokens(batch, KV_HEADS), tokens(batch, KV_HEADS)]
    position = torch.tensor([length], device="cuda")
    score = Score(HEAD_DIM**-0.5)

    def attend() -> Tensor:
        return backend.attend(query, *new, *parts, *frames, None, position, None, score, *layouts)

    cursor = parts[0][3].clone()
    boundary = layouts[0].sinks + layouts[0].window + (int(cursor[1]) + 1) * layouts[0].page_size
    last = torch.tensor([boundary - 1], device="cuda")
    full = torch.stack([last[0], cursor[1]]).int()

    def append(slot: Tensor, state: Tensor) -> None:
        for part in parts:
            part[3].copy_(state)
        weights, keys = None, layouts[0]
        if (
            keys.attentive
        ):  # a cache of fixed size weighs tokens at every step, a page filling or not
            weights = backend.importance(
                query, new[0], parts[0], frames[0], None, slot, None, boundary + 1, score, True, keys.queries,
                keys,
            )  # fmt: skip
        for part, x, layout, frame in zip(parts, new, layouts, frames, strict=True):
            asked = query if layout.queries else None
            backend.append_(part, frame, x, slot, None, layout, weights, asked)

    error, plain = (
        relative_errors(attend, query, new, parts, layouts, frames, length)
        if check
        else (None, None)
    )
    time = microseconds(attend)
    held = sum(t.numel() * t.element_size() for part in parts for t in part[:2])
    row = {"method": name, "batch": batch, "context": length, "bf16_us": bf16, "us": time}
    row |= {
        "speedup": bf16 / time,
        "packed_gbps": held / time / 1e3,
        "error": error,
        "bf16_error": plain,
    }
    if writes:
        row["append_us"] = microseconds(lambda: append(position, cursor))
        row["flush_us"] = microseconds(lambda: append(last, full))
    return row


def make_frame(spec: CacheSpec, layout: Layout, batch: int) -> Calibrated:
    """Return what tokens are coded relative to; sequences begin at different positions."""
    tables = spec.tables(layout.role)
    if tables is None:
        return UNCALIBRATED
    shift = torch.arange(batch, dtype=torch.int32, device="cuda") if layout.rotary else None
    return Calibrated(tables.words.cuda(), shift)


def check_errors(names: list[str]) -> None:
    """Compare with fp32 attention at a small size.

    Raises:
        SystemExit: An error is not a small multiple of that of bf16 attention.
    """
    wrong = []
    for name in names:
        for batch, length in ((2, 1500), (1, 5000)):
            spec = SPECS[name]()
            layouts = [spec.layout(role, HEAD_DIM, HEADS // KV_HEADS) for role in ROLES]
            frames = [make_frame(spec, layout, batch) for layout in layouts]
            parts = [filled(batch, length, *of) for of in zip(layouts, frames, strict=True)]
            query, new = tokens(batch, HEADS), [tokens(batch, KV_HEADS) for _ in range(2)]
            error, plain = relative_errors(
                lambda: backend.attend(
                    query, *new, *parts, *frames, None, None, length, Score(HEAD_DIM**-0.5), *layouts  # noqa: B023
                ),
                query, new, parts, layouts, frames, length,
            )  # fmt: skip
            print(f"check {name:13} {batch} x {length}: error {error:.1e}, bf16 {plain:.1e}")
            if not error <= 3 * plain + 2e-3:
                wrong.append(name)
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")


def plain_attention(batch: int, length: int) -> Callable[[], Tensor]:
    """Return one step of bf16 attention over ``length`` tokens."""
    query = tokens(batch, HEADS)
    shape = batch, KV_HEADS, length, HEAD_DIM
    key, value = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def environment() -> dict[str, str]:
    """Return what a timing depends on."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"gpu": torch.cuda.get_device_name()} | versions | {"commit": commit or "unknown"}


def tune(names: list[str]) -> None:
    """Print times at one sequence of 128k tokens over launch settings."""
    length = 128 * 1024
    print(f"bf16 {microseconds(plain_attention(1, length)):.1f} us")
    for name in names:
        for launch.BLOCK_EXACT in (64, 32):
            for launch.PROGRAMS_PER_SM in (2, 3, 4, 6):
                launch.attend_settings.cache_clear()
                launch.count_splits.cache_clear()
                row = measure(name, 1, length, 0.0, check=False, writes=False)
                print(
                    f"tune {name:13} block {launch.BLOCK_EXACT}"
                    f" programs {launch.PROGRAMS_PER_SM}: {row['us']:6.1f} us"
                )


Times = dict[tuple[str, ...], float]  # microseconds of method, batch, context and what is timed


def run_checkout(checkout: Path, options: list[str]) -> Times:
    """Return the times that the benchmark of a checkout measures in a process of its own.

    Raises:
        SystemExit: The benchmark fails.
    """
    program = checkout / "benchmarks" / "gpu_decode.py"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.csv"
        command = [sys.executable, str(program), "--out", str(out), *options]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(checkout)}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{program} failed:\n{done.stdout}\n{done.stderr}")
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    return {
        (row["method"], row["batch"], row["context"], what): float(row[what])
        for row in rows
        for what in ("bf16_us", "us", "append_us", "flush_us")
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
        f"{'method':13} {'batch':>5} {'context':>7} {'what':9} {'other':>8} {'this':>8} {'ratio':>6}"
    )
    for key in [key for key in best[0] if key in best[1]]:
        before, after = best[0][key], best[1][key]
        method, batch, context, what = key
        mark = " slower" * (what != "bf16_us" and after > (1 + tolerance) * before)
        slower += [key] * bool(mark)
        print(
            f"{method:13} {batch:>5} {context:>7} {what:9} {before:8.2f} {after:8.2f}"
            f" {after / before:6.3f}{mark}"
        )
    print(", ".join(environment().values()))
    if slower:
        sys.exit(f"{len(slower)} times are more than {tolerance:.0%} longer than those of {other}")


def main() -> None:
    """Measure, print a table, write it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "gpu_decode.csv"
    )
    parser.add_argument("--quick", action="store_true", help="three shapes only, and no writing")
    parser.add_argument("--check", action="store_true", help="errors only")
    parser.add_argument("--tune", action="store_true", help="launch settings at 128k tokens")
    parser.add_argument("--only", help="methods, with commas between them")
    parser.add_argument("--compare", type=Path, help="another checkout to be timed beside this one")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(SPECS)
    if arguments.compare:
        options = ["--quick"] * arguments.quick + ["--only", ",".join(names)]
        compare(arguments.compare.resolve(), options)
        return
    torch.manual_seed(0)
    check_errors(names)
    if arguments.check:
        return
    if arguments.tune:
        tune(names)
        return
    rows = []
    for batch, kilo in QUICK_SHAPES if arguments.quick else SHAPES:
        length = 1024 * kilo
        bf16 = microseconds(plain_attention(batch, length))
        torch.cuda.empty_cache()
        for name in names:
            check = kilo <= 32 and batch == 1 and not arguments.quick
            rows.append(measure(name, batch, length, bf16, check, not arguments.quick))
            torch.cuda.empty_cache()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *environment()])
        writer.writeheader()
        for row in rows:
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(shown | environment())
    print(", ".join(environment().values()))
    for row in rows:
        error = (
            ""
            if row["error"] is None
            else f"error {row['error']:.1e} (bf16 {row['bf16_error']:.1e})"
        )
        written = ""
        if "append_us" in row:
            written = f"  append {row['append_us']:5.1f} us  flush {row['flush_us']:6.1f} us"
        print(
            f"{row['batch']:3} x {row['context'] // 1024:4}k {row['method']:13}"
            f" bf16 {row['bf16_us']:7.1f} us  {row['us']:7.1f} us"
            f"  {row['speedup']:5.2f}x  {row['packed_gbps']:5.0f} GB/s"
            f"{written}  {error}"
        )


if __name__ == "__main__":
    main()
