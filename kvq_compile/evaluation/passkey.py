"""Passkey retrieval in natural text: a number planted at a depth of a long context, asked for at its end.

The task of Mohtashami and Jaggi (arXiv 2305.16300), with an ordinary text instead of repeated filler, so that a model
must tell the number from much that is like nothing else. Context, question and answer fill ``length`` tokens exactly.
The context enters the cache in one call, which attends exactly; the question, and then the answer, token by token,
read it as the method keeps it. All cases of a length are equally long, so that many are fed at once.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvq_compile.evaluation.kept import Kept, Key
from kvq_compile.evaluation.recall import DIGITS, count_right
from kvq_compile.evaluation.runner import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FACT = "\nThe pass key is {}. Remember it. {} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Passkeys:
    """What is asked: ``samples`` cases at each of ``depths`` places, evenly spread, of contexts of each length.

    ``batch`` of them are fed at once.
    """

    lengths: Sequence[int] = (2048, 4096, 8192)
    depths: int = 5
    samples: int = 4
    batch: int = 4

    def __post_init__(self) -> None:
        for name in ("depths", "samples", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")

    @property
    def cases(self) -> int:
        """Cases of one length."""
        return self.depths * self.samples


@dataclass(frozen=True)
class Case:
    """One context as token ids, and the number that it holds."""

    context: list[int]
    digits: str


@dataclass(frozen=True)
class PasskeyScore:
    """One row: of ``cases`` at a length and depth, the numbers that came back whole and the digits right, in percent.

    ``depth`` is the part of the context before the number; ``plain`` is `found` of the plain cache.
    """

    text: str
    method: str
    length: int
    depth: float
    cases: int
    found: float
    digits: float
    plain: float


def make_case(
    tokenizer: PreTrainedTokenizerBase, filler: Sequence[int], length: int, depth: float, seed: int
) -> Case:
    """Plant a number in a part of a text.

    Args:
        tokenizer: Encodes fact, question and answer.
        filler: Tokens of an ordinary text.
        length: Tokens of context, question and answer together.
        depth: Part of the text that comes before the number, 0 to 1.
        seed: Chooses the number and the part of the text.

    Raises:
        ValueError: ``length`` leaves no room for text, or the text is too short.
    """
    rng = random.Random(seed)
    digits = "".join(rng.choices("0123456789", k=DIGITS))
    fact = _encode(tokenizer, FACT.format(digits, digits))
    asked = len(_encode(tokenizer, QUESTION)) + answer_length(tokenizer)
    room = length - len(fact) - asked
    if room < 1 or len(filler) < room:
        raise ValueError(
            f"passkey retrieval needs more than {len(fact) + asked} tokens and a text as long, "
            f"got {length} and a text of {len(filler)}"
        )
    start, before = rng.randrange(len(filler) - room + 1), round(depth * room)
    text = list(filler[start : start + room])
    return Case([*text[:before], *fact, *text[before:]], digits)


def answer_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the most tokens that a number takes: one for each digit, and one for a space before them."""
    question = len(_encode(tokenizer, QUESTION))
    numbers = ("00000", "48213", "99999")
    return max(len(_encode(tokenizer, f"{QUESTION} {each}")) - question for each in numbers)


def passkey(
    runners: Sequence[Runner],
    tokenizer: PreTrainedTokenizerBase,
    filler: Sequence[int],
    protocol: Passkeys,
    advance: Callable[[int], None] = lambda cases: None,
    kept: Kept | None = None,
    done: Callable[[list[PasskeyScore]], object] = lambda rows: None,
    text: str = "",
    seconds: float = math.inf,
) -> list[PasskeyScore]:
    """Return the rows of every runner, length and depth; the first runner must be the plain one.

    Args:
        runners: As `make_runners` returns them.
        tokenizer: Encodes facts and questions.
        filler: Tokens of an ordinary text, at least as many as the longest context.
        protocol: What is asked.
        advance: Called with the number of cases done, for a progress bar.
        kept: What was measured before, which is not measured again, and where the rest goes.
        done: Called with the rows measured so far whenever there are more.
        text: What rows call the text.
        seconds: Time that a method may take for a length. Cases that are not begun by then are left out, evenly
            over depths, and its rows say how many there were.

    Raises:
        ValueError: A length leaves no room for text, or the text is too short.
    """
    kept = kept or Kept()
    rows: list[PasskeyScore] = []
    for length in protocol.lengths:
        cases = [
            make_case(tokenizer, filler, length, _depth(protocol, number), number)
            for number in range(protocol.cases)
        ]
        for runner in runners:
            keys: list[Key] = [
                ("passkey", text, runner.method.label, length, number)
                for number in range(protocol.cases)
            ]
            missing = [number for number, key in enumerate(keys) if key not in kept]
            advance(len(cases) - len(missing))
            began = time.perf_counter()
            for start in range(0, len(missing), protocol.batch):
                if start and time.perf_counter() - began >= seconds:
                    break
                batch = missing[start : start + protocol.batch]
                answers = ask(runner, tokenizer, [cases[number] for number in batch])
                for number, answer in zip(batch, answers, strict=True):
                    kept[keys[number]] = count_right(answer, cases[number].digits)
                advance(len(batch))
            rows += _rows(runner, runners[0], length, protocol, kept, text)
            done(rows)
    return rows


def ask(runner: Runner, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case]) -> list[str]:
    """Return what a runner answers to cases of one length, fed at once."""
    runner.start()
    runner.prefill(torch.tensor([case.context for case in cases], dtype=torch.int64, device="cpu"))
    question = torch.tensor(_encode(tokenizer, QUESTION), dtype=torch.int64, device="cpu")
    first = runner.feed(question.expand(len(cases), -1))[:, -1].argmax(-1)
    answers = runner.decode(first, answer_length(tokenizer)).tolist()
    runner.finish()
    return [tokenizer.decode(answer) for answer in answers]


def _rows(
    runner: Runner, plain: Runner, length: int, protocol: Passkeys, kept: Kept, text: str
) -> Iterator[PasskeyScore]:
    for place in range(protocol.depths):
        pairs = [
            [("passkey", text, each.method.label, length, number) for each in (runner, plain)]
            for number in range(place, protocol.cases, protocol.depths)
        ]
        counts = [[kept[key] for key in pair] for pair in pairs if all(key in kept for key in pair)]
        if not counts:
            continue
        right, base = zip(*counts, strict=True)
        yield PasskeyScore(
            text=text,
            method=runner.method.label,
            length=length,
            depth=_depth(protocol, place),
            cases=len(counts),
            found=100 * sum(count == DIGITS for count in right) / len(right),
            digits=100 * sum(right) / (DIGITS * len(right)),
            plain=100 * sum(count == DIGITS for count in base) / len(base),
        )


def _depth(protocol: Passkeys, number: int) -> float:
    """Return the depth of a case: the middle of its part of the context, of as many equal parts as there are depths."""
    return (number % protocol.depths + 0.5) / protocol.depths


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids
