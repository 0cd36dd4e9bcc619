"""Capture what the attentions of a model see on given sequences, for methods that calibrate.

The model is compiled by a backend that rewrites nothing: it finds the attentions as the ``kvq`` backend
does, lets the graph return their queries, keys and values, and runs it eagerly. So calibration covers
exactly the attentions that will be quantized later, by the same numbers, and no module has to be known by name.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import cross_entropy

from kvq_compile.errors import KVQWarning
from kvq_compile.kernels.score import UNBENT, Bend, Score
from kvq_compile.lowering.find.rotation import Rotation, find_rotation
from kvq_compile.lowering.rewrite.return_operands import Watched, watch_attentions
from kvq_compile.lowering.sites import Life, Refusal, SiteReport
from kvq_compile.options import make_spec

Batch = Tensor | Mapping[str, Any]
Found = tuple[Rotation | None, str]  # a layer's rotation, or why there is none
PROBE = 64  # tokens that suffice to find rotations
_ANY = make_spec("int8")  # of all methods the one that asks least of the shapes


@dataclass
class Activations:
    """What one attention saw in one batch.

    Attributes:
        layer: Number of the attention in the order of execution.
        query, key, value: ``[B, Hq, T, D]`` and ``[B, Hkv, T, D]``, in the model's dtype, as attention reads them.
        scale: Factor on the scores of queries and keys.
        bend: What happens to scores after that.
        key_gradient, value_gradient, output_gradient: Gradients of the mean loss of the batch's next tokens with
            respect to keys, values and the attention's output ``[B, Hq, T, Dv]``, or ``None``.
        rotation: How the keys were rotated, without the node of the positions, or ``None``.
        rotation_reason: Why ``rotation`` is ``None``, else empty.
        first_slot: Slot of the first token.
        mask: ``[B, T]``, True for tokens that are no padding; ``None`` if no ``attention_mask`` was given.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    key_gradient: Tensor | None
    value_gradient: Tensor | None
    rotation: Rotation | None
    rotation_reason: str
    first_slot: int = 0
    mask: Tensor | None = None
    output_gradient: Tensor | None = None
    bend: Bend = UNBENT


