"""Fused attention over pages whose tokens differ in bits is attention to what they stand for.

The same claim as in `test_kernels_attention_frames`, of which this file also takes the way to compile ahead of
time: the error is that of the same computation in the query's dtype.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import attend_mixed, attention, reference
from kvq_compile.kernels.frame import Frame
from kvq_compile.kernels.ops import new_parts
from kvq_compile.kernels.spec import CacheSpec, PageLayout, TensorSpec
from kvq_compile.small_tables import random_tables

pytestmark = pytest.mark.filterwarnings(  # of numpy, from Triton's interpreter
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"
# Shrinking a failure natively would compile a kernel for every attempt.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate) + (Phase.shrink,) * (not NATIVE)
EXAMPLES = settings(max_examples=max(1, settings().max_examples * 2 // 3), phases=PHASES)


def mixed_spec(budget: float, least: int = 0, most: int = 4, **options: Any) -> TensorSpec:
    return TensorSpec(budget, mixed=(least, most), **{"params": "fp8"} | options)


class Site:
    """One attention over a filled cache: layouts, queries and new tokens."""

    def __init__(
        self, cache: CacheSpec, dims: tuple[int, int], shared: int, lengths: tuple[int, int],
        dtype: torch.dtype, seed: int = 0,
    ) -> None:  # fmt: skip
        self.start, new = lengths
        generator = torch.Generator().manual_seed(seed)

        def random(heads: int, tokens: int, dim: int) -> Tensor:
            x = torch.randn(2, tokens, heads, dim, generator=generator)
            return x.to(dtype).transpose(1, 2)

        importance = torch.rand(2, 2, self.start, generator=generator) ** 6
        self.layouts = cache.layout("key", dims[0]), cache.layout("value", dims[1])
        self.scale = dims[0] ** -0.5
        self.parts = []
        for layout in self.layouts:
            x = random(2, self.start, layout.head_dim)
            parts = new_parts(x, layout.pages_at(self.start) + 1, layout)
            if self.start:
                reference.append_(*parts, x, 0, layout, None, importance)
            self.parts.append(parts)
        self.query = random(2 * shared, new, dims[0])
        self.new = random(2, new, dims[0]), random(2, new, dims[1])

    def attend(self, mask: Tensor | None, by_position: bool = True) -> Tensor:
        tensors = [t.to(DEVICE) for t in (self.query, *self.new)]
        parts = [tuple(p.to(DEVICE) for p in parts) for parts in self.parts]
        slots = torch.arange(self.start, self.start + self.query.shape[2], device=DEVICE)
        return attention.attend(
            *tensors, *parts, None if mask is None else mask.to(DEVICE),
            slots if by_position else None, None if by_position else self.start, self.scale,
            *self.layouts,
        ).cpu()  # fmt: skip

    def expected(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Attend plainly in ``dtype`` to the tokens that the cache stands for."""
        tokens = []
        for new, parts, layout in zip(self.new, self.parts, self.layouts, strict=True):
            codes, params, exact, cursor = parts
            held = reference.read(codes, params, exact.float(), cursor, self.start, layout)
            tokens.append(torch.cat([held, new.float()], 2).to(dtype))
        if mask is not None and mask.is_floating_point():
            mask = mask.to(dtype)
        return reference.softmax_attention(self.query.to(dtype), *tokens, mask, self.scale)

    def assert_low_precision_error(self, actual: Tensor, mask: Tensor | None) -> None:
        """Assert that the error is a small multiple of that of the same computation in low precision.

        The second term is the rounding of the result; the third is what fp32 loses where terms cancel:
        codes are summed apart from what their token adds to all channels.
        """
        exact = self.expected(mask, torch.float64)
        assert actual.dtype == self.query.dtype
        assert actual.shape == exact.shape
        assert bool(actual.isfinite().all())
        dtype = self.query.dtype
        if NATIVE and dtype == torch.float32:
            dtype = torch.float16
        plain = (self.expected(mask, dtype).double() - exact).abs().max()
        bound = 3 * plain + 2 * torch.finfo(dtype).eps * exact.abs().max() + 5e-5
        error = (actual.double() - exact).abs().max()
        assert error <= bound, f"error {error:.2e} beyond {bound:.2e}; plainly {plain:.2e}"


@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    least = draw(st.integers(0, 2))
    most = draw(st.sampled_from([4, 4, 6, least + 1, 8]))
    rows = draw(st.integers(max(8, 32 * least), 32 * most))
    return mixed_spec(
        rows / 32, least, most, params=draw(st.sampled_from(["fp8", "fp16"])),
        outliers=draw(st.sampled_from([0, 0, 2, 4])), fit=draw(st.booleans()),
        transform=draw(st.sampled_from(["none", "none", "hadamard"])),
    )  # fmt: skip


