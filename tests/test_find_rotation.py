"""The rotation of a key is read off its graph, whatever its spelling; what is no rotation is refused by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile.calibration.capture import capture
from kvq_compile.lowering.find.rotation import TURN, Rotation
from rotated_keys import (
    SPELLINGS,
    Finder,
    assert_close,
    backwards,
    complex_product,
    every_two,
    halves,
    interleaved,
    rotation_of,
    unrotated,
)
from versions import need_static_layers_that_count

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

INTERLEAVED = (interleaved, every_two, complex_product)
SOURCES = ("computed", "indexed", "sliced", "counted", "product")


class Rotated(nn.Module):
    """One attention; rotation before the heads move or after, of some channels or all."""

    def __init__(self, spelling=halves, source="computed", head_dim=16, theta=1e4, rotary=None):
        super().__init__()
        self.spelling, self.source, self.head_dim = spelling, source, head_dim
        self.rotary = rotary or head_dim
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(32, 24)
        self.kv = nn.Linear(24, 4 * head_dim)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        frequency = theta ** -(torch.arange(0, self.rotary, 2).double() / self.rotary)
        self.register_buffer("frequency", frequency.float())
        angle = torch.arange(100)[:, None] * frequency
        self.register_buffer("cos_table", angle.cos().float())
        self.sin_table = angle.sin().float()  # a plain attribute, as in the first Llama

    def cos_sin(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        if self.source == "indexed":
            return self.cos_table[position], self.sin_table[position]
        if self.source == "sliced":
            T = x.shape[2]
            return self.cos_table[:T], self.sin_table[:T]
        if self.source == "counted":
            position = torch.arange(x.shape[2])
        if self.source == "product":
            angle = (self.frequency[None, :, None] @ position[None, None].float()).mT[0]
        else:
            angle = position[:, None].float() * self.frequency
        return angle.cos(), angle.sin()

    def rotate(self, key: Tensor, position: Tensor) -> Tensor:
        rotated, kept = key[..., : self.rotary], key[..., self.rotary :]
        rotated = self.spelling(rotated, *self.cos_sin(key, position))
        return torch.cat((rotated, kept), -1) if kept.shape[-1] else rotated

    def project(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        joint = self.kv(self.embedding(ids)).unflatten(-1, (4, self.head_dim)).transpose(1, 2)
        return joint.split(2, 1)

    def forward(self, ids: Tensor, position: Tensor):
        key, value = self.project(ids)
        key = self.rotate(key, position)
        return sdpa(key, key, value), key, value


def inputs(tokens: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 32, (2, tokens), generator=generator), torch.arange(tokens)


def check(model: Rotated, tokens: int = 9) -> Rotation:
    """Find the rotation; turning the model's keys back by it must give its un-rotated keys."""
    torch._dynamo.reset()
    ids, position = inputs(tokens)
    rotation = rotation_of(model, ids, position)
    assert isinstance(rotation, Rotation), rotation
    with torch.no_grad():
        key = model(ids, position)[1]
        assert_close(unrotated(key, rotation, position), model.project(ids)[0])
    return rotation


