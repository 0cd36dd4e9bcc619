"""Calibrate a model for a method that learns: capture what its attentions see, fit tables, layer by layer.

The tokens that are kept of each batch follow from the seed alone, so on a CPU the same call gives the same
tables (a GPU sums gradients in no fixed order, which moves the last digits). How
many are kept bounds the memory: where the samples of all layers would not fit, the sequences are read again for
each group of layers that does. `resume` names a file to which every fitted layer goes, and from which a call
that was cut short goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvq_compile.calibration.artifact import Calibration, LayerTables, weight_hash
from kvq_compile.calibration.attention_change import Text, exact
from kvq_compile.calibration.capture import Activations, Batch, Found, capture, find_rotations
from kvq_compile.calibration.channel_weights import far_gradients, weighted_tables
from kvq_compile.calibration.choose import Choice, choose, measure
from kvq_compile.calibration.fit import Fitted, fit_codebook, fit_uniform
from kvq_compile.calibration.margins import search_margins
from kvq_compile.calibration.query_norms import measure_query_norms
from kvq_compile.calibration.rotate import unrotate
from kvq_compile.kernels.layout import Regions
from kvq_compile.kernels.schemes import Role, largest_divisor
from kvq_compile.kernels.tables import Tables
from kvq_compile.lowering.find.rotation import Rotation
from kvq_compile.methods import MEASURED, Skvq, calibration_options, default_clip, grouped
from kvq_compile.options import base_name, make_options, method_class
from kvq_compile.transform_coding import codings

TOKENS = 16_384
MEMORY = 2 << 30
SKIPPED = 5  # first tokens of a sequence: sinks, which stay exact
WINDOW = 128  # last tokens before a query: they stay exact too
FAR = SKIPPED + WINDOW  # first slot from which a query sees tokens that do not
CALIBRATED_NAMES = "tc, skvq, cq-<c>c<b>b, auto or qaq"
CODEBOOKS_BELOW = 2.5  # bits from which "auto" does not try codebooks, which lose by then
CODEBOOK = {"bits": 8, "couple": 8}  # its narrowest choice: 1 bit an element
WEIGHED = ("tc", "auto")  # methods that code in whole pages, by channels that are weighed
TEXTS, QUERIES = 4, 256  # sequences and queries of each by which attention's output is judged
Advance = Callable[[str, int, int], None]


@dataclass
class _Samples:
    """Tokens kept of one layer: keys and values ``[n, H, D]``, and squared gradients of the loss, if taken."""

    key: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    key_weight: list[Tensor] = field(default_factory=list)
    value_weight: list[Tensor] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    channels: Tensor | None = None  # sum of squared gradients beyond the window, [H, D], if taken
    rotation: Rotation | None = None
    note: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def joined(self, role: str) -> tuple[Tensor, Tensor | None]:
        """Return all tokens and their weights, if there are any, on the model's device."""
        tokens, weights = getattr(self, role), getattr(self, f"{role}_weight")
        weight = torch.cat(weights).to(self.device) if weights else None
        return torch.cat(tokens).to(self.device), weight


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    method: str = "tc",
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    memory: int = MEMORY,
    resume: str | Path | None = None,
    advance: Advance = lambda stage, done, total: None,
    **options: Any,
) -> Calibration:
    """Fit a method's tables to a model.

    >>> calibration = kvq_compile.calibrate(model, batches, method="cq-4c8b")
    >>> calibration.save("model-cq-4c8b.safetensors")
    >>> model.compile(backend="kvq", options={"calibration": "model-cq-4c8b.safetensors"})

    Args:
        model: Any decoder that the backend can compile.
        batches: Sequences, as token ids ``[B, T]`` or keyword arguments of the model.
        method: ``"tc"``, ``"skvq"``, ``"cq-<channels>c<bits>b"``, ``"auto"`` with ``bits`` on average, or ``"qaq"``,
            of which only query norms are measured, without gradients.
        tokens: Tokens to fit to, taken evenly from all batches.
        seed: Of every random choice.
        memory: Bytes of samples that may be held at once, at least those of one layer.
        resume: A file that keeps the layers fitted so far; what is measured for ``"qaq"`` takes no such file.
        advance: Called with a stage, how much of it is done and how much there is to do.
        **options: The method's options.

    Raises:
        ValueError: The method, an option or the batches do not fit, or ``resume`` is of another calibration.
        TypeError: A batch holds no sequences.
    """
    options = check_calibration(method, options)
    texts = _check_batches(batches)
    weights = frozenset(weight_hash(parameter) for parameter in model.parameters())
    if method == "qaq":
        return Calibration(method, options, _measured(model, texts, tokens, seed, advance), weights)
    fitted = _resumed(resume, method, options, weights)
    candidates: list[_Candidates] = []
    rotations = find_rotations(model, texts[0])
    if not options.get("pre_rope", True):
        rotations = dict.fromkeys(rotations, (None, "by the option pre_rope"))
    count = None
    while count is None or len(fitted) + len(candidates) < count:
        first = len(fitted) + len(candidates)
        about = 0 if method == "tc" else tokens, seed, memory, advance, method
        samples, count = _sample(model, texts, rotations, first, *about)
        for layer in samples:
            advance("fitting layers", len(fitted) + len(candidates), count)
            if method == "auto":  # which chooses when it has seen all layers
                candidates.append(_try_layer(layer, options, seed))
                continue
            if method == "tc":
                fitted.append(_weigh_layer(layer))
            else:
                fitted.append(_fit_layer(layer, method, options, seed))
            if resume is not None:
                Calibration(method, options, tuple(fitted), weights).save(resume)
    advance("fitting layers", count, count)
    fitted += _chosen(candidates, options)
    return Calibration(method, options, tuple(fitted), weights)