@st.composite
def sites(draw: st.DrawFn) -> Site:
    page = draw(st.sampled_from((32, 32, 64)))
    cache = CacheSpec(draw(specs()), draw(specs()), draw(st.integers(0, 5)), 20, page)
    boundary = cache.sinks + cache.window + page
    start = draw(st.sampled_from([1, boundary - 1, boundary, boundary + page, boundary + 75]))
    dims = st.sampled_from((16, 32, 64, 80, 128))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    return Site(
        cache, (draw(dims), draw(dims)), draw(st.sampled_from([1, 2, 4, 7])),
        (start, draw(st.sampled_from([1, 1, 2, 5]))), dtype,
    )  # fmt: skip


@EXAMPLES
@given(sites(), st.data())
def test_attention_has_the_error_of_the_same_computation_in_low_precision(
    site: Site, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(["none", "bool", "additive", "heads"]))
    tokens, width = site.query.shape[2], site.start + site.query.shape[2]
    mask = None
    if kind != "none":
        shape = (2, site.query.shape[1] if kind == "heads" else 1, tokens, width)
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
        if kind == "additive":
            mask = torch.zeros(shape).masked_fill(~mask, -math.inf)
    site.assert_low_precision_error(site.attend(mask, data.draw(st.booleans())), mask)


