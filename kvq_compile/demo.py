"""Generate one text twice, with a plain and with a quantized cache, and compare.

Both runs go through ``model.compile`` and ``generate``, greedily and from the same prompt. Speed is
the median time between two tokens as a streamer sees them, so neither compilation, which happens at
the first tokens, nor the prompt counts.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvq_compile.evaluation.perplexity import Protocol, Score, evaluate
from kvq_compile.evaluation.runner import PLAIN, Method, held, make_runners
from kvq_compile.loading import cache_argument, longest_context
from kvq_compile.reports import Report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Say = Callable[[str], None]


@dataclass(frozen=True)
class Generation:
    """What one run of ``generate`` gave: its text, and what its cache held at the end."""

    method: str
    text: str
    tokens: int
    cache: Report
    tokens_per_second: float


@dataclass(frozen=True)
class Comparison:
    """Everything the demo shows; ``agreed`` counts leading tokens that are equal in both texts."""

    plain: Generation
    quantized: Generation
    agreed: int
    scores: Sequence[Score]

    def json(self) -> str:
        """Return the comparison as JSON."""
        runs = {
            name: {**asdict(run), "cache": json.loads(run.cache.json())}
            for name, run in (("plain", self.plain), ("quantized", self.quantized))
        }
        scores = [asdict(score) for score in self.scores]
        return json.dumps({**runs, "agreed": self.agreed, "scores": scores}, indent=2)


class Clock:
    """A streamer for ``generate`` that only notes when tokens arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """Note the time; called once with the prompt, then with every token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: generation is over."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second at the median distance between two tokens."""
        return 1 / statistics.median(
            b - a for a, b in zip(self.times, self.times[1:], strict=False)
        )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Tensor,
    tokens: int,
    method: Method,
    compile_plain: bool = True,
) -> tuple[Generation, list[int]]:
    """Continue a prompt ``[1, S]`` by exactly ``tokens`` tokens through a compiled model.

    The model stays compiled with the backend of the last call; ``method.options`` of ``None``
    compiles it with Inductor, or not at all, and leaves the cache plain.
    """
    from transformers import DynamicCache

    torch.compiler.reset()  # the run before this one compiled the same code with another backend
    if method.options is None:
        model.compile(backend="inductor" if compile_plain else "eager")
    else:
        model.compile(backend="kvq", options=dict(method.options))
    cache, clock = DynamicCache(config=model.config), Clock()
    with torch.no_grad():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=model.generation_config.eos_token_id,
            streamer=clock,
            **{cache_argument(model): cache},
        )
    new: list[int] = output[0, prompt.shape[1] :].tolist()
    found = held(cache, method)
    text = tokenizer.decode(new)
    return Generation(method.label, text, len(new), found, clock.tokens_per_second), new


def protocol_for(model: PreTrainedModel, tokens: int, windows: int) -> Protocol:
    """Return the protocol of `evaluate`, with windows shortened to what model and text allow.

    Raises:
        ValueError: The text is shorter than a window of 16 tokens.
    """
    window = min(2048, tokens - 1, longest_context(model) or 2048)
    if window < 16:
        raise ValueError(f"text must have at least 17 tokens, got {tokens}")
    windows = min(windows, (tokens - 1) // window)
    return Protocol(window, prefill=min(512, window // 4), windows=windows)


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    method: Method,
    prompt_tokens: int = 1536,
    new_tokens: int = 64,
    windows: int = 2,
    compile_plain: bool = True,
    say: Say = lambda step: None,
) -> Comparison:
    """Generate with the plain cache and with ``method``, and measure perplexity on the text.

    Args:
        model: A decoder of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        ids: The text: its beginning is the prompt, and perplexity is measured on it.
        method: What the cache becomes.
        prompt_tokens: Length of the prompt; shortened where the text or the context end earlier.
        new_tokens: Tokens to generate.
        windows: Windows of the text that are scored, at most.
        compile_plain: Whether generation with the plain cache is compiled as well.
        say: Called with one line before each step.
    """
    context = longest_context(model) or len(ids) + new_tokens
    prompt_tokens = min(prompt_tokens, len(ids), context - new_tokens)
    if prompt_tokens < 1 or new_tokens < 2:
        raise ValueError(
            f"tokens must be 2 or more and fit into the model's context of {context}, "
            f"got {new_tokens}"
        )
    prompt = torch.tensor(ids[:prompt_tokens], device=model.device, dtype=torch.int64)[None]
    say("measuring perplexity with both caches")
    runners = make_runners(model, [method], compile_plain=False)
    scores = evaluate(runners, ids, protocol_for(model, len(ids), windows))
    say("compiling and generating with the plain cache")
    plain, first = generate(
        model, tokenizer, prompt, new_tokens, Method(PLAIN, None), compile_plain
    )
    say(f"compiling and generating with the quantized cache ({method.label})")
    quantized, second = generate(model, tokenizer, prompt, new_tokens, method)
    agreed = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first)
    )
    return Comparison(plain, quantized, agreed, scores)
