"""After a generation no 16-bit history is left, neither in any object nor in the process's memory."""

import gc
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from kvq_compile import ArrangedKV, QuantizedKV, report
from kvq_compile.testing.small_decoder import Decoder

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
OPTIONS = {
    "method": "int4",
    "sinks": 2,
    "window": 7,
    "page_size": 32,
    "inner": "eager",
    "strict": True,
}
PROMPT, MORE = 120, 6


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    return LlamaForCausalLM(config).eval()


def histories(tokens: int) -> list[tuple[int, ...]]:
    """Return the shapes of all floating tensors with four dimensions that hold ``tokens`` or more.

    Parts of a cache are none of them: its codes are integers, its parameters have three dimensions or six, and its
    exact rows are fewer than the tokens. A tensor is judged by its storage, so that no view hides one.
    """
    gc.collect()
    found = []
    for x in gc.get_objects():
        if not issubclass(type(x), Tensor) or isinstance(x, (QuantizedKV, ArrangedKV, FakeTensor)):
            continue
        if x.dim() == 4 and x.is_floating_point():
            stored = x.untyped_storage().nbytes() // x.element_size()
            if stored >= x.shape[0] * x.shape[1] * tokens * x.shape[3]:
                found.append(tuple(x.shape))
    return found


def assert_counted_from_storages(caches: list[Any]) -> None:
    storages = {part.untyped_storage()._cdata: part for cache in caches for part in cache.parts}
    size = sum(part.untyped_storage().nbytes() for part in storages.values())
    numbers = sum(
        cache.shape[0] * cache.shape[1] * cache.held() * cache.shape[3] for cache in caches
    )
    found = report(caches)
    assert found.bytes == size
    assert found.effective_bits == 8 * size / numbers


def generate(model: LlamaForCausalLM, cache: Any, **options: Any) -> Any:
    ids = torch.randint(0, 97, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=MORE,
            min_new_tokens=MORE,
            do_sample=False,
            pad_token_id=0,
            **options,
        )


def test_the_walk_finds_a_history(model: LlamaForCausalLM) -> None:
    """What the tests below rely on: a plain cache leaves keys and values of every layer."""
    cache = DynamicCache()
    generate(model, cache)
    assert len(histories(PROMPT)) >= 2 * len(cache.layers)


def test_generating_onto_a_growing_cache_leaves_no_history(model: LlamaForCausalLM) -> None:
    plain = model.forward
    model.forward = torch.compile(plain, backend="kvq", options=OPTIONS)  # type: ignore[method-assign]
    try:
        cache = DynamicCache()
        generate(model, cache)
    finally:
        model.forward = plain  # type: ignore[method-assign]
    torch._dynamo.reset()  # which holds example inputs of the first call, before they were quantized
    assert histories(PROMPT) == []
    assert cache.get_seq_length() == PROMPT + MORE - 1
    assert_counted_from_storages([x for layer in cache.layers for x in (layer.keys, layer.values)])


def test_generating_onto_a_static_cache_leaves_no_history(model: LlamaForCausalLM) -> None:
    """The prefill runs uncompiled and fills 16-bit buffers, which the first compiled call converts."""
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + MORE)
    compile_config = CompileConfig(backend="kvq", mode=None, options=OPTIONS)
    compile_config._compile_all_devices = True
    generate(model, cache, compile_config=compile_config)
    model.__dict__.pop("_compiled_call", None)
    torch._dynamo.reset()
    assert histories(PROMPT) == []
    assert_counted_from_storages([x for layer in cache.layers for x in (layer.keys, layer.values)])


@pytest.mark.parametrize("kind", ["grown", "static"])
def test_a_custom_decoder_leaves_no_history(kind: Any) -> None:
    decoder = Decoder(
        layers=2,
        heads=(4, 2),
        head_dim=64,
        dtype=torch.float16,
        kind=kind,
        chunks=(PROMPT, 1, 1),
        padding=(0, 0),
        mask_kind="bool",
        options={key: OPTIONS[key] for key in ("method", "sinks", "window", "page_size")},
        seed=0,
    )
    for call in decoder.run(inner="eager"):
        last = call.caches
        del call  # it holds the exact history for comparison
    assert last is not None
    torch._dynamo.reset()
    assert histories(PROMPT) == []


PEAK = """
import re, sys, torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

def peak():  # of this program alone: ru_maxrss starts from that of the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
)
model = LlamaForCausalLM(config).eval()
if sys.argv[1] == "kvq":
    options = {"method": "int4", "window": 32, "page_size": 32, "inner": "eager", "strict": True}
    model.compile(backend="kvq", options=options)
cache = DynamicCache()
with torch.no_grad():
    for count in (128, 1, 1, 127, *[128] * 7, 1, 1):
        if cache.get_seq_length() == 257:
            before = peak()
        model(torch.full((4, count), 7), past_key_values=cache)
assert cache.get_seq_length() == 1155
print(peak() - before)
"""


def peak_growth(cache: str) -> int:
    """Return by how many bytes the peak of a process grows while its cache grows from 257 to 1155 tokens."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, cache], capture_output=True, text=True, timeout=300, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout)


def test_the_peak_of_a_long_generation_is_below_that_of_the_plain_cache() -> None:
    """The plain cache grows by 84 MiB; the quantized one by an eighth of that, and needs scratch.

    What the allocator happens to keep only adds to a peak: the least of a few is nearest to what is needed.
    """
    history = 4 * (1155 - 257) * 3 * 2 * 8 * 128 * 4
    plain, quantized = peak_growth("plain"), peak_growth("kvq")
    for _ in range(3):
        if quantized > 0.6 * plain:
            quantized = min(quantized, peak_growth("kvq"))
    print(f"plain {plain / history:.2f}, quantized {quantized / history:.2f} of the history")
    assert plain >= 0.5 * history
    assert quantized <= 0.6 * plain
