"""Which decoders of the installed transformers are served: build each small, generate, say what became of its caches.

``python benchmarks/support.py`` surveys them all and writes ``benchmarks/results/support.jsonl``, a row a model,
attention and kind of cache, and ``docs/support.md`` from the rows that are there. Nothing is downloaded: models are
made of their configuration classes, with random weights. ``--models llama bloom`` surveys some, ``--write`` none.

Models run in a process of their own that is replaced where one takes longer than ``--seconds``.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, product
from pathlib import Path
from threading import Timer
from typing import Any

import torch
import transformers
from support_page import CALLS, MODES, PAGE, cell, page
from transformers import DynamicCache, PretrainedConfig, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

import kvq_compile
from kvq_compile import KVQWarning
from kvq_compile.history import watching
from kvq_compile.loading import cache_argument

ROWS = Path(__file__).resolve().parent / "results/support.jsonl"
VERSIONS = f"torch {torch.__version__}, transformers {transformers.__version__}"
OPTIONS = {"method": "int8", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"}
SLOTS = 85  # more than the tokens of all calls
# A call gets its tokens; and a cache, which the model does not return; all tokens until then; one token at a time.
WAYS = ("new", "handed", "all", "single")

# What configurations call their sizes, by the size that they are given here.
SIZES: dict[int, str] = {
    64: "hidden_size n_embd d_model dim hidden_dim embed_dim embedding_size embedding_dim",
    128: "vocab_size intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim moe_intermediate_size d_ff "
    "ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp dff "
    "vocab_size_per_layer_input expert_intermediate_size attention_hidden_size "
    "moe_shared_expert_intermediate_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts mamba_n_heads mamba_num_heads linear_num_heads linear_num_key_heads linear_num_value_heads",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_key_value_heads num_kv_heads n_kv_heads kv_n_heads num_experts_per_tok "
    "num_experts_per_token moe_k moe_topk top_k_experts first_k_dense_replace attn_layer_period num_blocks",
    16: "head_dim kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim kv_lora_rank q_lora_rank "
    "attention_head_dim index_head_dim d_kv global_head_dim swa_head_dim hidden_size_per_layer_input mamba_d_state "
    "ssm_state_size mamba_chunk_size chunk_size rotary_dim linear_head_dim linear_key_head_dim "
    "linear_value_head_dim indexer_head_dim",
    32: "mamba_head_dim",
    40: "sliding_window attention_chunk_size window_size attention_window_size",
    512: "max_position_embeddings n_positions max_seq_len n_ctx seq_length max_target_positions",
    1: "n_group n_groups topk_group n_shared_experts attn_layer_offset bos_token_id num_codebooks num_dense_layers",
    0: "num_nextn_predict_layers num_kv_shared_layers pad_token_id",
}
FILLED = ("head_dim", "num_experts_per_tok")  # which some configurations leave to the model
# What some classes have no default for, or one that no model can be built with; their checkpoints tell it.
TOLD: dict[str, Any] = {
    "attn_layer_indices": [1],
    "default_language": "en_XX",
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
TOLD_OF_PARTS: dict[str, dict[str, Any]] = {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}}
# Sizes that belong together in some classes, tried in turn where those above do not fit.
TOGETHER: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": 32},
    {"num_key_value_heads": 2},
    {"axial_pos_embds": False},
    {"attention_hidden_size": 64},
    {"hidden_size": 128, "embedding_dim": 128},
)
LISTS = ("layer_types", "layers_block_type")  # names of the kinds of layers
UNFINISHED = "took too long or ended its process"
ATTENDING = re.compile(r"^(?!linear)\w*attention|hybrid")


def small_config(model_type: str, together: dict[str, Any]) -> PretrainedConfig:
    """Return the configuration of a small decoder, with one layer of each kind that the model has, and at least two."""
    config = _small(CONFIG_MAPPING[model_type](), together)
    wanted = decoder_class(model_type).config_class
    if not isinstance(config, wanted):  # of several models, of which the decoder is one
        config = next((part for part in vars(config).values() if isinstance(part, wanted)), config)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def decoder_class(model_type: str) -> Any:
    """Return the class of a decoder."""
    name = CLASSES[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def _small(default: PretrainedConfig, together: dict[str, Any]) -> PretrainedConfig:
    kind = type(default)
    parts = {
        name: _small(part, together)
        for name, part in vars(default).items()
        if isinstance(part, PretrainedConfig)
    }
    for name in parts:
        vars(parts[name]).update(TOLD_OF_PARTS.get(name, {}))
    sizes = _sizes(default, together)
    try:
        config = kind(**sizes, **parts)
        while not set(kinds_of_layers(default)) <= set(kinds_of_layers(config)):
            sizes["num_hidden_layers"] += 1
            config = kind(**sizes, **parts)
    except (
        Exception
    ):  # its own check of sizes that belong together, some of which have names of their own
        config = default
        for name, size in (sizes | parts).items():
            setattr(config, name, size)
    return config


def kinds_of_layers(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the kinds of a model's layers, each once."""
    return tuple(dict.fromkeys(getattr(config, "layer_types", None) or ()))


