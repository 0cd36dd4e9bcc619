"""Which decoders of the installed transformers are served: build each small, generate, say what became of its caches.

``python benchmarks/support.py`` surveys them all and writes ``benchmarks/results/support.jsonl``, a row a model,
attention and kind of cache, and ``docs/support.md`` from the rows that are there. Nothing is downloaded: models are
made of their configuration classes, with random weights. ``--models llama bloom`` surveys some, ``--write`` none.

Models run in a process of their own that is replaced where one takes longer than ``--seconds``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

import kvq_compile
from kvq_compile import KVQWarning
from kvq_compile.history import watching
from kvq_compile.loading import cache_argument

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/support.md"
VERSIONS = f"torch {torch.__version__}, transformers {transformers.__version__}"
OPTIONS = {"method": "int8", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"}
CALLS, SLOTS = (48, 1, 1, 3), 64  # tokens of each call; one page is packed in the first
MODES = [("eager", "dynamic"), ("eager", "static"), ("sdpa", "dynamic"), ("sdpa", "static")]

ABOUT = """Causal language models of the installed transformers, each built small from its configuration class with
random weights, prefilled with {first} tokens and fed {further} further calls under `int8`. Key and value tensors of
the cache are counted: *packed*, read as they are stored; *dense*, stored quantized and read as an ordinary tensor;
*16 bit*, left as they are. The last column is the largest change of a logit, relative to the largest logit.
Made by `make support`; {versions}.
"""

# What configurations call their sizes, by the size that they are given here.
SIZES: dict[int, str] = {
    64: "hidden_size n_embd d_model dim hidden_dim embed_dim embedding_size attention_hidden_size",
    128: "vocab_size intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim moe_intermediate_size d_ff "
    "ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp dff "
    "vocab_size_per_layer_input expert_intermediate_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_key_value_heads num_kv_heads n_kv_heads num_experts_per_tok moe_k moe_topk top_k_experts "
    "first_k_dense_replace attn_layer_period",
    16: "head_dim kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim kv_lora_rank q_lora_rank "
    "attention_head_dim index_head_dim d_kv global_head_dim swa_head_dim hidden_size_per_layer_input mamba_d_state "
    "ssm_state_size mamba_chunk_size chunk_size rotary_dim",
    40: "sliding_window attention_chunk_size window_size",
    512: "max_position_embeddings n_positions max_seq_len n_ctx seq_length max_target_positions",
    1: "n_group topk_group n_shared_experts attn_layer_offset bos_token_id",
    0: "num_nextn_predict_layers num_kv_shared_layers pad_token_id",
}
FILLED = ("head_dim", "num_experts_per_tok")  # which some configurations leave to the model


def small_config(model_type: str) -> PretrainedConfig:
    """Return the configuration of a small model, with one layer of each kind that the model has, and at least two."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    parts = {
        name: type(part)(**_sizes(part))
        for name, part in vars(default).items()
        if isinstance(part, PretrainedConfig)
    }
    try:
        config = kind(**_sizes(default), **parts)
    except (
        Exception
    ):  # its own check of sizes that belong together, some of which have names of their own
        config = default
        for name, size in (_sizes(default) | parts).items():
            setattr(config, name, size)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _sizes(default: PretrainedConfig) -> dict[str, Any]:
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
    kinds = list(dict.fromkeys(given.get("layer_types") or ()))
    if kinds:
        layers = kinds if len(kinds) > 1 else kinds * 2
        sizes["layer_types"] = layers
        sizes |= {name: len(layers) for name in ("num_hidden_layers",) if name in sizes}
    return sizes


@torch.no_grad()
def feed(model: Any, ids: torch.Tensor, kind: str, forward: Any) -> tuple[torch.Tensor, Any]:
    """Return the logits of some calls, and the cache after them."""
    name, logits, cache = cache_argument(model), [], None
    if kind == "static":
        config = model.config.get_text_config(decoder=True)
        cache = StaticCache(config=config, max_cache_len=SLOTS)
    for part in ids.split(CALLS, 1):
        given = {} if cache is None else {name: cache}
        output = forward(input_ids=part, use_cache=True, **given)
        cache = getattr(output, name)
        logits.append(output.logits.float())
    return torch.cat(logits, 1), cache


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
        config = small_config(model_type)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        model = model.eval().float()
        expected, cache = feed(model, ids, kind, model.forward)
        kvq_compile.report(cache)
    except Exception as error:
        return row | {"untried": _text(error)}
    try:
        with watching() as graphs, warnings.catch_warnings():
            warnings.simplefilter("ignore", KVQWarning)
            run = torch.compile(model.forward, backend="kvq", options=OPTIONS)
            logits, cache = feed(model, ids, kind, run)
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
        "error": float((logits - expected).abs().max() / expected.abs().max()),
    }


