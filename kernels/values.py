"""What frozen values have in common: one object each, checks of their fields, and their text."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Any


class Interned(type):
    """Metaclass of values: equal arguments give one object, which is made and checked once.

    Code that Inductor generates spells a layout out where it is an argument, and so makes it anew at each call: 16
    of them took a fifth of a decoded token of a small model.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the object that these arguments, of these types, have made."""
        try:
            return _interned(cls, *args, **kwargs)
        except TypeError:  # refused, or an argument without a hash: say what the class says
            return super().__call__(*args, **kwargs)


@lru_cache(maxsize=4096, typed=True)
def _interned(cls: type, *args: Any, **kwargs: Any) -> Any:
    return type.__call__(cls, *args, **kwargs)


def check(ok: bool, message: str) -> None:
    """Raise ``ValueError`` with a message unless a condition holds."""
    if not ok:
        raise ValueError(message)


def check_integers(**values: object) -> None:
    """Raise ``TypeError`` for the first value that is no integer."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")


def check_flags(**values: object) -> None:
    """Raise ``TypeError`` for the first value that is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def changed_fields(x: object) -> str:
    """Return ``Class(field=value, ...)`` of a dataclass, fields that have their default left out."""
    shown = [
        f"{f.name}={getattr(x, f.name)!r}"
        for f in fields(x)  # type: ignore[arg-type]
        if getattr(x, f.name) != f.default
    ]
    return f"{type(x).__name__}({', '.join(shown)})"