def _sizes(default: PretrainedConfig, together: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes to make a configuration with; those that it has."""
    given = default.to_dict()
    sizes = {
        name: size
        for size, names in SIZES.items()
        for name in names.split()
        if type(given.get(name)) is int or (name in FILLED and name in given)
    }
    heads = given.get("num_attention_heads")
    if heads is not None and heads == given.get("num_key_value_heads"):
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes |= {name: value for name, value in TOLD.items() if given.get(name, value) is None}
    sizes |= {name: value for name, value in together.items() if name in given}
    lists = [name for name in LISTS if name in given]
    if lists:
        layers = list(kinds_of_layers(default))
        if not any(ATTENDING.search(kind) for kind in layers):
            layers.append("full_attention")
        layers += [kind for kind in layers if kind == "hybrid"]  # which may share their weights
        layers = layers if len(layers) > 1 else layers * 2
        sizes |= dict.fromkeys(lists, layers)
        sizes |= {name: len(layers) for name in ("num_hidden_layers",) if name in sizes}
    if given.get("rope_parameters") == {} and lists:
        sizes["rope_parameters"] = {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in layers
        }
    return sizes


@torch.no_grad()
def feed(
    model: Any, ids: torch.Tensor, kind: str, calls: str, forward: Any
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Return the logits of some calls, the cache after them, and the logits that the model has for the tokens of the
    last call on an ordinary cache of the same contents; ``calls`` is one of ``WAYS``.
    """
    name, logits, cache, ends = cache_argument(model), [], None, list(accumulate(CALLS))
    if kind == "static":
        config = model.config.get_text_config(decoder=True)
        cache = StaticCache(config=config, max_cache_len=SLOTS)
    elif calls == "handed" and name in inspect.signature(model.forward).parameters:
        cache = DynamicCache(config=model.config)
    if calls == "single":
        ends = list(range(1, ends[-1] + 1))
    for start, end in pairwise([0, *ends]):
        given = {} if cache is None else {name: cache}
        ordinary = {each: dequantized(kept) for each, kept in given.items()}
        before = (
            copy.deepcopy(model) if end == ends[-1] else model
        )  # which may keep states of its own
        part = ids[:, 0 if calls == "all" else start : end]
        output = forward(input_ids=part, use_cache=True, **given)
        cache = output.get(name, cache)
        if cache is None:
            raise KeepsNone(f"the model keeps no keys and values: it returns {', '.join(output)}")
        logits.append(output.logits.float()[:, start - end :])
    wanted = before(input_ids=part, use_cache=True, **ordinary).logits.float()
    return torch.cat(logits, 1), cache, wanted[:, start - end :]


def dequantized(cache: Any) -> Any:
    """Return a copy of a cache whose tensors are ordinary ones."""
    copied = copy.deepcopy(cache)
    stack, seen = [copied], set[int]()
    while stack:
        holder = stack.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        members = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
        for name, member in members.items():
            if isinstance(member, torch.Tensor):
                members[name] = member.dequantize() if type(member) is not torch.Tensor else member
            elif isinstance(member, (list, tuple)):
                stack += member
            elif isinstance(member, dict) or type(member).__name__.endswith(("Cache", "Layer")):
                stack.append(member)
    return copied


class KeepsNone(Exception):
    """A model has no cache of keys and values."""


def build(
    model_type: str, attention: str, kind: str, ids: torch.Tensor
) -> tuple[Any, str, torch.Tensor]:
    """Return a small model that runs without kvq, how it takes its tokens, and its logits.

    Raises the first error where none does.
    """
    first: Exception | None = None
    for together, calls in product(TOGETHER, WAYS):
        try:
            torch.manual_seed(0)
            config = small_config(model_type, together)
            model = decoder_class(model_type)._from_config(config, attn_implementation=attention)
            model = model.eval().float()
            expected, cache, _ = feed(model, ids, kind, calls, model.forward)
            kvq_compile.report(cache)
            return model, calls, expected
        except Exception as error:
            first = first or error
            if isinstance(error, KeepsNone) and calls == "handed":
                raise
    assert first is not None
    raise first


def survey(model_type: str, attention: str, kind: str) -> dict[str, Any]:
    """Return what became of the caches of one model; what keeps it from being tried is told instead."""
    row: dict[str, Any] = {
        "model": model_type,
        "attention": attention,
        "cache": kind,
        "versions": VERSIONS,
    }
    torch.manual_seed(0)
    ids = torch.randint(3, 100, (2, sum(CALLS)))
    try:
        model, calls, expected = build(model_type, attention, kind, ids)
    except Exception as error:
        return row | {"untried": _text(error)}
    try:
        with watching() as graphs, warnings.catch_warnings():
            warnings.simplefilter("ignore", KVQWarning)
            run = torch.compile(model.forward, backend="kvq", options=OPTIONS)
            logits, cache, wanted = feed(model, ids, kind, calls, run)
            report = kvq_compile.report(cache)
    except Exception as error:
        return row | {"failed": _text(error)}
    dense = sum(tensor.dense_read > 0 for tensor in report.tensors)
    plain = sum("plain" in tensor.parts for tensor in report.tensors)
    told = [told for graph in graphs for told in (*graph.sites, *graph.states)]
    reasons = {
        x.detail for x in told if x.outcome not in ("rewritten", "quantized") and not x.expected
    }
    return row | {
        "packed": len(report.tensors) - dense - plain,
        "dense": dense,
        "plain": plain,
        "reasons": sorted(reasons),
        "error": _change(logits, expected),
        "exact": _change(logits[:, -wanted.shape[1] :], wanted),
    }


def _change(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())


def _text(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0][:160] if lines else ""
    return text if isinstance(error, KeepsNone) else f"{type(error).__name__}: {text}"


def survey_all(
    models: Sequence[str], mode: tuple[str, str], seconds: float
) -> Iterator[dict[str, Any]]:
    """Yield a row a model, from a process that is replaced where a model takes too long or ends it."""
    left = list(models)
    while left:
        command = [sys.executable, __file__, "--worker", *mode, "--models", *left]
        worker = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert worker.stdout is not None
        while left:
            timer = Timer(seconds, worker.kill)
            timer.start()
            line = next((line for line in worker.stdout if line.startswith("{")), None)
            timer.cancel()
            model = left.pop(0)
            about = {"model": model, "attention": mode[0], "cache": mode[1], "versions": VERSIONS}
            yield json.loads(line) if line else about | {"unfinished": UNFINISHED}
            if line is None:
                break
        worker.kill()
        worker.wait()


def main() -> None:
    """Run the survey."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=sorted(CLASSES))
    parser.add_argument("--modes", nargs="*", default=[f"{a}-{c}" for a, c in MODES])
    parser.add_argument("--seconds", type=float, default=120, help="how long a model may take")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument(
        "--write", action="store_true", help="write the page from the rows that are there"
    )
    parser.add_argument("--worker", nargs=2, metavar=("ATTENTION", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(1)
        for model in options.models:
            torch._dynamo.reset()
            print(json.dumps(survey(model, *options.worker)), flush=True)
        return
    rows = {}
    if options.rows.exists():
        told = map(json.loads, options.rows.read_text().splitlines())
        rows = {(row["model"], row["attention"], row["cache"]): row for row in told}
    for mode in (
        [] if options.write else [mode for mode in MODES if "-".join(mode) in options.modes]
    ):
        for row in survey_all(options.models, mode, options.seconds):
            rows[(row["model"], *mode)] = row
            options.rows.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))
            print(
                time.strftime("%H:%M:%S"),
                row["model"],
                *mode,
                row.get("unfinished") or row.get("untried") or cell(row),
                flush=True,
            )
    PAGE.write_text(page([rows[key] for key in sorted(rows)]))


if __name__ == "__main__":
    main()
