"""A decoder's step with attention in any spelling, and what became of it."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvq_compile import QuantizedKV
from kvq_compile.backend import compile_graph
from kvq_compile.lowering.nodes import target_name
from kvq_compile.lowering.pipeline import lower
from kvq_compile.options import make_config

B, H, G, D = 3, 2, 4, 16
EXACT = {"method": "int8", "sinks": 1, "window": 256, "page_size": 32, "inner": "eager"}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Watch:
    """A backend that keeps what became of each attention, and which calls the last graph has."""

    def __init__(self) -> None:
        self.config = make_config(EXACT)
        self.details: list[str] = []
        self.calls: set[str] = set()

    def __call__(self, gm, inputs, **_):
        lowered = lower(gm, inputs, self.config.spec)
        self.details = [site.detail for site in lowered.reports]
        self.calls = {target_name(node) for node in lowered.module.graph.nodes}
        return compile_graph(gm, inputs, self.config)


def seen(new: int, slots: int) -> Tensor:
    return torch.ones(new, slots, dtype=torch.bool).tril(slots - new)


def heads(x: Tensor) -> Tensor:
    return x.repeat_interleave(G, 1)


@torch.no_grad()
def watch(
    attend: Attend,
    dtype: torch.dtype = torch.float32,
    lengths=(1, 1, 3),
    dynamic: bool | None = None,
) -> Watch:
    """Feed tokens to a decoder's step with a cache that grows; hold it to the same step uncompiled."""

    def step(query, key, value, keys, values):
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return attend(query, keys, values), keys, values

    recorder = Watch()
    compiled = torch.compile(step, backend=recorder, dynamic=dynamic)
    torch.manual_seed(0)
    plain = packed = [torch.randn(B, H, 40, D, dtype=dtype) for _ in range(2)]
    eps = torch.finfo(dtype).eps
    for new in lengths:
        own = [torch.randn(B, n, new, D, dtype=dtype) for n in (H * G, H, H)]
        wanted, *plain = step(*own, *plain)
        output, *packed = compiled(*own, *packed)
        assert output.shape == wanted.shape
        assert output.dtype == wanted.dtype
        torch.testing.assert_close(output, wanted, rtol=16 * eps, atol=16 * eps)
    assert all(isinstance(cache, QuantizedKV) for cache in packed)
    return recorder


def assert_fused(recorder: Watch) -> None:
    assert "attend.default" in recorder.calls, recorder.details
    products = {"softmax", "einsum", "bmm", "matmul", "scaled_dot_product_attention"}
    assert not products & recorder.calls


def grouped(query, keys):
    return torch.einsum("bhgtd,bhsd->bhgts", query.unflatten(1, (H, G)), keys)


def attended(scores, values):
    return torch.einsum("bhgts,bhsd->bhgtd", scores.softmax(-1), values).flatten(1, 2)


def hide(scores):
    return scores.masked_fill(~seen(*scores.shape[-2:]), -1e9)
