"""Kernels compiled ahead of time, for GPUs that are not there.

A launcher is called on CPU tensors, and what it would launch is compiled instead. A process that runs kernels in
Triton's interpreter, as tests do without a GPU, cannot compile them. So `compiled_kernels` is a program: tests start
it with `run`, and it answers with `report`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import triton

from kvq_compile.kernels.triton import launch

Usage = dict[str, int]


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
        patch.setattr(launch, "platform_of", lambda query: driver.gpu.backend)
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


def run(program: Path, target: str, names: Iterable[str]) -> dict[str, Usage]:
    """Start a program that ends in `report` and return what it reports of the kernels of its cases ``names``."""
    if not cuobjdump().exists():
        pytest.skip("this build of triton brings no cuobjdump")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program), target, *names],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def report(cases: Mapping[str, Callable[[str], Any]]) -> None:
    """Print what the kernels ``cases[name](target)`` take, for `run`."""
    target, *names = sys.argv[1:]
    print(json.dumps({name: usage(cases[name](target)) for name in names}))
