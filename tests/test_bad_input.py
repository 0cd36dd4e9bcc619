"""What cannot be served is refused by name or is an error that names it, and nothing is lost."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import KVQError, KVQWarning, QuantizedKV, make_spec, quantize_cache_
from kvq_compile.history import watching
from kvq_compile.options import make_config
from versions import no_attention_without_heads

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"method": "int8", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"}
SPEC = {name: value for name, value in OPTIONS.items() if name != "inner"}
SLOTS = 64


def tokens(
    number: int, seed: int = 0, head_dim: int = 16, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 100 * number)
    return torch.randn(2, 2, number, head_dim, generator=generator).to(dtype)


def new(number: int, count: int = 5, **options) -> list[torch.Tensor]:
    """Return query, key, value, and keys and values as long."""
    return [tokens(number, seed, **options) for seed in range(count)]


def attend(query, key, value, keys, values):
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return sdpa(query, keys, values), keys, values


def fill(query, key, value, keys, values, position):
    keys[:, :, position] = key
    values[:, :, position] = value
    return sdpa(
        query, keys, values, attn_mask=torch.arange(keys.shape[2])[None] <= position[:, None]
    )


def compile_(step, **options):
    return torch.compile(step, backend="kvq", options=OPTIONS | options)


# Options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "imt4"}, ValueError, "got 'imt4'; did you mean 'int4'?"),
        (
            {"method": "kivi", "group_sise": 32},
            ValueError,
            "got 'group_sise'; did you mean 'group_size'?",
        ),
        ({"methd": "int4"}, ValueError, "got 'methd'; did you mean 'method'?"),
        (
            {"method": "kivi", "key_bits": 5},
            ValueError,
            "bits must be one of [1, 1.5, 2, 3, 4, 8], got 5",
        ),
        ({"bits": 0.5}, ValueError, "bits must be from 1 to 8, got 0.5"),
        ({"bits": "3"}, TypeError, "bits must be a number, got '3'"),
        ({"key_bits": 9}, ValueError, "key_bits must be above 0 and at most 8, got 9"),
        ({"method": "tc", "pairs": "thirds"}, ValueError, "pairs must be"),
        ({"value_bits": 16}, ValueError, "bits must be one of [1, 1.5, 2, 3, 4, 8], got 16"),
        (
            {"method": "kivi", "key_bits": 0},
            ValueError,
            "bits must be one of [1, 1.5, 2, 3, 4, 8], got 0",
        ),
        ({"method": "kivi", "group_size": 0}, ValueError, "group_size must be positive, got 0"),
        ({"method": "kivi", "clip": 1.5}, ValueError, "clip must be in (0, 1], got 1.5"),
        ({"method": "int4", "transform": "hadamrd"}, ValueError, "transform must be"),
        ({"window": -1}, ValueError, "window must be 0 or more, got -1"),
        ({"sinks": -1}, ValueError, "sinks must be 0 or more, got -1"),
        ({"page_size": 100}, ValueError, "page_size must be one of (32, 64, 128, 256), got 100"),
        ({"method": "kivi", "key_bits": "4"}, TypeError, "bits must be an integer, got '4'"),
        ({"window": 4.5}, TypeError, "window must be an integer, got 4.5"),
        ({"layers": {0: 4}}, ValueError, "layers must map numbers to a method"),
        ({"layers": [None]}, TypeError, "layers must be a dictionary, got [None]"),
        (
            {"layers": {0: {"method": "int8", "layers": {}}}},
            ValueError,
            "layers must map numbers to a method",
        ),
        ({"layers": {-1: None}}, ValueError, "layers must be numbered from 0, got -1"),
        ({"strict": 1}, TypeError, "strict must be a bool, got 1"),
        (
            {"inner": "tvm"},
            ValueError,
            "inner must be one of inductor, eager, aot_eager, got 'tvm'",
        ),
        ({"inductor": 3}, TypeError, "inductor must be a dictionary"),
        ({"method": 4}, TypeError, "method must be a name, got 4"),
        ({"method": "cq"}, ValueError, "method must be one of"),
        ({"layers": {True: None}}, ValueError, "layers must be numbered from 0, got True"),
        ({"page_size": "x"}, TypeError, "page_size must be an integer, got 'x'"),
        ({"method": "kivi", "clip": "x"}, TypeError, "clip must be a number or \"best\", got 'x'"),
        (
            {"method": "kivi", "group_size": "x"},
            ValueError,
            'group_size must be a number of channels, None or "auto"',
        ),
        ({"method": "qaq", "page_size": "x"}, TypeError, "page_size must be an integer, got 'x'"),
        (
            {"method": "qaq", "bits": 0},
            ValueError,
            "bits must be from 1.88 to 3.77 with min_bits=1",
        ),
        ({"method": "qaq", "bits": -3}, ValueError, "got -3; give other min_bits or max_bits"),
        (
            {"method": "qaq", "bits": 9},
            ValueError,
            "bits must be from 1.88 to 5.77 with min_bits=1",
        ),
        ({"method": "qaq", "bits": "3"}, TypeError, "bits must be a number, got '3'"),
        ({"method": "qaq", "bits": float("nan")}, ValueError, "bits must be finite, got nan"),
        (
            {"method": "qaq", "key_bits": 9},
            ValueError,
            "key_bits must be from min_bits=1 to max_bits=4",
        ),
        (
            {"method": "qaq", "max_bits": 9},
            ValueError,
            "two ascending numbers of 0 to 8, got 1 and 9",
        ),
        ({"method": "qaq", "min_bits": 1.5}, TypeError, "min_bits must be an integer, got 1.5"),
        ({"layers": {2: {"method": "qaq", "bits": 0}}}, ValueError, "bits must be from 1.88"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(options, error, message) -> None:
    with pytest.raises(error) as caught:
        make_config(options)
    assert message in str(caught.value)


def test_an_error_in_the_options_reaches_the_user_of_torch_compile() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"got 'int5'; did you mean"):
        torch.compile(attend, backend="kvq", options={"method": "int5"})(*new(2))


@given(
    st.floats(-1, 10), st.integers(0, 7), st.integers(1, 8), st.sampled_from(["fitted", "paper"])
)
def test_bits_of_qaq_are_refused_as_an_option_or_have_a_layout(bits, least, more, variant) -> None:
    """Regression: what no page could hold was a warning at the first call, and a cache in 16 bit."""
    options = {
        "bits": bits,
        "min_bits": least,
        "max_bits": min(8, least + more),
        "variant": variant,
    }
    try:
        spec = make_spec("qaq", **options)
    except ValueError as error:
        assert str(error).startswith("bits must be from")  # noqa: PT017 - either is right
        return
    for role in ("key", "value"):
        assert least <= spec.layout(role, 128, 2).bits <= least + more


@pytest.mark.parametrize("method", ["int8", "int4", "int2", "kivi"])
@given(head_dim=st.integers(1, 72).map(lambda n: 8 * n))
def test_groups_that_a_method_chooses_divide_every_head(method, head_dim) -> None:
    """Regression: the default group of 32 channels refused heads of 40, 48, 80 ... channels."""
    for role in ("key", "value"):
        layout = make_spec(method).layout(role, head_dim)
        whole = head_dim if layout.grouping == "token" else layout.page_size
        most = 32 if method in ("int2", "kivi") else whole
        larger = [g for g in range(layout.group_size + 1, most + 1) if whole % g == 0]
        assert (whole % layout.group_size, larger) == (0, [])
        assert (f"group-{layout.group_size}" in layout.about) == (layout.group_size != whole)


@pytest.mark.parametrize("method", [{"method": "int2"}, {"method": "kivi", "bits": 4}])
@pytest.mark.parametrize("head_dim", [8, 40, 72])
@torch.no_grad()
def test_a_head_that_no_power_of_two_divides_is_served_and_told(method, head_dim) -> None:
    with watching() as graphs:
        step = compile_(attend, **method)
        _, keys, values = step(*new(80, head_dim=head_dim))
        query = new(1, 3, head_dim=head_dim)
        output, keys, values = step(*query, keys, values)
    dense = attend(*query, keys.dequantize()[:, :, :160], values.dequantize()[:, :, :160])[0]
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)
    group = (
        keys.page_layout.group_size if method["method"] == "int2" else values.page_layout.group_size
    )
    assert f"group-{group}" in graphs[-1].sites[0].detail or group == head_dim


def test_a_group_that_does_not_divide_the_head_is_refused_by_name() -> None:
    with (
        torch.no_grad(),
        pytest.warns(KVQWarning, match="head_dim must be a multiple of group_size=32, got 48"),
    ):
        output, keys, _ = compile_(attend, group_size=32)(*new(2, head_dim=48))
    assert type(keys) is torch.Tensor
    torch.testing.assert_close(output, attend(*new(2, head_dim=48))[0])


def capped_by_erf(query, key, value, keys, values):
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return torch.softmax(torch.erf(query @ keys.transpose(2, 3)), -1) @ values, keys, values


def test_strict_makes_a_refusal_an_error() -> None:
    with pytest.raises(
        BackendCompilerFailed, match=r"KVQError: 1 of 1 attentions were left.*head_dim"
    ):
        compile_(attend, group_size=32, strict=True)(*new(2, head_dim=48))


@torch.no_grad()
def test_strict_accepts_a_cache_that_is_stored_quantized_and_read_dense() -> None:
    with pytest.warns(KVQWarning, match=r"slower than over 16 bit: .*erf"):
        _, keys, values = compile_(capped_by_erf, strict=True)(*new(2))
    assert type(keys) is type(values) is QuantizedKV


def test_strict_accepts_what_keeps_no_cache() -> None:
    def step(query, key, value):
        return sdpa(query, key + 1, value + 1)

    compile_(step, strict=True)(*new(2, 3))


@torch.no_grad()
def test_a_layer_left_out_by_option_stays_in_16_bit() -> None:
    def step(query, key, value, keys, values, other_keys, other_values):
        output, *first = attend(query, key, value, keys, values)
        output, *second = attend(output, key, value, other_keys, other_values)
        return output, *first, *second

    with watching() as graphs:
        output, *caches = compile_(step, layers={1: None}, strict=True)(*new(2, 7))
    names = [type(cache).__name__ for cache in caches]
    assert names == ["QuantizedKV", "QuantizedKV", "Tensor", "Tensor"]
    assert [site.outcome for site in graphs[0].sites] == ["rewritten", "left alone"]
    assert graphs[0].sites[1].detail == "left in 16 bit by the option layers"
    torch.testing.assert_close(output, step(*new(2, 7))[0], rtol=1e-4, atol=1e-5)


# Values


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize(
    "method", [{"method": "int4"}, {"method": "kivi", "bits": 4, "group_size": 16}]
)
@torch.no_grad()
def test_a_token_that_is_not_finite_does_not_poison_the_others(poison, method) -> None:
    step, (keys, values) = compile_(attend, **method), (tokens(60, 1), tokens(60, 2))
    clean_keys, clean_values = keys.clone(), values.clone()
    keys[0, 0, 20, 3] = values[0, 1, 30, 5] = poison
    query = tokens(1)
    _, keys, values = step(query, tokens(1, 3), tokens(1, 4), keys, values)
    for cache, clean, token in ((keys, clean_keys, 20), (values, clean_values, 30)):
        error = (cache.dequantize()[:, :, :60] - clean).abs()
        error[0, :, token] = 0
        # A finite value, however large, is data and widens its group to the largest number there is.
        largest = torch.finfo(torch.float16).max if math.isfinite(poison) else clean.max()
        assert error.max() <= (largest - clean.min()) / 15
    assert keys.dequantize().isfinite().all()


@torch.no_grad()
def test_a_call_without_tokens_changes_nothing() -> None:
    step = compile_(attend)
    _, keys, values = step(*new(40))
    before = keys.dequantize()
    with pytest.warns(KVQWarning, match="the call has no tokens"):
        output, keys, values = step(*[x[:, :, :0] for x in new(1, 3)], keys, values)
    assert output.shape == (2, 2, 0, 16)
    assert keys.shape[2] == values.shape[2] == 80
    torch.testing.assert_close(keys.dequantize()[:, :, :80], before)


@pytest.mark.parametrize("method", ["int4", "kivi", "qaq"])
@pytest.mark.parametrize(
    ("batch", "heads"),
    [(0, 2), *(pytest.param(batch, 0, marks=no_attention_without_heads) for batch in (2, 0))],
)
@torch.no_grad()
def test_no_sequences_and_no_heads_are_refused_by_name_and_run(method, batch, heads) -> None:
    """Regression: the analysis divided by the heads, and a kernel could not tell the shape of nothing."""
    empty = [torch.zeros(batch, heads, count, 16) for count in (3, 3, 3, 0, 0)]
    with pytest.warns(KVQWarning, match="no sequences, heads or channels"):
        output, keys, _ = compile_(attend, method=method)(*empty)
    assert output.shape == (batch, heads, 3, 16)
    assert type(keys) is torch.Tensor


# Buffers of fixed size


@pytest.mark.long(but=["1-eager", "8-eager", "8-inductor"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("too_many", [1, 8])
@torch.no_grad()
def test_more_tokens_than_slots_are_an_error_and_write_nothing(too_many, inner) -> None:
    """Regression: the packed form has room to spare, and took tokens that the buffer had no slot for."""
    step, keys, values = (
        compile_(fill, inner=inner),
        torch.zeros(2, 2, SLOTS, 16),
        torch.zeros(2, 2, SLOTS, 16),
    )
    for first, last in ((0, 40), (40, 60)):
        step(*new(last - first, 3), keys, values, torch.arange(first, last))
    before = keys.dequantize()
    with pytest.raises((RuntimeError, AssertionError), match="no room for the new tokens"):
        step(*new(4 + too_many, 3), keys, values, torch.arange(60, 64 + too_many))
    assert keys.held() == 60
    torch.testing.assert_close(keys.dequantize(), before)


@torch.no_grad()
def test_positions_with_a_gap_are_told_and_lose_nothing() -> None:
    step, plain = compile_(fill), [torch.zeros(2, 2, SLOTS, 16) for _ in range(2)]
    keys, values = (cache.clone() for cache in plain)
    for first, last in ((0, 8), (8, 12)):
        step(*new(last - first, 3), keys, values, torch.arange(first, last))
        fill(*new(last - first, 3), *plain, torch.arange(first, last))
    with pytest.warns(KVQWarning, match="tokens are written behind empty cache positions"):
        step(*new(4, 3), keys, values, torch.arange(20, 24))
    fill(*new(4, 3), *plain, torch.arange(20, 24))
    for cache, expected in zip((keys, values), plain, strict=True):
        spread = float(expected.max() - expected.min())
        torch.testing.assert_close(
            torch.as_tensor(cache)[:, :, :24], expected[:, :, :24], rtol=0, atol=spread / 255
        )


@torch.no_grad()
def test_buffers_that_share_memory_stay_as_they_are_both_of_them() -> None:
    """Regression: the keys were converted before the values turned out to be impossible."""

    def make():
        keys, memory = torch.zeros(2, 2, SLOTS, 16), torch.zeros(2, 2, 2, SLOTS, 16)
        return keys, memory[0]

    step, (keys, values), plain = compile_(fill), make(), make()
    with pytest.warns(KVQWarning, match="must not share its storage"):
        for first, last in ((0, 8), (8, 9), (9, 10), (10, 13)):
            position = torch.arange(first, last)
            output = step(*new(last - first, 3), keys, values, position)
            torch.testing.assert_close(output, fill(*new(last - first, 3), *plain, position))
            assert type(keys) is type(values) is torch.Tensor
    with pytest.raises(KVQError, match="must not share its storage"):
        compile_(fill, strict=True)(*new(4, 3), keys, values, torch.arange(4))
    assert type(keys) is torch.Tensor


def test_quantizing_by_hand_converts_all_or_none() -> None:
    caches = [tokens(40), torch.zeros(2, 2, 2, 40, 16)[0]]
    with pytest.raises(KVQError, match="must not share its storage"):
        quantize_cache_(caches, **SPEC)
    assert [type(cache) for cache in caches] == [torch.Tensor, torch.Tensor]


# Modes


class Decoder(torch.nn.Module):
    """Two layers, each with a cache of its own and, if asked, a graph break between them."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.ModuleList(torch.nn.Linear(16, 48) for _ in range(2))
        self.breaks = breaks

    def forward(self, x, past):
        grown = []
        for index, project in enumerate(self.project):
            if index and self.breaks:
                torch._dynamo.graph_break()
            query, key, value = project(x).chunk(3, -1)
            attended, *pair = attend(query, key, value, *past[index])
            x = x + attended
            grown.append(pair)
        return x, grown


