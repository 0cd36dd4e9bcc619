"""Hold a million tokens of a 7B multi-head model on one card: a static cache that is never in 16 bit.

A model of the shape of Llama-2-7B with random weights makes its cache inside the compiled call, for a prompt. Random
tokens then fill the cache by the writes that a model makes, a key is planted near the far end, and attention looks for
it there. Then the model decodes.

    python benchmarks/gpu_capacity.py [--tokens 1000000] [--method tc:key_bits=1.5,value_bits=2] [--out FILE]
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from kvq_compile import report
from kvq_compile.evaluation.runner import parse_method

PROMPT, WARM, TIMED = 512, 6, 16
HEAD, SIZE = 5, 4.0  # of the planted key


def make_model(layers: int, hidden: int, device: str) -> LlamaForCausalLM:
    """Return a model with random bf16 weights and as many KV heads as heads."""
    heads = hidden // 128
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=32000,
        max_position_embeddings=1 << 20, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def fill(
    layer: Any, first: int, tokens: int, chunk: int, planted: tuple[int, Tensor, Tensor]
) -> None:
    """Write random tokens into a layer's cache up to ``tokens``, and a key with its value at a slot."""
    slot, planted_key, planted_value = planted
    _, heads, _, head_dim = layer.keys.shape
    for start in range(first, tokens, chunk):
        stop = min(start + chunk, tokens)
        slots = torch.arange(start, stop, device=planted_key.device)
        for cache, one in ((layer.keys, planted_key), (layer.values, planted_value)):
            x = torch.randn(
                1, heads, stop - start, head_dim, dtype=torch.bfloat16, device=one.device
            )
            if start <= slot < stop:
                x[0, HEAD, slot - start] = one
            cache.index_copy_(2, slots, x)
    layer.cumulative_length.fill_(tokens)


def find(layer: Any, options: Any, tokens: int, planted: tuple[int, Tensor, Tensor]) -> float:
    """Return the cosine between the planted value and what attention finds for a query like the planted key."""
    _, key, value = planted
    heads, head_dim = layer.keys.shape[1], layer.keys.shape[3]

    def look(query: Tensor, new: Tensor, keys: Tensor, values: Tensor, slot: Tensor) -> Tensor:
        keys.index_copy_(2, slot, new)
        values.index_copy_(2, slot, new)
        mask = torch.arange(keys.shape[2], device=slot.device) <= slot
        return sdpa(query, keys, values, attn_mask=mask[None, None, None])

    query = (key / SIZE).expand(1, heads, 1, head_dim).contiguous()
    slot = torch.tensor([tokens], device=key.device)
    compiled = torch.compile(look, backend="kvq", options={**options, "strict": True})
    output = compiled(query, torch.zeros_like(query), layer.keys, layer.values, slot)
    return float(cosine_similarity(output[0, HEAD, 0].float(), value.float(), dim=0))


def decode(model: Any, cache: StaticCache, tokens: int) -> float:
    """Return the median seconds of a step."""
    device = model.device
    ids, seconds = torch.ones(1, 1, dtype=torch.long, device=device), []
    for place in range(tokens, tokens + WARM + TIMED):
        position = torch.full((1, 1), place, device=device)
        synchronize(device)
        start = time.perf_counter()
        logits = model(ids, position_ids=position, past_key_values=cache).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM:])


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Fill a cache, look for the planted key, decode, and return a row."""
    method = dict(parse_method(options.method).options or {})
    model = make_model(options.layers, options.hidden, options.device)
    device, config = model.device, model.config
    model.compile(backend="kvq", options={**method, "strict": True})
    slots = options.tokens + 1 + WARM + TIMED
    cache = StaticCache(config, max_cache_len=slots)
    prompt = torch.randint(0, config.vocab_size, (1, PROMPT), device=device)
    model(prompt, past_key_values=cache, logits_to_keep=1)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (128,), generator=generator).to(device) * 2 - 1
    value = torch.randn(128, generator=generator).bfloat16().to(device)
    planted = options.tokens * 999 // 1000, (SIZE * signs).bfloat16(), value
    synchronize(device)
    start = time.perf_counter()
    for layer in cache.layers:
        fill(layer, PROMPT, options.tokens, options.chunk, planted)
    synchronize(device)
    filled = time.perf_counter() - start
    ends = [find(cache.layers[place], method, options.tokens, planted) for place in (0, -1)]
    for layer in cache.layers:
        layer.cumulative_length.fill_(options.tokens)
    seconds = decode(model, cache, options.tokens)
    told = report(cache)
    row = {
        "method": options.method, "layers": options.layers, "tokens": options.tokens,
        "packed_bits": round(told.packed_bits, 4), "cache_gb": round(told.bytes / 1e9, 2),
        "filled_s": round(filled, 1), "cosine_first": round(ends[0], 3),
        "cosine_last": round(ends[1], 3), "step_ms": round(1e3 * seconds, 2),
        "tokens_per_s": round(1 / seconds, 2),
    }  # fmt: skip
    if device.type == "cuda":
        row |= {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        row = about | {"transformers": transformers.__version__, "commit": options.commit} | row
    return row


def main() -> None:
    """Measure what was asked for and write a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokens", type=int, default=1_000_000)
    add("--method", default="tc:key_bits=1.5,value_bits=2")
    add("--layers", type=int, default=32)
    add("--hidden", type=int, default=4096)
    add("--chunk", type=int, default=16384, help="tokens written at once")
    add("--device", default="cuda")
    add("--commit", default="", help="of the code")
    add("--out", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    row = measure(options)
    print(row)
    if options.out is not None:
        new = not options.out.exists()
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
