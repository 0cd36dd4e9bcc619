"""Whatever else a graph holds does what PyTorch does: programs are drawn, run beside an attention and without one."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, assume, event, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import TorchRuntimeError
from torch.nn.functional import dropout
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import KVQWarning, QuantizedKV
from kvq_compile.backend import compile_graph
from kvq_compile.history import watching
from kvq_compile.options import make_config
from refused_steps import EXACT, grown, join

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROWS = 3
EXAMPLES = 2000 if settings.default.max_examples >= 500 else settings.default.max_examples
NOTES: list[float] = []
CONFIG = make_config(EXACT)


@torch.library.custom_op("kvq_test::write_down", mutates_args=())
def write_down(x: Tensor) -> Tensor:
    """Remember a number, which no schema tells of."""
    NOTES.append(float(x.sum()))
    return x.clone()


@write_down.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("kvq_test::count_up", mutates_args=("x",))
def count_up(x: Tensor) -> None:
    """Write into an argument, as the schema tells."""
    x += 1


def assigned(x, y):
    x[1:] = y[:-1] + 0
    return x


def added_in_place(x, y):
    x.add_(y.clamp(-2, 2))
    return x


def counted(x, y):
    count_up(x)
    return x * 1


def copied_rows(x, y):
    return x.clone().index_copy_(0, torch.tensor([2, 0]), y[:2])


def chosen(x, y):
    operands = x.reshape(-1) + 0, y.reshape(-1) + 0
    branch = torch.cond(x.sum() > 0, lambda a, b: a + b, lambda a, b: (a - b).sin(), operands)
    return branch.view(ROWS, -1)


def mapped(x, y):
    return torch.vmap(lambda a, b: a * b + 1)(x, y)


def derivative(x, y):
    return torch.func.jvp(torch.sin, (x,), (y,))[1]


def drawn_and_dropped(x, y):
    torch.rand_like(x)
    return x - y


def written_down_and_dropped(x, y):
    write_down(y)
    return x.cos()


def asserted(x, y):
    torch._assert_async((x.nan_to_num() < 1e30).all(), "numbers stay small")
    return x.tanh()


def without_gradient(x, y):
    with torch.no_grad():
        return x @ y.mT @ x / 9


def in_half_precision(x, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return ((x @ y.mT).float() @ x / 9).float()


def attention_over_nothing_kept(x, y):
    return sdpa(x[None, None], y[None, None], x[None, None].sin())[0, 0]


def softmax_written_out(x, y):
    return torch.softmax(x @ y.mT, -1) @ y


STEPS = {
    function.__name__: function
    for function in (
        *(assigned, added_in_place, counted, copied_rows, chosen, mapped, derivative),
        *(drawn_and_dropped, written_down_and_dropped, asserted, without_gradient),
        *(in_half_precision, attention_over_nothing_kept, softmax_written_out),
    )
} | {
    "added": lambda x, y: x.clamp(-3, 3) + y,
    "multiplied": lambda x, y: (x * y).tanh(),
    "joined": lambda x, y: torch.cat([x, y], 1)[:, : x.shape[1]],
    "joined elsewhere": lambda x, y: torch.cat([x, y], 0)[-ROWS:],
    "viewed": lambda x, y: x.reshape(-1).view(ROWS, -1),
    "a view": lambda x, y: x[:],
    "transposed": lambda x, y: x.mT.contiguous().mT + y,
    "sized": lambda x, y: x + torch.arange(x.shape[1]) * x.shape[1],
    "allocated": lambda x, y: x.new_zeros(x.shape).add_(y),
    "drawn": lambda x, y: torch.rand_like(x) + y,
    "dropped out": lambda x, y: dropout(x, 0.5, True),
    "compared": lambda x, y: torch.where(x > y, x, 0.5),
    "written down": lambda x, y: write_down(x) + y,
    "ones": lambda x, y: torch.ones(ROWS, x.shape[1]),
}


@dataclass(frozen=True)
class Program:
    """What a drawn graph does: each step takes two registers and makes a third."""

    steps: tuple[tuple[str, int, int], ...]
    returned: tuple[int, ...]
    inputs: int
    width: int
    dynamic: bool
    beside: bool

    def run(self, registers, *attention):
        registers = list(registers) or [torch.full((ROWS, self.width), 0.5)]
        for name, first, second in self.steps:
            x, y = (registers[place % len(registers)] for place in (first, second))
            registers.append(STEPS[name](x, y))
        results = tuple(registers[place % len(registers)] for place in self.returned)
        if not self.beside:
            return results
        query, key, value, keys, values = attention
        keys, values = join(keys, values, key, value)
        return *results, sdpa(query, keys, values), keys, values


REGISTER = st.integers(0, 15)
PROGRAMS = st.builds(
    Program,
    steps=st.lists(
        st.tuples(st.sampled_from(sorted(STEPS)), REGISTER, REGISTER), min_size=1, max_size=7
    ).map(tuple),
    returned=st.lists(REGISTER, min_size=1, max_size=3).map(tuple),
    inputs=st.integers(0, 3),
    width=st.integers(2, 5),
    dynamic=st.booleans(),
    beside=st.booleans(),
)


@settings(max_examples=EXAMPLES, phases=set(Phase) - {Phase.explain})  # explaining takes minutes
@given(program=PROGRAMS, seed=st.integers(0, 9))
def test_a_drawn_graph_does_what_pytorch_does(program: Program, seed: int) -> None:
    torch._dynamo.reset()
    reached, compared = [], []

    def backend(gm, example_inputs):
        reached.append(gm)
        ours = compile_graph(gm, example_inputs, CONFIG)

        def both(*args):
            compared.append(len(gm.graph.nodes))
            twins = [x.clone() if type(x) is Tensor else x for x in args]
            try:
                expected = observed(gm.forward, twins, seed)
            except RuntimeError:
                reject()  # the program is wrong in itself
            outcome = observed(ours, args, seed)
            assert_equal(outcome[1:], expected[1:])
            assert_equal(
                [x for x in args if type(x) is Tensor], [x for x in twins if type(x) is Tensor]
            )
            number = len(expected[0]) - 3 * program.beside
            assert_equal(outcome[0][:number], expected[0][:number])
            torch.testing.assert_close(
                [dense(x) for x in outcome[0][number:]],
                [dense(x) for x in expected[0][number:]],
                rtol=1e-4,
                atol=1e-5,
            )
            kept = outcome[0][number:][-2:]
            assert [type(x) for x in kept] == [QuantizedKV] * (2 * program.beside)
            return outcome[0]

        return both

    generator = torch.Generator().manual_seed(seed)
    registers = [
        torch.randn(ROWS, program.width, generator=generator) for _ in range(program.inputs)
    ]
    attention = grown(length=9, quantized=True)() if program.beside else []
    compiled = torch.compile(program.run, backend=backend, dynamic=program.dynamic, fullgraph=True)
    with torch.no_grad(), watching() as graphs, warnings.catch_warnings():
        warnings.simplefilter("ignore", KVQWarning)  # of attentions that keep nothing
        try:
            compiled(registers, *attention)
        except TorchRuntimeError:
            assume(reached)  # what PyTorch cannot capture says nothing of a backend
            raise
    assert compared
    assert not [site for graph in graphs for site in graph.sites if "failed" in site.detail]
    event(f"beside an attention: {program.beside}, inputs: {program.inputs}")


def observed(call, args, seed):
    """Return a call's results, the notes it made and the next random number."""
    torch.manual_seed(seed)
    NOTES.clear()
    results = call(*args)
    return list(results), list(NOTES), float(torch.rand(()))


def dense(x):
    return x.dequantize() if isinstance(x, QuantizedKV) else x


def assert_equal(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
