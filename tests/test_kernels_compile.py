"""The decoding kernel compiles ahead of time and keeps its state in registers, no GPU needed."""

from typing import Any

import pytest

import aot
from attention_site import plain_sides
from kvq_compile.kernels.layout import CacheSpec
from kvq_compile.kernels.schemes import Uniform

CASES = {  # bits, grouping and group size of keys and values
    "int8": ((8, "token", 128), (8, "token", 128)),
    "int4": ((4, "token", 128), (4, "token", 128)),
    "int3": ((3, "token", 128), (3, "token", 128)),
    "int2": ((2, "token", 128), (2, "token", 128)),
    "int2-g64": ((2, "token", 64), (2, "token", 64)),
    "kivi-2": ((2, "channel", 32), (2, "token", 32)),
}


def compile_case(name: str, target: str) -> Any:
    spec = CacheSpec(*(Uniform(bits, grouping, size) for bits, grouping, size in CASES[name]))
    return aot.compile_attend(*plain_sides(spec, (128, 128)), target)


@pytest.mark.parametrize("name", CASES)
def test_decoding_keeps_its_state_in_registers(compiled: dict[str, aot.Usage], name: str) -> None:
    assert compiled[f"{name} sm_90"]["stack"] == 0


@pytest.mark.parametrize("name", CASES)
def test_two_programs_share_a_processor(compiled: dict[str, aot.Usage], name: str) -> None:
    used = compiled[f"{name} sm_90"]
    assert used["registers"] * 128 * 2 <= 65536
    assert used["shared"] * 2 <= 227 * 1024


if __name__ == "__main__":
    aot.report(compile_case, [(name, "sm_90") for name in CASES])
