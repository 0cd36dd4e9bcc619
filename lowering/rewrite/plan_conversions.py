"""Plan which 16-bit buffers are quantized in place once a call has run, and how many tokens they hold then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvq_compile.lowering.nodes import shape_of, value_of
from kvq_compile.lowering.sites import AttentionSite, Coding, Life, State
from kvq_compile.lowering.sizes import Size, SizeReader


@dataclass(frozen=True)
class Conversion:
    """A 16-bit buffer to convert once the call has run.

    Attributes:
        argument: Its place among the arguments.
        position: Number of the output that holds the slots just written, or ``None``.
        end: Tokens held after the call, where that is known from the arguments.
        coding: What to convert to.
    """

    argument: int
    position: int | None
    end: Size | None
    coding: Coding

    def held(self, args: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Return how many tokens the buffer holds after a call."""
        if self.end is not None:
            return self.end(args)
        assert self.position is not None
        return int(outputs[self.position].max()) + 1


def plan_conversions(
    graph: fx.Graph,
    sites: Sequence[AttentionSite],
    arguments: dict[fx.Node, int],
    sizes: SizeReader,
) -> list[Conversion]:
    """Return the slots that 16-bit buffers are written at as further outputs.

    Before:  keys.index_copy_(2, position, key); ...; position.add_(1); return logits
    After:   slots = position.clone(); keys.index_copy_(2, position, key); ...; return logits, slots
    Because: which slots hold a token is known for certain only where they are written.
    """
    output = next(iter(reversed(graph.nodes)))
    conversions: list[Conversion] = []
    for site in sites:
        for state, coding in site.states():
            if state.life is not Life.BUFFER_PLAIN:
                continue
            assert state.past is not None
            argument = arguments[state.past]
            if isinstance(value_of(state.position), torch.Tensor):
                conversions.append(
                    Conversion(argument, _return_slots(graph, output, state), None, coding)
                )
            else:
                end = value_of(state.position) + (shape_of(state.new) or ())[2]
                conversions.append(Conversion(argument, None, sizes.size(end), coding))
    return conversions


def _return_slots(graph: fx.Graph, output: fx.Node, state: State) -> int:
    """Return the number of a new output that holds the slots of a write."""
    assert state.write is not None
    with graph.inserting_before(state.write):
        slots = graph.call_method("clone", (state.position,))
    output.args = ((*output.args[0], slots),)  # type: ignore[misc]
    return len(output.args[0]) - 1
