"""Tell users where PyTorch goes around this backend without a word.

``torch.compile(model)`` returns an `OptimizedModule`, whose ``generate`` is the original model's: it calls the
original ``forward`` and compiles nothing. So does ``generate`` of a model that peft put around another one, where the
outer model was compiled. ``torch.export`` traces the original ``forward`` as well: what it exports has
a 16-bit cache. A backend is never called there, so nothing else can notice.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch.nn import Module

from kvq_compile.errors import KVQError, KVQWarning
from kvq_compile.kernels.cache.tensor import QuantizedKV

ADVICE = (
    'torch.compile(model, backend="kvq").generate() compiles nothing, since PyTorch hands out the original '
    'model\'s generate; write model.compile(backend="kvq") and model.generate() instead'
)
PEFT_ADVICE = (
    "generate of a model of peft runs the model inside, which is not compiled: the cache stays in 16 bit; write "
    'model.get_base_model().compile(backend="kvq") and model.generate()'
)
NO_EXPORT = (
    "a model must not be compiled by kvq to be exported, got {}, whose original forward torch.export would trace, with "
    "16-bit caches; export a copy that is not compiled, or run this one as it is"
)
NO_CACHE = (
    "arguments of torch.export must be plain tensors, got a QuantizedKV; pass cache.dequantize(), since an exported "
    "program keeps 16-bit caches, or run the model compiled by kvq"
)


def watch_generate() -> None:
    """Make ``generate`` of a kvq-compiled `OptimizedModule` warn; every other lookup stays as it is."""
    from torch._dynamo.eval_frame import OptimizedModule  # here: it imports Triton

    original = OptimizedModule.__getattr__
    if getattr(original, "_kvq_watches", False):
        return

    def lookup(self: Any, name: str) -> Any:
        if name == "generate" and _is_ours(self.__dict__.get("dynamo_ctx")):
            warnings.warn(ADVICE, KVQWarning, stacklevel=2)
        return original(self, name)

    lookup._kvq_watches = True  # type: ignore[attr-defined]
    OptimizedModule.__getattr__ = lookup  # type: ignore[method-assign]


def watch_peft() -> None:
    """Make ``generate`` of peft's models warn where nothing but the outer model was compiled by kvq.

    Peft is looked at where it was imported before: without it there is no such model.
    """
    outer = getattr(sys.modules.get("peft"), "PeftModelForCausalLM", None)
    if outer is None or getattr(outer.generate, "_kvq_watches", False):
        return
    original = outer.generate

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(_is_ours(context) for context in _contexts(self)):
            warnings.warn(PEFT_ADVICE, KVQWarning, stacklevel=2)
        return original(self, *args, **kwargs)

    generate._kvq_watches = True  # type: ignore[attr-defined]
    outer.generate = generate


def watch_export() -> None:
    """Make ``torch.export`` refuse what was compiled by kvq, and quantized caches; all else is exported as before.

    All its functions call one, which has no public name. Where it is not as it was found here, nothing is refused.
    """
    from torch.export import _trace

    original: Callable[..., Any] | None = getattr(_trace, "_export", None)
    if original is None or getattr(original, "_kvq_watches", False):
        return

    @functools.wraps(original)
    def export(mod: Any, *args: Any, **kwargs: Any) -> Any:
        _check_can_be_exported(mod, (args, kwargs))
        return original(mod, *args, **kwargs)

    export._kvq_watches = True  # type: ignore[attr-defined]
    _trace._export = export


def _check_can_be_exported(mod: Any, given: Any) -> None:
    from torch.utils._pytree import tree_leaves

    held = [*mod.parameters(), *mod.buffers()] if isinstance(mod, Module) else []
    if any(isinstance(x, QuantizedKV) for x in (*held, *tree_leaves(given))):
        raise KVQError(NO_CACHE)
    for module in mod.modules() if isinstance(mod, Module) else ():
        if any(_is_ours(context) for context in _contexts(module)):
            raise KVQError(NO_EXPORT.format(type(module).__name__))


def _contexts(module: Module) -> Iterator[Any]:
    """Yield what ``torch.compile`` put around a module, its ``forward`` or a function that it holds."""
    from torch._dynamo.eval_frame import OptimizeContext

    yield module.__dict__.get("dynamo_ctx")
    for function in (type(module).forward, *module.__dict__.values()):
        for cell in getattr(function, "__closure__", None) or ():
            if isinstance(cell.cell_contents, OptimizeContext):
                yield cell.cell_contents


def _is_ours(context: Any) -> bool:
    """Return whether what ``torch.compile`` put around a callable compiles with kvq."""
    from kvq_compile.backend import kvq

    wrapped: Any = getattr(context, "callback", None)
    while wrapped is not None and wrapped is not kvq:  # PyTorch wraps a backend several times over
        wrapped = next(
            (
                getattr(wrapped, name)
                for name in ("_torchdynamo_orig_backend", "compiler_fn", "func")
                if hasattr(wrapped, name)
            ),
            None,
        )
    return wrapped is kvq
