"""A model under a method, fed piece by piece: what every measurement of quality goes through."""

from __future__ import annotations

import inspect
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvq_compile.loading import cache_argument
from kvq_compile.options import make_config
from kvq_compile.reports import Report, report

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

PLAIN = "plain"


@dataclass(frozen=True)
class Method:
    """A method with its options, as ``options=`` of the backend takes them.

    Args:
        label: What tables call it.
        options: The backend's options; ``None`` is the plain cache, ``{}`` the backend's default.
    """

    label: str
    options: Mapping[str, Any] | None


def parse_value(text: str) -> object:
    """Return ``text`` as the bool, None, int or float it spells, else as it is."""
    words: dict[str, object] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_method(text: str) -> Method:
    """Read ``name`` or ``name:option=value,option=value``; the name may be a calibration's file.

    >>> parse_method("kivi:key_bits=2,group_size=32").options
    {'method': 'kivi', 'key_bits': 2, 'group_size': 32}

    Raises:
        ValueError: An option lacks its ``=``, or the method or an option is unknown.
    """
    if text == PLAIN:
        return Method(PLAIN, None)
    name, options = parse_options(text)
    if Path(name).suffix == ".safetensors":
        options = {"calibration": name, **options}
    else:
        options = {"method": name, **options}
    make_config(options)
    return Method(text, options)


def parse_options(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``name:option=value,...`` into the name and the options.

    Raises:
        ValueError: An option lacks its ``=``.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"method option must read option=value, got {item!r} in {text!r}")
        options[key.strip()] = parse_value(value.strip())
    return name, options


def held(cache: DynamicCache, method: Method) -> Report:
    """Return what a cache holds.

    Raises:
        RuntimeError: ``method`` should have quantized the cache and did not.
    """
    found = report(cache)
    if method.options is not None and not any(t.packed_bits for t in found.tensors):
        raise RuntimeError(
            f"no layer of the cache was quantized by {method.label}; `kvq explain` tells why"
        )
    return found


class Runner:
    """One model under one method, fed piece by piece with the cache of one text.

    Several runners share a model. Each compiles a function of its own around it, so nothing is
    left behind on the model and they do not count against each other's limit of recompilations.

    Args:
        model: A decoder of transformers, in evaluation mode.
        method: What its cache becomes.
        compile_plain: Whether the plain cache runs through Inductor, as the others do, or eagerly.
    """

    def __init__(self, model: PreTrainedModel, method: Method, compile_plain: bool = True) -> None:
        self.model = model
        self.method = method
        self.seconds: list[float] = []
        self.cache: DynamicCache = None
        # transformers computes the logits of a whole prompt unless it is told not to.
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._call = self._compile(compile_plain)

    def _compile(self, compile_plain: bool) -> Callable[..., Tensor]:
        model, name = self.model, cache_argument(self.model)

        def call(ids: Tensor, cache: DynamicCache, **extra: int) -> Tensor:
            logits: Tensor = model(ids, **{name: cache}, use_cache=True, **extra).logits
            return logits

        # Dynamo keeps its compiled code by code object: every runner needs one of its own.
        own = types.FunctionType(
            call.__code__.replace(), call.__globals__, f"call_{self.method.label}", None,
            call.__closure__,
        )  # fmt: skip
        if self.method.options is not None:
            return torch.compile(own, backend="kvq", options=dict(self.method.options))
        return torch.compile(own) if compile_plain else own

    def start(self) -> None:
        """Begin a text with an empty cache."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    def feed(self, ids: Tensor, timed: bool = False) -> Tensor:
        """Append tokens, ``[T]`` of one sequence or ``[B, T]``, to the cache; return their logits ``[..., T, V]``."""
        began = time.perf_counter()
        with torch.no_grad():
            logits = self._call(_batched(ids).to(self.model.device), self.cache)
        if logits.is_cuda:
            torch.cuda.synchronize()
        if timed:
            self.seconds.append((time.perf_counter() - began) / ids.numel())
        return logits if ids.dim() == 2 else logits[0]

    def prefill(self, ids: Tensor) -> Tensor:
        """Append a prompt, ``[T]`` or ``[B, T]``, and return the logits of its last token, ``[..., V]``."""
        with torch.no_grad():
            logits = self._call(_batched(ids).to(self.model.device), self.cache, **self._last_only)[
                :, -1
            ]
        return logits if ids.dim() == 2 else logits[0]

    def decode(self, token: Tensor, count: int) -> Tensor:
        """Return ``count`` tokens a sequence, ``[B, count]``: ``token`` ``[B]``, and those that follow it greedily."""
        found = [token]
        while len(found) < count:
            found.append(self.feed(found[-1][:, None])[:, -1].argmax(-1))
        return torch.stack(found, 1)

    def finish(self) -> Report:
        """End a text: drop its cache and return what it held."""
        found = held(self.cache, self.method)
        self.cache = None
        return found


def _batched(ids: Tensor) -> Tensor:
    return ids if ids.dim() == 2 else ids[None]


def make_runners(
    model: PreTrainedModel, methods: Sequence[Method], compile_plain: bool = True
) -> list[Runner]:
    """Return a runner for the plain cache and one for each method, in this order."""
    plain = Method(PLAIN, None)
    wanted = [plain, *(method for method in methods if method.options is not None)]
    return [Runner(model, method, compile_plain) for method in wanted]
