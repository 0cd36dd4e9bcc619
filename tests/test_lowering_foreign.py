"""What runs under PyTorch's own backends runs under kvq, and gives the same numbers."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import KVQWarning, QuantizedKV
from kvq_compile.lowering import pipeline
from kvq_compile.lowering.find import attention
from refused_steps import buffers, compile_, grown, join, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

INNER = ("eager", "aot_eager", "inductor")
EFFECTS: list[float] = []


@torch.library.custom_op("kvq_test::note", mutates_args=())
def note(x: Tensor) -> Tensor:
    """Remember a number, which no schema tells of."""
    EFFECTS.append(float(x.sum()))
    return x.clone()


@note.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def scan(x):
    pair = associative_scan(
        lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (x, x), 1, combine_mode="generic"
    )
    return pair[1]


def mapped_twice(x):
    return torch.vmap(torch.vmap(lambda a: a * 2))(x)


def forward_derivative(x):
    return torch.func.jvp(torch.sin, (x,), (x,))[1]


def jacobian(x):
    return torch.func.jacrev(lambda a: a.sin())(x[0])


def gradient(x):
    return torch.func.grad(lambda a: (a * a).sum())(x)


def in_another_dtype(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x.mT
    return y, y.float() @ x


def profiled(x):
    with torch.profiler.record_function("step"):
        return x + 1


def seeded(x):
    torch.manual_seed(0)
    return torch.nn.functional.dropout(x, 0.5, True)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "step",
    [
        *(scan, mapped_twice, forward_derivative, jacobian, gradient),
        *(in_another_dtype, profiled, seeded),
    ],
)
def test_a_graph_without_attention_runs_as_it_is(step, inner) -> None:
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.compile(step, backend=inner)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(compile_(step, inner=inner)(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("inner", INNER)
def test_a_graph_without_inputs_runs(inner) -> None:
    def step(x):
        table = torch.arange(8.0).outer(torch.ones(4))
        torch._dynamo.graph_break()
        return x @ table

    torch.testing.assert_close(
        compile_(step, inner=inner)(torch.ones(2, 8)), step(torch.ones(2, 8))
    )


def test_a_graph_with_nothing_to_rewrite_goes_to_the_inner_compiler_as_captured(
    monkeypatch,
) -> None:
    captured, handed_on = [], []

    def lower(gm, *args, **options):
        captured.append(gm)
        lowered = pipeline.lower(gm, *args, **options)
        handed_on.append(lowered.module)
        return lowered

    monkeypatch.setattr("kvq_compile.backend.lower", lower)
    compile_(lambda x: torch.softmax(x, -1) + 1)(torch.ones(2, 3))
    assert captured
    assert all(a is b for a, b in zip(captured, handed_on, strict=True))


def growing_beside(other):
    """Return a step that grows a cache and does something else beside it."""

    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        more = other(query)
        return sdpa(query, keys, values), more, keys, values

    return step


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "other",
    [
        lambda query: torch.vmap(lambda a: a * 2)(query),
        lambda query: scan(query[0, 0]),
        lambda query: torch.func.jvp(torch.sin, (query,), (query,))[1],
        lambda query: torch.cond(query.sum() > 0, lambda x: x + 1, lambda x: x - 1, (query,)),
        note,
    ],
    ids=["vmap", "associative_scan", "jvp", "cond", "custom operator"],
)
def test_a_rewritten_graph_keeps_what_has_nothing_to_do_with_attention(other, inner) -> None:
    step = growing_beside(other)
    with torch.no_grad():
        expected = step(*grown()())
        before = len(EFFECTS)
        outputs = compile_(step, inner=inner)(*grown(quantized=True)())
    torch.testing.assert_close(outputs[1], expected[1], rtol=0, atol=0)
    torch.testing.assert_close(outputs[0], expected[0], rtol=1e-4, atol=1e-5)
    assert isinstance(outputs[2], QuantizedKV)
    assert len(EFFECTS) == before + (other is note)


def test_random_numbers_that_nobody_reads_are_drawn_all_the_same() -> None:
    def drawing(query):
        torch.rand(3)
        return query + torch.rand(16)

    step = growing_beside(drawing)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = step(*grown()())[1]
        torch.manual_seed(0)
        outputs = compile_(step)(*grown(quantized=True)())
    torch.testing.assert_close(outputs[1], expected, rtol=0, atol=0)
    assert isinstance(outputs[2], QuantizedKV)


def test_an_effect_whose_result_nobody_reads_still_happens() -> None:
    def step(query, key, value, keys, values):
        note(query)
        keys, values = join(keys, values, key, value)
        return sdpa(query, keys, values), keys, values

    EFFECTS.clear()
    with torch.no_grad():
        compile_(step)(*grown(quantized=True)())
    assert len(EFFECTS) == 1


def test_an_assertion_beside_a_rewritten_attention_still_asserts() -> None:
    def step(query, key, value, keys, values):
        torch._assert_async((query < 1e9).all(), "the query must be finite")
        keys, values = join(keys, values, key, value)
        return sdpa(query, keys, values), keys, values

    compiled = compile_(step)
    query, *rest = grown(quantized=True)()
    with torch.no_grad():
        compiled(query, *rest)
        with pytest.raises(RuntimeError, match="the query must be finite"):
            compiled(query * torch.inf, *rest)


# Slots computed twice, and moved on


def test_slots_that_keys_and_values_compute_each_for_themselves_are_one() -> None:
    def step(query, key, value, keys, values, position, mask):
        keys.index_copy_(2, position.view(-1), key)
        values.index_copy_(2, position.view(-1), value)
        return sdpa(query, keys, values, attn_mask=mask)

    assert_quantizes_buffers(step)


def test_slots_that_the_model_moves_on_are_those_of_the_write() -> None:
    def step(query, key, value, keys, values, position, mask):
        slots = position + 0
        keys[:, :, slots[: key.shape[2]]] = key
        values[:, :, slots[: key.shape[2]]] = value
        slots.add_(7)
        return sdpa(query, keys, values, attn_mask=mask) + slots.sum()

    assert_quantizes_buffers(step)


def test_slots_moved_on_between_keys_and_values_are_two_and_left_alone() -> None:
    def step(query, key, value, keys, values, position, mask):
        slots = position + 0
        keys.index_copy_(2, slots[: key.shape[2]], key)
        slots.add_(1)
        values.index_copy_(2, slots[: key.shape[2]], value)
        return sdpa(query, keys, values, attn_mask=mask)

    given = buffers()()
    with torch.no_grad(), pytest.warns(KVQWarning, match="written at different cache positions"):
        output = compile_(step)(*given)
        torch.testing.assert_close(output, step(*buffers()()))


def assert_quantizes_buffers(step) -> None:
    with torch.no_grad():
        given, plain = buffers()(), buffers()()
        compiled = compile_(step, strict=True)
        for _ in range(2):
            torch.testing.assert_close(compiled(*given), step(*plain), rtol=1e-4, atol=1e-5)
    assert isinstance(given[3], QuantizedKV)
    torch.testing.assert_close(given[3].dequantize()[:, :, :5], plain[3][:, :, :5])


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_buffers_allocated_in_the_call_may_have_any_size(inner) -> None:
    """Regression: a symbolic size stood in the graph by its name, which only Inductor knows."""

    def step(query, key, value, slots: int):
        keys, values = key.new_zeros(2, 2, slots, 16), key.new_zeros(2, 2, slots, 16)
        position = torch.arange(key.shape[2])
        keys.index_copy_(2, position, key)
        values.index_copy_(2, position, value)
        mask = torch.arange(slots)[None] <= position[:, None]
        return sdpa(query, keys, values, attn_mask=mask), keys, values

    compiled = compile_(step, inner=inner, strict=True)
    with torch.no_grad():
        for slots in (12, 17, 23):
            arguments = tokens(5), tokens(5, seed=1), tokens(5, seed=2), slots
            output, keys, _ = compiled(*arguments)
            torch.testing.assert_close(output, step(*arguments)[0], rtol=1e-4, atol=1e-5)
            assert isinstance(keys, QuantizedKV)
            assert keys.shape[2] == slots


# Analysis that fails


def fail(*_args, **_kwargs):
    raise AssertionError("Expected bool, got FakeTensor")


@pytest.mark.parametrize(
    ("place", "quantized"),
    [
        ("reader", False),
        ("find.sites._site", False),
        ("find.sites._site", True),
        ("find.sites.find_attentions", True),
        ("rewrite.quantize_outputs._plan", False),
        ("rewrite.fuse_attention._fuse", True),
    ],
)
def test_an_analysis_that_fails_is_a_refusal_that_asks_to_be_reported(
    place, quantized, monkeypatch
) -> None:
    if place == "reader":
        monkeypatch.setitem(attention._READERS, "scaled_dot_product_attention", fail)
    else:
        monkeypatch.setattr(f"kvq_compile.lowering.{place}", fail)

    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        return sdpa(query, keys, values), keys, values

    with torch.no_grad():
        expected = step(*grown()())
        with pytest.warns(KVQWarning, match=r"Expected bool, got FakeTensor.*please report it"):
            outputs = compile_(step)(*grown(quantized=quantized)())
        torch.testing.assert_close(outputs[0], expected[0], rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()
        with pytest.raises(BackendCompilerFailed, match="please report it"):
            compile_(step, strict=True)(*grown(quantized=quantized)())
