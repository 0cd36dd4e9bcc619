"""The ``kvq`` backend of ``torch.compile``: rewrite the captured graph, hand the rest to Inductor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from kvq_compile.compiling import compiling
from kvq_compile.entry import watch_generate
from kvq_compile.errors import KVQError, KVQWarning
from kvq_compile.history import GraphReport, record
from kvq_compile.lowering import logs
from kvq_compile.lowering.pipeline import lower
from kvq_compile.lowering.runtime import Compiled
from kvq_compile.lowering.sites import SiteReport
from kvq_compile.options import Config, make_config

watch_generate()


def kvq(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **rest: Any,
) -> Compiled:
    """Compile one captured graph so that the caches it keeps are quantized.

    Called by ``torch.compile(..., backend="kvq")``, which finds it as an entry point.

    Args:
        gm: The captured graph.
        example_inputs: Arguments of the call that is being compiled.
        mode: As for ``torch.compile``; handed on to Inductor.
        options: See `kvq_compile.options.make_config`.

    Raises:
        ValueError: An option is unknown or out of range.
        KVQError: ``strict`` is set and an attention that keeps a cache could not be rewritten.
    """
    config = make_config(options)
    with compiling(f"a graph of {len(gm.graph.nodes)} nodes"):
        return compile_graph(gm, example_inputs, config, mode)


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, mode: str | None = None
) -> Compiled:
    """Lower one graph, report on it and return the callable that Dynamo will run."""
    lowered = lower(gm, example_inputs, config.spec)
    if config.calibration is not None and lowered.reports:
        config.calibration.check(example_inputs, len(lowered.reports))
    record(GraphReport(tuple(lowered.reports), config.spec))
    _tell(lowered.reports, config)

    def compile_inner(args: Sequence[Any]) -> Compiled:
        return _compile_inner(lowered.module, lowered.flatten(args), config, mode)

    def stays_plain(reason: RuntimeError) -> None:
        text = f"a 16-bit cache was left as it is: {reason}"
        if config.strict:
            raise KVQError(text) from reason
        warnings.warn(text, KVQWarning, stacklevel=3)

    if not lowered.compiles:
        return gm.forward
    if lowered.conversions:
        return lowered.run_once_then_convert(compile_inner, stays_plain)
    return lowered.around(compile_inner(example_inputs))


def _tell(reports: Sequence[SiteReport], config: Config) -> None:
    """Log what became of each attention; warn about those that keep a cache in 16 bit."""
    for site in reports:
        logs.sites.info("%d (%s) %s: %s", site.layer, site.source, site.outcome, site.detail)
    refused = [site for site in reports if site.outcome == "left alone" and not site.expected]
    if not refused:
        return
    reasons = "; ".join(sorted({site.detail for site in refused}))
    text = f"{len(refused)} of {len(reports)} attentions were left as they are: {reasons}"
    if config.strict:
        raise KVQError(text)
    warnings.warn(text, KVQWarning, stacklevel=2)


def _compile_inner(
    module: fx.GraphModule, inputs: list[Any], config: Config, mode: str | None
) -> Compiled:
    if config.inner == "eager":
        return module.forward
    if config.inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(module, inputs)
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **config.inductor}
    return compile_fx(module, inputs, config_patches=patches)  # type: ignore[return-value]
