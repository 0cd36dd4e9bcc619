"""A method that was measured to lose too much says so before it is used, and the default does not."""

import pytest
import torch

from kvq_compile.errors import KVQWarning
from kvq_compile.measured import BETTER, FIGURES, TOO_FEW, warning
from kvq_compile.methods import METHODS
from kvq_compile.options import DEFAULT, make_spec

COSTLY = [
    ("int2", {}, "+300 %"),
    ("int4", {"key_bits": 2}, "+300 %"),
    ("kivi", {}, "+11 %"),
    ("qaq", {"bits": 2.9}, "+51 %"),
    ("qaq", {"bits": 2.3, "params": "fp8"}, "+51 %"),
]
FINE = [
    (None, {}),
    ("int8", {}),
    ("int4", {}),
    ("int3", {}),
    ("int2", {"key_bits": 4}),
    ("kivi", {"bits": 4}),
    ("kivi", {"key_bits": 4, "value_bits": 2}),
    ("qaq", {}),
    ("qaq", {"bits": 4, "params": "fp8"}),
]


@pytest.mark.parametrize(("method", "options", "cost"), COSTLY)
def test_a_method_that_loses_too_much_says_what_was_measured_and_what_to_take(
    method, options, cost
) -> None:
    text = warning(make_spec(method, **options))
    assert text is not None
    assert cost in text
    assert f"take {BETTER.method}" in text


@pytest.mark.parametrize(("method", "options"), FINE)
def test_a_method_that_holds_says_nothing(method, options) -> None:
    assert warning(make_spec(method, **options)) is None


def test_every_method_that_is_told_of_exists_and_was_measured() -> None:
    families = {figure.method.partition(":")[0] for figure in FIGURES}
    assert set(TOO_FEW) <= set(METHODS)
    assert families == {"int2" if name.startswith("int") else name for name in TOO_FEW}


def test_what_is_advised_costs_less_than_whatever_is_warned_of() -> None:
    assert all(BETTER.kl < figure.kl for figure in FIGURES)


def test_the_default_is_what_no_method_gives() -> None:
    name, options = DEFAULT
    assert make_spec() == make_spec(name, **options)
    assert make_spec(window=64) == make_spec(name, **options, window=64)


@pytest.mark.filterwarnings("always::kvq_compile.errors.KVQWarning")
def test_compiling_and_quantizing_warn() -> None:
    import kvq_compile

    keys = [torch.randn(1, 1, 40, 32) for _ in range(2)]
    torch._dynamo.reset()
    with pytest.warns(KVQWarning, match="int2 with keys of 2 bits loses too much"):
        torch.compile(lambda x: x + 1, backend="kvq", options={"method": "int2"})(torch.ones(2))
    with pytest.warns(KVQWarning, match="int2 with keys of 2 bits loses too much"):
        kvq_compile.quantize_cache_(keys, "int2", sinks=0, window=1, page_size=32)
