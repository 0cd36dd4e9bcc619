"""The page of decoders that are served, ``docs/support.md``, of rows that `support` has measured."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

PAGE = Path(__file__).resolve().parent.parent / "docs/support.md"
CALLS = (48, 1, 1, 3)  # tokens of each call; one page is packed in the first
MODES = [("eager", "dynamic"), ("eager", "static"), ("sdpa", "dynamic"), ("sdpa", "static")]
OUTCOMES = {
    "packed",
    "failed",
    "untried",
}  # a row that has none of these says that a model took too long

ABOUT = """Causal language models of the installed transformers, each built small from its configuration class with
random weights, prefilled with {first} tokens and fed {further} further calls under `int8`. Key and value tensors of
the cache are counted: *packed*, read as they are stored; *dense*, stored quantized and read as an ordinary tensor;
*16 bit*, left as they are. *Change* is the largest change of a logit, relative to the largest logit; *exact* is that
of the last call against the model on an ordinary cache of the same contents, in fp32: what the quantizer is not to
blame for. An empty cell is a mode that the model does not run in without kvq. Made by `make support`; {versions}.
"""

DRAFTS = (
    "keeps no keys and values: it drafts for another model, and reads the keys and values of that"
)
REASONS = {
    "gemma4_assistant": DRAFTS,
    "gemma4_unified_assistant": DRAFTS,
    "blt": "transformers itself cannot make its cache: `BltConfig` has no `num_hidden_layers`",
    "gemma3n": "`TimmWrapperModel` requires the timm library; its decoder is surveyed as `gemma3n_text`",
}
# Why caches of softmax attentions stay in 16 bit, where the reason that a graph gives does not say it all.
EXCEPTIONS = {
    "deepseek_v4": "keys and values are one tensor, a window of which is joined to entries that are compressed from "
    "other tokens; attention reads the two as one",
    "mpt": "the model cuts its biases at a length that it reads from the device, so that PyTorch compiles the write "
    "into the cache and the attention that reads it as two graphs, neither of which shows a cache",
}


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Return ``docs/support.md``.

    Raises:
        ValueError: A cell would be empty for another reason than that the model does not run so without kvq.
    """
    versions = "; ".join(sorted({row["versions"] for row in rows}))
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        found[row["model"]][row["attention"], row["cache"]] = row
    tried = {
        model: each
        for model, each in found.items()
        if any({"packed", "failed"} & row.keys() for row in each.values())
    }
    missing = [
        f"{model} {attention}-{cache}"
        for model, each in sorted(found.items())
        for attention, cache in (MODES if model in tried else each)
        if not OUTCOMES & each.get((attention, cache), {}).keys()
    ]
    if missing:
        raise ValueError(
            f"rows must tell of all modes of a model, got none of {', '.join(missing)}; survey these "
            "with --models and --modes, and more --seconds where one took too long"
        )
    lines = [
        "# Which decoders are served",
        "",
        ABOUT.format(first=CALLS[0], further=len(CALLS) - 1, versions=versions),
        *_summary(rows),
        "",
        "| model | "
        + " | ".join(f"{attention}, {cache}" for attention, cache in MODES)
        + " | change | exact |",
        "|---" * (len(MODES) + 3) + "|",
    ]
    for model in sorted(tried):
        cells = [cell(tried[model][mode]) for mode in MODES]
        change = max(row.get("error", 0.0) for row in tried[model].values())
        exact = [row["exact"] for row in tried[model].values() if "exact" in row]
        told = f"{max(exact):.0e}" if exact else ""
        lines.append(f"| `{model}` | {' | '.join(cells)} | {change:.4f} | {told} |")
    lines += ["", "## What stays in 16 bit", "", *_exceptions(rows)]
    lines += ["", "## Why caches are read dense or stay in 16 bit", "", *_reasons(rows)]
    lines += ["", "## Modes that models do not run in without kvq", "", *_modes_left(rows, tried)]
    left = sorted(set(found) - set(tried))
    if left:
        lines += ["", "## Not tried", ""]
        lines += ["What keeps a model from being built small, or from running without kvq:", ""]
    for model in left:
        reason = REASONS.get(model) or next(iter(found[model].values())).get("untried", "")
        lines.append(f"- `{model}`: {reason}")
    return "\n".join(lines) + "\n"


def _summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    surveyed = len({row["model"] for row in rows})
    yield f"- {surveyed} of the {len(CLASSES)} model types that transformers knows are in these rows."
    for mode in MODES:
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


def cell(row: dict[str, Any]) -> str:
    """Return what is told of a model in one mode."""
    if "untried" in row:
        return ""
    if "failed" in row:
        return "fails"
    counts = [(row["packed"], "packed"), (row["dense"], "dense"), (row["plain"], "16 bit")]
    told = [(count, name) for count, name in counts if count]
    if len(told) == 1:
        return told[0][1]
    return ", ".join(f"{count} {name}" for count, name in told)


def _exceptions(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row.get("plain"):
            reason = EXCEPTIONS.get(row["model"]) or "; ".join(row["reasons"])
            yield f"- `{row['model']}`, {row['attention']}, {row['cache']}: {reason}."


def _modes_left(rows: Sequence[dict[str, Any]], tried: Collection[str]) -> Iterator[str]:
    models: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["model"] in tried and "untried" in row:
            no_sdpa = "does not support an attention implementation through" in row["untried"]
            reason = "no SDPA" if no_sdpa else row["untried"]
            models[f"{row['attention']}, {row['cache']}: {reason}"].add(row["model"])
    for reason in sorted(models):
        yield f"- {reason} ({', '.join(sorted(models[reason]))})"


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
