"""Measure what a quantized cache costs in quality: the protocol behind every figure we quote.

A text is cut into windows. Of each, the first ``prefill`` tokens enter an empty cache in one call;
that call attends exactly, whatever the method, and is not scored. The other tokens follow in chunks
of ``chunk`` through the compiled model and its cache, each chunk reading a history that has
been quantized by then. The prediction made at each of these tokens is scored against the token that
comes next in the text (teacher forcing), so a window of 2048 needs 2049 tokens and scores 1536.

Every method sees the same chunks of the same windows as the *plain* cache, which holds what the
model computes in the model's dtype. Windows are the outer loop: the plain logits of one window
are kept while the methods are held against them, and no longer. What a window gave is kept on disk (`Kept`), so
that a run that was cut short goes on; only the plain logits of the window that it stopped in are computed anew.

Speed is chunk length over the *median* time of a chunk. Compilation happens in the first calls and
therefore does not count.
"""

from __future__ import annotations

import csv
import inspect
import json
import math
import statistics
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvq_compile.evaluation.kept import Kept, Part
from kvq_compile.loading import cache_argument
from kvq_compile.options import make_config
from kvq_compile.reports import Report, report

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

Advance = Callable[[int], None]
PLAIN = "plain"


@dataclass(frozen=True)
class Method:
    """A method with its options, as ``options=`` of the backend takes them.

    Args:
        label: What tables call it.
        options: The backend's options; ``None`` is the plain cache, ``{}`` the backend's default.
    """

    label: str
    options: Mapping[str, Any] | None


@dataclass(frozen=True)
class Protocol:
    """Lengths, in tokens, and the number of windows."""

    window: int = 2048
    prefill: int = 512
    chunk: int = 64
    windows: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.prefill < self.window:
            raise ValueError(
                f"prefill must be between 1 and window - 1 = {self.window - 1}, got {self.prefill}"
            )
        if self.chunk < 1 or self.windows < 1:
            raise ValueError(
                f"chunk and windows must be 1 or more, got {self.chunk} and {self.windows}"
            )

    @property
    def scored(self) -> int:
        """Tokens scored in one window."""
        return self.window - self.prefill

    @property
    def chunks(self) -> int:
        """Chunks that one window is fed in after its prefill."""
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


