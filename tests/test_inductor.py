"""A model under Inductor, as users compile it, says what it says without."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import compile_fx
from torch._inductor.runtime import compile_tasks
from transformers import LlamaConfig, LlamaForCausalLM

from kvq_compile import QuantizedKV
from kvq_compile.history import watching
from kvq_compile.options import make_config
from thorough import THOROUGH

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::kvq_compile.errors.KVQWarning"),
    pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*should not be instantiated:DeprecationWarning"
    ),  # torch, under Dynamo
]


# Inductor vectorizes the check of an index and leaves the index out, of a plain model, too.
UNDECLARED = pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="the C++ that torch 2.11 makes of a mask does not compile",
)


@pytest.mark.parametrize(  # Inductor takes half a minute for one flex_attention
    "attention", [pytest.param("sdpa", marks=UNDECLARED), *["flex_attention"] * THOROUGH]
)
def test_a_growing_cache_is_served_under_inductor_as_without(attention: str) -> None:
    """Regression: sizes of alike caches were merged in tracing, and Inductor named one that no input had."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None,
        attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(2, 128, (1, 200))
    found = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        model.compile(backend="kvq", options={"method": "int8", "inner": inner})
        found.append(model.generate(ids, max_new_tokens=3, do_sample=False))
    assert torch.equal(*found)


@pytest.mark.parametrize("first", [0, 1])
@torch.no_grad()
def test_sizes_go_by_the_symbol_that_the_graph_has_for_them(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a size that had another name than in the graph was not defined in Inductor's code.

    Of two sizes that are equal PyTorch takes either name; the size of the cache that is met first stays an input.
    """
    given: list[Any] = []

    def compile_graph(module: Any, inputs: Any, **_: Any) -> Any:
        given.append(inputs)
        return module.forward

    monkeypatch.setattr(compile_fx, "compile_fx", compile_graph)

    def read_dense(query: Tensor, key: Tensor, value: Tensor, past: Any) -> Any:
        one = torch.cat([past[first], key], 2)
        other = torch.cat([past[1 - first], value], 2)
        return (query @ one.mT).cos() @ other, ((one, other), (other, one))[first]

    compiled = torch.compile(read_dense, backend="kvq", options={"method": "int8"})
    past: Any = tuple(torch.zeros(1, 2, 200, 32) for _ in range(2))
    for _ in range(2):
        _output, past = compiled(*torch.zeros(3, 1, 2, 1, 32), past)
    sizes = [x.node for x in given[1] if isinstance(x, torch.SymInt)]
    assert sizes
    for size in sizes:
        assert size._expr == size.expr


@torch.no_grad()
def test_triton_is_given_its_assembler_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inductor gives it one when it first compiles a kernel, which it does not where it finds them on disk."""
    done = []
    compile_whole = compile_fx.compile_fx
    monkeypatch.setattr(compile_tasks, "_set_triton_ptxas_path", lambda: done.append("assembler"))

    def compile_graph(*args: Any, **kwargs: Any) -> Any:
        done.append("graph")
        return compile_whole(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", compile_graph)
    tokens = torch.zeros(1, 2, 4, 32)
    torch.compile(lambda x: (F.scaled_dot_product_attention(x, x, x), x), backend="kvq")(tokens)
    assert done == ["assembler", "graph"]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@torch.no_grad()
def test_a_mode_that_replays_steps_on_a_gpu_compiles_them_on_a_cpu(mode: str) -> None:
    """There it is what it is for Inductor, and nothing is said of steps."""
    generator = torch.Generator().manual_seed(0)
    options = {"method": "int8", "window": 4, "page_size": 32}
    spec = make_config(options).spec
    tokens, weights = (torch.randn(size, generator=generator) for size in ((2, 4, 64), (3, 64, 64)))

    def step(x: Any, weights: Any, past_keys: Any, past_values: Any) -> Any:
        query, key, value = ((x @ w).view(2, -1, 2, 32).transpose(1, 2) for w in weights)
        keys, values = torch.cat([past_keys, key], 2), torch.cat([past_values, value], 2)
        return F.scaled_dot_product_attention(query, keys, values), keys, values

    def run(**more: Any) -> torch.Tensor:
        torch._dynamo.reset()
        past = torch.randn(2, 2, 2, 70, 32, generator=torch.Generator().manual_seed(1))
        cache = [
            QuantizedKV.from_dense(x, spec.layout(role, 32))
            for x, role in zip(past, ("key", "value"), strict=True)
        ]
        compiled, outputs = torch.compile(step, backend="kvq", **more), []
        for x in tokens.split(1, 1):
            output, *cache = compiled(x, weights, *cache)
            outputs.append(output)
        assert all(isinstance(x, QuantizedKV) for x in cache)
        return torch.stack(outputs)

    expected = run(options=options | {"inner": "eager"})
    with watching() as graphs:
        torch.testing.assert_close(run(options=options | {"mode": mode}), expected)
    assert [site.outcome for graph in graphs for site in graph.sites] == ["rewritten"] * len(graphs)
    assert {graph.steps for graph in graphs} == {""}
