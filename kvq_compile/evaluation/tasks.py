"""The tasks on which methods are measured, each over several texts: one call for ``kvq eval`` and the benchmarks.

A task is chosen by its protocol: `Protocol` for perplexity and recall, `Passkeys`, `Continuations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvq_compile.console import progress
from kvq_compile.evaluation.greedy import Continuations, greedy
from kvq_compile.evaluation.kept import Kept
from kvq_compile.evaluation.passkey import Passkeys, passkey
from kvq_compile.evaluation.perplexity import Advance, Protocol, Score, chunks_to_do, evaluate
from kvq_compile.evaluation.recall import recall
from kvq_compile.evaluation.results import Row
from kvq_compile.evaluation.runner import Method, Runner, make_runners
from kvq_compile.loading import spread_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = Protocol | Passkeys | Continuations
Write = Callable[[Sequence[Row]], object]
Bar = Callable[[str, int], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class Measurement:
    """What is measured, whatever the task.

    Args:
        model: A decoder of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        texts: Token ids by the name of their text.
        methods: What is held against the plain cache.
        compile_plain: Whether the plain cache runs through Inductor.
        kept: What was measured before, which is not measured again, and where the rest goes.
        lengths, exams: Contexts in which recall is measured beside perplexity, in tokens, and how many of each.
        seconds: Time that a row may take; one that is cut short says what it was measured on.
        bar: Shows how far a task is, by its title and total.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: Mapping[str, Sequence[int]]
    methods: Sequence[Method]
    compile_plain: bool = False
    kept: Kept = field(default_factory=Kept)
    lengths: Sequence[int] = ()
    exams: int = 4
    seconds: float = math.inf
    bar: Bar = progress

    def run(self, task: Task, write: Write = lambda rows: None) -> list[Row]:
        """Return the rows of a task on every text; ``write`` is called with those so far whenever there are more."""
        rows: list[Row] = []
        for name in self.texts:
            rows += self._on_text(task, name, after(rows, write))
        return rows

    def _on_text(self, task: Task, name: str, write: Write) -> Sequence[Row]:
        # Runners of its own: a task compiles for lengths of its own, of which PyTorch allows a few.
        runners = make_runners(self.model, self.methods, self.compile_plain)
        rest: dict[str, Any] = {
            "kept": self.kept,
            "done": write,
            "text": name,
            "seconds": self.seconds,
        }
        ids, count = self.texts[name], len(runners)
        if isinstance(task, Passkeys):
            total = task.cases * len(task.lengths) * count
            with self.bar(f"passkeys in {name}", total) as advance:
                return passkey(runners, self.tokenizer, ids, task, advance, **rest)
        if isinstance(task, Continuations):
            with self.bar(f"continuations of {name}", task.prompts * count) as advance:
                return greedy(runners, ids, task, advance, **rest)
        with self.bar(f"perplexity on {name}", chunks_to_do(task, runners)) as advance:
            scores = evaluate(runners, ids, task, advance, **rest)
        for length in self.lengths:
            scores = self._with_recall(scores, runners, name, length)
            write(scores)
        return scores

    def _with_recall(
        self, scores: Sequence[Score], runners: Sequence[Runner], name: str, length: int
    ) -> list[Score]:
        """Return scores with the recall at one length beside those that they have."""
        with self.bar(f"recall at {length} in {name}", self.exams * len(runners)) as advance:
            percents = recall(
                runners,
                self.tokenizer,
                self.texts[name],
                length,
                self.exams,
                advance,
                self.kept,
                name,
            )
        return [
            replace(score, recall={**score.recall, length: percent})
            for score, percent in zip(scores, percents, strict=True)
        ]


def check_text(task: Task, ids: Sequence[int], context: int | None) -> None:
    """Make sure, before anything is measured, that a text is long enough for a task and a model for its lengths.

    Args:
        task: The task.
        ids: The text.
        context: Tokens that the model can attend over, ``None`` where it does not say.

    Raises:
        ValueError: One of them is not.
    """
    if isinstance(task, Protocol):
        task.cut(ids)
    elif isinstance(task, Continuations):
        spread_windows(list(ids), task.prompts, task.prompt)
    else:
        longest = max(task.lengths)
        if longest > (context or longest):
            raise ValueError(
                f"length must fit into the model's context of {context}, got {longest}"
            )
        if longest > len(ids):
            raise ValueError(
                f"text must have {longest} tokens for passkeys in contexts of as many, got {len(ids)}; "
                "take a longer text or shorter contexts"
            )


def usual_lengths(context: int | None) -> tuple[int, ...]:
    """Return the lengths of `Passkeys` that fit into a model's context; all of it where none does."""
    fitting = tuple(length for length in Passkeys.lengths if length <= (context or length))
    return fitting or (context or 0,)


def after(done: Sequence[Row], write: Write) -> Write:
    """Return what writes more rows after those that are done by now."""
    before = list(done)
    return lambda more: write([*before, *more])
