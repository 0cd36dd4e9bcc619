"""Triton's interpreter without what it does again for each call and each operation, to the same effect."""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter

_make_block_type, _make_tensor = tl.block_type.__init__, tl.tensor.__init__
_types: dict[tuple[Any, ...], dict[str, Any]] = {}
_shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}


def install(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let kernels take a third of the time; other versions than this module was written for run what they have."""
    if triton.__version__.startswith("3.6."):
        put(interpreter.InterpretedFunction, "__call__", _call)
        put(interpreter, "_get_np_dtype", _remembered(interpreter._get_np_dtype))
        put(tl.core, "_unwrap_shape", _unwrap_shape)
        put(tl.block_type, "__init__", _start_block_type)
        put(tl.tensor, "__init__", _start_tensor)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function from a kernel; operations of the language are exchanged where they are not yet."""
    if "languages" not in vars(self):
        seen = self.fn.__globals__.values()
        self.languages = [each for each in (tl, tl.core) if any(x is each for x in seen)]
    if any(tl.core.is_builtin(language.load) for language in self.languages):
        interpreter._patch_lang(self.fn)
    fn = self.rewrite()
    try:
        return fn(*args, **kwargs)
    except Exception as e:
        raise interpreter.InterpreterError(repr(e)) from e


def _remembered(find: Any) -> Any:
    found: dict[str, Any] = {}

    def look_up(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = find(dtype)
        return found[name]

    return look_up


def _unwrap_shape(shape: Any) -> list[int]:
    """Return the sizes; the types of the tuples that they are in are not made."""
    shape = shape.value if isinstance(shape, tl.constexpr) else shape
    return [size.value if isinstance(size, tl.constexpr) else size for size in shape]


def _start_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    key = (element_ty.name, *_unwrap_shape(shape)) if type(element_ty) is tl.dtype else ()
    if key in _types:
        vars(self).update(_types[key])
        return
    _make_block_type(self, element_ty, shape)
    if key:  # a pointer is more than its name
        _types[key] = dict(vars(self))


def _start_tensor(self: Any, handle: Any, type: Any) -> None:
    key = tuple(type.shape.values) if type.is_block() else ()
    if key in _shapes:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = _shapes[key]
        return
    _make_tensor(self, handle, type)
    _shapes[key] = self.shape, self.numel
