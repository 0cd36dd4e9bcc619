"""Time decode attention to packed latents of the sizes of DeepSeek V3: 512 latents and 64 rotary channels a token.

python benchmarks/gpu_latents.py [--method int4] [--shape 1x32k] [--heads 128] [--out FOLDER] [--commit COMMIT]

A token's key is its latents and its rotary channels, its value the latents; all query heads share the one KV head. The
baselines attend to the same in 16 bit: SDPA, as PyTorch chooses, and two matrix products around a softmax. Rows
go to ``latents.csv``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile.bench.caches import Shape, boundary, random_spec
from kvq_compile.bench.clock import layers_in_turn, microseconds
from kvq_compile.bench.place import place
from kvq_compile.bench.rows import PLACE, add_rows, reason, short_cell
from kvq_compile.commands.bench import read_shape
from kvq_compile.kernels import ops, reference
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.score import Score

LATENTS, ROTARY = 512, 64
SCALE = 192**-0.5  # of heads of 128 + 64 channels, from which the model's queries were absorbed
CASE = ("method", "batch", "context", "heads")
BASELINES = ("sdpa", "products")
Attend = Callable[[], Tensor]


class Latents:
    """Latents and rotary channels of random tokens, in 16 bit and packed, and a query of every head."""

    def __init__(self, batch: int, context: int, heads: int, device: torch.device) -> None:
        like = {"dtype": torch.bfloat16, "device": device}
        self.shape = Shape(batch, context, heads, 1, ROTARY)
        self.rotary = torch.randn(batch, 1, context, ROTARY, **like)
        self.latents = torch.randn(batch, 1, context, LATENTS, **like)
        self.new = [torch.randn(batch, 1, 1, size, **like) for size in (ROTARY, LATENTS)]
        self.query = torch.randn(batch, heads, 1, ROTARY + LATENTS, **like)
        self.position = torch.tensor([context], dtype=torch.int64, device=device)

    def in_16_bit(self, name: str) -> Iterator[tuple[int, Attend]]:
        """Yield the bytes that are read and a way to attend to them, over copies without end."""
        rows = self.query.squeeze(
            2
        )  # [B, heads, 576]: of one KV head, queries are rows of one matrix
        while True:
            kept = torch.cat([self.rotary, self.latents], 3).squeeze(1)
            value = kept[..., ROTARY:]

            def attend(kept: Tensor = kept, value: Tensor = value) -> Tensor:
                if name == "sdpa":
                    return sdpa(rows[:, None], kept[:, None], value[:, None], scale=SCALE)[:, 0]
                weights = torch.softmax((rows @ kept.mT).float() * SCALE, -1)
                return weights.to(rows.dtype) @ value

            yield kept.numel() * kept.element_size(), attend

    def packed(self, method: str) -> Iterator[tuple[int, Attend]]:
        """Yield the bytes that are read and attention to packed latents, over copies without end."""
        spec = random_spec(method, self.shape)
        device = self.query.device
        layouts, parts, constants = [], [], []
        for role, x in (("key", self.rotary), ("value", self.latents)):
            layout = spec.layout(role, x.shape[3], self.shape.heads, LATENTS)
            tables = spec.tables(role)
            own = [] if tables is None else [tables.on(device)]
            if layout.rotary:
                own.append(torch.zeros(self.shape.batch, dtype=torch.int32, device=device))
            slots = boundary(layout, self.shape.context)
            parts.append(ops.quantize(x, slots, False, layout, own, None, None))
            layouts.append(layout)
            constants.append(own)
        self.layouts, self.parts, self.constants = layouts, parts, constants
        score = Score(SCALE, of_values=True)
        while True:
            held = [[part.clone() for part in each] for each in parts]

            def attend(held: list[list[Tensor]] = held) -> Tensor:
                return ops.attend(
                    *(self.query, *self.new, *held, [*constants[0], *constants[1]], None, self.position),
                    *(None, score, *layouts),
                )  # fmt: skip

            yield (
                sum(part.numel() * part.element_size() for each in held for part in each[:2]),
                attend,
            )

    def error(self, output: Tensor) -> float:
        """Return the relative error of attention to packed latents against fp64 over the same tokens."""
        read = [
            reference.read(*held[:2], held[2].float(), held[3], self.shape.context, layout, Calibrated.of(own, layout))
            for held, layout, own in zip(self.parts, self.layouts, self.constants, strict=True)
        ]  # fmt: skip
        rotary, latents = (
            torch.cat([x.double(), new.double()], 2) for x, new in zip(read, self.new, strict=True)
        )
        scores = self.query.double() @ torch.cat([rotary, latents], 3).mT * SCALE
        expected = torch.softmax(scores, -1) @ latents
        return float((output.double() - expected).norm() / expected.norm())


def measure(latents: Latents, method: str) -> dict[str, object]:
    """Return a row: microseconds, bytes a second and the error, or why there are none."""
    device = latents.query.device
    try:
        ways = latents.in_16_bit(method) if method in BASELINES else latents.packed(method)
        read, first = next(ways)
        error = None if method in BASELINES else latents.error(first())
        calls = [first, *(next(ways)[1] for _ in range(1, layers_in_turn(read, device)))]
        time = microseconds(calls, device)
        return {"us": time, "gbps": read / time / 1e3, "error": error}
    except Exception as failure:  # what does not run says why, and the others go on
        return {"refused": reason(failure)}


def main() -> None:
    """Print and keep a row a method and shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--method", action="append", help="may be repeated [default: int8, int4, int2]"
    )
    parser.add_argument("--shape", action="append", help="may be repeated [default: 1x32k, 8x32k]")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("kvq-bench"))
    parser.add_argument("--commit")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = place(device, given.commit)
    for batch, context in map(read_shape, given.shape or ("1x32k", "8x32k")):
        latents = Latents(batch, context, given.heads, device)
        for method in (*BASELINES, *(given.method or ("int8", "int4", "int2"))):
            sizes = {"batch": batch, "context": context, "heads": given.heads}
            row = {"method": method, **sizes, **measure(latents, method), **about}
            add_rows(given.out / "latents.csv", [row], (*PLACE, *CASE), short_cell)
            print(
                {name: short_cell(value) for name, value in row.items() if name not in about},
                flush=True,
            )


if __name__ == "__main__":
    main()
