"""Evaluate what may be an attention on random numbers, and find the order of the axes in each of its tensors.

`contraction` says what is looked for. All of it happens on the CPU, with tensors of some hundred elements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.kernels.layout import HIDES
from kvq_compile.kernels.score import bend_
from kvq_compile.lowering.find.chain import Chain
from kvq_compile.lowering.find.trial import Trial, run_step, size_of_trial
from kvq_compile.lowering.nodes import order_of, root_of, value_of, writers_of
from kvq_compile.lowering.sites import Refusal

# What symbolic sizes are set to: of fewer than 4 keys a mask that hides some would leave one, whose weight is 1.
_TRIED = (5, 7, 4, 11, 6, 13, 9, 8, 10, 12, 14, 15, 16, 17, 18)
_ORDERS = [(*order, 4) for order in itertools.permutations(range(4))]
_LARGEST = 1 << 24  # elements of a tensor that is evaluated
Order = tuple[int, ...]
Orders = tuple[Order, Order, Order, Order, Order]


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
        watched: Steps whose results are wanted as they were before anything wrote into them.
        seen: These results in the last run.
        sized: Further nodes whose sizes are set.
        wide: Whether casts to fewer bits than fp32 are left out: then what is computed is all that shows.
    """

    watched: tuple[fx.Node, ...] = ()
    sized: tuple[fx.Node, ...] = ()
    seen: Mapping[fx.Node, Tensor] = MappingProxyType({})
    wide = False

    def assignments(self, trials: int, far: bool = True) -> Iterator[Mapping[Any, int]]:
        """Yield sizes to try: symbols that were equal in the call that is compiled are equal, others are not.

        The tokens of queries, keys and values have symbols of their own in functions that take all three. There are
        two trials at least, since a factor that a call is given is another one in each.
        """
        del far  # these sizes have to fit one another
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
        seen = {}
        for node in self.steps:
            known[node] = run_step(node, known, sizes, self.wide)
            if node in self.watched:
                seen[node] = known[node].float().clone()
        self.seen = seen
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


def _random_mask(shape: Sequence[int], few: bool) -> Tensor:
    """Return half of each row, so that none hides all but one of its keys; of few keys all of them or none."""
    if not shape or shape[-1] < 4:
        return torch.full(tuple(shape), few, dtype=torch.bool, device="cpu")
    drawn = torch.rand(tuple(shape), dtype=torch.float32, device="cpu")
    return drawn.argsort(-1) % 2 == 0