def _text(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"


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
            yield (
                json.loads(line)
                if line
                else about | {"untried": "took too long or ended its process"}
            )
            if line is None:
                break
        worker.kill()
        worker.wait()


# The page


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Return ``docs/support.md``."""
    versions = "; ".join(sorted({row["versions"] for row in rows}))
    modes = [
        mode for mode in MODES if any((row["attention"], row["cache"]) == mode for row in rows)
    ]
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        found[row["model"]][row["attention"], row["cache"]] = row
    tried = {
        model: each
        for model, each in found.items()
        if any("packed" in row for row in each.values())
    }
    lines = [
        "# Which decoders are served",
        "",
        ABOUT.format(first=CALLS[0], further=len(CALLS) - 1, versions=versions),
        *_summary(rows, modes),
        "",
        "| model | "
        + " | ".join(f"{attention}, {cache}" for attention, cache in modes)
        + " | change |",
        "|---" * (len(modes) + 2) + "|",
    ]
    for model in sorted(tried):
        cells = [_cell(tried[model].get(mode)) for mode in modes]
        change = max(row.get("error", 0.0) for row in tried[model].values())
        lines.append(f"| `{model}` | {' | '.join(cells)} | {change:.4f} |")
    lines += ["", "## Why caches are read dense or stay in 16 bit", "", *_reasons(rows)]
    left = sorted(set(found) - set(tried))
    if left:
        lines += ["", "## Not tried", ""]
        lines += ["What keeps a model from being built small, or from running without kvq:", ""]
    for model in left:
        reason = next(iter(found[model].values())).get("untried", "")
        lines.append(f"- `{model}`: {reason}")
    return "\n".join(lines) + "\n"


def _summary(rows: Sequence[dict[str, Any]], modes: Sequence[tuple[str, str]]) -> Iterator[str]:
    surveyed = len({row["model"] for row in rows})
    yield f"- {surveyed} of the {len(CLASSES)} model types that transformers knows are in these rows."
    for mode in modes:
        of_mode = [
            row for row in rows if (row["attention"], row["cache"]) == mode and "packed" in row
        ]
        packed = sum(not row["dense"] and not row["plain"] for row in of_mode)
        whole = sum(not row["plain"] for row in of_mode)
        some = sum(row["plain"] > 0 and row["packed"] + row["dense"] > 0 for row in of_mode)
        yield (
            f"- {mode[0]} attention, {mode[1]} cache: of {len(of_mode)} models {whole} are stored quantized whole, "
            f"{packed} of them read packed alone; {some} in part; {len(of_mode) - whole - some} not at all."
        )
    failed = sorted({row["model"] for row in rows if "failed" in row})
    yield f"- Compiling fails for {len(failed)}: {', '.join(failed) or 'none'}."


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or "untried" in row:
        return ""
    if "failed" in row:
        return "fails"
    counts = [(row["packed"], "packed"), (row["dense"], "dense"), (row["plain"], "16 bit")]
    told = [(count, name) for count, name in counts if count]
    if len(told) == 1:
        return told[0][1]
    return ", ".join(f"{count} {name}" for count, name in told)


def _reasons(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    models: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for reason in row.get("reasons", ()):
            models[" ".join(reason.split())].add(row["model"])
    counts = Counter({reason: len(among) for reason, among in models.items()})
    for reason, count in counts.most_common():
        names = sorted(models[reason])
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        yield f"- {count}: {reason} ({', '.join(names[:8])}{more})"


def main() -> None:
    """Run the survey."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=sorted(CLASSES))
    parser.add_argument("--modes", nargs="*", default=[f"{a}-{c}" for a, c in MODES])
    parser.add_argument("--seconds", type=float, default=120, help="how long a model may take")
    parser.add_argument("--rows", type=Path, default=ROOT / "benchmarks/results/support.jsonl")
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
                _cell(row) or row.get("untried"),
                flush=True,
            )
    PAGE.write_text(page([rows[key] for key in sorted(rows)]))


if __name__ == "__main__":
    main()
