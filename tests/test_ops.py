"""Every operator says of itself what it does: schema, shapes, mutations, and what a compiler may assume."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

from kvq_compile.kernels import ops
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.schemes import Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.testing import DTYPES, lengths, page_layouts

NAMES = ("append_", "append_both_", "attend", "dequantize", "importance", "quantize")
SPECS = {
    "int4": CacheSpec(Uniform(4), Uniform(4), 2, 5, 32),
    "int3": CacheSpec(Uniform(3, group_size=16), Uniform(1), 0, 0, 32),
    "kivi": CacheSpec(Uniform(2, "channel", 16), Uniform(2, "token", 16), 2, 5, 32),
    "rotated": CacheSpec(*[Uniform(8, transform="hadamard", clip=0.9)] * 2, 2, 5, 32),
}


def case(name: str, dtype: torch.dtype, head_dim: int = 64) -> dict[str, Any]:
    """Return caches of 80 tokens, one new token and layouts."""
    spec = SPECS[name]
    generator = torch.Generator().manual_seed(0)
    layouts = [spec.layout(role, head_dim) for role in ("key", "value")]
    x = torch.randn(2, 2, 81, head_dim, generator=generator).to(dtype)
    parts = [ops.quantize(x[:, :, :80], 80, True, layout, []) for layout in layouts]
    query = torch.randn(2, 4, 1, head_dim, generator=generator).to(dtype)
    return {
        "x": x,
        "new": x[:, :, 80:].contiguous(),
        "query": query,
        "parts": parts,
        "layouts": layouts,
    }


def attend_args(
    at: dict[str, Any], position: Any, start: Any, mask: Tensor | None = None
) -> tuple[Any, ...]:
    about = mask, position, start, Score(0.125), *at["layouts"]
    return (at["query"], at["new"], at["new"], *at["parts"], [], *about)


# Declarations


@pytest.mark.long(but=["position-rotated-dtype3", "start-int3-dtype1", "start-kivi-dtype2"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("int4", torch.float16),
        ("int3", torch.bfloat16),
        ("kivi", torch.float32),
        ("rotated", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("slot", ["position", "start"])
def test_operators_keep_their_declarations(name: str, dtype: torch.dtype, slot: str) -> None:
    at = case(name, dtype)
    where = (torch.tensor([80]), None) if slot == "position" else (None, 80)
    mask = torch.ones(2, 1, 1, 81, dtype=torch.bool) if slot == "position" else None
    torch.library.opcheck(ops.attend, attend_args(at, *where, mask))
    for parts, layout in zip(at["parts"], at["layouts"], strict=True):
        grows = slot == "start"
        torch.library.opcheck(ops.quantize, (at["x"], 81 if grows else 200, grows, layout, []))
        torch.library.opcheck(ops.dequantize, (parts, [], 83, layout))
        torch.library.opcheck(ops.append_, (parts, [], at["new"], *where, layout))
        behind = None, None, at["query"]
        torch.library.opcheck(ops.append_, (parts, [], at["new"], *where, layout, *behind))
    both = (*at["parts"], [], at["new"], at["new"], *where, *at["layouts"])
    torch.library.opcheck(ops.append_both_, both)
    torch.library.opcheck(ops.append_both_, (*both, None, None, at["query"]))


def test_every_operator_is_registered_once() -> None:
    """Importing the package, the backend and the operators again must not define them again."""
    code = (
        "import importlib, torch, kvq_compile, kvq_compile.backend\n"
        "from kvq_compile.kernels import ops\n"
        "assert importlib.import_module('kvq_compile.kernels.ops') is ops\n"
        "names = [schema.name for schema in torch._C._jit_get_all_schemas()]\n"
        "print(*sorted(name[5:] for name in names if name.startswith('kvq::')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert tuple(done.stdout.split()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_only_the_operator_with_an_underscore_mutates(name: str) -> None:
    schema = getattr(torch.ops.kvq, name).default._schema
    written = [
        a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
    ]
    assert written == {"append_": ["cache"], "append_both_": ["keys", "values"]}.get(name, [])
    assert schema.is_mutable == name.endswith("_")


@given(st.data(), st.sampled_from(DTYPES), st.booleans())
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(
    data: st.DataObject, dtype: torch.dtype, grows: bool
) -> None:
    key, value = data.draw(page_layouts(role="key")), data.draw(page_layouts(role="value"))
    held = data.draw(lengths(key))
    slots = held + (0 if grows else data.draw(st.integers(0, 400)))
    heads, rows = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))

    def run() -> list[Tensor]:
        def tokens(count: int, dim: int, groups: int = 1) -> Tensor:
            return torch.zeros(2, heads * groups, count, dim, dtype=dtype)

        pair = key, value_like(key, value)
        parts = [ops.quantize(tokens(held, at.head_dim), slots, grows, at, []) for at in pair]
        query = tokens(rows, key.head_dim, 3)
        new = [tokens(rows, at.head_dim) for at in pair]
        output = ops.attend(query, *new, *parts, [], None, None, held, Score(1.0), *pair)
        read = ops.dequantize(parts[0], [], held + 2, key)
        return [*parts[0], *parts[1], output, read]

    with FakeTensorMode():
        fake = run()
    for mine, theirs in zip(fake, run(), strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (
            theirs.shape,
            theirs.dtype,
            theirs.stride(),
        )


def value_like(key: Layout, value: Layout) -> Layout:
    """Return the layout of values whose tokens lie where those of the keys do."""
    spec = Uniform(value.bits, "token", None, value.clip, value.transform)
    return CacheSpec(spec, spec, key.sinks, key.window, key.page_size).layout(
        "value", value.head_dim
    )


# What Inductor makes of them


def step(after: bool, both: bool) -> Callable[..., Tensor]:
    """Return one layer's step: attend, then append."""
    layouts = case("int4", torch.float32)["layouts"]

    def attend_then_append(
        query: Tensor, new: Tensor, where: Tensor | None, start: int | None, *parts: Tensor
    ) -> Tensor:
        caches, about = (parts[:4], parts[4:]), (None, where, start, Score(0.125), *layouts)
        output = ops.attend(query, new, new, *caches, [], *about)
        behind = output if after else None
        if both:
            ops.append_both_(*caches, [], new, new, where, start, *layouts, None, None, behind)
        else:
            for cache, layout in zip(caches, layouts, strict=True):
                ops.append_(cache, [], new, where, start, layout, None, None, behind)
        return output * 2

    return attend_then_append


