"""What the command line shows: results on standard output, progress, notes and errors on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from typer.core import TyperGroup

from kvq_compile.compiling import watched_by

if TYPE_CHECKING:
    from kvq_compile.bench.kernels import Row as KernelRow
    from kvq_compile.demo import Comparison, Generation
    from kvq_compile.evaluation.greedy import GreedyScore
    from kvq_compile.evaluation.passkey import PasskeyScore
    from kvq_compile.evaluation.perplexity import Score
    from kvq_compile.evaluation.results import Row

OWN_ERRORS = ("typer", "click")  # packages whose errors show themselves, usage included
console = Console()
errors = Console(stderr=True)


def note(text: str) -> None:
    """Print a line beside the results."""
    errors.print(escape(text), highlight=False, soft_wrap=True)


class Commands(TyperGroup):
    """The commands; what goes wrong in one ends it with a sentence instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            shows_itself = type(error).__module__.partition(".")[0] in OWN_ERRORS
            if shows_itself or ctx.params.get("traceback"):
                raise
            fail(error)


def fail(error: BaseException) -> NoReturn:
    """Print an error as one sentence and end the command: with 2 where an argument is wrong, else with 1."""
    from kvq_compile.errors import KVQError

    cause = _cause(error)
    text = " ".join(str(cause).split())
    expected = isinstance(cause, (KVQError, ValueError, TypeError, OSError, ImportError))
    if not expected:
        text = f"{type(cause).__name__}: {text or 'no message'}; kvq --traceback shows where"
    errors.print(f"[red]error:[/red] {escape(text)}", highlight=False, soft_wrap=True)
    raise typer.Exit(2 if isinstance(cause, (ValueError, TypeError, OSError)) else 1)


def _cause(error: BaseException) -> BaseException:
    """Return the error that torch's compiler has wrapped, which names it after its own."""
    inner = getattr(error, "inner_exception", None)
    return _cause(inner) if isinstance(inner, BaseException) else error


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Show a line with a spinner while the block runs; yield the function that changes its text."""
    with errors.status(text) as spinner:
        said = text

        def say(step: str) -> None:
            nonlocal said
            said = f"{step} ..."
            spinner.update(said)

        with watched_by(lambda what: spinner.update(f"{said} compiling {what}" if what else said)):
            yield say


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each stage while the block runs; yield the function that says how far one is."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=errors) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(escape(stage), total=total)
            bar.update(tasks[stage], completed=done, total=total)

        def compiling(what: str | None) -> None:
            for stage, task in list(tasks.items())[-1:]:
                bar.update(task, description=escape(f"{stage} (compiling)" if what else stage))

        with watched_by(compiling):
            yield advance


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show one bar while the block runs; yield the function that advances it."""
    with stages() as advance:
        done = 0
        advance(title, done, total)

        def steps(count: int) -> None:
            nonlocal done
            done += count
            advance(title, done, total)

        yield steps


