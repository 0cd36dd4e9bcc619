"""Caches that a module keeps as parameters are served as its buffers are."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvq_compile import KVQWarning
from kvq_compile.kernels.cache.tensor import QuantizedKV
from versions import no_lists_of_parameters

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"inner": "eager", "method": "int8", "sinks": 0, "window": 8, "page_size": 32}
B, H, D, S = 2, 2, 32, 128
TOLERANCE = 0.01  # of codes of 8 bits in elements up to 1.5


def assign(cache: Tensor, new: Tensor, at: Tensor) -> None:
    cache[:, :, at] = new


def scatter(cache: Tensor, new: Tensor, at: Tensor) -> None:
    cache.scatter_(2, at[:, None].expand(*new.shape), new)


class Layer(nn.Module):
    """A layer that keeps keys and values as it is told."""

    def __init__(self, how: str, trained: bool = False, write=assign) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.write = nn.Linear(H * D, 3 * H * D, bias=False), write
        empty = [nn.Parameter(torch.zeros(B, H, S, D), requires_grad=trained) for _ in range(2)]
        if how == "list":
            self.caches = nn.ParameterList(empty)
        else:
            self.keys, self.values = empty
        self.gain = nn.Parameter(torch.ones(B, H, S, D), requires_grad=False)

    def held(self) -> list[Tensor]:
        return [*self.caches] if hasattr(self, "caches") else [self.keys, self.values]

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (H, D)).transpose(1, 2) for part in self.project(x).chunk(3, -1)
        )
        keys, values = self.held()
        self.write(keys, k, at)
        self.write(values, v, at)
        seen = torch.arange(S) <= at[:, None]
        return F.scaled_dot_product_attention(q, keys, values, seen) * self.gain[:, :, :1]


def assert_follows(plain: Layer, compiled: Layer, first: int, counts: tuple[int, ...]) -> None:
    with torch.no_grad():
        for count in counts:
            x, at = torch.randn(B, count, H * D), torch.arange(first, first + count)
            torch.testing.assert_close(compiled(x, at), plain(x, at), atol=TOLERANCE, rtol=0)
            first += count


@pytest.mark.parametrize("write", [assign, scatter])
@pytest.mark.parametrize("how", ["attributes", pytest.param("list", marks=no_lists_of_parameters)])
def test_parameters_hold_quantized_caches(how: str, write) -> None:
    """And parameters that are only read, as a gain is, stay what they are."""
    plain, compiled = (Layer(how, write=write) for _ in range(2))
    compiled.compile(backend="kvq", options=OPTIONS)
    assert_follows(plain, compiled, 0, (60, 1, 1, 5, 1))
    assert all(isinstance(cache, QuantizedKV) for cache in compiled.held())
    assert type(compiled.gain) is nn.Parameter


@pytest.mark.parametrize("copied", ["deepcopy", "state_dict", "load_plain"])
def test_a_module_with_such_parameters_is_copied_and_loaded(copied: str) -> None:
    plain, compiled = Layer("attributes"), Layer("attributes")
    compiled.compile(backend="kvq", options=OPTIONS)
    assert_follows(plain, compiled, 0, (60, 1))
    if copied == "deepcopy":
        compiled = copy.deepcopy(compiled)
    elif copied == "load_plain":
        compiled.load_state_dict(plain.state_dict())
    else:
        file = io.BytesIO()
        torch.save(compiled.state_dict(), file)
        file.seek(0)
        compiled.load_state_dict(torch.load(file))
    assert_follows(plain, compiled, 61, (1, 4))
    assert all(isinstance(cache, QuantizedKV) for cache in compiled.held())


def test_parameters_that_are_trained_stay_as_they_are() -> None:
    plain, compiled = (Layer("attributes", trained=True) for _ in range(2))
    compiled.compile(backend="kvq", options=OPTIONS)
    with pytest.warns(KVQWarning, match="the parameter must not require gradients"):
        assert_follows(plain, compiled, 0, (60, 1, 1))
    assert all(type(cache) is nn.Parameter for cache in compiled.held())
