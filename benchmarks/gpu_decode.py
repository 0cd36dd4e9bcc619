"""Time one decoding step over a quantized cache against bf16 attention, and check its error, on a
GPU.

Both sides are replayed from CUDA graphs with the L2 cache flushed between runs. Shapes are those of
an 8-billion-parameter Llama layer: 32 query heads, 8 KV heads of 128 channels. ``append`` is the
cost of writing one token's keys and values; ``flush`` the same when it fills a page in every
sequence, which happens once in ``page_size`` steps; both include two small copies that put the
cursors back.

    python benchmarks/gpu_decode.py [--out results.csv] [--quick]
"""

from __future__ import annotations

import argparse
import csv
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.testing import do_bench

from kvq_compile.kernels import attention, quantize_kv, reference
from kvq_compile.kernels.ops import new_parts
from kvq_compile.kernels.spec import CacheSpec, PageLayout, TensorSpec

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SHAPES = [(1, 32), (1, 128), (8, 4), (8, 32), (32, 16)]  # batch, context in units of 1024 tokens
SPECS = {
    "int8": CacheSpec(TensorSpec(8), TensorSpec(8)),
    "int4": CacheSpec(TensorSpec(4), TensorSpec(4)),
    "int3": CacheSpec(TensorSpec(3), TensorSpec(3)),
    "int2": CacheSpec(TensorSpec(2), TensorSpec(2)),
    "int2-g64": CacheSpec(TensorSpec(2, group_size=64), TensorSpec(2, group_size=64)),
    "kivi-2": CacheSpec(TensorSpec(2, "channel", 32), TensorSpec(2, group_size=32)),
}
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def microseconds(step: Callable[[], object]) -> float:
    """Return the median time of ``step``, replayed from a CUDA graph."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return 1e3 * do_bench(graph.replay, warmup=5, rep=30, return_mode="median")


def filled(batch: int, length: int, layout: PageLayout) -> Parts:
    """Return a cache of ``length`` random tokens: random codes, with parameters as of normal
    numbers."""
    pages = layout.pages_at(length)
    like = torch.empty(batch, KV_HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    codes, params, exact, cursor = new_parts(like, pages + 1, layout)
    codes.view(torch.int8).random_(-128, 128)
    params[..., 0].uniform_(4.0, 6.0).div_(layout.levels)
    params[..., 1].uniform_(-3.0, -2.0)
    exact.normal_()
    cursor.copy_(torch.tensor([length, pages]))
    return codes, params, exact, cursor


def tokens(batch: int, heads: int) -> Tensor:
    """Return one new token, strided as a projection leaves it."""
    x = torch.randn(batch, 1, heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    return x.transpose(1, 2)


def relative_errors(run: Callable[[], Tensor], query: Tensor, new: list[Tensor], parts: list[Parts],
                    layouts: list[PageLayout], length: int) -> tuple[float, float]:  # fmt: skip
    """Return the error of ``run`` and of bf16 attention to the same tokens, against fp32."""
    exact = []
    for fresh, (codes, params, rows, cursor), layout in zip(new, parts, layouts, strict=True):
        held = reference.read(codes, params, rows.float(), cursor, length, layout)
        exact.append(torch.cat([held, fresh.float()], 2).repeat_interleave(HEADS // KV_HEADS, 1))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(query.double(), *(t.double() for t in exact))
    plain = F.scaled_dot_product_attention(query, *(t.bfloat16() for t in exact)).double()
    error = (run().double() - expected).norm() / expected.norm()
    return float(error), float((plain - expected).norm() / expected.norm())


def measure(name: str, batch: int, length: int, bf16: float, check: bool) -> dict[str, object]:
    """Return one row of the table."""
    spec = SPECS[name]
    layouts = [spec.layout("key", HEAD_DIM), spec.layout("value", HEAD_DIM)]
    parts = [filled(batch, length, layout) for layout in layouts]
    query, new = tokens(batch, HEADS), [tokens(batch, KV_HEADS), tokens(batch, KV_HEADS)]
    position = torch.tensor([length], device="cuda")
    scale = HEAD_DIM**-0.5

    def attend() -> Tensor:
        return attention.attend(query, *new, *parts, None, position, None, scale, *layouts)

    cursor = parts[0][3].clone()
    boundary = layouts[0].sinks + layouts[0].window + (int(cursor[1]) + 1) * layouts[0].page_size
    last = torch.tensor([boundary - 1], device="cuda")
    full = torch.stack([last[0], cursor[1]]).int()

    def append(slot: Tensor, state: Tensor) -> None:
        for part, x, layout in zip(parts, new, layouts, strict=True):
            part[3].copy_(state)
            quantize_kv.append_(*part, x, slot, None, layout)

    error, plain = (
        relative_errors(attend, query, new, parts, layouts, length) if check else (None, None)
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
    row["append_us"] = microseconds(lambda: append(position, cursor))
    row["flush_us"] = microseconds(lambda: append(last, full))
    return row


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


def main() -> None:
    """Measure, print a table, write it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "gpu_decode.csv"
    )
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    arguments = parser.parse_args()
    rows = []
    for batch, kilo in SHAPES[:2] if arguments.quick else SHAPES:
        length = 1024 * kilo
        bf16 = microseconds(plain_attention(batch, length))
        torch.cuda.empty_cache()
        for name in SPECS:
            rows.append(measure(name, batch, length, bf16, check=kilo <= 32 and batch == 1))
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
        print(
            f"{row['batch']:3} x {row['context'] // 1024:4}k {row['method']:9}"
            f" bf16 {row['bf16_us']:7.1f} us  {row['us']:7.1f} us"
            f"  {row['speedup']:5.2f}x  {row['packed_gbps']:5.0f} GB/s"
            f"  append {row['append_us']:5.1f} us  flush {row['flush_us']:6.1f} us  {error}"
        )


if __name__ == "__main__":
    main()
