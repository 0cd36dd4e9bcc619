"""Measure passkey retrieval through a quantized cache: facts planted in a sequence, asked for at its end.

Perplexity is an average over tokens that mostly need their neighbours; recall is not. Six facts ::

    The pass key for Alice is 48213. Remember it.

stand at random places of a text, and six questions follow it. Text and facts enter the cache in one
call. A question is fed up to the number, the number is then decoded greedily, token by
token, and every digit is compared. Everything together fills the context that is asked for,
exactly: facts, questions and answers count.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvq_compile.evaluation.kept import Kept
from kvq_compile.evaluation.perplexity import Advance
from kvq_compile.evaluation.runner import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FACTS = 6
DIGITS = 5
THINGS = (
    "pass key",
    "locker code",
    "room number",
    "account id",
    "train number",
    "secret word index",
)
NAMES = (
    "Alice", "Bruno", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jacob",
    "Karen", "Lewis", "Maria", "Nora", "Oscar", "Paula", "Robert", "Sarah", "Thomas", "Zelda",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question as token ids up to the number, the tokens the number takes, and the number."""

    prompt: list[int]
    answer_length: int
    digits: str
    ending: list[int]


@dataclass(frozen=True)
class Exam:
    """A context with planted facts, and the questions that follow it."""

    context: list[int]
    questions: list[Question]


def make_exam(
    tokenizer: PreTrainedTokenizerBase, filler: Sequence[int], length: int, seed: int
) -> Exam:
    """Plant facts in a text.

    Args:
        tokenizer: Encodes facts and questions.
        filler: Tokens of an ordinary text, at least ``length`` of them.
        length: Tokens of context, facts, questions and answers together.
        seed: Chooses names, things, digits, places and the part of the text.

    Raises:
        ValueError: ``length`` leaves no room for text, or the text is too short.
    """
    rng = random.Random(seed)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    facts: list[list[int]] = []
    questions: list[Question] = []
    for name in rng.sample(NAMES, FACTS):
        thing = rng.choice(THINGS)
        digits = "".join(rng.choices("0123456789", k=DIGITS))
        facts.append(encode(f"\nThe {thing} for {name} is {digits}. Remember it.\n"))
        asked = f"\nWhat is the {thing} for {name}? The {thing} for {name} is"
        prompt = encode(asked)
        answer_length = len(encode(f"{asked} {digits}")) - len(prompt)
        questions.append(Question(prompt, answer_length, digits, encode(".\n")))
    rng.shuffle(questions)

    spent = sum(map(len, facts)) + sum(
        len(q.prompt) + q.answer_length + len(q.ending) for q in questions
    )
    room = length - spent
    if room < FACTS or len(filler) < room:
        raise ValueError(
            f"recall needs more than {spent + FACTS} tokens and a text as long, "
            f"got {length} and a text of {len(filler)}"
        )
    start = rng.randrange(len(filler) - room + 1)
    places = sorted(rng.sample(range(room), FACTS))
    context: list[int] = []
    done = 0
    for place, fact in zip(places, facts, strict=True):
        context += [*filler[start + done : start + place], *fact]
        done = place
    context += filler[start + done : start + room]
    return Exam(context, questions)


def count_right(answer: str, digits: str) -> int:
    """Return how many digits of an answer are right, place by place."""
    return sum(a == b for a, b in zip(answer.strip(), digits, strict=False))


def sit_exam(runner: Runner, tokenizer: PreTrainedTokenizerBase, exam: Exam) -> int:
    """Return how many digits a runner answers rightly, of ``FACTS * DIGITS``."""
    runner.start()
    runner.prefill(torch.tensor(exam.context, dtype=torch.int64, device="cpu"))
    right = 0
    before: list[int] = []
    for question in exam.questions:
        asked = torch.tensor([before + question.prompt], dtype=torch.int64, device="cpu")
        first = runner.feed(asked)[:, -1].argmax(-1)
        answer = runner.decode(first, question.answer_length)[0].tolist()
        right += count_right(tokenizer.decode(answer), question.digits)
        before = [*answer[-1:], *question.ending]
    runner.finish()
    return right


def recall(
    runners: Sequence[Runner],
    tokenizer: PreTrainedTokenizerBase,
    filler: Sequence[int],
    length: int,
    exams: int = 4,
    advance: Advance = lambda exams: None,
    kept: Kept | None = None,
    text: str = "",
) -> list[float]:
    """Return the percentage of digits each runner gets right over several contexts.

    Args:
        runners: As `make_runners` returns them.
        tokenizer: Encodes facts and questions.
        filler: Tokens of an ordinary text, at least ``length`` of them.
        length: Tokens of a context.
        exams: Contexts.
        advance: Called after each exam with the number of exams done, for a progress bar.
        kept: What was measured before, which is not measured again, and where the rest goes.
        text: What the text is called there.
    """
    kept = kept or Kept()
    contexts = [make_exam(tokenizer, filler, length, seed) for seed in range(exams)]
    for runner in runners:
        if ("recall", text, runner.method.label, length) in kept:
            advance(exams)
            continue
        right = 0
        for exam in contexts:
            right += sit_exam(runner, tokenizer, exam)
            advance(1)
        percent = 100 * right / (exams * FACTS * DIGITS)
        kept["recall", text, runner.method.label, length] = percent
    return [kept["recall", text, runner.method.label, length] for runner in runners]
