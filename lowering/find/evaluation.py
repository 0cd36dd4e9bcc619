"""Evaluate what may be an attention on random numbers, and find the order of the axes in each of its tensors.

`contraction` says what is looked for. All of it happens on the CPU, with tensors of some hundred elements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.kernels.layout import HIDES
from kvq_compile.lowering.find.trial import Trial, run_step, size_of_trial, writers_of
from kvq_compile.lowering.nodes import order_of, root_of, shape_of, value_of
from kvq_compile.lowering.sites import Refusal

_TRIED = (5, 3, 7, 4, 11, 6, 13, 9, 8, 10, 12, 14, 15, 16, 17, 18)  # what symbolic sizes are set to
_ORDERS = [(*order, 4) for order in itertools.permutations(range(4))]
_LARGEST = 1 << 24  # elements of a tensor that is evaluated
Order = tuple[int, ...]
Orders = tuple[Order, Order, Order, Order]


def hint_of(size: Any) -> int:
    """Return a size as it was in the call that is compiled."""
    return size_of_trial(size, {})


def _hints(shapes: Any) -> Mapping[Any, int]:
    """Return what symbols were in the call that is compiled; torch 2.13 has a new name for it."""
    found: Mapping[Any, int] = getattr(shapes, "backed_var_to_val", None) or shapes.var_to_val
    return found


class Steps(Trial):
    """A trial between cuts that may be written before their first use, and in the trial itself.

    Attributes:
        watched: A step whose result is wanted as it was before anything wrote into it.
        seen: That result in the last run.
        sized: Further nodes whose sizes are set.
    """

    watched: fx.Node | None = None
    sized: tuple[fx.Node, ...] = ()
    seen: Tensor

    def assignments(self, trials: int) -> Iterator[Mapping[Any, int]]:
        """Yield sizes to try: symbols that were equal in the call that is compiled are equal, others are not.

        The tokens of queries, keys and values have symbols of their own in functions that take all three. There are
        two trials at least, since a factor that a call is given is another one in each.
        """
        values = [value_of(node) for node in (*self.steps, *self.cuts, *self.sized)]
        shapes = [value.shape if isinstance(value, Tensor) else (value,) for value in values]
        known = {
            symbol: _hints(size.node.shape_env)[symbol]
            for shape in shapes
            for size in shape
            if isinstance(size, torch.SymInt)
            for symbol in size.node.expr.free_symbols
        }
        hints = list(dict.fromkeys(known.values()))
        for trial in range(trials if hints else 2):
            sizes = dict(zip(hints, _TRIED[trial % len(_TRIED) :], strict=False))
            yield {symbol: sizes[hint] for symbol, hint in known.items()}

    def run_all(self, sizes: Mapping[Any, int], given: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """Return what every step gives; see `Trial.run_all`."""
        known = dict(given)
        for node in self.steps:
            known[node] = run_step(node, known, sizes)
            if node is self.watched:
                self.seen = known[node].float().clone()
        return known

    def _is_changed(self, cut: fx.Node, needed: set[fx.Node], last: int) -> bool:
        place = order_of(cut.graph)
        readers = [place[user] for user in needed if cut in user.all_input_nodes]
        writers = writers_of(cut.graph).get(root_of(cut), ())
        return any(
            min(readers, default=last) < place[writer] <= last
            for writer in writers
            if writer not in needed
        )


class Evaluation:
    """One evaluation: random numbers for some sizes, and what they give."""

    def __init__(
        self, nodes: tuple[fx.Node, ...], new: fx.Node, sizes: Mapping[Any, int],
        sides: Sequence[fx.Node], exact: bool,
    ) -> None:  # fmt: skip
        self._nodes, self._sizes, self._exact = nodes, sizes, exact
        self._tolerance = 1e-3 if exact else 4e-2
        _, query, key, value, _, _ = nodes
        self._given = {node: self._random(node) for node in (query, key, value, *sides)}
        self._sides = {node: self._given[node] for node in sides}
        B, H, S, D = self._given[key].shape
        T = size_of_trial((shape_of(new) or ())[2], sizes)
        self.groups = self._given[query].numel() // (B * H * T * D)
        self._axes = (B, H, self.groups, T)
        self._columns, self._channels = S, D
        self.scale = 0.0
        wide = {axis for axis, size in enumerate(self._axes) if size > 1}
        told = {tuple(axis for axis in order if axis in wide): order for order in _ORDERS[::-1]}
        self._orders = list(told.values())[::-1]  # axes of one element can be anywhere

    def _random(self, node: fx.Node) -> Tensor:
        value = value_of(node)
        shape = [size_of_trial(size, self._sizes) for size in value.shape]
        if math.prod(shape) > _LARGEST:
            raise Refusal("the attention is too large to be evaluated")
        if value.dtype == torch.bool:
            return torch.rand(shape, dtype=torch.float32, device="cpu") < 0.5
        made = torch.randn(shape, dtype=torch.float32, device="cpu")
        return made if self._exact else made.to(value.dtype)

    def orders(self, whole: Steps, chain: Steps) -> dict[Orders, None]:
        """Return the orders of query, scores and output for which it is an attention."""
        output, query, key, value = self._nodes[:4]
        known = whole.run_all(self._sizes, self._given)
        keys, values = self._given[key].float(), self._given[value].float()
        found: dict[Orders, None] = {}
        for query_order in self._fitting(self._given[query].shape, self._channels):
            rows = self._apart(self._given[query].float(), query_order, self._channels)
            dots = torch.einsum("bhgtd,bhsd->bhgts", rows, keys)
            for product_order, factor in self._products(whole.seen, dots):
                for scores_order, scale, mask in self._scores(chain, dots * factor, product_order):
                    weights = (dots * (factor * scale) + mask).softmax(-1)
                    wanted = torch.einsum("bhgts,bhsd->bhgtd", weights, values)
                    seen = (mask > HIDES).any(-1, keepdim=True)
                    for output_order in self._outputs(known[output].float(), wanted, seen):
                        found[query_order, product_order, scores_order, output_order] = None
                        self.scale = factor * scale
        return found

    def _fitting(self, shape: Sequence[int], last: int) -> Iterator[Order]:
        """Yield the orders whose axes, joined or not, are the dimensions of a tensor."""
        for order in self._orders:
            rest = [(*self._axes, last)[axis] for axis in order]
            for wanted in shape:
                size = 1
                while size < wanted and rest:
                    size *= rest.pop(0)
                if size != wanted:
                    break
            else:
                if math.prod(rest) == 1:
                    yield order

    def _apart(self, tensor: Tensor, order: Order, last: int) -> Tensor:
        """Return a tensor of some order as ``[B, Hkv, G, T, last]``."""
        sizes = (*self._axes, last)
        inverse = [order.index(axis) for axis in range(5)]
        return tensor.reshape([sizes[axis] for axis in order]).permute(inverse)

    def _products(self, product: Tensor, dots: Tensor) -> Iterator[tuple[Order, float]]:
        """Yield the orders in which a product is a multiple of ``dots``, and the factor."""
        if product.numel() != dots.numel():
            return
        for order in self._fitting(product.shape, self._columns):
            laid = dots.permute(order).reshape(product.shape)
            factor = float((product * laid).sum() / laid.square().sum())
            if self._close(product, laid * factor) and factor:
                yield order, factor

    def _scores(
        self, chain: Steps, dots: Tensor, order: Order
    ) -> Iterator[tuple[Order, float, Tensor]]:
        """Yield the orders in which what enters the softmax is a multiple of ``dots`` plus a mask; both."""
        product, scores = self._nodes[4], self._nodes[5]
        if scores is product:
            yield order, 1.0, torch.zeros_like(dots)
            return
        shape = [size_of_trial(size, self._sizes) for size in value_of(product).shape]
        dtype = torch.float32 if self._exact else value_of(product).dtype
        laid = dots.permute(order).reshape(shape).to(dtype)
        lifts = (0.0, 1.0, 50.0)
        none, once, often = (
            chain.run(self._sizes, {**self._sides, product: laid * lift}).float() for lift in lifts
        )
        if none.numel() != dots.numel():
            return
        for scores_order in self._fitting(none.shape, self._columns):
            mask = self._apart(none, scores_order, self._columns)
            change = [self._apart(x, scores_order, self._columns) - mask for x in (once, often)]
            scale = self._multiple(change[0], dots, mask)
            if scale and self._multiple(change[1], 50 * dots, mask, scale):
                yield scores_order, scale, mask

    def _multiple(
        self, change: Tensor, dots: Tensor, mask: Tensor, scale: float | None = None
    ) -> float | None:
        """Return the factor by which seen scores change with ``dots``, up to a constant of each row."""
        seen = mask > HIDES
        hidden = (mask + change)[~seen]
        if not torch.isfinite(change[seen]).all() or (hidden > HIDES / 2).any():
            return None
        count = seen.sum(-1, keepdim=True).clamp_min(1)

        def centred(x: Tensor) -> Tensor:
            x = torch.where(seen, x, 0)
            return torch.where(seen, x - x.sum(-1, keepdim=True) / count, 0)

        change, dots = centred(change), centred(dots)
        if scale is None:
            scale = float((change * dots).sum() / dots.square().sum().clamp_min(1e-30))
        return scale if self._close(change, scale * dots) else None

    def _outputs(self, output: Tensor, wanted: Tensor, seen: Tensor) -> Iterator[Order]:
        """Yield the orders in which the output is what it should be, in all rows that see something."""
        if output.numel() != wanted.numel():
            return
        for order in self._fitting(output.shape, wanted.shape[-1]):
            rows = self._apart(output, order, wanted.shape[-1])
            if self._close(torch.where(seen, rows, 0), torch.where(seen, wanted, 0)):
                yield order

    def _close(self, one: Tensor, other: Tensor) -> bool:
        error, size = (one - other).abs().amax(), other.abs().amax()
        return bool(torch.isfinite(error)) and float(error) <= self._tolerance * float(size)
