"""Measure what a quantized cache costs in quality: the protocol behind every figure we quote.

A text is cut into windows. Of each, the first ``prefill`` tokens enter an empty cache in one call;
that call attends exactly, whatever the method, and is not scored. The other tokens follow in chunks
of ``chunk`` through the compiled model and its cache, each chunk reading a history that has
been quantized by then. The prediction made at each of these tokens is scored against the token that
comes next in the text (teacher forcing), so a window of 2048 needs 2049 tokens and scores 1536.

Every method sees the same chunks of the same windows as the *plain* cache, which holds what the
model computes in the model's dtype. Windows are the outer loop, ``batch`` of them at a time: the plain logits of
these are kept while the methods are held against them, and no longer. What windows gave is kept on disk (`Kept`), so
that a run that was cut short goes on; only the plain logits of the windows that it stopped in are computed anew.

Speed is tokens of a chunk, of all windows of a batch, over the *median* time of a chunk. Compilation happens in the
first calls and therefore does not count.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from kvq_compile.evaluation.kept import Kept, Key
from kvq_compile.evaluation.runner import Runner

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Protocol:
    """Lengths, in tokens, the number of windows, and how many of them are fed at once."""

    window: int = 2048
    prefill: int = 512
    chunk: int = 64
    windows: int = 4
    batch: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.prefill < self.window:
            raise ValueError(
                f"prefill must be between 1 and window - 1 = {self.window - 1}, got {self.prefill}"
            )
        if self.chunk < 1 or self.windows < 1:
            raise ValueError(
                f"chunk and windows must be 1 or more, got {self.chunk} and {self.windows}"
            )
        if self.batch < 1:
            raise ValueError(f"batch must be 1 or more, got {self.batch}")

    @property
    def scored(self) -> int:
        """Tokens scored in one window."""
        return self.window - self.prefill

    @property
    def chunks(self) -> int:
        """Chunks that windows are fed in after their prefill."""
        return math.ceil(self.scored / self.chunk)

    def cut(self, ids: Sequence[int]) -> list[Tensor]:
        """Return the windows of a text, each ``[window + 1]``: the last token is only a target."""
        needed = self.window * self.windows + 1
        if len(ids) < needed:
            raise ValueError(
                f"{self.windows} windows of {self.window} tokens need a text of {needed} tokens, "
                f"got {len(ids)}; pass fewer or shorter windows"
            )
        starts = range(0, self.window * self.windows, self.window)
        return [
            torch.tensor(ids[start : start + self.window + 1], dtype=torch.int64, device="cpu")
            for start in starts
        ]

    def batches(self, ids: Sequence[int]) -> list[Tensor]:
        """Return the windows of a text, ``batch`` in one tensor ``[B, window + 1]``; the last may have fewer."""
        windows = torch.stack(self.cut(ids))
        return list(windows.split(self.batch))


@dataclass(frozen=True)
class Score:
    """One row of the table; ``difference`` in percent, ``kl`` in nats, ``top1`` in percent.

    ``packed_bits`` are those of an element in a packed page, ``read_bits`` those of them that attention reads,
    ``effective_bits`` all bytes held over all elements.
    ``recall`` is in percent of digits, by tokens of context; ``text`` and ``windows`` are what was scored.
    """

    method: str
    packed_bits: float
    effective_bits: float
    perplexity: float
    difference: float
    kl: float
    top1: float
    bytes: int
    tokens_per_second: float
    recall: dict[int, float] = field(default_factory=dict)
    text: str = ""
    windows: int = 0
    read_bits: float = 16.0


@dataclass(frozen=True)
class Part:
    """What a batch of windows gave for one method.

    Attributes:
        tokens: Tokens scored.
        loss, kl: Sums over them, in nats.
        agreed: Those whose likeliest next token is that of the plain cache.
        windows: Windows in the batch.
        packed_bits, read_bits, effective_bits, bytes: Of the cache of one window, at its end.
        seconds: Time per token of each full chunk.
    """

    tokens: int
    loss: float
    kl: float
    agreed: int
    windows: int
    packed_bits: float
    read_bits: float
    effective_bits: float
    bytes: int
    seconds: list[float] = field(default_factory=list)


@dataclass
class Sums:
    """Running sums over the scored tokens of one method."""

    tokens: int = 0
    loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def add(self, logits: Tensor, plain: Tensor, targets: Tensor) -> None:
        """Add one chunk: logits and plain logits ``[T, V]``, targets ``[T]``."""
        log_q = logits.float().log_softmax(-1)
        log_p = plain.float().log_softmax(-1)
        self.tokens += len(targets)
        self.loss -= float(log_q.gather(-1, targets[:, None]).double().sum())
        self.kl += float((log_p.exp() * (log_p - log_q)).double().sum())
        self.agreed += int((logits.argmax(-1) == plain.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss."""
        return math.exp(self.loss / self.tokens)