def readable_bytes(count: int) -> str:
    """Return a number of bytes in kB or MB (powers of ten)."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def show_results(rows: Sequence[Row]) -> None:
    """Print the tables of `kvq eval`, of each task and text; they fit 80 columns."""
    from kvq_compile.evaluation.results import KINDS

    shows = (show_scores, show_passkeys, show_greedy)
    for text in dict.fromkeys(row.text for row in rows):
        console.print(escape(text), highlight=False, soft_wrap=True)
        for show, (_, kind) in zip(shows, KINDS.values(), strict=True):
            if of_kind := [row for row in rows if row.text == text and isinstance(row, kind)]:
                show(of_kind)  # type: ignore[operator]


def show_passkeys(rows: Sequence[PasskeyScore]) -> None:
    """Print the passkeys found by each method, by length, over all depths."""
    lengths = list(dict.fromkeys(row.length for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    cells = [
        [_found([row for row in rows if (row.method, row.length) == (method, length)]) for length in lengths]
        for method in methods
    ]  # fmt: skip
    console.print("passkeys found, in percent, by tokens of context", highlight=False)
    console.print(_table(methods, list(map(str, lengths)), cells))


def _found(rows: Sequence[PasskeyScore]) -> str:
    cases = sum(row.cases for row in rows)
    return f"{sum(row.found * row.cases for row in rows) / cases:.1f}" if cases else ""


def show_greedy(rows: Sequence[GreedyScore]) -> None:
    """Print how long continuations stay those of the plain cache."""
    heads = ("same %", "equal tokens %", "first other: mean", "median")
    cells = [
        (f"{row.same:.1f}", f"{row.equal:.1f}", f"{row.agreed:.1f}", f"{row.median:.1f}")
        for row in rows
    ]
    said = f"greedy continuations by {rows[0].tokens} tokens against those of the plain cache"
    console.print(said, highlight=False)
    console.print(_table([row.method for row in rows], heads, cells))


def show_scores(scores: Sequence[Score]) -> None:
    """Print the table of `kvq eval`, and one of recall where it was measured; both fit 80 columns."""
    heads = ("packed", "bits", "ppl", "diff %", "KL", "top-1 %", "bytes", "tok/s")
    rows = [
        (
            f"{score.packed_bits:.2f}",
            f"{score.effective_bits:.2f}",
            f"{score.perplexity:.3f}",
            f"{score.difference:+.2f}",
            f"{score.kl:.5f}",
            f"{score.top1:.1f}",
            readable_bytes(score.bytes),
            f"{score.tokens_per_second:.0f}",
        )
        for score in scores
    ]
    console.print(_table([score.method for score in scores], heads, rows))
    if lengths := list(scores[0].recall):
        recalled = [[f"{score.recall[length]:.1f}" for length in lengths] for score in scores]
        console.print("recall in percent of digits, by tokens of context", highlight=False)
        console.print(_table([score.method for score in scores], list(map(str, lengths)), recalled))


def _table(methods: Sequence[str], heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("method", overflow="fold", max_width=40)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for method, row in zip(methods, rows, strict=True):
        table.add_row(escape(method), *row)
    return table


def show_kernels(rows: Sequence[KernelRow]) -> None:
    """Print the tables of `kvq bench kernels`, one a head size: a row a method or peer, a column a shape."""
    for size in dict.fromkeys(row.head_size for row in rows):
        of_size = [row for row in rows if row.head_size == size]
        shapes = list(dict.fromkeys((row.batch, row.context) for row in of_size))
        methods = list(dict.fromkeys(row.method for row in of_size))
        cell = {(row.method, row.batch, row.context): _kernel_cell(row) for row in of_size}
        said = f"heads of {size} channels: µs a token (times faster than SDPA in 16 bit)"
        console.print(said, highlight=False)
        heads = [f"{batch} x {readable_tokens(context)}" for batch, context in shapes]
        cells = [[cell.get((method, *shape), "") for shape in shapes] for method in methods]
        console.print(_table(methods, heads, cells))
    for why, names in refusals(rows, "method").items():
        note(f"{', '.join(names)}: {why}")


def _kernel_cell(row: KernelRow) -> str:
    if row.us is None:
        return "not run"
    return f"{row.us:.1f} ({row.speedup:.2f})" if row.speedup else f"{row.us:.1f}"


def refusals(rows: Sequence[Any], name: str) -> dict[str, list[str]]:
    """Return why rows were not measured, each reason once, with what their field ``name`` says."""
    told: dict[str, list[str]] = {}
    for row in rows:
        if row.refused and getattr(row, name) not in told.setdefault(row.refused, []):
            told[row.refused].append(getattr(row, name))
    return told


def show_grid(
    title: str, cells: Mapping[tuple[str, Any], str], refused: Mapping[str, Sequence[str]]
) -> None:
    """Print a table of a row a name and a column a shape or heading, and why some were not run."""
    console.print(escape(title), highlight=False)
    names, columns = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    heads = [
        column if isinstance(column, str) else f"{column[0]} x {readable_tokens(column[1])}"
        for column in columns
    ]
    rows = [[cells.get((name, column), "") for column in columns] for name in names]
    console.print(_table(names, heads, rows))
    for why, which in refused.items():
        note(f"{', '.join(which)}: {why}")


def readable_tokens(count: int) -> str:
    """Return a number of tokens, in units of 1024 where it is made of them."""
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count}"


def show_comparison(result: Comparison, plain: str) -> None:
    """Print what `kvq demo` found."""
    for run in (result.plain, result.quantized):
        title = f"{run.method} cache, {run.tokens} tokens, greedy"
        console.print(Panel(escape(run.text), title=escape(title), title_align="left"))
    first, second = result.plain, result.quantized
    console.print(f"The first {result.agreed} of {first.tokens} tokens are the same.\n")
    console.print(_comparison_table(first, second))
    base, other = result.scores
    console.print(
        f"Perplexity on the text: {base.perplexity:.3f} plain, {other.perplexity:.3f} "
        f"quantized ({other.difference:+.2f} %).\n"
        f"Tokens/s is the median over the tokens of one generation, plain {plain}, quantized "
        "compiled; compilation and prompt do not count.",
        highlight=False,
    )


def _comparison_table(*runs: Generation) -> Table:
    """Return bytes by part, effective bits and speed of generations, side by side."""
    tokens = runs[0].cache.tokens
    table = Table(title=f"cache after {tokens} tokens", title_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column(escape(run.method), justify="right", overflow="fold")
    for part in dict.fromkeys(part for run in runs for part in run.cache.parts):
        sizes = [run.cache.parts.get(part) for run in runs]
        table.add_row(part, *("" if size is None else readable_bytes(size) for size in sizes))
    table.add_section()
    table.add_row("bytes", *(readable_bytes(run.cache.bytes) for run in runs))
    table.add_row("at 16 bit", *(readable_bytes(run.cache.dense_bytes) for run in runs))
    table.add_row("effective bits", *(f"{run.cache.effective_bits:.2f}" for run in runs))
    table.add_row("tokens/s", *(f"{run.tokens_per_second:.1f}" for run in runs))
    return table