@given(
    spelling=st.sampled_from(SPELLINGS),
    source=st.sampled_from(SOURCES),
    head_dim=st.sampled_from((4, 8, 16, 20, 64)),
    theta=st.sampled_from((1e2, 1e4, 5e5, 1e7)),
    fraction=st.sampled_from((0.25, 0.5, 1.0)),
    tokens=st.sampled_from((1, 2, 9)),
)
def test_every_spelling_from_every_source_is_undone(
    spelling, source, head_dim, theta, fraction, tokens
) -> None:
    rotary = max(2, int(head_dim * fraction) // 2 * 2)
    rotation = check(Rotated(spelling, source, head_dim, theta, rotary), tokens)
    half, pairs = head_dim // 2, rotary // 2
    assert sorted(rotation.order) == list(range(head_dim))
    step = 1 if spelling in INTERLEAVED else pairs
    lower, upper = rotation.order[:pairs], rotation.order[half : half + pairs]
    assert [b - a for a, b in zip(lower, upper, strict=True)] == [step] * pairs
    exact = [theta ** (-2 * i / rotary) / (2 * torch.pi) * TURN for i in range(pairs)]
    # half a unit of rounding, and what float32 tables of 64 positions leave open
    allowed = [1 + 1e-6 * f + (200 if source in ("indexed", "sliced") else 0) for f in exact]
    for found, wanted, off in zip(rotation.frequencies, exact, allowed, strict=False):
        assert abs(found - wanted) <= off
    assert rotation.frequencies[pairs:] == (0,) * (half - pairs)


def test_turning_the_other_way_gives_negated_frequencies() -> None:
    forward, back = check(Rotated(halves)), check(Rotated(backwards))
    assert back.order == forward.order
    assert back.frequencies == tuple(-f for f in forward.frequencies)


def test_the_wrong_order_or_sign_does_not_undo_the_rotation() -> None:
    model, (ids, position) = Rotated(halves), inputs()
    right, order = check(model), check(Rotated(interleaved)).order
    key, plain = model(ids, position)[1].detach(), model.project(ids)[0].detach()
    for wrong in (
        Rotation(right.order, tuple(-f for f in right.frequencies)),
        Rotation(order, right.frequencies),
    ):
        assert float((unrotated(key, wrong, position) - plain).abs().max()) > 0.1


@pytest.mark.parametrize("source", SOURCES)
def test_positions_are_a_node_except_where_a_table_is_sliced(source) -> None:
    position = check(Rotated(source=source)).position
    assert (position is None) == (source == "sliced")
    if position is not None:
        assert position.op == ("call_function" if source == "counted" else "placeholder")


def test_a_rotation_before_the_heads_move_is_undone() -> None:
    class Before(Rotated):
        def forward(self, ids, position):
            key, value = self.project(ids)
            cos, sin = self.cos_sin(key, position)
            key = halves(key.transpose(1, 2), cos[:, None], sin[:, None]).transpose(1, 2)
            return sdpa(key, key, value), key, value

    check(Before())


def test_keys_normalized_before_they_are_rotated_are_undone() -> None:
    class Normalized(Rotated):
        def project(self, ids):
            key, value = super().project(ids)
            return key * key.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt(), value

    check(Normalized())


def test_frequencies_made_in_the_graph_are_found() -> None:
    class InGraph(Rotated):
        def cos_sin(self, x, position):
            frequency = 1.0 / 1e4 ** (torch.arange(0, 16, 2).float() / 16)
            angle = torch.outer(position.float(), frequency)
            return angle.cos(), angle.sin()

    check(InGraph())
    check(InGraph(), tokens=8)  # as many positions as frequencies: which are which?


def test_a_slice_that_starts_at_a_length_is_found() -> None:
    model = Rotated(source="sliced")

    def step(ids, past):
        start, stop = past.shape[2], past.shape[2] + ids.shape[1]
        key = model.project(ids)[0]
        key = halves(key, model.cos_table[start:stop], model.sin_table[start:stop])
        key = torch.cat([past, key], 2)
        return sdpa(key[:, :, -1:], key, key), key

    finder = Finder()
    compiled = torch.compile(step, backend=finder, fullgraph=True)
    with torch.no_grad():
        for length in (3, 5, 6):
            compiled(inputs(2)[0], torch.zeros(2, 2, length, 16))
    assert [rotation.frequencies for rotation in finder.found] == [check(model).frequencies] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_table_of_few_bits_gives_frequencies_as_precise_as_it_is(dtype) -> None:
    model = Rotated(interleaved, "indexed").to(dtype)
    rotation, exact = rotation_of(model, *inputs()), check(Rotated(interleaved, "indexed"))
    assert rotation.order == exact.order
    angle = torch.arange(100)[:, None] * (
        torch.tensor(rotation.frequencies) - torch.tensor(exact.frequencies)
    )
    # The table's cosines and sines are rounded by eps / 2 each; the angle follows within eps.
    worst = float(angle.abs().max()) * 2 * torch.pi / TURN
    assert worst <= 2 * torch.finfo(dtype).eps


# What is no rotation by an angle proportional to the position


class Unlike(Rotated):
    """A rotation with something changed."""

    def __init__(self, change) -> None:
        super().__init__()
        self.change = change
        upper = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).triu(1) / 100
        self.generator = upper - upper.T

    def forward(self, ids, position):
        key, value = self.project(ids)
        key = self.change(self, key, position)
        return sdpa(key, key, value), key, value


