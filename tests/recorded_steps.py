"""Steps of a decoder that are noted and replayed on a CPU as CUDA graphs are on a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from kvq_compile import QuantizedKV, backend
from kvq_compile.history import watching
from kvq_compile.kernels import ops

OPTIONS: dict[str, Any] = {"method": "int2", "window": 4, "page_size": 32, "inner": "eager"}
LAYOUTS = [backend.make_config(OPTIONS).spec.layout(role, 32) for role in ("key", "value")]
REPLAYED = "are replayed from CUDA graphs"
WRITES = (ops.append_, ops.append_both_)


class Tape(TorchDispatchMode):
    """Notes calls as a CUDA graph does: with their numbers, on their memory. Writes to arguments wait for a replay."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.own: set[int] = set()  # memory that was allocated meanwhile

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        waits = func._schema.is_mutable and memory(given[0]) not in self.own
        result = (None if func in WRITES else args[0]) if waits else func(*args, **kwargs)
        made = {memory(x) for x in tree_leaves(result) if isinstance(x, Tensor)}
        self.own |= made - {memory(x) for x in given}
        self.calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            anew = func(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(anew), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    if "c10d" in str(func):  # which has only begun
                        torch.ops._c10d_functional.wait_tensor(new)
                    old.copy_(new)


def memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@dataclass
class Recorder:
    """Stands for CUDA graphs where there is no GPU."""

    tapes: list[Tape] = field(default_factory=list)
    replays: int = 0

    def __call__(self, run: Callable[[], Sequence[Any]]) -> Callable[[], Sequence[Any]]:
        with Tape() as tape:
            results = run()
        self.tapes.append(tape)

        def replay() -> Sequence[Any]:
            self.replays += 1
            tape.replay()
            return results

        return replay

    @classmethod
    def on_cpu(cls, patch: pytest.MonkeyPatch) -> "Recorder":
        """Return the one that records steps on a CPU from now on."""
        made = cls()
        patch.setitem(backend.RECORDERS, "cpu", made)
        return made


def llama(layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def attended(query: Tensor, key: Tensor, value: Tensor, past: Any, mask: Any = None) -> Any:
    keys, values = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
    return sdpa(query, keys, values, mask), (keys, values)


def compared(function: Callable[..., Any], recorder: Recorder, recorded: str | None = None) -> str:
    """Check that steps are what they are unrecorded; return what is told of them."""
    results = []
    for mode in ("default", recorded):
        torch._dynamo.reset()
        generator = torch.Generator().manual_seed(0)
        compiled = torch.compile(function, backend="kvq", options={**OPTIONS, "mode": mode})
        x = torch.randn(3, 1, 2, 70, 32, generator=generator)
        past: Any = tuple(
            QuantizedKV.from_dense(part, layout)
            for part, layout in zip(x[1:], LAYOUTS, strict=True)
        )
        with torch.no_grad(), watching() as graphs:
            for _ in range(12):
                step = torch.randn(3, 1, 2, 1, 32, generator=generator)
                output, past = compiled(*step, past)
                results.append(output)
    ours, theirs = results[:12], results[12:]
    for one, other in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    return graphs[-1].steps