def evaluate(
    runners: Sequence[Runner],
    ids: Sequence[int],
    protocol: Protocol | None = None,
    advance: Advance = lambda chunks: None,
    kept: Kept | None = None,
    done: Callable[[list[Score]], object] = lambda rows: None,
    text: str = "",
    seconds: float = math.inf,
) -> list[Score]:
    """Return the score of each runner on a text; the first must be the plain one.

    Args:
        runners: As `make_runners` returns them.
        ids: The text, at least ``windows * window + 1`` tokens.
        protocol: Lengths; the default is the one our tables are made with.
        advance: Called after each chunk with the number of chunks done, for a progress bar.
        kept: What was measured before, which is not measured again, and where the rest goes.
        done: Called with the rows measured so far whenever there is one more.
        text: What rows call the text.
        seconds: Time that a row may take. One that has used it up begins no more windows, and is held against the
            plain cache on those that it has; none has more windows than the plain cache.
    """
    protocol, kept = protocol or Protocol(), kept or Kept()
    spent = dict.fromkeys(runners, 0.0)
    batches = protocol.batches(ids)
    for number, windows in enumerate(batches):
        if spent[runners[0]] >= seconds:
            break
        plain: list[Tensor] = []
        missing = [
            runner
            for runner in runners
            if spent[runner] < seconds and _key(text, runner, number) not in kept
        ]
        for runner in runners:
            if runner in missing or (missing and runner is runners[0]):
                began = time.perf_counter()
                part = _score_windows(runner, windows, protocol, plain, advance)
                spent[runner] += time.perf_counter() - began
                kept[_key(text, runner, number)] = asdict(part)
            else:
                advance(protocol.chunks)
            if number + 1 == len(batches):
                done(_rows(runners[: runners.index(runner) + 1], text, protocol, kept))
    rows = _rows(runners, text, protocol, kept)
    done(rows)
    return rows


def _key(text: str, runner: Runner, number: int) -> Key:
    return "windows", text, runner.method.label, number


def _score_windows(
    runner: Runner, windows: Tensor, protocol: Protocol, plain: list[Tensor], advance: Advance
) -> Part:
    """Score a batch of windows; the first call for it, of the plain runner, fills ``plain`` with its logits."""
    sums, is_plain, before = Sums(), not plain, len(runner.seconds)
    for index, (logits, targets) in enumerate(score_windows(runner, windows, protocol)):
        if is_plain:
            plain.append(logits)
        sums.add(logits, plain[index], targets)
        advance(1)
    found = runner.finish()
    return Part(
        **asdict(sums),
        windows=len(windows),
        packed_bits=found.packed_bits,
        read_bits=found.read_bits,
        effective_bits=found.effective_bits,
        bytes=found.bytes // len(windows),
        seconds=runner.seconds[before:],
    )


def score_windows(
    runner: Runner, windows: Tensor, protocol: Protocol
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits ``[N, V]`` of each chunk of windows ``[B, window + 1]`` with their targets ``[N]``."""
    runner.start()
    runner.prefill(windows[:, : protocol.prefill])
    for start in range(protocol.prefill, protocol.window, protocol.chunk):
        stop = min(start + protocol.chunk, protocol.window)
        logits = runner.feed(windows[:, start:stop], timed=stop - start == protocol.chunk)
        targets = windows[:, start + 1 : stop + 1].to(logits.device)
        yield logits.flatten(0, 1), targets.flatten()


def _rows(runners: Sequence[Runner], text: str, protocol: Protocol, kept: Kept) -> list[Score]:
    """Return the rows of runners, of all windows that each has."""
    return [_score(runner, runners[0], text, protocol, kept) for runner in runners]


def _score(runner: Runner, plain: Runner, text: str, protocol: Protocol, kept: Kept) -> Score:
    count = math.ceil(protocol.windows / protocol.batch)
    done = [number for number in range(count) if _key(text, runner, number) in kept]
    parts, base = (
        [Part(**kept[_key(text, each, number)]) for number in done] for each in (runner, plain)
    )
    tokens = sum(part.tokens for part in parts)
    loss, least = (sum(part.loss for part in each) for each in (parts, base))
    seconds = [second for part in parts for second in part.seconds]
    return Score(
        method=runner.method.label,
        packed_bits=parts[-1].packed_bits,
        read_bits=parts[-1].read_bits,
        effective_bits=parts[-1].effective_bits,
        perplexity=math.exp(loss / tokens),
        difference=100 * (math.exp(loss / tokens) / math.exp(least / tokens) - 1),
        kl=sum(part.kl for part in parts) / tokens,
        top1=100 * sum(part.agreed for part in parts) / tokens,
        bytes=parts[-1].bytes,
        tokens_per_second=1 / statistics.median(seconds) if seconds else math.nan,
        text=text,
        windows=sum(part.windows for part in parts),
    )


def chunks_to_do(protocol: Protocol, runners: Sequence[Runner]) -> int:
    """Return how often `evaluate` will call ``advance(1)``, if no time runs out."""
    return math.ceil(protocol.windows / protocol.batch) * len(runners) * protocol.chunks