def check_calibration(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Make sure that there is a calibration of ``method`` with ``options``; return all options it depends on.

    Raises:
        ValueError: The method is not calibrated, or an option is unknown or out of range.
        TypeError: ``method`` is no name.
    """
    if not (method_class(method).calibrated or method in MEASURED):
        raise ValueError(
            f"method must be one that is calibrated, {CALIBRATED_NAMES}, got {method!r}"
        )
    if method in MEASURED and "query_norm" in options:
        raise ValueError(
            "query_norm must be left out of a calibration, which measures it, "
            f"got {options['query_norm']!r}"
        )
    every = make_options(method, options)
    return dict(options) if method in MEASURED else calibration_options(every)


def _check_batches(batches: Any) -> list[Batch]:
    """Return the batches as a list.

    Raises:
        TypeError: A batch holds no sequences.
        ValueError: There are none.
    """
    one = isinstance(batches, (Tensor, Mapping, str, bytes))
    if one or not isinstance(batches, Iterable):
        advice = "; put it into a list" if isinstance(batches, (Tensor, Mapping)) else ""
        raise TypeError(
            f"batches must be a list of token ids [B, T] or of keyword arguments of the model, "
            f"got one {type(batches).__name__}{advice}"
        )
    texts = list(batches)
    if not texts:
        raise ValueError("batches must hold a sequence or more, got none")
    for index, text in enumerate(texts):
        tokens = isinstance(text, Tensor) and text.dim() == 2 and not text.is_floating_point()
        if not (tokens or isinstance(text, Mapping)):
            got = (
                f"{text.dtype} {list(text.shape)}"
                if isinstance(text, Tensor)
                else type(text).__name__
            )
            raise TypeError(
                f"batches must hold token ids [B, T], integers, or keyword arguments of the model, "
                f"got {got} at place {index}"
            )
    return texts


def _measured(
    model: nn.Module, texts: Sequence[Batch], tokens: int, seed: int, advance: Advance
) -> tuple[LayerTables, ...]:
    norms = measure_query_norms(model, texts, tokens, seed, SKIPPED, advance)
    return tuple(LayerTables(None, None, False, query_norms=layer) for layer in norms)


def _resumed(
    resume: str | Path | None, method: str, options: dict[str, Any], weights: frozenset[str]
) -> list[LayerTables]:
    if resume is None or not Path(resume).exists():
        return []
    begun = Calibration.load(resume)
    if (begun.method, begun.options, begun.weights) != (method, options, weights):
        raise ValueError(
            f"resume must name a file of this model, method and options, got {resume} of {begun.method} "
            f"{begun.options}; remove it or name another"
        )
    return list(begun.layers)


def _sample(
    model: nn.Module,
    texts: Sequence[Batch],
    rotations: Mapping[int, Found],
    first: int,
    tokens: int,
    seed: int,
    memory: int,
    advance: Advance,
    method: str,
) -> tuple[list[_Samples], int]:
    """Return the samples of as many layers, from number ``first`` on, as fit, and how many layers there are."""
    share, gradients = -(-tokens // len(texts)), method != "skvq"
    found_in = capture(model, texts, gradients=gradients, rotations=rotations)
    samples: list[_Samples] = []
    layers = 0
    for number, found in enumerate(found_in):
        advance("reading sequences", number, len(texts))
        layers = len(found)
        if number == 0:
            rows = tokens * (4 if gradients else 2) + TEXTS * 2 * found[0].key.shape[2]
            a_layer = 4 * rows * found[0].key.shape[1] * found[0].key.shape[3]
            samples = [_Samples() for _ in found[first : first + max(1, memory // a_layer)]]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        for sample, seen in zip(samples, found[first:], strict=False):
            _take(sample, seen, share, generator.clone_state())
            if method in WEIGHED:
                squares = far_gradients(seen, SKIPPED, WINDOW).square().sum((0, 2))
                sample.channels = squares if sample.channels is None else sample.channels + squares
            whole = seen.mask is None or bool(seen.mask[0].all())
            if len(sample.texts) < TEXTS and whole and seen.key.shape[2] > _shortest(method):
                sample.texts.append(_text(seen, generator.clone_state()))
    advance("reading sequences", len(texts), len(texts))
    return samples, layers


def _take(sample: _Samples, seen: Activations, share: int, generator: torch.Generator) -> None:
    """Keep ``share`` tokens of a batch, keys as they were before their rotation."""
    B, _, T, _ = seen.key.shape
    slot = torch.arange(T, dtype=torch.int64, device="cpu")
    usable = (slot >= 0).expand(B, T) if seen.mask is None else seen.mask.cpu().bool()
    usable = usable & (slot >= SKIPPED)
    places = usable.flatten().nonzero()[:, 0]
    order = torch.randperm(len(places), generator=generator, dtype=torch.int64, device="cpu")
    picked = places[order[:share].sort().values]
    position = (usable.cumsum(-1) - 1 + SKIPPED) if seen.mask is not None else slot.expand(B, T)
    position = position.flatten()[picked]
    sample.rotation, sample.note = seen.rotation, seen.rotation_reason
    sample.device = seen.key.device
    for name, x, gradient in (
        ("key", seen.key, seen.key_gradient),
        ("value", seen.value, seen.value_gradient),
    ):
        rows = torch.stack([_rows(part, picked) for part in (x, gradient) if part is not None])
        if name == "key" and seen.rotation is not None:
            rows = unrotate(rows, position, seen.rotation)
        getattr(sample, name).append(rows[0])
        if gradient is not None:
            getattr(sample, f"{name}_weight").append(rows[1].square())


def _text(seen: Activations, generator: torch.Generator) -> Text:
    """Return what an attention saw of the first sequence of a batch, with queries that look beyond the window."""
    far = seen.key.shape[2] - FAR
    order = torch.randperm(far, generator=generator, dtype=torch.int64, device="cpu")
    places = order[:QUERIES] + FAR
    place = places.sort().values.to(seen.key.device)
    query, key, value = (x.detach()[0].float() for x in (seen.query, seen.key, seen.value))
    return Text(query[:, place], place, key, value, seen.scale, seen.bend)


def _rows(x: Tensor, picked: Tensor) -> Tensor:
    """Return tokens ``picked`` of ``x`` ``[B, H, T, D]`` as ``[n, H, D]`` (fp32, on the CPU)."""
    return x.detach().transpose(1, 2).flatten(0, 1)[picked.to(x.device)].float().cpu()


def _fit_layer(sample: _Samples, method: str, options: dict[str, Any], seed: int) -> LayerTables:
    key = _fit(sample, "key", method, options, seed)
    transformed = options["values"] == "hadamard"  # which needs no tables
    value = None if transformed else _fit(sample, "value", method, options, seed)
    return LayerTables(key, value, sample.rotation is not None, _note(sample))


@dataclass
class _Candidates:
    """What "auto" may choose from for one layer."""

    key: list[Choice]
    value: list[Choice]
    rotary: bool
    note: str


def _weigh_layer(sample: _Samples) -> LayerTables:
    """Return the tables of a layer's keys for transform coding, and what each width of keys and values changes."""
    tried = _transform_choices(sample, "tc")
    changes = [
        tuple((float(choice.options["bits"]), choice.error) for choice in choices)
        for choices in tried
    ]
    note = f"keys are taken for ones that are not rotated: {sample.note}" if sample.note else ""
    return LayerTables(
        *(tried[0][0].tables, None, False, note), key_changes=changes[0], value_changes=changes[1]
    )


def _transform_choices(sample: _Samples, what: str) -> tuple[list[Choice], list[Choice]]:
    """Return what the widths of transform coding change, of keys and of values."""
    texts = _texts(sample, what)
    assert sample.channels is not None
    weighted = weighted_tables(sample.channels, sample.rotation)
    outputs = [exact(text) for text in texts]
    roles: dict[Role, list[Choice]] = {"key": [], "value": []}
    for role, choices in roles.items():
        tables = weighted if role == "key" else None
        for options in codings(role, weighted.head_dim):
            choices.append(measure(role, options, tables, False, texts, outputs))
    return roles["key"], roles["value"]


def _try_layer(sample: _Samples, options: dict[str, Any], seed: int) -> _Candidates:
    keys, values = _transform_choices(sample, "auto")
    rotary, texts = sample.rotation is not None, _texts(sample, "auto")
    if (
        options["bits"] < CODEBOOKS_BELOW
        and sample.value[0].shape[2] % (8 * CODEBOOK["couple"]) == 0
    ):
        outputs = [exact(text) for text in texts]
        full = {"weighted": True, "correlate": False, "balance": True, **CODEBOOK}
        roles: dict[Role, list[Choice]] = {"key": keys, "value": values}
        for role, choices in roles.items():
            tables = _fit(sample, role, "cq", full, seed)
            choices.append(measure(role, CODEBOOK, tables, rotary, texts, outputs))
    return _Candidates(keys, values, rotary, _note(sample))


def _chosen(candidates: list[_Candidates], options: dict[str, Any]) -> list[LayerTables]:
    if not candidates:
        return []
    flat = [tensor for layer in candidates for tensor in (layer.key, layer.value)]
    chosen = iter(choose(flat, options["bits"]))
    pairs = [(layer, next(chosen), next(chosen)) for layer in candidates]
    return [
        LayerTables(
            *(key.tables, value.tables, layer.rotary and "weighs" not in key.options, layer.note),
            *(dict(key.options), dict(value.options)),
        )
        for layer, key, value in pairs
    ]


def _note(sample: _Samples) -> str:
    return f"keys are quantized as attention sees them: {sample.note}" if sample.note else ""


def _shortest(method: str) -> int:
    """Return how many tokens a sequence must exceed for attention's output to depend on how a method codes them."""
    return FAR + Regions().page_size - 1 if method in WEIGHED else FAR


def _texts(sample: _Samples, what: str) -> list[Text]:
    if not sample.texts:
        raise ValueError(
            f"batches must hold a sequence without padding of more than {_shortest(what)} tokens for {what}, got none; "
            "pass longer sequences"
        )
    return sample.texts


def _fit(sample: _Samples, role: Role, method: str, options: dict[str, Any], seed: int) -> Tables:
    x, weight = sample.joined(role)
    rotation = sample.rotation if role == "key" else None
    paired = rotation is not None
    if base_name(method) == "cq":
        fitted = fit_codebook(
            x,
            weight if options["weighted"] else None,
            couple=options["couple"],
            bits=options["bits"],
            paired=paired,
            seed=seed,
            correlate=options["correlate"],
            balance=options["balance"] and role == "key",
        )
        return to_tables(fitted, rotation)
    bits = options[f"{role}_bits"]
    bits = options["bits"] if bits is None else bits
    clip = options[f"{role}_clip"]
    clip = default_clip(role, bits) if clip is None else clip
    size, up_to = grouped(options["group_size"], Skvq.most)
    group_size = size or x.shape[2]
    if up_to:
        group_size = largest_divisor(x.shape[2], group_size)
    fitted = fit_uniform(
        x,
        group_size=group_size,
        paired=paired,
        margin=0.0 if clip == "search" else (1.0 - clip) / 2.0,
        equalize=options["equalize"],
        reorder=options["reorder"],
    )
    if clip == "search":
        fitted = search_margins(
            fitted,
            _texts(sample, f'{role}_clip="search"'),
            role,
            rotation,
            levels=2 if bits == 1.5 else (1 << int(bits)) - 1,
            group_size=group_size,
            fp8=options["params"] == "fp8",
            sinks=SKIPPED,
            window=WINDOW,
        )
    return to_tables(fitted, rotation)


def to_tables(fitted: Fitted, rotation: Rotation | None) -> Tables:
    """Return what was fitted to unrotated keys, or to values, as `Tables` of the model's channels."""
    device, order, frequency = fitted.order.device, fitted.order, None
    if rotation is not None:
        order = torch.tensor(rotation.order, device=device, dtype=torch.int64)[fitted.order]
        half = fitted.order[:, : fitted.order.shape[1] // 2].cpu()
        frequency = torch.tensor(rotation.frequencies, dtype=torch.int64, device="cpu")[half].int()
    codebook = fitted.codebook
    return Tables.build(
        order=order.cpu(),
        mean=fitted.mean.gather(1, fitted.order).cpu(),
        scale=fitted.scale.gather(1, fitted.order).cpu(),
        margin=fitted.margin.cpu(),
        frequency=frequency,
        codebook=None if codebook is None else codebook.cpu(),
    )
