"""Keys rotated in every spelling that models use, the rotation that is found in their graph, and keys turned back."""

import contextlib

import torch
from torch import Tensor

from kvq_compile import make_spec
from kvq_compile.lowering.find.attention import find_attentions
from kvq_compile.lowering.find.rotation import TURN, Rotation, find_rotation
from kvq_compile.lowering.find.states import find_state
from kvq_compile.lowering.graph import Graph
from kvq_compile.lowering.rewrite.unchain_writes import unchain_writes
from kvq_compile.lowering.sites import Refusal

TOLERANCE = 1e-4  # of the largest key: angles and products are rounded to float32 by the model


class Finder:
    """A backend that rewrites nothing and keeps the rotation of every attention, or why there is none."""

    def __init__(self) -> None:
        self.found: list[Rotation | str] = []

    def __call__(self, gm, example_inputs):
        graph = Graph.copy_of(gm, make_spec(), example_inputs)
        unchain_writes(graph)
        outputs = set(graph.output.all_input_nodes)
        for attention in find_attentions(graph.fx):
            key = attention.key
            with contextlib.suppress(Refusal):  # no cache: the key is the call's own as it is
                key = find_state(key, outputs).new
            try:
                self.found.append(find_rotation(key, graph.inputs))
            except Refusal as reason:
                self.found.append(str(reason))
        return gm.forward


def rotation_of(function, *arguments) -> Rotation | str:
    finder = Finder()
    with torch.no_grad():
        torch.compile(function, backend=finder, fullgraph=True)(*arguments)
    assert len(finder.found) == 1
    return finder.found[0]


def unrotated(key: Tensor, rotation: Rotation, positions: Tensor) -> Tensor:
    """Turn keys ``[B, H, T, D]`` back by what was found."""
    half = len(rotation.frequencies)
    a, b = key[..., rotation.order[:half]].double(), key[..., rotation.order[half:]].double()
    angle = positions[:, None] * torch.tensor(rotation.frequencies) % TURN * (2 * torch.pi / TURN)
    result = torch.empty_like(key)
    result[..., rotation.order[:half]] = (a * angle.cos() + b * angle.sin()).to(key.dtype)
    result[..., rotation.order[half:]] = (b * angle.cos() - a * angle.sin()).to(key.dtype)
    return result


def assert_close(key: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert float((key - expected).abs().max()) <= tolerance * float(expected.abs().max())


# Spellings of a rotation: x [B, H, T, R], angle [T, R/2]


def halves(x, cos, sin):
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-x2, x1), -1) * sin


def halves_written_out(x, cos, sin):
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def interleaved(x, cos, sin):
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3).type_as(x)


def every_two(x, cos, sin):
    cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


def complex_product(x, cos, sin):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(3).type_as(x)


def backwards(x, cos, sin):
    return halves(x, cos, -sin)


SPELLINGS = (halves, halves_written_out, interleaved, every_two, complex_product)
