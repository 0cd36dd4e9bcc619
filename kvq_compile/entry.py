"""Warn where PyTorch goes around a compiled model without a word.

``torch.compile(model)`` returns an `OptimizedModule`, whose ``generate`` is the original model's: it calls the
original ``forward`` and compiles nothing. A backend is never called there, so nothing else can notice.
"""

from __future__ import annotations

import warnings
from typing import Any

from kvq_compile.errors import KVQWarning

ADVICE = (
    'torch.compile(model, backend="kvq").generate() compiles nothing, since PyTorch hands out the original '
    'model\'s generate; write model.compile(backend="kvq") and model.generate() instead'
)


def watch_generate() -> None:
    """Make ``generate`` of a kvq-compiled `OptimizedModule` warn; every other lookup stays as it is."""
    from torch._dynamo.eval_frame import OptimizedModule  # here: it imports Triton

    original = OptimizedModule.__getattr__
    if getattr(original, "_kvq_watches", False):
        return

    def lookup(self: Any, name: str) -> Any:
        if name == "generate" and _is_ours(self):
            warnings.warn(ADVICE, KVQWarning, stacklevel=2)
        return original(self, name)

    lookup._kvq_watches = True  # type: ignore[attr-defined]
    OptimizedModule.__getattr__ = lookup  # type: ignore[method-assign]


def _is_ours(module: Any) -> bool:
    from kvq_compile.backend import kvq

    wrapped: Any = getattr(module.__dict__.get("dynamo_ctx"), "callback", None)
    while wrapped is not None and wrapped is not kvq:  # PyTorch wraps a backend several times over
        wrapped = getattr(wrapped, "_torchdynamo_orig_backend", None) or getattr(
            wrapped, "compiler_fn", None
        )
    return wrapped is kvq
