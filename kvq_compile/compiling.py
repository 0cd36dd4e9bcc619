"""Show that a graph is being compiled, which can take a minute: a line on a terminal, or what a program asks for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Watcher = Callable[[str | None], None]  # called with what is compiled, and with ``None`` after it
_watchers: list[Watcher] = []


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Tell the innermost watcher that ``what`` is being compiled while the block runs."""
    tell = _watchers[-1] if _watchers else _tell_terminal
    tell(what)
    try:
        yield
    finally:
        tell(None)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Tell ``watcher`` of compilations inside the block, instead of the terminal."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _tell_terminal(what: str | None) -> None:
    """Write a line to a terminal's standard error, and wipe it off again; elsewhere nothing."""
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K" if what is None else f"\r\x1b[Kkvq: compiling {what} ...")
        sys.stderr.flush()
