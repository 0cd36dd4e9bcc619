"""A quantized cache that leaves PyTorch gives its tokens or says what to write, and never ends the process."""

import multiprocessing
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from kvq_compile.testing.small_cache import assert_same_bytes, grown, static, tokens

MAKE = {"grown": lambda: grown(90), "static": lambda: static(100, 90)}


@pytest.fixture(params=sorted(MAKE))
def cache(request: pytest.FixtureRequest) -> Any:
    return MAKE[request.param]()


def test_numpy_lists_and_dlpack_hold_the_dequantized_tokens(cache: Any) -> None:
    dense = cache.dequantize()
    assert np.array_equal(cache.numpy(), dense.numpy())
    assert np.array_equal(np.asarray(cache), dense.numpy())
    assert cache.tolist() == dense.tolist()
    assert torch.equal(torch.from_dlpack(cache), dense)
    assert cache[:, :, :20].tolist() == dense[:, :, :20].tolist()


def test_nbytes_is_what_the_parts_take(cache: Any) -> None:
    assert cache.nbytes == sum(part.untyped_storage().nbytes() for part in cache.parts)
    assert cache.nbytes == sum(cache.part_bytes().values())


@pytest.mark.parametrize(
    "name",
    ["data_ptr", "const_data_ptr", "untyped_storage", "storage", "_typed_storage", "apply_", "map_", "map2_"],
)  # fmt: skip
def test_what_needs_the_elements_in_memory_says_what_to_write(cache: Any, name: str) -> None:
    with pytest.raises(
        NotImplementedError, match=r"^\w+ must be called on .*cache\.dequantize\(\)"
    ):
        getattr(cache, name)()


def test_safetensors_is_told_to_take_the_dequantized_tokens(cache: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"safetensors takes that"):
        save({"keys": cache})
    dense = cache.dequantize()
    assert torch.equal(load(save({"keys": dense}))["keys"], dense)


def test_shared_memory_holds_the_packed_parts(cache: Any) -> None:
    """Regression: share_memory_ ended the process with a segmentation fault."""
    before = cache.dequantize()
    assert not cache.is_shared()
    assert cache.share_memory_() is cache
    assert cache.is_shared()
    assert all(part.is_shared() for part in cache.parts)
    assert torch.equal(cache.dequantize(), before)


def test_a_grown_cache_in_shared_memory_takes_new_tokens_in_memory_of_its_own() -> None:
    cache = grown(90)
    cache.share_memory_()
    mine, theirs = cache, cache.parts
    before = [part.clone() for part in theirs]
    longer = torch.cat([mine, tokens(40, 1)], 2)
    assert all(torch.equal(part, old) for part, old in zip(theirs, before, strict=True))
    assert_same_bytes(longer, torch.cat([grown(90), tokens(40, 1)], 2))


def _read_and_grow(queue: Any, answers: Any) -> None:
    cache = queue.get(timeout=30)
    first = cache.dequantize().numpy()
    torch.cat([cache, tokens(40, 1)], 2)
    answers.put((type(cache).__name__, cache.kind, first))


def test_a_process_that_receives_a_grown_cache_does_not_touch_the_senders() -> None:
    context = multiprocessing.get_context("fork")
    queue, answers = torch.multiprocessing.get_context("fork").Queue(), context.Queue()
    cache = grown(90)
    before = cache.dequantize()
    process = context.Process(target=_read_and_grow, args=(queue, answers))
    process.start()
    queue.put(cache)
    name, kind, read = answers.get(timeout=30)
    process.join(60)
    assert (name, kind) == ("QuantizedKV", "grown")
    assert np.array_equal(read, before.numpy())
    assert_same_bytes(cache, grown(90))


def test_it_prints_what_it_is_and_no_layout() -> None:
    assert repr(grown(90)) == (
        "QuantizedKV([2, 2, 90, 64], 2-bit keys, grown, dtype=torch.float32, device=cpu)"
    )
    assert f"{static(100, 90)}".startswith("QuantizedKV([2, 2, 100, 64], 2-bit keys, static")


# Every method of a tensor

