"""Keys and values that are linear maps of kept latents are never made: queries and outputs are projected instead."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvq_compile
from kvq_compile import QuantizedKV
from kvq_compile.backend import compile_graph
from kvq_compile.history import watching
from kvq_compile.lowering.find.latents import NOT_LINEAR
from kvq_compile.lowering.find.sites import NOT_OF_LATENTS
from kvq_compile.lowering.nodes import target_name
from kvq_compile.lowering.pipeline import lower
from kvq_compile.lowering.sites import DENSE
from kvq_compile.options import make_config
from thorough import spread

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"method": "int8", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"}
HEADS, NOPE, ROPE, LATENT, OUT = 4, 16, 8, 32, 24
CALLS = (40, 1, 1, 3, 1)  # tokens of each call; a page is packed in the first


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Decoder(nn.Module):
    """One layer of latent attention: a step takes query, latent and rotary part, and the caches of the latter."""

    def __init__(self, grows: bool = True, slots: int = 128) -> None:
        super().__init__()
        self.grows, self.slots = grows, slots
        self.up_down = nn.Parameter(draw(HEADS * (NOPE + OUT), LATENT) / 5)
        self.up, self.down = (nn.Parameter(draw(HEADS, LATENT, n) / 5) for n in (NOPE, OUT))
        self.norm = nn.Parameter(draw(LATENT))

    def expand(self, latents: Tensor, rotary: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, as DeepSeek's models make them."""
        del query
        batch, _, tokens, _ = latents.shape
        made = nn.functional.linear(latents, self.up_down)
        made = made.view(batch, tokens, -1, NOPE + OUT).transpose(1, 2)
        nope, value = made.split([NOPE, OUT], -1)
        key = made.new_empty(*made.shape[:-1], NOPE + ROPE)
        key[..., :NOPE].copy_(nope)
        key[..., NOPE:].copy_(rotary.expand(-1, HEADS, -1, -1))
        return key, value

    def forward(
        self, query: Tensor, latent: Tensor, rotary: Tensor, latents: Tensor, rotaries: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        mask = None
        if self.grows:
            latents = torch.cat([latents, latent], 2)
            rotaries = torch.cat([rotaries, rotary], 2)
            slots = torch.arange(latents.shape[2] - latent.shape[2], latents.shape[2])
        else:
            slots = first + torch.arange(latent.shape[2])
            latents.index_copy_(2, slots, latent)
            rotaries.index_copy_(2, slots, rotary)
        mask = torch.arange(latents.shape[2]) <= slots[:, None]
        key, value = self.expand(latents, rotaries, query)
        return self.attend(query, key, value, mask), latents, rotaries

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return sdpa(query, key, value, mask, scale=0.2)


class WrittenOut(Decoder):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scores = (query @ key.transpose(-2, -1) * 0.2).masked_fill(~mask, -math.inf)
        return torch.softmax(scores, -1) @ value


class OfTwoWeights(Decoder):
    def expand(self, latents: Tensor, rotary: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        rotary = rotary.expand(-1, HEADS, -1, -1)
        return torch.cat([latents @ self.up, rotary], -1), latents @ self.down


class ByEinsum(Decoder):
    """Rotary channels come first."""

    def expand(self, latents: Tensor, rotary: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        nope, value = (
            torch.einsum("bsc,hcd->bhsd", latents[:, 0], weight) for weight in (self.up, self.down)
        )
        return torch.cat([rotary.expand(-1, HEADS, -1, -1), nope], -1), value


class OfSharedHeads(Decoder):
    """Two query heads share a key."""

    def expand(self, latents: Tensor, rotary: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().expand(latents, rotary, query)
        return key[:, : HEADS // 2], value[:, : HEADS // 2]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return sdpa(query, key, value, mask, scale=0.2, enable_gqa=True)


SERVED = [Decoder, WrittenOut, OfTwoWeights, ByEinsum, OfSharedHeads]


class Normalized(Decoder):
    """A norm stands between what is kept and its projection."""

    def expand(self, latents: Tensor, rotary: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        latents = latents * torch.rsqrt(latents.square().mean(-1, keepdim=True) + 1e-6) * self.norm
        return super().expand(latents, rotary, query)


class Rectified(Decoder):
    def expand(self, latents: Tensor, rotary: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().expand(latents, rotary, query)
        return key, value.relu()


class OfTheCall(Decoder):
    """The weights depend on the call."""

    def expand(self, latents: Tensor, rotary: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        return super().expand(latents * query.mean(), rotary, query)


class Mixing(Decoder):
    """A key is made of the token before it as well."""

    def expand(self, latents: Tensor, rotary: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        return super().expand(latents + latents.roll(1, 2), rotary, query)


class ByPosition(Decoder):
    """Rotary channels are rotated when they are read."""

    def expand(self, latents: Tensor, rotary: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.arange(rotary.shape[2])[:, None] / 10
        return super().expand(latents, rotary * angle.cos() + rotary.flip(-1) * angle.sin(), query)


class Scaled(Decoder):
    """The elements of the map are those of no weight."""

    def expand(self, latents: Tensor, rotary: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        return super().expand(latents * self.norm, rotary, query)


UNSERVED = [Normalized, Rectified, OfTheCall, Mixing, ByPosition, Scaled]


def empty(decoder: Decoder, batch: int) -> list[Tensor]:
    slots = 0 if decoder.grows else decoder.slots
    return [torch.zeros(batch, 1, slots, n) for n in (LATENT, ROPE)]


def plain(cache: Tensor) -> Tensor:
    return cache.dequantize() if isinstance(cache, QuantizedKV) else cache.clone()


@torch.no_grad()
def generate(decoder: Decoder, batch: int = 2, calls=CALLS, backend="kvq", **options):
    """Generate; yield of each call the output, and what fp32 and fp64 give on the tokens that the caches stand for."""
    named = {"options": OPTIONS | options} if backend == "kvq" else {}
    run = torch.compile(decoder, backend=backend, **named)
    double, caches, held = copy.deepcopy(decoder).double(), empty(decoder, batch), 0
    for number, count in enumerate(calls):
        new = [
            draw(batch, heads, count, n, seed=7 * number + heads)
            for heads, n in ((HEADS, NOPE + ROPE), (1, LATENT), (1, ROPE))
        ]
        first = torch.tensor(held)
        exact, *_ = double(*(x.double() for x in (*new, *map(plain, caches))), first)
        expected, *_ = decoder(*new, *map(plain, caches), first)
        output, *caches = run(*new, *caches, first)
        held += count
        yield output, expected, exact, caches


def outcomes(graphs) -> set[tuple[str, str]]:
    return {(site.outcome, site.detail) for graph in graphs for site in graph.sites}


def assert_attends(decoder: Decoder, **options: object) -> None:
    """Each call must have a small multiple of the error of the captured computation in the same precision."""
    with watching() as graphs:
        for output, expected, exact, kept in generate(decoder, **options):
            caches = kept
            error, plainly = ((x.double() - exact).abs().max() for x in (output, expected))
            assert error <= 3 * plainly + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert all(isinstance(cache, QuantizedKV) for cache in caches)
    assert {outcome for outcome, _ in outcomes(graphs)} == {"rewritten"}


@pytest.mark.parametrize(("kind", "grows"), spread(SERVED, [True, False], 2))
def test_latents_are_read_packed_however_they_are_projected(kind, grows) -> None:
    assert_attends(kind(grows))


@pytest.mark.parametrize("method", ["tc", "kivi", "int4"])
def test_latents_are_read_packed_by_every_method_without_a_calibration(method) -> None:
    assert_attends(Decoder(), method=method)


def test_sizes_that_are_equal_by_chance_are_told_apart() -> None:
    """As many slots as channels of a projection, and as many sequences as heads."""
    decoder = Decoder(False, slots=NOPE + OUT)
    assert_attends(decoder, batch=HEADS, calls=(36, 1, 1))


@pytest.mark.filterwarnings("ignore:.*read their caches dense")
@pytest.mark.parametrize(("kind", "grows"), spread(UNSERVED, [True, False], 2))
def test_what_is_no_linear_map_of_single_tokens_is_read_dense(kind, grows) -> None:
    with watching() as graphs:
        for output, expected, _, kept in generate(kind(grows)):
            caches = kept
            torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert all(isinstance(cache, QuantizedKV) for cache in caches)
    assert outcomes(graphs) - {("left alone", NOT_LINEAR)} == {(DENSE, NOT_LINEAR)}


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
def test_bits_that_depend_on_attention_are_not_given_to_latents() -> None:
    with watching() as graphs:
        for output, expected, _, _ in generate(Decoder(), method="qaq"):
            torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert (DENSE, NOT_OF_LATENTS) in outcomes(graphs)


def test_no_key_is_made_and_no_weight_copied() -> None:
    """The rewritten step holds no tensor of keys, and takes its weights as views."""
    config, modules = make_config(OPTIONS), []

    def backend(gm, inputs):
        modules.append(lower(gm, inputs, config.spec).module)
        return compile_graph(gm, inputs, config)

    for _ in generate(Decoder(), calls=(40, 1), backend=backend):
        pass
    steps = {target_name(node) for node in modules[-1].graph.nodes}
    assert {"attend.default", "bmm", "narrow"} <= steps
    assert not steps & {"linear", "scaled_dot_product_attention", "dequantize.default", "copy_"}


# --- transformers ---------------------------------------------------------------------------------


def deepseek(attention: str):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, first_k_dense_replace=2,
        kv_lora_rank=32, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=24,
        max_position_embeddings=512, attn_implementation=attention,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    keys = model(torch.ones(1, 2, dtype=torch.int64)).past_key_values.layers[0].keys
    if keys.shape[-1] == config.qk_nope_head_dim + config.qk_rope_head_dim:
        pytest.skip("this transformers keeps the keys of all heads, and no latents")
    return model


def plain_twin(cache):
    """Return the same cache with its tokens dequantized."""
    twin = copy.deepcopy(cache)
    for layer in twin.layers:
        for name in ("keys", "values"):
            held = getattr(layer, name, None)
            if isinstance(held, QuantizedKV):
                setattr(layer, name, held.dequantize().clone())
    return twin


@pytest.mark.long(but=["sdpa-static"])
@pytest.mark.parametrize(("attention", "kind"), spread(["eager", "sdpa"], ["dynamic", "static"], 2))
def test_deepseek_reads_its_latents_packed(attention, kind) -> None:
    """Each call says what the plain model says on the dequantized cache."""
    from transformers import DynamicCache, StaticCache

    model = deepseek(attention)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=128)
    forward = torch.compile(model.forward, backend="kvq", options=OPTIONS)
    ids = torch.randint(1, 64, (2, sum(CALLS)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), watching() as graphs:
        for part in ids.split(CALLS, 1):
            twin = plain_twin(cache)
            logits = forward(part, past_key_values=cache).logits
            again = model(part, past_key_values=twin).logits
            torch.testing.assert_close(logits, again, rtol=1e-4, atol=1e-4)
    assert all(isinstance(t, QuantizedKV) for x in cache.layers for t in (x.keys, x.values))
    assert {outcome for outcome, _ in outcomes(graphs)} == {"rewritten"}
    assert cache.layers[0].keys.page_layout.role == "value"


def test_a_calibration_leaves_latents_out() -> None:
    model = deepseek("sdpa")
    ids = torch.randint(1, 64, (1, 64), generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="latents"):
        kvq_compile.calibrate(model, [ids], method="skvq")
