"""Transform coding with a calibration: channels weigh what the loss says, and layers share bits by what they change."""

import functools
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

transformers = pytest.importorskip("transformers")

import kvq_compile
from kvq_compile.calibration.artifact import Calibration, LayerTables
from kvq_compile.calibration.capture import Activations, capture
from kvq_compile.calibration.channel_weights import LARGEST, far_gradients, weighted_tables
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.reference.attention import apply_score
from kvq_compile.kernels.reference.channelwise import allocate, find_state
from kvq_compile.kernels.schemes import Channelwise
from kvq_compile.kernels.score import UNBENT, Bend, Score
from kvq_compile.kernels.tables import Tables, read_section
from kvq_compile.lowering.find.rotation import Rotation
from kvq_compile.options import make_spec
from kvq_compile.transform_coding import Tc
from qaq_model import assert_reads_its_cache, make_model, run, small_text

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@functools.cache
def calibrated() -> Calibration:
    texts = [drawn_text(400, seed) for seed in range(2)]
    return kvq_compile.calibrate(make_model(), texts, "tc")


def drawn_text(count: int, seed: int) -> Tensor:
    return torch.randint(0, 64, (1, count), generator=torch.Generator().manual_seed(seed))


def widths(cache: QuantizedKV) -> Tensor:
    return cache.page_layout.state_of(cache.exact)[:, :, 0].float()


def scales(tables: Tables) -> Tensor:
    """Return the scales of the model's channels, ``[H, D]``."""
    order = read_section(tables.words, "order", tables.head_dim).long()
    coded = read_section(tables.words, "scale", tables.head_dim)
    return torch.empty_like(coded).scatter_(1, order, coded)


# Weights


def seen(tokens: int = 12, seed: int = 0, mask: Tensor | None = None) -> Activations:
    """Return what an attention of two KV heads with two queries each saw of two sequences."""
    generator = torch.Generator().manual_seed(seed)
    query, gradient = (torch.randn(2, 4, tokens, 8, generator=generator) for _ in range(2))
    key, value = (torch.randn(2, 2, tokens, 8, generator=generator) for _ in range(2))
    return Activations(
        0, query, key, value, 0.3, None, None, None, "", mask=mask, output_gradient=gradient
    )