EMPTY = [(torch.empty(0), torch.empty(0))] * 2


def test_recording_gradients_is_refused_with_a_reason_and_training_works() -> None:
    model = Decoder().train()
    compiled = torch.compile(model, backend="kvq", options=OPTIONS)
    with pytest.warns(KVQWarning, match=r"gradients are being recorded.*run under torch.no_grad"):
        output, grown = compiled(tokens(40), EMPTY)
    assert type(grown[0][0]) is torch.Tensor
    output.sum().backward()
    gradient = model.project[0].weight.grad.clone()
    model.zero_grad()
    model(tokens(40), EMPTY)[0].sum().backward()
    torch.testing.assert_close(gradient, model.project[0].weight.grad)


def test_a_quantized_cache_is_read_right_while_gradients_are_recorded() -> None:
    model = Decoder()
    compiled = torch.compile(model, backend="kvq", options=OPTIONS)
    with torch.no_grad():
        _, grown = compiled(tokens(40), EMPTY)
    with pytest.warns(KVQWarning, match="gradients are being recorded"):
        output, grown = compiled(tokens(3), grown)
    output.sum().backward()
    assert isinstance(grown[0][0], QuantizedKV)
    expected, _ = model(tokens(3), model(tokens(40), EMPTY)[1])
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_without_gradients_works(mode) -> None:
    with mode(), watching() as graphs:
        compiled = torch.compile(Decoder(), backend="kvq", options=OPTIONS)
        _, grown = compiled(tokens(40), EMPTY)
        output, grown = compiled(tokens(3), grown)
        expected, _ = Decoder()(tokens(3), Decoder()(tokens(40), EMPTY)[1])
        step, keys, values = (
            compile_(fill),
            torch.zeros(2, 2, SLOTS, 16),
            torch.zeros(2, 2, SLOTS, 16),
        )
        for first, last in ((0, 40), (40, 41)):
            step(*new(last - first, 3), keys, values, torch.arange(first, last))
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
    assert all(isinstance(tensor, QuantizedKV) for tensor in (*grown[0], *grown[1], keys, values))
    assert all(site.outcome == "rewritten" for graph in graphs for site in graph.sites)