CASES = {  # keys and values
    "qaq-2.3": (mixed_spec(2.75), mixed_spec(1.4375)),
    "qaq-3": (mixed_spec(3.25), mixed_spec(2.375)),
    "six bits": (mixed_spec(3.5, 1, 6), mixed_spec(3, 0, 6)),
    "eight bits": (mixed_spec(5, 0, 8), mixed_spec(2, 0, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_chunk_of_queries_over_whole_pages_is_right(name: str) -> None:
    site = Site(CacheSpec(*CASES[name], 5, 20, 64), (128, 128), 2, (160, 9), torch.float32)
    causal = torch.arange(169) <= torch.arange(160, 169)[:, None]
    site.assert_low_precision_error(site.attend(causal), causal)


@pytest.mark.parametrize("dims", [(16, 80), (80, 16), (16, 16)])
def test_small_heads_with_outliers_are_right(dims: tuple[int, int]) -> None:
    """Failed natively: a token of 16 channels has a single unit, and units were unpacked in pairs."""
    cache = CacheSpec(mixed_spec(2.5, 0, 3, outliers=2), mixed_spec(3.25, 0, 8, outliers=4), 0, 20, 32)
    site = Site(cache, dims, 4, (52, 2), torch.float32)
    site.assert_low_precision_error(site.attend(None), None)


def test_pages_of_equal_tokens_have_no_bits_and_are_read() -> None:
    """Their tokens have no extent, so all of them stand for their centres."""
    site = Site(CacheSpec(*CASES["qaq-2.3"], 1, 9, 32), (32, 32), 1, (74, 1), torch.float32)
    for parts, layout in zip(site.parts, site.layouts, strict=True):
        reference.append_(*parts, torch.full((2, 2, 74, 32), 0.5), 0, layout)
        assert not parts[0].any()
    site.assert_low_precision_error(site.attend(None), None)


def test_the_number_of_shares_does_not_change_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(CacheSpec(*CASES["six bits"], 1, 20, 32), (64, 64), 4, (120, 1), torch.float32)
    expected = site.attend(None)
    monkeypatch.setattr(attention, "PROGRAMS_PER_PROCESSOR", 1000)
    torch.testing.assert_close(site.attend(None), expected, rtol=1e-5, atol=1e-5)


def test_tables_are_refused_by_name() -> None:
    tables = random_tables(2, 32, group_size=32, rotary=False, codebook=None, seed=0)
    spec = CacheSpec(mixed_spec(2, tables=tables), mixed_spec(2), 1, 20, 32)
    layouts = [spec.layout(role, 32) for role in ("key", "value")]
    parts = [new_parts(torch.zeros(1, 2, 1, 32, device=DEVICE), 2, layout) for layout in layouts]
    x = torch.zeros(1, 2, 1, 32, device=DEVICE)
    frame = Frame(tables.words.to(DEVICE))
    with pytest.raises(NotImplementedError, match="tables must be None"):
        attention.attend(x, x, x, *parts, None, None, 1, 1.0, *layouts, frame, None)


# --- instructions ---------------------------------------------------------------------------------


def execute(ptx: str, registers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Execute straight-line PTX on 32-bit registers that hold any number of lanes, int64."""

    def value(operand: str) -> Tensor:
        if operand in registers:
            return registers[operand]
        return torch.tensor(int(operand, 0))

    def halves(x: Tensor) -> Tensor:
        words = torch.stack([x & 0xFFFF, x >> 16], -1)
        return torch.where(words >= 1 << 15, words - (1 << 16), words).short().view(torch.float16)

    for line in ptx.strip("{} ").replace("\n", " ").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        name, rest = line.strip().split(" ", 1)
        to, *operands = (operand.strip() for operand in rest.split(","))
        args = [value(operand) for operand in operands]
        if name == "mov.b32":
            result = args[0]
        elif name == "shl.b32":
            result = (args[0] << args[1]) & 0xFFFFFFFF
        elif name == "shr.b32" or name == "shr.u32":
            result = args[0] >> args[1]
        elif name == "and.b32":
            result = args[0] & args[1]
        elif name == "lop3.b32":
            a, b, c, table = args
            bits = [((x[..., None] if x.dim() else x) >> torch.arange(32)) & 1 for x in (a, b, c)]
            chosen = (table >> (bits[0] * 4 + bits[1] * 2 + bits[2])) & 1
            result = (chosen << torch.arange(32)).sum(-1)
        else:
            assert name == "sub.f16x2", name
            difference = halves(args[0]) - halves(args[1])
            words = difference.view(torch.int16).long() & 0xFFFF
            result = words[..., 0] | (words[..., 1] << 16)
        registers[to] = result
    return registers


@pytest.mark.parametrize("bits", range(1, 9))
def test_merged_planes_are_the_codes_in_fp16(bits: int) -> None:
    """All places of the two units of a register, with bits of other fields all zero, all one and random."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (64, 2, 16), generator=generator)
    codes[0], codes[1] = 0, (1 << bits) - 1
    planes = {}
    for plane in range(bits):
        fields = (codes >> (bits - 1 - plane)) & 1
        units = (fields << torch.arange(16)).sum(-1)
        planes[f"${16 + plane}"] = units[:, 0] | (units[:, 1] << 16)
    registers = execute(attend_mixed.merge_planes(bits), planes)
    for field in range(16):
        pair = torch.stack([registers[f"${field}"] & 0xFFFF, registers[f"${field}"] >> 16], -1)
        words = torch.where(pair >= 1 << 15, pair - (1 << 16), pair).short()
        assert torch.equal(words.view(torch.float16).long(), codes[:, :, field])


# --- launch settings ------------------------------------------------------------------------------


def test_rotary_keys_and_codebooks_take_two_programs_a_processor_and_others_three() -> None:
    def programs(key: TensorSpec, value: TensorSpec) -> int:
        spec = CacheSpec(key, value)
        layouts: list[PageLayout] = [spec.layout("key", 64), spec.layout("value", 64)]
        return attention.programs_per_processor(*(attention.Coding.of(x) for x in layouts))

    def tables(rotary: bool, codebook: tuple[int, int] | None = None) -> Any:
        return random_tables(2, 64, group_size=64, rotary=rotary, codebook=codebook, seed=0)

    assert programs(TensorSpec(2), TensorSpec(2)) == 3
    assert programs(*CASES["qaq-2.3"]) == 3
    assert programs(TensorSpec(2, tables=tables(True), rotary=True), TensorSpec(2)) == 2
    book = TensorSpec(4, couple=2, tables=tables(False, (2, 4)))
    assert programs(TensorSpec(2), book) == 2


# --- ahead of time --------------------------------------------------------------------------------


def tool() -> Path | None:
    """Return the disassembler's companion that Triton brings along, if it does."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


def argument_type(name: str) -> str:
    """Return the type of a kernel's argument that is no constant."""
    types = {"scale": "fp32", "partial": "*fp32", "lse": "*fp32", "position": "*i64"}
    types |= dict.fromkeys(("query", "packed_query", "key", "value"), "*bf16")
    types |= dict.fromkeys(("key_exact", "value_exact", "turns", "key_book", "value_book"), "*bf16")
    types |= dict.fromkeys(("key_codes", "value_codes"), "*u16")
    types |= dict.fromkeys(("key_params", "value_params"), "*u8")
    types |= dict.fromkeys(("key_cursor", "value_cursor", "key_tables", "shift"), "*i32")
    return types.get(name, "i32")


def compile_case(name: str, target: tuple[str, Any, int]) -> dict[str, int]:
    """Compile one case; for an H100 return registers, bytes of stack and of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    layouts = [CacheSpec(*CASES[name]).layout(role, 128) for role in ("key", "value")]
    constants, options = attention.launch_constants(*layouts, 4, 1, torch.bfloat16, target[0])
    constants |= {"HAS_POSITION": True, "MASK_KIND": 0, "MASK_SHARED": False}
    constants |= {"mask": None, "query_bias": None, "tokens": 1, "m_s": 1}
    signature, attributes = {}, {}
    for index, argument in enumerate(attention.attend_kernel.arg_names):
        kind = argument_type(argument)
        signature[argument] = "constexpr" if argument in constants else kind
        aligned = kind.startswith("*") or argument.endswith(("_b", "_h", "_t", "_words"))
        if aligned and argument not in constants:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=attention.attend_kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    compiled = triton.compile(source, target=GPUTarget(*target), options=options)
    if target[0] == "hip":
        return {"stack": 0}
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
    """Two programs share a processor, too."""
    assert compiled[name]["stack"] == 0
    assert compiled[name]["registers"] * 128 * 2 <= 65536
    assert compiled[name]["shared"] * 2 <= 227 * 1024


if __name__ == "__main__":
    compile_case("qaq-2.3", ("hip", "gfx942", 64))
    print(json.dumps({case: compile_case(case, ("cuda", 90, 32)) for case in CASES}))
