"""Evaluate a part of a graph on real tensors, for `find_rotation`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from kvq_compile.lowering.nodes import (
    changed_roots,
    fixed_number,
    getitem_index,
    order_of,
    root_of,
    shape_of,
    target_name,
    value_of,
)
from kvq_compile.lowering.sites import Refusal

# What stands for the positions: a node of integers, or (node, place): rows of a table that node takes by a
# slice, which stands at this place in its index.
Leaf = fx.Node | tuple[fx.Node, int]

SYMBOLIC = (torch.SymInt, torch.SymFloat)
_WIDER = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
}
WIDER_METHODS = {**dict.fromkeys(("float", "half", "bfloat16"), "double"), "cuda": "cpu"}


def quietly() -> ExitStack:
    """Return a context in which gradients exist and nothing casts behind our back."""
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    stack.enter_context(torch.autocast("cpu", enabled=False))
    return stack


class Replay:
    """The part of a graph between the source and the key, as a function of source and positions.

    Attributes:
        shape: ``B, H, T, D`` of the key.
        source_shape: Shape of the source.
        dtype: float64, or complex128 for a source of complex numbers.
        epsilon: Relative precision of the coarsest constant that takes part.
    """

    def __init__(
        self, key: fx.Node, source: fx.Node, leaves: Iterable[Leaf], inputs: Mapping[fx.Node, Any]
    ) -> None:
        self._key, self._source, self._inputs = key, source, inputs
        self._integers = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
        self._sliced = dict(leaf for leaf in leaves if isinstance(leaf, tuple))
        self.shape = tuple(number(size) for size in shape_of(key) or ())
        self.source_shape = tuple(number(size) for size in shape_of(source) or ())
        self.dtype = _WIDER.get(value_of(source).dtype, torch.float64)
        self.epsilon = torch.finfo(torch.float32).eps
        self._nodes = self._between()
        self._constants = {node: self._constant(node) for node in self._nodes if not _called(node)}

    def _between(self) -> list[fx.Node]:
        """Return the nodes to run, in order.

        Raises:
            Refusal: One of them is written into.
        """
        place = order_of(self._key.graph)
        seen: set[fx.Node] = set()
        stack = [self._key]
        while stack:
            node = stack.pop()
            if node in seen or node is self._source or node in self._integers:
                continue
            seen.add(node)
            if not isinstance(value_of(node), SYMBOLIC):  # whose value is known
                stack.extend(operands(node))
        if {root_of(node) for node in (*seen, self._source)} & changed_roots(self._key.graph.nodes):
            raise Refusal("the key is rotated by writing in place")
        return sorted(seen, key=place.__getitem__)

    def _constant(self, node: fx.Node) -> Any:
        value = value_of(node)
        if isinstance(value, SYMBOLIC):
            return _known(value)
        if node.op == "get_attr":
            value = node.graph.owning_module
            for name in str(node.target).split("."):
                value = getattr(value, name)
        else:
            value = self._inputs.get(node)
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            raise Refusal(f"the value of {node.name}, of which the angles are made, is not known")
        if value.is_floating_point() or value.is_complex():
            self.epsilon = max(self.epsilon, torch.finfo(value.dtype).eps)
        return value.detach().to("cpu", _WIDER.get(value.dtype, value.dtype), copy=True)

    def __call__(self, source: Tensor, positions: Tensor) -> Tensor:
        """Return the key ``[B, H, T, D]`` of a source whose tokens stand at ``positions`` ``[T]``.

        Raises:
            Refusal: A step cannot be run.
        """
        known: dict[fx.Node, Any] = {**self._constants, self._source: source}
        for node in self._integers:
            fake = value_of(node)
            sizes = [number(size) for size in fake.shape]
            dtype = _WIDER.get(fake.dtype, fake.dtype)
            known[node] = positions.to(dtype).expand(sizes) if sizes else positions[0]
        for node in self._nodes:
            if node in known:
                continue
            try:
                known[node] = self._run(node, known, positions)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise Refusal(
                    f"the rotation cannot be evaluated at {target_name(node)}: {text}"
                ) from None
        key: Tensor = known[self._key]
        return key

    def _run(self, node: fx.Node, known: Mapping[fx.Node, Any], positions: Tensor) -> Any:
        def fill(x: Any) -> Any:
            return widened(known.get(x) if isinstance(x, fx.Node) else x)

        target: Any = node.target
        args: Any = fx.node.map_aggregate(node.args, fill)
        kwargs: Any = fx.node.map_aggregate(node.kwargs, fill)
        if node in self._sliced:
            index = list(getitem_index(node) or ())
            index[self._sliced[node]] = positions
            return args[0][fx.node.map_aggregate(tuple(index), fill)]
        if _is_cast_like(node):
            dtype = value_of(node).dtype
            return args[0].to(_WIDER.get(dtype, dtype))
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], WIDER_METHODS.get(target, target))(*args[1:], **kwargs)
        raise Refusal(f"the rotation passes through a {node.op}")


def _called(node: fx.Node) -> bool:
    symbolic = isinstance(value_of(node), SYMBOLIC)
    return node.op in ("call_function", "call_method", "call_module") and not symbolic


def widened(x: Any) -> Any:
    """Return an argument with dtypes made double and devices made the CPU."""
    if isinstance(x, torch.dtype):
        return _WIDER.get(x, x)
    if isinstance(x, torch.device) or (isinstance(x, str) and x.startswith("cuda")):
        return torch.device("cpu")
    return _known(x) if isinstance(x, SYMBOLIC) else x


def operands(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values a node is computed from; ``x.type_as(y)`` takes only the dtype of ``y``."""
    return [node.args[0]] if _is_cast_like(node) else node.all_input_nodes  # type: ignore[list-item]


def _is_cast_like(node: fx.Node) -> bool:
    others = [n for n in node.args[1:] if isinstance(n, fx.Node) and dtype_of(n) is not None]
    return bool(others) and target_name(node) in ("type_as", "to")


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """Return the dtype of a tensor, or of the first of several; ``None`` for everything else."""
    value = value_of(node)
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value.dtype if isinstance(value, Tensor) else None


def is_integer(node: fx.Node) -> bool:
    """Return whether a node is a tensor of integers or truth values."""
    dtype = dtype_of(node)
    return dtype is not None and not (dtype.is_floating_point or dtype.is_complex)


def number(size: Any) -> int:
    """Return a size as it is in the call that is being compiled, without a guard on it.

    Raises:
        Refusal: The size is known only when the graph runs.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    if not size.node.has_hint():
        raise Refusal(f"the size {size} depends on data")
    return int(size.node.hint)


def _known(value: torch.SymInt | torch.SymFloat) -> float:
    """Return what a symbol stands for in the call that is being compiled, guarding on it if it is no size."""
    if isinstance(value, torch.SymInt):
        return number(value)
    fixed = fixed_number(value)
    if fixed is None:
        raise Refusal(f"the number {value} depends on data")
    return fixed