def squared(self, key, position):
    angle = position[:, None].float().square() * self.frequency
    return halves(key, angle.cos(), angle.sin())


def from_data(self, key, position):
    angle = position[:, None].float() * self.frequency * (1 + key.mean())
    return halves(key, angle.cos(), angle.sin())


def growing(self, key, position):
    return self.rotate(key, position) * 1.01 ** position[:, None].float()


def shifted(self, key, position):
    return self.rotate(key, position + torch.ones_like(position)) + 1.0


def triples(self, key, position):
    return torch.einsum(
        "bhtd,tde->bhte", key, torch.matrix_exp(position[:, None, None] * self.generator)
    )


def in_place(self, key, position):
    out = torch.empty_like(key)
    cos, sin = self.cos_sin(key, position)
    out[..., :8] = key[..., :8] * cos - key[..., 8:] * sin
    out[..., 8:] = key[..., 8:] * cos + key[..., :8] * sin
    return out * cos.repeat(1, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (squared, "not rotated by an angle proportional to the position"),
        (from_data, "not rotated by an angle proportional to the position"),
        (growing, "the key is not rotated: its channels do not mix at any position"),
        (shifted, "the key at position 0 is not the un-rotated key times a constant"),
        (in_place, "the key is rotated by writing in place"),
        (triples, "the rotation mixes channels in more than pairs"),
        (lambda self, key, position: key, "the key is not rotated: it comes straight from linear"),
    ],
)
def test_what_is_no_rotation_by_position_is_refused(change, reason) -> None:
    found = rotation_of(Unlike(change), *inputs())
    assert isinstance(found, str), found
    assert reason in found


def test_cosines_given_to_the_call_are_refused() -> None:
    def step(key, cos, sin):
        key = halves(key, cos, sin)
        return sdpa(key, key, key), key

    arguments = torch.randn(1, 2, 9, 16), torch.randn(9, 8), torch.randn(9, 8)
    assert "all depend on the tokens" in rotation_of(step, *arguments)


# Models


NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
BY_HEAD = NO_TOKENS | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
BY_HEAD |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
BY_HEAD |= {"max_position_embeddings": 128, "pad_token_id": None}
SHARED = BY_HEAD | {"head_dim": 16}
GPT = NO_TOKENS | {"vocab_size": 64, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 32}
CONFIGS = {
    "Llama": lambda: transformers.LlamaConfig(**SHARED),
    "Llama 3": lambda: transformers.LlamaConfig(**SHARED, rope_parameters=LLAMA3),
    "YaRN": lambda: transformers.LlamaConfig(**SHARED, rope_parameters=YARN),
    "Phi": lambda: transformers.PhiConfig(**BY_HEAD, partial_rotary_factor=0.5),
    "Cohere": lambda: transformers.CohereConfig(**BY_HEAD),
    "GLM": lambda: transformers.GlmConfig(**SHARED),
    "GPT-J": lambda: transformers.GPTJConfig(**GPT, rotary_dim=8),
    "GPT-NeoX": lambda: transformers.GPTNeoXConfig(**BY_HEAD),
}


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def projected_keys(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Return what the projections give, ``[B, Hkv, T, 16]``, without compiling anything."""
    keys: list[Tensor] = []
    name = "k_proj" if "k_proj" in str(model) else "query_key_value"

    def keep(module, args, output):
        heads = output.unflatten(-1, (-1, 16)).transpose(1, 2)
        keys.append(heads if name == "k_proj" else heads[:, 1::3])

    modules = [module for path, module in model.named_modules() if path.endswith(name)]
    hooks = [module.register_forward_hook(keep) for module in modules]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return keys


@pytest.mark.parametrize("name", CONFIGS)
def test_unrotated_keys_of_a_model_are_what_its_projection_gave(name) -> None:
    model, ids = make_model(name), torch.randint(0, 64, (2, 24))
    scaling = getattr(getattr(model.base_model, "rotary_emb", None), "attention_scaling", 1.0)
    assert (scaling != 1.0) == (name == "YaRN")
    expected = projected_keys(model, ids)
    (found,) = capture(model, [ids], gradients=False)
    for seen, plain in zip(found, expected, strict=True):
        assert seen.rotation is not None, seen.rotation_reason
        assert_close(unrotated(seen.key, seen.rotation, torch.arange(24)), plain * scaling)


@pytest.mark.long(but=["GPT-J-static"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "GPT-J"])
def test_prefill_and_decode_graphs_show_one_rotation(name, kind) -> None:
    model, finder = make_model(name), Finder()
    cache = transformers.DynamicCache(config=model.config)
    if kind == "static":
        need_static_layers_that_count()
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    compiled = torch.compile(model.forward, backend=finder)
    with torch.no_grad():
        for tokens in (12,) if (name, kind) == ("Llama", "static") else (12, 1, 1, 3):
            compiled(torch.zeros(2, tokens, dtype=torch.int64), past_key_values=cache)
    found = finder.found
    assert all(isinstance(rotation, Rotation) for rotation in found), found
    assert len({(rotation.order, rotation.frequencies) for rotation in found}) == 1
    assert all(rotation.position is not None for rotation in found)


def test_positions_given_by_the_caller_are_the_positions() -> None:
    model, finder = make_model("Llama"), Finder()
    position = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def step(ids, mask, position):
        return model(ids, attention_mask=mask, position_ids=position, use_cache=True)

    with torch.no_grad():
        compiled = torch.compile(step, backend=finder, fullgraph=True)
        compiled(torch.zeros(2, 5, dtype=torch.int64), mask, position)
    names = {str(rotation.position.target) for rotation in finder.found}
    assert names == {"L_position_"}


def test_learned_positions_are_no_rotation() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(**GPT)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    (found,) = capture(model, [torch.zeros(1, 8, dtype=torch.int64)], gradients=False)
    reason = "the key is not rotated: it comes straight from addmm"
    assert [seen.rotation_reason for seen in found] == [reason] * 2


def test_a_table_of_pairs_in_bfloat16_as_gpt_fast_keeps_it_is_read() -> None:
    class Attention(nn.Module):  # gpt-fast's own: a table of pairs in bfloat16, indexed
        def __init__(self):
            super().__init__()
            self.wkv = nn.Linear(24, 64)
            angle = torch.outer(torch.arange(64).float(), 1e4 ** (-torch.arange(0, 16, 2) / 16))
            table = torch.stack([angle.cos(), angle.sin()], -1).bfloat16()
            self.register_buffer("freqs_cis", table)
            self.register_buffer("k_cache", torch.zeros(1, 2, 64, 16))
            self.register_buffer("v_cache", torch.zeros(1, 2, 64, 16))

        def forward(self, x, input_pos):
            freqs = self.freqs_cis[input_pos].view(1, x.shape[1], 1, 8, 2)
            k, v = self.wkv(x).view(1, -1, 4, 16).split(2, 2)
            pairs = k.float().reshape(*k.shape[:-1], -1, 2)
            k = torch.stack(
                [
                    pairs[..., 0] * freqs[..., 0] - pairs[..., 1] * freqs[..., 1],
                    pairs[..., 1] * freqs[..., 0] + pairs[..., 0] * freqs[..., 1],
                ],
                -1,
            )
            k, v = k.flatten(3).type_as(x).transpose(1, 2), v.transpose(1, 2)
            self.k_cache[:, :, input_pos] = k
            self.v_cache[:, :, input_pos] = v
            mask = torch.arange(64)[None] <= input_pos[:, None]
            return sdpa(k, self.k_cache, self.v_cache, mask)

    for positions in (torch.arange(6), torch.tensor([6])):
        torch._dynamo.reset()
        rotation = rotation_of(Attention(), torch.randn(1, len(positions), 24), positions)
        assert isinstance(rotation, Rotation), rotation
        assert rotation.order == (*range(0, 16, 2), *range(1, 16, 2))
        assert rotation.position is not None and rotation.position.op == "placeholder"
