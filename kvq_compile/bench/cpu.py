"""Decoding speed of a model on this CPU: a plain cache under Inductor against quantized ones, at one context length.

Every method decodes the same tokens on the same model in turn, round after round, so that a change in the machine's
speed meets all of them. What counts is the median over single tokens; compilation and the prompt do not.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvq_compile.evaluation.runner import Method, Runner, held, make_runners

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHODS = ("int8", "int4", "kivi:bits=4", "tc:bits=4", "tc:bits=2.5")
FIRST = 4  # tokens that are not timed: they compile the first step, then the dynamic one
PLACE = ("hardware", "torch", "kvq_compile", "commit")
CASE = ("model", "dtype", "context", "method")


@dataclass(frozen=True)
class Row:
    """A method at one context.

    Attributes:
        tokens_per_second: Of single tokens, median.
        times_plain: How many times as fast as the plain cache.
        bytes, effective_bits: Of the cache behind the last token.
    """

    model: str
    dtype: str
    context: int
    method: str
    tokens_per_second: float
    times_plain: float
    bytes: int
    effective_bits: float


def check_text(ids: Sequence[int], context: int, tokens: int, rounds: int) -> None:
    """Make sure that a text is long enough.

    Raises:
        ValueError: It is not.
    """
    needed = context + FIRST + tokens * rounds
    if len(ids) < needed:
        raise ValueError(
            f"the text must have {needed} tokens, got {len(ids)}; pass another --text, or a shorter --context"
        )


def measure(
    model: PreTrainedModel, name: str, ids: Sequence[int], methods: Sequence[Method], context: int,
    tokens: int, rounds: int, advance: Callable[[str, int, int], object] = lambda *_: None,
) -> list[Row]:  # fmt: skip
    """Return a row for the plain cache and one for each method.

    Args:
        model: A decoder of transformers on a CPU, in evaluation mode.
        name: What tables call it.
        ids: The text.
        methods: What is held against the plain cache.
        context: Tokens in the cache before the first one that is timed.
        tokens, rounds: Tokens that are timed a round, and rounds.
        advance: Told how many runners, then rounds, are done.
    """
    check_text(ids, context, tokens, rounds)
    text = torch.tensor(ids, dtype=torch.int64, device="cpu")
    runners = make_runners(model, methods)
    for done, runner in enumerate(runners, 1):
        runner.start()
        runner.prefill(text[:context])
        for token in text[context : context + FIRST]:
            runner.feed(token[None])
        advance("compiling", done, len(runners))
    turns = [(number, runner) for number in range(rounds) for runner in runners]
    for done, (number, runner) in enumerate(turns, 1):
        _feed(runner, text[context + FIRST + number * tokens :][:tokens])
        advance("decoding", done, len(turns))
    plain = statistics.median(runners[0].seconds)
    return [_row(runner, model, name, context, plain) for runner in runners]


def _feed(runner: Runner, ids: Tensor) -> None:
    for token in ids:
        runner.feed(token[None], timed=True)


def _row(runner: Runner, model: PreTrainedModel, name: str, context: int, plain: float) -> Row:
    seconds = statistics.median(runner.seconds)
    found = held(runner.cache, runner.method)
    return Row(
        model=name,
        dtype=str(model.dtype).removeprefix("torch."),
        context=context,
        method=runner.method.label,
        tokens_per_second=round(1 / seconds, 2),
        times_plain=round(plain / seconds, 2),
        bytes=found.bytes,
        effective_bits=round(found.effective_bits, 2),
    )
