"""How long greedy continuations stay those of the 16-bit model.

Prompts are pieces of a text, evenly spread. Each enters the cache in one call, which attends exactly; the tokens that
follow read it as the method keeps it, and nothing stops before the last of them, an end of text included. After the
first token that differs two continuations are different texts, so that the tokens that are equal afterwards say
little; both figures are given. What rounding alone does shows in a method whose window covers everything, such as
``int8:window=4096``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvq_compile.evaluation.kept import Kept, Key
from kvq_compile.evaluation.runner import Runner
from kvq_compile.loading import spread_windows


@dataclass(frozen=True)
class Continuations:
    """``prompts`` of ``prompt`` tokens each, continued by ``tokens``, ``batch`` of them at once."""

    prompts: int = 50
    prompt: int = 1024
    tokens: int = 200
    batch: int = 4

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt", "tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class GreedyScore:
    """One row, of all prompts, against the plain cache.

    Attributes:
        text, method, prompts, tokens: What was continued, and how.
        same: Continuations that are the same to the end, in percent.
        agreed: Tokens before the first that differs, on average; ``tokens`` where none does.
        median: The same, in the middle.
        equal: Tokens that are equal place by place, in percent.
    """

    text: str
    method: str
    prompts: int
    tokens: int
    same: float
    agreed: float
    median: float
    equal: float


def greedy(
    runners: Sequence[Runner],
    ids: Sequence[int],
    protocol: Continuations,
    advance: Callable[[int], None] = lambda prompts: None,
    kept: Kept | None = None,
    done: Callable[[list[GreedyScore]], object] = lambda rows: None,
    text: str = "",
    seconds: float = math.inf,
) -> list[GreedyScore]:
    """Return the row of each runner; the first must be the plain one.

    Args:
        runners: As `make_runners` returns them.
        ids: The text.
        protocol: Lengths and numbers.
        advance: Called with the number of prompts done, for a progress bar.
        kept: What was measured before, which is not measured again, and where the rest goes.
        done: Called with the rows measured so far whenever there is one more.
        text: What rows call the text.
        seconds: Time that a row may take. Prompts that are not begun by then are left out, and it says how many it has.

    Raises:
        ValueError: The text is too short.
    """
    kept = kept or Kept()
    prompts = torch.cat(spread_windows(list(ids), protocol.prompts, protocol.prompt))
    rows: list[GreedyScore] = []
    for runner in runners:
        keys: list[Key] = [
            ("greedy", text, runner.method.label, number) for number in range(protocol.prompts)
        ]
        missing = [number for number, key in enumerate(keys) if key not in kept]
        advance(protocol.prompts - len(missing))
        began = time.perf_counter()
        for start in range(0, len(missing), protocol.batch):
            if start and time.perf_counter() - began >= seconds:
                break
            batch = missing[start : start + protocol.batch]
            found = continue_prompts(runner, prompts[batch], protocol.tokens)
            for number, tokens in zip(batch, found, strict=True):
                kept[keys[number]] = tokens
            advance(len(batch))
        plain = [("greedy", text, runners[0].method.label, number) for number, _ in enumerate(keys)]
        pairs = [
            (kept[base], kept[key])
            for base, key in zip(plain, keys, strict=True)
            if base in kept and key in kept
        ]
        rows.append(_score(text, runner.method.label, pairs))
        done(rows)
    return rows


def continue_prompts(runner: Runner, prompts: torch.Tensor, tokens: int) -> list[list[int]]:
    """Continue prompts ``[B, T]`` greedily by exactly ``tokens`` tokens each."""
    runner.start()
    first = runner.prefill(prompts).argmax(-1)
    found: list[list[int]] = runner.decode(first, tokens).tolist()
    runner.finish()
    return found


def leading(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens are equal before the first that differs."""
    pairs = enumerate(zip(first, second, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(first))


def _score(text: str, method: str, pairs: Sequence[tuple[list[int], list[int]]]) -> GreedyScore:
    tokens = len(pairs[0][0])
    agreed = [leading(plain, found) for plain, found in pairs]
    equal = sum(a == b for plain, found in pairs for a, b in zip(plain, found, strict=True))
    return GreedyScore(
        text=text,
        method=method,
        prompts=len(pairs),
        tokens=tokens,
        same=100 * sum(count == tokens for count in agreed) / len(pairs),
        agreed=statistics.mean(agreed),
        median=statistics.median(agreed),
        equal=100 * equal / (tokens * len(pairs)),
    )