@dataclass(frozen=True)
class Score:
    """One row of the table; ``difference`` in percent, ``kl`` in nats, ``top1`` in percent.

    ``packed_bits`` are those of an element in a packed page, ``effective_bits`` all bytes held over all elements.
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


def parse_value(text: str) -> object:
    """Return ``text`` as the bool, None, int or float it spells, else as it is."""
    words: dict[str, object] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_method(text: str) -> Method:
    """Read ``name`` or ``name:option=value,option=value``; the name may be a calibration's file.

    >>> parse_method("kivi:key_bits=2,group_size=32").options
    {'method': 'kivi', 'key_bits': 2, 'group_size': 32}

    Raises:
        ValueError: An option lacks its ``=``, or the method or an option is unknown.
    """
    if text == PLAIN:
        return Method(PLAIN, None)
    name, options = parse_options(text)
    if Path(name).suffix == ".safetensors":
        options = {"calibration": name, **options}
    else:
        options = {"method": name, **options}
    make_config(options)
    return Method(text, options)


def parse_options(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``name:option=value,...`` into the name and the options.

    Raises:
        ValueError: An option lacks its ``=``.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"method option must read option=value, got {item!r} in {text!r}")
        options[key.strip()] = parse_value(value.strip())
    return name, options


def held(cache: DynamicCache, method: Method) -> Report:
    """Return what a cache holds.

    Raises:
        RuntimeError: ``method`` should have quantized the cache and did not.
    """
    found = report(cache)
    if method.options is not None and not any(t.packed_bits for t in found.tensors):
        raise RuntimeError(
            f"no layer of the cache was quantized by {method.label}; `kvq explain` tells why"
        )
    return found


class Runner:
    """One model under one method, fed piece by piece with the cache of one text.

    Several runners share a model. Each compiles a function of its own around it, so nothing is
    left behind on the model and they do not count against each other's limit of recompilations.

    Args:
        model: A decoder of transformers, in evaluation mode.
        method: What its cache becomes.
        compile_plain: Whether the plain cache runs through Inductor, as the others do, or eagerly.
    """

    def __init__(self, model: PreTrainedModel, method: Method, compile_plain: bool = True) -> None:
        self.model = model
        self.method = method
        self.seconds: list[float] = []
        self.cache: DynamicCache = None
        # transformers computes the logits of a whole prompt unless it is told not to.
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._call = self._compile(compile_plain)

    def _compile(self, compile_plain: bool) -> Callable[..., Tensor]:
        model, name = self.model, cache_argument(self.model)

        def call(ids: Tensor, cache: DynamicCache, **extra: int) -> Tensor:
            logits: Tensor = model(ids, **{name: cache}, use_cache=True, **extra).logits
            return logits

        # Dynamo keeps its compiled code by code object: every runner needs one of its own.
        own = types.FunctionType(
            call.__code__.replace(), call.__globals__, f"call_{self.method.label}", None,
            call.__closure__,
        )  # fmt: skip
        if self.method.options is not None:
            return torch.compile(own, backend="kvq", options=dict(self.method.options))
        return torch.compile(own) if compile_plain else own

    def start(self) -> None:
        """Begin a text with an empty cache."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    def feed(self, ids: Tensor, timed: bool = False) -> Tensor:
        """Append tokens ``[T]`` to the cache and return their logits ``[T, V]``."""
        began = time.perf_counter()
        with torch.no_grad():
            logits = self._call(ids.to(self.model.device)[None], self.cache)[0]
        if logits.is_cuda:
            torch.cuda.synchronize()
        if timed:
            self.seconds.append((time.perf_counter() - began) / len(ids))
        return logits

    def prefill(self, ids: Tensor) -> None:
        """Append a prompt ``[T]`` and drop its logits."""
        with torch.no_grad():
            self._call(ids.to(self.model.device)[None], self.cache, **self._last_only)

    def score_window(self, window: Tensor, protocol: Protocol) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits ``[T, V]`` of each chunk of a window with their targets ``[T]``."""
        self.start()
        self.prefill(window[: protocol.prefill])
        for start in range(protocol.prefill, protocol.window, protocol.chunk):
            stop = min(start + protocol.chunk, protocol.window)
            logits = self.feed(window[start:stop], timed=stop - start == protocol.chunk)
            yield logits, window[start + 1 : stop + 1].to(logits.device)


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


def make_runners(
    model: PreTrainedModel, methods: Sequence[Method], compile_plain: bool = True
) -> list[Runner]:
    """Return a runner for the plain cache and one for each method, in this order."""
    plain = Method(PLAIN, None)
    wanted = [plain, *(method for method in methods if method.options is not None)]
    return [Runner(model, method, compile_plain) for method in wanted]


def evaluate(
    runners: Sequence[Runner],
    ids: Sequence[int],
    protocol: Protocol | None = None,
    advance: Advance = lambda chunks: None,
    kept: Kept | None = None,
    done: Callable[[list[Score]], object] = lambda rows: None,
) -> list[Score]:
    """Return the score of each runner on a text; the first must be the plain one.

    Args:
        runners: As `make_runners` returns them.
        ids: The text, at least ``windows * window + 1`` tokens.
        protocol: Lengths; the default is the one our tables are made with.
        advance: Called after each chunk with the number of chunks done, for a progress bar.
        kept: What was measured before, which is not measured again, and where the rest goes.
        done: Called with the rows measured so far whenever there is one more.
    """
    protocol, kept = protocol or Protocol(), kept or Kept()
    rows: list[Score] = []
    for number, window in enumerate(protocol.cut(ids)):
        plain: list[Tensor] = []
        missing = [runner for runner in runners if (runner.method.label, number) not in kept.parts]
        for runner in runners:
            if runner in missing or (missing and runner is runners[0]):
                part = _score_window(runner, window, protocol, plain, advance)
                kept.add_part(runner.method.label, number, part)
            else:
                advance(protocol.chunks)
            if number + 1 == protocol.windows:
                rows.append(_score(runner.method.label, runners[0].method.label, protocol, kept))
                done(rows)
    return rows


def _score_window(
    runner: Runner, window: Tensor, protocol: Protocol, plain: list[Tensor], advance: Advance
) -> Part:
    """Score one window; the first call for a window, of the plain runner, fills ``plain`` with its logits."""
    sums, is_plain, before = Sums(), not plain, len(runner.seconds)
    for index, (logits, targets) in enumerate(runner.score_window(window, protocol)):
        if is_plain:
            plain.append(logits)
        sums.add(logits, plain[index], targets)
        advance(1)
    found = held(runner.cache, runner.method)
    runner.cache = None
    return Part(
        **asdict(sums),
        packed_bits=found.packed_bits,
        effective_bits=found.effective_bits,
        bytes=found.bytes,
        seconds=runner.seconds[before:],
    )


def _score(method: str, plain: str, protocol: Protocol, kept: Kept) -> Score:
    """Return the row of a method, of all windows."""
    parts, base = (
        [kept.parts[label, number] for number in range(protocol.windows)]
        for label in (method, plain)
    )
    tokens = sum(part.tokens for part in parts)
    loss, least = (sum(part.loss for part in each) for each in (parts, base))
    seconds = [second for part in parts for second in part.seconds]
    return Score(
        method=method,
        packed_bits=parts[-1].packed_bits,
        effective_bits=parts[-1].effective_bits,
        perplexity=math.exp(loss / tokens),
        difference=100 * (math.exp(loss / tokens) / math.exp(least / tokens) - 1),
        kl=sum(part.kl for part in parts) / tokens,
        top1=100 * sum(part.agreed for part in parts) / tokens,
        bytes=parts[-1].bytes,
        tokens_per_second=1 / statistics.median(seconds) if seconds else math.nan,
    )


def chunks_to_do(protocol: Protocol, runners: Sequence[Runner]) -> int:
    """Return how often `evaluate` will call ``advance(1)``."""
    return protocol.windows * len(runners) * protocol.chunks


def flat_row(score: Score) -> dict[str, object]:
    """Return a score as one flat row, a column for each recall length."""
    row: dict[str, object] = asdict(score)
    row.pop("recall")
    return row | {f"recall_{length}": percent for length, percent in score.recall.items()}


def write_results(scores: Sequence[Score], out: Path, about: Mapping[str, object]) -> list[Path]:
    """Write ``eval.csv`` and ``eval.json`` to the folder ``out`` and return both paths.

    Args:
        scores: The rows.
        out: Created when missing.
        about: What the rows were measured on: model, text, protocol, versions, hardware.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [flat_row(score) for score in scores]
    table, document = out / "eval.csv", out / "eval.json"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    document.write_text(json.dumps({"about": dict(about), "scores": rows}, indent=2) + "\n")
    return [table, document]