WALK = """
import sys, warnings
import numpy, torch
from torch.utils._pytree import tree_leaves
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.schemes import Uniform

warnings.simplefilter("ignore")
torch.set_num_threads(1)
LAYOUT = CacheSpec(Uniform(4), Uniform(4), sinks=1, window=1, page_size=32).layout("key", 16)
TOKENS = torch.randn(2, 1, 36, 16, generator=torch.Generator().manual_seed(0))
DENSE = QuantizedKV.from_dense(TOKENS, LAYOUT).dequantize()

def seed():  # of the CPU alone: torch.manual_seed formats a traceback for each other device
    torch.default_generator.manual_seed(0)

def calls(x):  # arguments that one method of a tensor or another takes
    order, token = torch.tensor([1, 0]), (slice(None), slice(None), slice(3, 5))
    return [
        (), (0,), (2,), (-1,), (1.5,), (1.0, 2.0), (x,), (x > 0,), (2, order), (0, 1), (2, 0, 5), (0, 1, 2, 3),
        (torch.float16,), ("cpu",), (2, order, x[:, :, :2]), (x > 0, 0.0), (x > 0, x), (lambda v: v + 1,),
        (x, lambda a, b: a + b), (x, x), (token,), (token, 1.0), (x, 0.5), (x.transpose(2, 3),), ((2,),),
    ]

def alike(got, expected):
    got, expected = tree_leaves(got), tree_leaves(expected)
    return len(got) == len(expected) and all(map(alike_leaf, got, expected))

def alike_leaf(got, expected):
    if isinstance(got, QuantizedKV):
        got = got.dequantize()
    if isinstance(expected, torch.Tensor):
        if expected.layout != torch.strided or expected.dtype is torch.complex32:
            got, expected = got.to_dense().cfloat(), expected.to_dense().cfloat()
        return got.dtype == expected.dtype and got.shape == expected.shape and torch.allclose(
            got.as_subclass(torch.Tensor), expected, atol=0, rtol=0, equal_nan=True)
    if isinstance(expected, numpy.ndarray):
        return numpy.array_equal(got, expected)
    return type(got) is type(expected) and (got == expected or not isinstance(got, (int, float, bool, str, torch.Size)))

def outcome(name, place):
    before = DENSE.clone()
    plain, arguments = DENSE.clone(), calls(before)[place]
    seed()
    try:
        method = getattr(plain, name)
        expected = method(*arguments) if callable(method) else method
    except Exception:
        return None  # a tensor does not take these either
    cache = QuantizedKV.from_dense(TOKENS, LAYOUT)
    seed()
    try:
        method = getattr(cache, name)
        got = method(*arguments) if callable(method) else method
    except (NotImplementedError, ValueError) as error:
        said = str(error)
        return "refused" if "QuantizedKV" in said and torch.equal(cache.dequantize(), before) else "unclear: " + said
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if plain.shape != before.shape or not torch.equal(plain, before):
        now = cache.dequantize()
        return "written" if torch.allclose(now, plain, atol=0.5) else "a write was lost"
    return "same" if alike(got, expected) else f"differs: {str(got)[:80]}"

for name in sys.stdin.read().split():
    for place in range(len(calls(TOKENS))):
        print(name, place, end=" ", flush=True)
        print(outcome(name, place))
"""
# What a cache is asked about itself, what differs from call to call, what only tells how a tensor is kept.
OWN = frozenset(
    (
        *(
            "__annotations__",
            "__class__",
            "__dict__",
            "__dir__",
            "__dlpack__",
            "__doc__",
            "__format__",
        ),
        *(
            "__getattribute__",
            "__getstate__",
            "__hash__",
            "__init__",
            "__init_subclass__",
            "__iter__",
        ),
        *(
            "__module__",
            "__new__",
            "__reduce__",
            "__reduce_ex__",
            "__repr__",
            "__setstate__",
            "__str__",
        ),
        *("__subclasshook__", "__weakref__", "_cdata", "_python_dispatch", "_reduce_ex_internal"),
        *("is_shared", "nbytes", "new", "new_empty"),
    )
)


def test_every_method_of_a_tensor_answers_or_refuses() -> None:
    """Regression: share_memory_, apply_ and map_ ended the process; others spoke of an invalid python storage."""
    names = [name for name in dir(torch.Tensor) if name not in OWN]
    command = [sys.executable, "-c", WALK]
    done = subprocess.run(
        command, input=" ".join(names), capture_output=True, text=True, timeout=280
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines[-1:], done.stderr[-500:])
    results = [line.split(" ", 2) for line in lines]
    assert {name for name, _, _ in results} == set(names)
    wrong = [line for line, (_, _, what) in zip(lines, results, strict=True)
             if what not in ("None", "same", "written", "refused")]  # fmt: skip
    assert wrong == []
    met = {what for _, _, what in results}
    assert met == {"None", "same", "written", "refused"}


def test_another_tensor_cannot_take_the_place_of_a_cache() -> None:
    """Regression: `data` was set of the wrapper, whose parts stayed what they were."""
    cache = static(100, 90)
    with pytest.raises(NotImplementedError, match=r"write cache.copy_\(other\)"):
        cache.data = torch.zeros(cache.shape)
    assert_same_bytes(cache.data, static(100, 90))
