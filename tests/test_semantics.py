"""A model with a quantized cache means what it meant, whatever is done to the cache between two calls."""

import copy
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache

from kvq_compile import QuantizedKV
from kvq_compile.history import watching
from small_llama import EXACT, PACKED, TOLERANCE, make_model, positions_for, text
from thorough import THOROUGH, spread


@pytest.fixture(scope="module", autouse=True)
def shared_graphs() -> Iterator[None]:
    """Let tests of one model share its graphs, which caches of other tests then meet."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()
    kept_twins.cache_clear()


# QuantizedKV.__getitem__ returns what autograd takes for a view of the longer cache; Dynamo then wants both to be
# equally long. `crop` subscripts. It must return `read._view(read.shape[2])` where `read._is_view()`.


def new_twins(options: dict, **shape) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a model and the same one compiled."""
    plain, compiled = make_model(**shape), make_model(**shape)
    compiled.compile(backend="kvq", options=options)
    return plain, compiled


@lru_cache
def kept_twins(window: int, **shape) -> tuple[torch.nn.Module, torch.nn.Module]:
    return new_twins(EXACT | {"window": window}, **shape)


def twins(options: dict, **shape) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a model and the same one compiled, the same ones for all tests."""
    return kept_twins(options["window"], **shape)


@torch.no_grad()
def feed(model, ids: torch.Tensor, chunks, cache) -> torch.Tensor:
    logits, first = [], int(cache.get_seq_length())
    for part in ids.split(list(chunks), 1):
        about = positions_for(model, first, part.shape[1])
        logits.append(model(part, past_key_values=cache, **about).logits)
        first += part.shape[1]
    return torch.cat(logits, 1)


def dynamic(model) -> DynamicCache:
    return DynamicCache(config=model.config)


def static(model, slots: int = 96) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=slots)


def tensors(cache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def assert_close(
    logits: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE
) -> None:
    assert float((logits - expected).abs().max() / expected.abs().max()) <= tolerance


def assert_quantized(cache) -> None:
    assert all(isinstance(tensor, QuantizedKV) for tensor in tensors(cache))


# Lengths and shapes


@pytest.mark.long(but=["static"])
@pytest.mark.parametrize("make_cache", [dynamic, static])
def test_a_prompt_in_chunks_is_a_prompt_at_once(make_cache) -> None:
    plain, compiled = twins(PACKED)
    ids = text(60, batch=2)
    cache = make_cache(compiled)
    assert_close(
        feed(compiled, ids, (20, 7, 20, 1, 12), cache), feed(plain, ids, (60,), make_cache(plain))
    )
    assert_quantized(cache)


@pytest.mark.long(but=["4-1"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), *[(4, 2), (1, 1)] * THOROUGH])
def test_query_heads_share_kv_heads(heads, kv_heads) -> None:
    plain, compiled = twins(PACKED, heads=heads, kv_heads=kv_heads)
    ids, cache = text(50), dynamic(compiled)
    assert_close(feed(compiled, ids, (42, 1, 7), cache), feed(plain, ids, (50,), dynamic(plain)))
    assert cache.layers[0].keys.shape[1] == kv_heads


@pytest.mark.usefixtures("fresh_dynamo")
def test_prompts_of_any_length_share_their_graphs() -> None:
    plain, compiled = twins(PACKED)
    with watching() as graphs:
        for length in (20, 21, 37, 44, 50, 64):
            ids, cache = text(length + 2), dynamic(compiled)
            assert_close(
                feed(compiled, ids, (length, 1, 1), cache),
                feed(plain, ids, (length + 2,), dynamic(plain)),
            )
    assert len(graphs) <= 4


def test_a_cache_grows_over_many_pages() -> None:
    plain, compiled = twins(PACKED)
    ids, cache = text(400), dynamic(compiled)
    logits = feed(compiled, ids, (40, *[60] * 5, *[1] * 60), cache)
    assert_close(logits, feed(plain, ids, (400,), dynamic(plain)))
    assert int(cache.layers[0].keys.cursor[1]) == (400 - 1 - 4) // 32


@pytest.mark.long(but=["dynamic-options0"])
@pytest.mark.parametrize(("make_cache", "options"), spread([dynamic, static], [EXACT, PACKED], 2))
@torch.no_grad()
def test_a_padded_row_sees_what_it_sees_alone(make_cache, options) -> None:
    plain, compiled = twins(options)
    rows = [text(50, seed=1)[0], text(41, seed=2)[0], text(33, seed=3)[0]]
    pad = [50 - len(row) for row in rows]
    ids = torch.stack(
        [
            torch.cat([torch.zeros(p, dtype=torch.int64), row])
            for p, row in zip(pad, rows, strict=True)
        ]
    )
    mask = torch.stack([torch.arange(50) >= p for p in pad]).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, logits = make_cache(compiled), []
    for part in (slice(0, 44), slice(44, 45), slice(45, 50)):
        arguments = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
        arguments |= positions_for(compiled, part.start, part.stop - part.start)
        logits.append(compiled(ids[:, part], past_key_values=cache, **arguments).logits)
    assert_quantized(cache)
    for row, p, mine in zip(rows, pad, torch.cat(logits, 1), strict=True):
        assert_close(mine[p:], plain(row[None]).logits[0], TOLERANCE if options is PACKED else 1e-5)


# Ways to generate


def generate(model, prompt: torch.Tensor, **options) -> list[list[int]]:
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings).tolist()


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_beam_search_finds_the_same_beams(cache_implementation) -> None:
    plain, compiled = twins(EXACT)
    options = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "cache_implementation": cache_implementation,
    }
    prompt = text(9, batch=2)
    assert generate(compiled, prompt, **options) == generate(plain, prompt, **options)


@pytest.mark.usefixtures("fresh_dynamo")
def test_looking_drafts_up_in_the_prompt_changes_no_token() -> None:
    plain, compiled = twins(EXACT)
    prompt, never = text(5).repeat(1, 4), 64  # transformers 5.0 wants some token to end at
    with watching() as graphs:
        drafted = generate(compiled, prompt, prompt_lookup_num_tokens=3, eos_token_id=never)
    assert graphs
    assert drafted == generate(plain, prompt)


def test_an_assistant_changes_no_token() -> None:
    plain, compiled = twins(EXACT)
    assistant = make_model()
    with torch.no_grad():  # close to the model, so that some drafts are accepted and some are not
        for weight in assistant.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    assistant.generation_config.num_assistant_tokens = 3
    assert generate(compiled, text(9), assistant_model=assistant) == generate(plain, text(9))


WAYS = {
    "sequences of one prompt": {"do_sample": True, "num_return_sequences": 3},
    "guidance": {"guidance_scale": 1.5},
    "a prompt in chunks": {"prefill_chunk_size": 4},
}
if THOROUGH:
    WAYS |= {
        "samples": {"do_sample": True, "top_k": 8},
        "beams, sampled": {"do_sample": True, "num_beams": 2},
        "no cache": {"use_cache": False},
    }


@pytest.mark.long(but=["a prompt in chunks", "sequences of one prompt"])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_way_to_generate_takes_the_same_tokens(options: dict) -> None:
    plain, compiled = twins(EXACT)
    if "prefill_chunk_size" in options:  # transformers 5.0 wants the cache to be given
        made = DynamicCache(config=plain.config), DynamicCache(config=plain.config)
    else:
        made = None, None
    found = []
    for model, cache in zip((plain, compiled), made, strict=True):
        torch.manual_seed(3)
        found.append(generate(model, text(11), **options, past_key_values=cache))
    assert found[0] == found[1]


@pytest.mark.long(but=["static"])
@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_a_padded_batch_and_a_batch_of_another_size_take_the_same_tokens(
    cache_implementation,
) -> None:
    plain, compiled = twins(EXACT)
    for batch in (1, 3):
        ids, mask = text(14, batch=batch), torch.ones(batch, 14, dtype=torch.long)
        mask[-1, :5] = 0
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        found = [
            model.generate(
                ids, attention_mask=mask, cache_implementation=cache_implementation, **options
            )
            for model in (plain, compiled)
        ]
        assert torch.equal(*found)


def test_attention_weights_are_returned_for_every_cache_position() -> None:
    plain, compiled = new_twins(PACKED)
    for model in (plain, compiled):
        model.set_attn_implementation("eager")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"output_attentions": True, "return_dict_in_generate": True}
    ours, theirs = (model.generate(text(60), **options) for model in (compiled, plain))
    for one, other in zip(ours.attentions[-1], theirs.attentions[-1], strict=True):
        assert one.shape == other.shape == (1, 4, 1, 63)
        assert_close(one, other, TOLERANCE)


# What is done to a cache between two calls


@torch.no_grad()
def test_at_once_one_by_one_and_rolled_back_agree() -> None:
    plain, compiled = twins(PACKED)
    ids, wrong = text(56), text(8, seed=5)
    expected = feed(plain, ids, (56,), dynamic(plain))[:, -1]
    at_once, one_by_one, redone = dynamic(compiled), dynamic(compiled), dynamic(compiled)
    assert_close(feed(compiled, ids, (56,), at_once)[:, -1], expected)
    assert_close(feed(compiled, ids, (38, *[1] * 18), one_by_one)[:, -1], expected)
    feed(compiled, torch.cat([ids[:, :48], wrong], 1), (48, 8), redone)
    redone.crop(-8)
    assert_close(feed(compiled, ids[:, 48:], (1, 7), redone)[:, -1], expected)
    for cache in (one_by_one, redone):
        for mine, theirs in zip(tensors(cache), tensors(at_once), strict=True):
            assert mine.cursor.tolist() == theirs.cursor.tolist()
            step = 2 * float(
                theirs.params[..., 0].max()
            )  # a rounding of the last bit may move a code by one
            torch.testing.assert_close(mine.dequantize(), theirs.dequantize(), rtol=0, atol=step)


@pytest.mark.parametrize("kept", [20, *[50, 3] * THOROUGH])
@torch.no_grad()
def test_a_cropped_cache_goes_on_from_where_it_was_cut(kept) -> None:
    plain, compiled = twins(PACKED)
    mine, theirs = dynamic(compiled), dynamic(plain)
    for model, cache in ((compiled, mine), (plain, theirs)):
        feed(model, text(60), (56, 4), cache)
        cache.crop(kept - 60)
    assert mine.get_seq_length() == kept
    assert_close(
        feed(compiled, text(6, seed=7), (1, 5), mine), feed(plain, text(6, seed=7), (1, 5), theirs)
    )
    assert_quantized(mine)


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_a_static_cache_that_was_reset_is_a_new_one() -> None:
    plain, compiled = twins(PACKED)
    cache = static(compiled)
    feed(compiled, text(60), (50, 1, 9), cache)
    cache.reset()
    with watching() as graphs:
        logits = feed(compiled, text(52, seed=1), (50, 1, 1), cache)
    assert_close(logits, feed(plain, text(52, seed=1), (52,), static(plain)))
    assert_quantized(cache)
    assert all(tensor.held() == 52 for tensor in tensors(cache))
    assert len(graphs) <= 1  # a prompt into a buffer that is quantized already


@torch.no_grad()
def test_a_copied_prefix_serves_several_continuations() -> None:
    plain, compiled = twins(PACKED)
    prefix, cache = text(45), dynamic(compiled)
    feed(compiled, prefix, (45,), cache)
    for seed in (1, 2):
        more, copied = text(8, seed=seed), copy.deepcopy(cache)
        logits = feed(compiled, more, (3, 1, 4), copied)
        expected = feed(plain, torch.cat([prefix, more], 1), (53,), dynamic(plain))[:, 45:]
        assert_close(logits, expected)
        assert_quantized(copied)
    assert cache.get_seq_length() == 45


@pytest.mark.parametrize("make_cache", [dynamic, static])
@torch.no_grad()
def test_caches_alternate_on_one_compiled_model(make_cache) -> None:
    plain, compiled = twins(PACKED)
    texts = [text(48, seed=seed) for seed in range(3)]
    mine, theirs = [[make_cache(model) for _ in texts] for model in (compiled, plain)]
    for part in (slice(0, 42), slice(42, 43), slice(43, 44), slice(44, 48)):
        for ids, cache, reference in zip(texts, mine, theirs, strict=True):
            logits = feed(compiled, ids[:, part], (part.stop - part.start,), cache)
            assert_close(logits, feed(plain, ids[:, part], (part.stop - part.start,), reference))


@torch.no_grad()
def test_an_older_view_keeps_its_tokens() -> None:
    _, compiled = twins(PACKED)
    cache = dynamic(compiled)
    feed(compiled, text(40), (40,), cache)
    view = cache.layers[0].keys
    before = view.dequantize()
    feed(compiled, text(80, seed=1), (40, *[1] * 8, 32), cache)
    assert view.shape[2] == 40
    step = float(
        view.params[..., 0].max()
    )  # once a token leaves the window it is off by half a step
    torch.testing.assert_close(view.dequantize(), before, rtol=0, atol=step)


def repeat_rows(cache) -> None:
    cache.batch_repeat_interleave(2)


def select_rows(cache) -> None:
    cache.batch_select_indices(torch.tensor([1, 0, 1]))


def reorder_rows(cache) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


@pytest.mark.parametrize(
    ("change", "batch"), [(repeat_rows, 4), (select_rows, 3), (reorder_rows, 2)]
)
@torch.no_grad()
def test_rows_of_a_cache_can_be_repeated_selected_and_reordered(change, batch) -> None:
    plain, compiled = twins(PACKED)
    mine, theirs = dynamic(compiled), dynamic(plain)
    for model, cache in ((compiled, mine), (plain, theirs)):
        feed(model, text(44, batch=2), (44,), cache)
        change(cache)
    assert_quantized(mine)
    more = text(6, batch=batch, seed=3)
    assert_close(feed(compiled, more, (1, 5), mine), feed(plain, more, (1, 5), theirs))
    assert_quantized(mine)
