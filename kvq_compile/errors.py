"""What can go wrong, by name."""

from __future__ import annotations


class KVQError(RuntimeError):
    """A request that kvq-compile cannot serve."""


class KVQWarning(UserWarning):
    """Something that a user of kvq-compile should know: an attention left in 16 bit, a call that compiles nothing."""