def copies_of_codes(after: bool, both: bool, position: bool) -> int:
    """Compile a step and count the buffers of the size of the codes that its code allocates."""
    at = case("int4", torch.float32)
    where = (torch.tensor([80]), None) if position else (None, 80)
    parts = (*at["parts"][0], *at["parts"][1])
    expected = step(after, both)(at["query"], at["new"], *where, *[p.clone() for p in parts])
    torch._dynamo.reset()
    compiled = torch.compile(step(after, both), fullgraph=True, dynamic=False)
    with torch.no_grad():
        output, code = run_and_get_code(compiled, at["query"], at["new"], *where, *parts)
    torch.testing.assert_close(output, expected)
    assert parts[3].tolist() == parts[7].tolist() == [81, 2]
    return allocated(code, {part.numel() for part in parts if part.dtype == torch.int16})


def allocated(code: list[str], sizes: set[int]) -> int:
    """Return how many buffers of codes with so many elements are allocated, in one axis or in several."""
    found = re.findall(
        r"empty_strided_cpu\(\(([\d, ]+)\), \(.*?\), torch\.int16\)", "\n".join(code)
    )
    shapes = [[int(size) for size in shape.split(",") if size.strip()] for shape in found]
    return sum(math.prod(shape) in sizes for shape in shapes)


@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_inductor_appends_behind_an_attention_without_copying_the_cache(
    both: bool, position: bool, fresh_dynamo: None
) -> None:
    """`after` orders the write behind the attention. torch 2.13 keeps that order here without it, too."""
    assert copies_of_codes(True, both, position) == 0


def test_the_count_of_copies_sees_a_copy(fresh_dynamo: None) -> None:
    """Whatever the parts are copied for: the measurement above must be able to fail."""
    at = case("int4", torch.float32)
    layout = at["layouts"][0]

    def append_to_a_copy(new: Tensor, *parts: Tensor) -> Tensor:
        copy = [part + 0 for part in parts]
        ops.append_(copy, [], new, None, 80, layout)
        return copy[0]

    compiled = torch.compile(append_to_a_copy, fullgraph=True, dynamic=False)
    with torch.no_grad():
        _, code = run_and_get_code(compiled, at["new"], *at["parts"][0])
    assert allocated(code, {at["parts"][0][0].numel()}) >= 1


# What they refuse


@pytest.mark.parametrize("start", [-1, 82])
def test_a_write_that_would_leave_a_gap_is_refused_and_changes_nothing(start: int) -> None:
    at = case("int4", torch.float32)
    before = [part.clone() for part in at["parts"][0]]
    with pytest.raises(ValueError, match="position must start at or before the 80 tokens held"):
        ops.append_(at["parts"][0], [], at["new"], None, start, at["layouts"][0])
    assert all(map(torch.equal, at["parts"][0], before))


def test_attention_to_tokens_that_the_cache_does_not_hold_is_refused() -> None:
    at = case("int4", torch.float32)
    with pytest.raises(
        ValueError, match="position must start at or before the 80 tokens held, got 81"
    ):
        ops.attend(*attend_args(at, None, 81))
    seen = torch.ones(1, 1, 1, 90, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask must hide the slots that hold no token, from 81 on"):
        ops.attend(*attend_args(at, None, 80, seen))
