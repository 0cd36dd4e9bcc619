"""Kernels compiled ahead of time, for GPUs that are not there.

A launcher is called on CPU tensors, and what it would launch is compiled instead. A process that runs kernels in
Triton's interpreter, as tests do without a GPU, cannot compile them. So a test file with cases to compile is a
program as well: it ends with a call of `report`, and the fixture `compiled` starts it with `run`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.tables import Tables
from kvq_compile.kernels.triton import append as quantize_kv
from kvq_compile.kernels.triton import attend as attention

CAPACITY = 4  # pages
HEADS, SHARED = 2, 4  # KV heads, and query heads to each of them
Usage = dict[str, int]
Side = tuple[Layout, Calibrated]


def cuobjdump() -> Path:
    """Return the disassembler's companion that most builds of Triton bring along."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Driver:
    """Stands in for the driver of a GPU that is not there, as far as compiling asks it."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        if target.startswith("sm_"):
            self.gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        else:
            self.gpu = GPUTarget("hip", target, 64)

    def get_current_target(self):
        return self.gpu

    def get_current_device(self):
        return self.gpu.arch

    def get_current_stream(self, device):
        return 0


@contextmanager
def launches(target: str) -> Iterator[dict[str, Any]]:
    """Compile kernels for ``target``, ``sm_…`` or ``gfx…``, where they would be launched; yield them by name."""
    driver, run, compiled = Driver(target), triton.JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **constants):
        compiled[self.fn.__name__] = run(self, *args, grid=grid, warmup=True, **constants)

    triton.runtime.driver.set_active(driver)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", compile_only)
        patch.setattr(attention, "platform_of", lambda query: driver.gpu.backend)
        yield compiled


def usage(kernel: Any) -> Usage:
    """Return what a kernel takes: registers of a thread, bytes of stack, bytes of shared memory.

    A kernel for AMD has only the registers that it spills to memory, called its stack.
    """
    if "cubin" not in kernel.asm:
        spilled = re.findall(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
        return {"stack": int(spilled[0])}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(cuobjdump()), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)[0]
    return {"registers": int(registers), "stack": int(stack), "shared": kernel.metadata.shared}


def compile_attend(key: Side, value: Side, target: str) -> Any:
    """Compile what decodes one token in bf16 over 128 channels."""
    (key_layout, key_frame), (value_layout, value_frame) = key, value
    query, x = (
        torch.zeros(1, heads, 1, 128, dtype=torch.bfloat16) for heads in (HEADS * SHARED, HEADS)
    )
    parts = [Packed.empty(x, CAPACITY, layout) for layout in (key_layout, value_layout)]
    position = torch.zeros(1, dtype=torch.int64)
    with launches(target) as compiled:
        attention.attend(
            query, x, x, *parts, None, position, None, 1.0, key_layout, value_layout, key_frame,
            value_frame,
        )  # fmt: skip
    return compiled["attend_kernel"]


def compile_append(
    layout: Layout, target: str, frame: Calibrated = UNCALIBRATED, importance: bool = False
) -> Any:
    """Compile what writes one token in bf16."""
    x = torch.zeros(1, HEADS, 1, layout.head_dim, dtype=torch.bfloat16)
    parts, position = Packed.empty(x, CAPACITY, layout), torch.zeros(1, dtype=torch.int64)
    weights = torch.zeros(1, HEADS, 300) if importance else None
    query = x.repeat(1, layout.shared_by, 1, 1) if layout.queries else None
    with launches(target) as compiled:
        quantize_kv.append_(*parts, x, position, None, layout, frame, weights, query)
    return next(iter(compiled.values()))


def calibrated(layout: Layout, tables: Tables | None) -> Calibrated:
    """Return what one sequence is coded relative to that begins at position 0."""
    if tables is None:
        return UNCALIBRATED
    return Calibrated(tables.words, torch.zeros(1, dtype=torch.int32) if layout.rotary else None)


def run(program: Path) -> dict[str, Usage]:
    """Start a test file as a program and return what it reports."""
    if not cuobjdump().exists():
        pytest.skip("this build of triton brings no cuobjdump")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def report(case: Callable[[str, str], Any], targets: Iterable[tuple[str, str]]) -> None:
    """Print what the kernels ``case(name, target)`` take, for `run`."""
    print(json.dumps({f"{name} {target}": usage(case(name, target)) for name, target in targets}))