@torch.no_grad()
def test_a_graph_break_in_the_middle_of_the_model_costs_nothing_but_a_graph() -> None:
    model = Decoder(breaks=True)
    compiled = torch.compile(model, backend="kvq", options=OPTIONS)
    past, plain = EMPTY, EMPTY
    with watching() as graphs:
        for new in (40, 1, 3):
            output, past = compiled(tokens(new), past)
            expected, plain = model(tokens(new), plain)
            torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
    assert all(isinstance(tensor, QuantizedKV) for pair in past for tensor in pair)
    assert all(len(graph.sites) == 1 and graph.sites[0].outcome == "rewritten" for graph in graphs)


def test_a_device_without_kernels_is_refused_by_name() -> None:
    arguments = [x.to("meta") for x in new(2)]
    with (
        torch.no_grad(),
        pytest.warns(KVQWarning, match="device meta is not supported; use cpu or cuda"),
    ):
        output, keys, _ = compile_(attend)(*arguments)
    assert output.device.type == "meta"
    assert type(keys) is torch.Tensor


@torch.no_grad()
def test_a_cache_from_another_method_is_an_error_that_names_both() -> None:
    caches = quantize_cache_(
        [tokens(40), tokens(40, 1)], make_spec("int4", sinks=1, window=4, page_size=32)
    )
    with pytest.raises(
        BackendCompilerFailed,
        match=r"as this model is compiled, 8-bit keys with .* got 4-bit keys with",
    ):
        compile_(attend)(*new(1, 3), *caches)
    assert all(isinstance(cache, QuantizedKV) for cache in caches)
    assert caches[0].shape[2] == 40
