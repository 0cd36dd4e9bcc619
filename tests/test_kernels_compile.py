"""The decoding kernel compiles ahead of time and keeps its state in registers, no GPU needed.

This file also is the program that compiles: a process that runs kernels in Triton's interpreter
cannot.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

CASES = {  # bits, grouping and group size of keys and values
    "int8": ((8, "token", 128), (8, "token", 128)),
    "int4": ((4, "token", 128), (4, "token", 128)),
    "int3": ((3, "token", 128), (3, "token", 128)),
    "int2": ((2, "token", 128), (2, "token", 128)),
    "int2-g64": ((2, "token", 64), (2, "token", 64)),
    "kivi-2": ((2, "channel", 32), (2, "token", 32)),
}


def tool() -> Path | None:
    """Return the disassembler's companion that Triton brings along, if it does."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


def compile_case(name: str) -> dict[str, int]:
    """Compile one case for an H100; return registers, bytes of stack and of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kvq_compile.kernels.attention import attend_kernel, launch_constants
    from kvq_compile.kernels.spec import CacheSpec, TensorSpec

    spec = CacheSpec(*(TensorSpec(bits, grouping, size) for bits, grouping, size in CASES[name]))
    layouts = spec.layout("key", 128), spec.layout("value", 128)
    constants, options = launch_constants(*layouts, 4, 1, torch.bfloat16, "cuda")
    constants |= {"HAS_POSITION": True, "MASK_KIND": 0, "MASK_SHARED": False, "tokens": 1, "m_s": 1}
    types = {"codes": "*u16", "params": "*i32", "cursor": "*i32", "mask": "*u8", "position": "*i64"}
    types |= {
        "partial": "*fp32",
        "lse": "*fp32",
        "query": "*bf16",
        "key": "*bf16",
        "value": "*bf16",
    }
    signature, attributes = {}, {}
    for index, argument in enumerate(attend_kernel.arg_names):
        kind = types.get(argument) or types.get(argument.rsplit("_", 1)[-1], "i32")
        if argument.endswith("_exact"):
            kind = "*bf16"
        kind = "fp32" if argument == "scale" else kind
        signature[argument] = "constexpr" if argument in constants else kind
        if kind.startswith("*") or argument.endswith(("_b", "_h", "_t")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=attend_kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool()), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)[0]
    return {"registers": int(registers), "stack": int(stack), "shared": compiled.metadata.shared}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    if tool() is None:
        pytest.skip("this build of triton brings no cuobjdump")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_decoding_keeps_its_state_in_registers(
    compiled: dict[str, dict[str, int]], name: str
) -> None:
    assert compiled[name]["stack"] == 0


@pytest.mark.parametrize("name", CASES)
def test_two_programs_share_a_processor(compiled: dict[str, dict[str, int]], name: str) -> None:
    assert compiled[name]["registers"] * 128 * 2 <= 65536
    assert compiled[name]["shared"] * 2 <= 227 * 1024


if __name__ == "__main__":
    print(json.dumps({name: compile_case(name) for name in CASES}))