@given(
    st.integers(0, 5), st.integers(1, 14), st.booleans(), st.integers(0, 99),
    st.sampled_from((UNBENT, UNBENT, Bend(0.8, -0.5, 0.6))),
)  # fmt: skip
def test_far_gradients_are_those_of_keys_that_only_queries_beyond_the_window_see(
    sinks: int, window: int, padded: bool, seed: int, bend: Bend
) -> None:
    """Autograd differentiates the same attention, in which a copy of the keys stands for the packed ones."""
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3] = not padded
    about = replace(seen(seed=seed, mask=mask), bend=bend)
    packed = about.key.clone().requires_grad_()
    slot = torch.arange(12)
    distance = slot[:, None] - slot
    far = (distance >= window) & (slot >= sinks)
    query = about.query.unflatten(1, (2, 2))
    exact, old = (
        apply_score(query @ keys[:, :, None].mT, Score(0.3, *bend)) for keys in (about.key, packed)
    )
    hidden = (distance < 0) | ~mask[:, None, None, None]
    weights = torch.where(far, old, exact).masked_fill(hidden, -torch.inf).softmax(-1)
    output = weights.nan_to_num(0.0) @ about.value[:, :, None]
    assert about.output_gradient is not None
    lost = (output.flatten(1, 2) * about.output_gradient)[mask[:, None].expand(2, 4, 12)].sum()
    (expected,) = torch.autograd.grad(lost, packed)
    about.output_gradient[~mask[:, None].expand(2, 4, 12)] = 0.0
    found = far_gradients(about, sinks, window)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_captured_gradients_of_outputs_predict_how_the_loss_changes() -> None:
    """An output reaches the loss by its projection alone: both gradients are of one number."""
    model, text = make_model(), small_text(20)
    (found,) = capture(model, [text], gradients=True)
    outputs: list[Tensor] = []

    def watch(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        outputs.append(inputs[0].detach().requires_grad_())
        return (outputs[-1],)

    hooks = [x.self_attn.o_proj.register_forward_pre_hook(watch) for x in model.model.layers]
    logits = model(text).logits[0, :-1]
    for hook in hooks:
        hook.remove()
    loss = torch.nn.functional.cross_entropy(logits, text[0, 1:])
    (last,) = torch.autograd.grad(loss, outputs[-1:])
    gradient = found[-1].output_gradient
    assert gradient is not None
    torch.testing.assert_close(
        gradient.transpose(1, 2).flatten(2), last, rtol=1e-3, atol=1e-3 * float(last.abs().max())
    )


@given(st.integers(0, 99))
def test_scales_make_weighted_channels_alike_up_to_a_bound(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.exp2(12 * torch.rand(2, 8, generator=generator, dtype=torch.float64))
    order = tuple(torch.randperm(8, generator=generator).tolist())
    rotation = Rotation(order, tuple(range(400, 0, -100)), None)
    scale = scales(weighted_tables(weight, rotation)).double()
    assert scale.min() >= 1 and scale.max() <= LARGEST
    pair = weight[:, order].view(2, 2, 4).mean(1).repeat(1, 2)
    coded = scale[:, order] ** 2 * pair
    bounded = scale[:, order] == LARGEST
    expected = pair.amax(1, keepdim=True).expand_as(coded)
    torch.testing.assert_close(
        coded[~bounded], expected[~bounded], rtol=2**-22, atol=0
    )  # fp32, squared
    assert (coded[bounded] <= expected[bounded]).all()


def test_heads_without_a_gradient_weigh_channels_alike() -> None:
    weight = torch.stack([torch.zeros(8), torch.ones(8)])
    assert torch.equal(scales(weighted_tables(weight, None)), torch.ones(2, 8))


def test_a_cache_gives_bits_by_calibrated_weights_and_its_own_variances() -> None:
    """A unit of a channel's scale weighs as much as that of any other, so no query has a say."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(2, 64, generator=generator) + 1e-3
    tables = weighted_tables(weight, None)
    scheme = Channelwise(3, tables=tables.digest, weighs=True)
    layout = Layout("key", 64, Regions(), scheme)
    pages = torch.randn(1, 2, 2, 128, 64, generator=generator)
    found = find_state(pages, pages[:, :, 0, :0], 0, layout, Calibrated(tables.words), pages.dtype)
    centred = pages - found[:, :, 1, None, None] * scales(tables)[:, None, None]
    variance = centred.var(3, unbiased=False).sum(2)
    expected = allocate(variance / scales(tables).square(), layout.bit_rows)
    agreed = (found[:, :, 0] == expected).float().mean()
    assert agreed > 0.9  # the rest: bits of nearly equal worth
    assert layout.query_rows == 0


# Widths of layers


def layer(key: dict[float, float], value: dict[float, float]) -> LayerTables:
    tables = weighted_tables(torch.ones(2, 64), None)
    return LayerTables(
        tables, None, False, key_changes=tuple(key.items()), value_changes=tuple(value.items())
    )


def test_bits_go_where_they_change_outputs_most() -> None:
    quiet = layer({1: 0.1, 2: 0.05, 4: 0.01}, {2: 0.1, 4: 0.05})
    loud = layer({1: 9.0, 2: 4.0, 4: 0.5}, {2: 0.2, 4: 0.1})
    chosen = [(spec.key.bits, spec.value.bits) for spec in Tc(bits=2.25).specs([quiet, loud])]
    every = list(product((1, 2, 4), (2, 4), (1, 2, 4), (2, 4)))

    def change(picked: tuple[float, ...]) -> float:
        a, b, c, d = picked
        sums = [dict(quiet.key_changes)[a], dict(quiet.value_changes)[b]]
        return sum([*sums, dict(loud.key_changes)[c], dict(loud.value_changes)[d]])

    best = min((pick for pick in every if sum(pick) <= 9), key=change)
    assert [width for pair in chosen for width in pair] == list(best) == [1, 2, 4, 2]


def test_widths_that_are_given_stand_and_the_rest_is_shared() -> None:
    layers = [layer({1: 1.0, 2: 0.5, 4: 0.1}, {2: 0.2, 4: 0.1})] * 2
    specs = Tc(bits=3, key_bits=2.5).specs(layers)
    assert [spec.key.bits for spec in specs] == [2.5, 2.5]
    assert sum(spec.value.bits for spec in specs) <= 12 - 5
    (spec, _) = Tc(key_bits=2, value_bits=3, value_clip=0.5).specs(layers)
    assert (spec.key.bits, spec.value.bits, spec.value.clip) == (2, 3, 0.5)


def test_a_budget_that_no_widths_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="bits must be 3.00 or more for this model, got 2"):
        Tc(bits=2).specs([layer({4: 1.0}, {2: 0.2})])


@pytest.mark.parametrize("bits", [1.5, 2, 3.3, 6])
def test_one_calibration_serves_any_bits(bits: float) -> None:
    spec = make_spec(calibration=calibrated(), bits=bits)
    chosen = [spec.for_layer(index) for index in range(2)]
    codes = [each.scheme(role).bits for each in chosen for role in ("key", "value")]
    assert sum(1.6 if width == 1.5 else width for width in codes) <= 4 * bits
    assert all(each.key.weighs and each.key.tables != "-" for each in chosen)


# Models


@pytest.mark.long(but=["2"])
@pytest.mark.parametrize("bits", [2, 3])
def test_a_calibrated_model_attends_to_what_its_cache_stands_for(bits: float) -> None:
    model, calibration = make_model(), calibrated()
    call = run(model, method="tc", calibration=calibration, bits=bits)
    cache = transformers.DynamicCache(config=model.config)
    assert_reads_its_cache(model, call, cache, small_text(120), 60, 61, 100, 120)
    spec = make_spec(calibration=calibration, bits=bits)
    for index, held in enumerate(cache.layers):
        expected = spec.for_layer(index)
        assert held.keys.page_layout.scheme == expected.key
        assert held.values.page_layout.bits == expected.value.bits
        assert (widths(held.keys).sum(-1) == expected.key.bits * 64).all()
        assert held.keys.page_layout.query_rows == 0


def test_a_model_that_rotates_no_keys_calibrates_too() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=128, n_head=4, n_layer=1, vocab_size=64, n_positions=512, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    made = kvq_compile.calibrate(model, [drawn_text(300, 0)], "tc")
    assert "taken for ones that are not rotated" in made.layers[0].note
    cache = transformers.DynamicCache(config=config)
    call = run(model, method="tc", calibration=made, bits=3)
    assert_reads_its_cache(model, call, cache, small_text(80), 60, 61, 80)
    assert cache.layers[0].keys.page_layout.scheme.weighs


def test_static_and_growing_caches_hold_the_same_pages() -> None:
    model, text = make_model(), small_text(120)
    call = run(model, method="tc", calibration=calibrated(), bits=3)
    grown = transformers.DynamicCache(config=model.config)
    fixed = transformers.StaticCache(config=model.config, max_cache_len=128)
    with torch.no_grad():
        for first, last in ((0, 70), (70, 71), (71, 120)):
            place = torch.arange(first, last)
            logits = call(text[:, first:last], fixed, cache_position=place)
            expected = call(text[:, first:last], grown)
            assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
    for ours, theirs in zip(fixed.layers, grown.layers, strict=True):
        assert torch.equal(widths(ours.keys), widths(theirs.keys))


def test_sequences_of_a_batch_are_coded_as_they_are_alone() -> None:
    model = make_model()
    texts = torch.cat([drawn_text(100, seed) for seed in (5, 6)])
    call = run(model, method="tc", calibration=calibrated(), bits=3)
    together = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        call(texts, together)
        for index, text in enumerate(texts):
            alone = transformers.DynamicCache(config=model.config)
            call(text[None], alone)
            for both, one in zip(together.layers, alone.layers, strict=True):
                assert torch.equal(widths(both.keys)[index], widths(one.keys)[0])


def test_the_file_gives_the_calibration_back(tmp_path: Path) -> None:
    calibrated().save(tmp_path / "tc")
    assert Calibration.load(tmp_path / "tc") == calibrated()


def test_another_model_is_refused_by_name() -> None:
    other = make_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    call = run(other, method="tc", calibration=calibrated())
    with pytest.raises(
        Exception, match="calibration must be of this model, got one of other weights"
    ):
        call(small_text(40), transformers.DynamicCache(config=other.config))


def test_explain_tells_of_the_calibration() -> None:
    model = make_model()
    options = {"calibration": calibrated(), "bits": 3, "window": 8, "page_size": 32}
    with torch.no_grad():
        explained = kvq_compile.explain(model, small_text(60), use_cache=True, options=options)
    assert explained.rewritten == 2
    assert "by channel without a mean, calibrated" in str(explained)