def capture(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    gradients: bool,
    rotations: Mapping[int, Found] | None = None,
) -> Iterator[list[Activations]]:
    """Run a model on each batch and yield what its attentions saw, one `Activations` for each, in order.

    The model runs in evaluation mode and is left as it was: its parameters get no ``.grad``, buffers that it
    writes into keep their contents, and nothing compiled stays on it.

    Args:
        model: A decoder that returns, or keeps in its buffers, the keys and values of a call.
        batches: Token ids ``[B, T]``, or the keyword arguments of a call; ``use_cache=True`` is added where
            the model knows it. An ``attention_mask`` ``[B, T]`` among them is handed on as ``mask``.
        gradients: Whether to take gradients of the mean next-token cross entropy with respect to keys, values
            and outputs. The logits are ``.logits`` of the result, or the result, or its first part.
        rotations: Rotation of each layer or the reason for none, where they are known (`find_rotations`).

    Raises:
        TypeError: A batch is neither token ids nor keyword arguments.
        ValueError: No attention keeps a cache, a batch begins with a filled one, or there is no loss.
    """
    watch = _Watch(gradients, rotations)
    accepted = inspect.signature(model.forward).parameters

    def call(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return model(*args, **kwargs)

    # Dynamo keeps compiled code by code object; this one dies with the generator.
    own = types.FunctionType(
        call.__code__.replace(), call.__globals__, "capture", None, call.__closure__
    )
    compiled = torch.compile(own, backend=watch.compile, fullgraph=True)
    for batch in batches:
        args, kwargs = _arguments(batch, accepted)
        with _evaluating(model), torch.inference_mode(False), torch.set_grad_enabled(gradients):
            watch.seen = []
            result = compiled(args, kwargs)
            watch.check()
            found = _collect(watch, batch, result if gradients else None)
            del result
        yield found


def find_rotations(model: nn.Module, batch: Batch) -> dict[int, Found]:
    """Return the rotation of each layer's keys, found on the first tokens of a batch.

    Rotations are found by running pieces of the graph in fp64, at the length at which it was captured.
    """
    if isinstance(batch, Tensor):
        batch = batch[:1, :PROBE]
    (found,) = capture(model, [batch], gradients=False)
    return {seen.layer: (seen.rotation, seen.rotation_reason) for seen in found}


class _Watch:
    """The backend, and what the graphs that it compiled have seen.

    Attributes:
        seen: Layer, score, query, key, value and output of each attention of the latest call.
        rotations: Rotation of each layer, or the reason why there is none, found in the first graph.
    """

    def __init__(self, gradients: bool, rotations: Mapping[int, Found] | None) -> None:
        self._gradients = gradients
        self.seen: list[tuple[int, Score, Tensor, Tensor, Tensor, Tensor]] = []
        self.rotations: dict[int, Found] = dict(rotations or {})
        self._left_out: list[SiteReport] = []
        self._error: ValueError | None = None

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        """Return the callable that Dynamo runs: the graph as it is, with an eye on its attentions."""
        try:
            watched = watch_attentions(gm, _ANY, self._gradients)
            self._check_empty(watched)
        except ValueError as error:  # Dynamo would wrap it
            self._error = error
            return gm.forward
        self._left_out = watched.reports
        inputs = dict(zip(watched.placeholders, watched.take(example_inputs), strict=True))
        for site in watched.sites:
            if site.order not in self.rotations:
                self.rotations[site.order] = _rotation(site.key.new, inputs)

        def run(*args: Any) -> list[Any]:
            outputs, seen = watched.run(args)
            self.seen = [
                (site.order, site.attention.score, *operands)
                for site, operands in zip(watched.sites, seen, strict=True)
            ]
            return outputs

        return run

    def _check_empty(self, watched: Watched) -> None:
        lives = {site.key.life for site in watched.sites}
        filled = lives & {Life.GROWN, Life.GROWN_PLAIN, Life.BUFFER}
        if filled:
            raise ValueError(
                "batches must begin with an empty 16-bit cache, got one that holds tokens or is quantized; "
                "pass no cache, or a model that has not run under kvq"
            )

    def check(self) -> None:
        """Raise where the latest call saw no attention; warn of those left out."""
        if self._error is not None:
            raise self._error
        refused = [report for report in self._left_out if not report.expected]
        reasons = "; ".join(sorted({report.detail for report in self._left_out}))
        if not self.seen:
            raise ValueError(
                "model must keep the keys and values of an attention in a cache, got none that does "
                f"({reasons or 'no attention was found'}); call it with use_cache=True, or let it return its cache"
            )
        if refused:
            text = f"{len(refused)} attentions cannot be quantized and were not captured: {reasons}"
            warnings.warn(text, KVQWarning, stacklevel=3)
            self._left_out = []


def _rotation(key: fx.Node, inputs: Mapping[fx.Node, Any]) -> Found:
    try:
        return replace(
            find_rotation(key, inputs), position=None
        ), ""  # its node keeps the graph alive
    except Refusal as reason:
        return None, str(reason)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; each of its modules returns to its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _arguments(
    batch: Batch, accepted: Mapping[str, inspect.Parameter]
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Return the arguments of the call for a batch."""
    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        if batch.dim() != 2 or batch.is_floating_point():
            raise ValueError(
                f"batches must hold token ids [B, T], got {batch.dtype} {tuple(batch.shape)}"
            )
        args = (batch,)
    elif isinstance(batch, Mapping):
        kwargs = dict(batch)
    else:
        raise TypeError(
            f"batches must hold token ids or keyword arguments, got {type(batch).__name__}"
        )
    if "use_cache" in accepted:
        kwargs.setdefault("use_cache", True)
    return args, kwargs


def _collect(watch: _Watch, batch: Batch, result: Any) -> list[Activations]:
    """Return the activations of the latest call; with a result, gradients of its loss as well."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    wanted = [tensor for _, _, _, *tensors in watch.seen for tensor in tensors]
    gradients: list[Tensor | None] = [None] * len(wanted)
    if result is not None:
        loss = _loss(_logits(result), _ids(batch), mask)
        if not loss.requires_grad:
            raise ValueError("logits must depend on the keys, got some without a gradient")
        gradients = list(torch.autograd.grad(loss, wanted, allow_unused=True))
    found = []
    for index, (layer, score, query, key, value, _) in enumerate(watch.seen):
        rotation, reason = watch.rotations[layer]
        key_gradient, value_gradient, output_gradient = gradients[3 * index : 3 * index + 3]
        found.append(
            Activations(
                layer=layer,
                query=query.detach(),
                key=key.detach(),
                value=value.detach(),
                scale=score.scale,
                bend=score.bend,
                key_gradient=key_gradient,
                value_gradient=value_gradient,
                rotation=rotation,
                rotation_reason=reason,
                mask=mask,
                output_gradient=output_gradient,
            )
        )
    watch.seen = []
    return found


def _logits(result: Any) -> Tensor:
    """Return the logits ``[B, T, V]`` of what a model returned."""
    logits = getattr(result, "logits", None)
    if logits is None:
        logits = result[0] if isinstance(result, (tuple, list)) and result else result
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ValueError(
            f"model must return logits [B, T, V] for gradients, got {type(logits).__name__}; "
            "pass gradients=False"
        )
    return logits


def _ids(batch: Batch) -> Tensor:
    """Return the token ids ``[B, T]`` of a batch."""
    if isinstance(batch, Tensor):
        return batch
    if "input_ids" in batch:
        ids: Tensor = batch["input_ids"]
        return ids
    for name, value in batch.items():
        whole = isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
        if whole and name not in ("attention_mask", "position_ids"):
            found: Tensor = value
            return found
    raise ValueError(
        f"batches must name token ids [B, T] for a loss, got {', '.join(batch)}; pass gradients=False"
    )


def _loss(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean cross entropy of the next tokens, padding left out."""
    if logits.shape[:2] != ids.shape:
        raise ValueError(
            f"logits must cover all tokens {tuple(ids.shape)}, got {tuple(logits.shape)}"
        )
    counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device)
    counted = (counted[:, 1:] & counted[:, :-1]).to(logits.device)
    if not bool(counted.any()):
        raise ValueError("batches must hold 2 tokens of a sequence or more for a loss, got fewer")
    targets = ids[:, 1:].to(logits.device)
    return cross_entropy(logits[:, :-1][counted].float(), targets[counted].long())