class Evaluation:
    """One evaluation: random numbers for some sizes, and what they give; ``few`` is what masks of few keys hold."""

    def __init__(
        self, nodes: tuple[fx.Node, ...], tokens: Any, sizes: Mapping[Any, int],
        sides: Sequence[fx.Node], exact: bool, few: bool, read: Chain,
    ) -> None:  # fmt: skip
        self._read, self._few = read, few
        self._nodes, self._sizes, self._exact = nodes, sizes, exact
        self._tolerance = 1e-3 if exact else 4e-2
        _, query, key, value, _, _ = nodes
        self._given = {node: self._random(node) for node in (query, key, value, *sides)}
        self._sides = {node: self._given[node] for node in sides}
        B, H, S, D = self._given[key].shape
        T = size_of_trial(tokens, sizes)
        self.groups = self._given[query].numel() // (B * H * T * D)
        self._axes = (B, H, self.groups, T)
        self._columns, self._channels = S, D
        self._more = 0 if read.sinks is None else read.sinks.count
        self.scales = 0.0, 0.0  # of products, and of what becomes of them behind a cap or a clamp
        wide = {axis for axis, size in enumerate(self._axes) if size > 1}
        told = {tuple(axis for axis in order if axis in wide): order for order in _ORDERS[::-1]}
        self._orders = list(told.values())[::-1]  # axes of one element can be anywhere

    def _random(self, node: fx.Node) -> Tensor:
        value = value_of(node)
        shape = [size_of_trial(size, self._sizes) for size in value.shape]
        if math.prod(shape) > _LARGEST:
            raise Refusal("the attention is too large to be evaluated")
        if value.dtype == torch.bool:
            return _random_mask(shape, self._few)
        made = torch.randn(shape, dtype=torch.float32, device="cpu")
        return made if self._exact else made.to(value.dtype)

    def orders(self, whole: Steps, chain: Steps) -> dict[Orders, None]:
        """Return the orders of query, product, scores and output for which it is an attention."""
        output, query, key, value = self._nodes[:4]
        whole.wide = chain.wide = self._exact
        known = whole.run_all(self._sizes, self._given)
        keys, values = self._given[key].float(), self._given[value].float()
        found: dict[Orders, None] = {}
        for query_order in self._fitting(self._given[query].shape, self._channels):
            rows = self._apart(self._given[query].float(), query_order, self._channels)
            dots = torch.einsum("bhgtd,bhsd->bhgts", rows, keys)
            for product_order, factor in self._products(whole.seen[self._nodes[4]], dots):
                scaled = dots * factor
                raised = scaled * self._factors(known, product_order)
                for base_order, bent in self._bases(whole, raised, product_order):
                    for scores_order, scale, mask, sinks in self._scores(
                        chain, scaled, raised, base_order
                    ):
                        logits = torch.cat([bent * scale + mask, sinks], -1)
                        weights = logits.softmax(-1)[..., : self._columns]
                        wanted = torch.einsum("bhgts,bhsd->bhgtd", weights, values)
                        seen = (mask > HIDES).any(-1, keepdim=True)
                        for output_order in self._outputs(known[output].float(), wanted, seen):
                            orders = (
                                query_order,
                                product_order,
                                base_order,
                                scores_order,
                                output_order,
                            )
                            found[orders] = None
                            self.scales = factor, scale
        return found

    def _factors(self, known: Mapping[fx.Node, Any], order: Order) -> Tensor:
        """Return what rows of the product are multiplied by before their softmax, ``[B, Hkv, G, T, 1]``."""
        shape = [size_of_trial(size, self._sizes) for size in value_of(self._nodes[4]).shape]
        found = torch.ones(*shape[:-1], 1, dtype=torch.float32, device="cpu")
        for factor, divides in self._read.factors:
            value = torch.as_tensor(known[factor], dtype=torch.float32, device="cpu")
            value = value.reshape(()) if value.numel() == 1 else value
            found = found / value if divides else found * value
        return self._apart(found, order, 1)

    def _bases(self, whole: Steps, raised: Tensor, order: Order) -> Iterator[tuple[Order, Tensor]]:
        """Yield the orders in which scores behind their last cap or clamp are what the steps to there say; these.

        Raises:
            Refusal: They are something else.
        """
        base = self._read.base
        if base is self._nodes[4]:
            yield order, raised
            return
        bent, seen = bend_(raised * self._read.score.scale, self._read.score.bend), whole.seen[base]
        agrees = False
        for base_order in self._fitting(seen.shape, self._columns):
            if self._close(seen, bent.permute(base_order).reshape(seen.shape)):
                agrees = True
                yield base_order, bent
        if not agrees:
            raise Refusal(
                f"the scores are up to {float(seen.abs().amax()):.4g} behind {base}, and not up to "
                f"{float(bent.abs().amax()):.4g}, as their steps say"
            )

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
        self, chain: Steps, dots: Tensor, raised: Tensor, order: Order
    ) -> Iterator[tuple[Order, float, Tensor, Tensor]]:
        """Yield the orders in which what enters the softmax is a multiple of scores plus a mask; these and sinks.

        Scores are set to ``dots``, which factors make ``raised``.
        """
        base, scores = self._read.base, self._nodes[5]
        if scores is base:
            yield order, 1.0, torch.zeros_like(dots), dots[..., :0]
            return
        shape = [size_of_trial(size, self._sizes) for size in value_of(base).shape]
        dtype = torch.float32 if self._exact else value_of(base).dtype
        laid = dots.permute(order).reshape(shape).to(dtype)
        wanted = raised if base is self._nodes[4] else dots
        lifts = (0.0, 1.0, 50.0)
        none, once, often = (
            chain.run(self._sizes, {**self._sides, base: laid * lift}).float() for lift in lifts
        )
        if none.shape[-1] <= self._more:
            return
        first = self._more if self._read.sinks is not None and self._read.sinks.first else 0
        own = [x.narrow(-1, first, x.shape[-1] - self._more) for x in (none, once, often)]
        more = [
            x[..., :first] if first else x[..., x.shape[-1] - self._more :]
            for x in (none, once, often)
        ]
        if own[0].numel() != dots.numel():
            return
        for scores_order in self._fitting(own[0].shape, self._columns):
            mask, *set_ = (self._apart(x, scores_order, self._columns) for x in own)
            sinks, *moved = (self._apart(x, scores_order, self._more) for x in more)
            change = [
                torch.cat([x - mask, y - sinks], -1) for x, y in zip(set_, moved, strict=True)
            ]
            target = torch.cat([wanted, torch.zeros_like(sinks)], -1)  # sinks stay where they are
            seen = torch.cat([mask, sinks], -1)
            scale = self._multiple(change[0], target, seen)
            if scale and self._multiple(change[1], 50 * target, seen, scale):
                yield scores_order, scale, mask, sinks

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
