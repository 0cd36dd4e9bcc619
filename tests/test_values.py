"""Schemes and layouts are values: made once, equal by their fields, refused every time."""

import copy
import pickle

import pytest

from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.schemes import Mixed, Uniform


def layout() -> Layout:
    return Layout("key", 64, Regions(5, 128, 128), Uniform(4, group_size=32))


def test_equal_arguments_give_one_object() -> None:
    """Regression: generated code spells layouts out at each call, and made and checked them anew."""
    assert layout() is layout()
    assert Regions(5, 128, 128) is Regions(5, 128, 128)
    assert Uniform(4) is not Uniform(8)


def test_numbers_that_are_equal_and_of_another_type_are_still_refused() -> None:
    assert Uniform(4, group_size=16).group_size == 16
    with pytest.raises(TypeError, match="group_size must be an integer, got 16.0"):
        Uniform(4, group_size=16.0)  # type: ignore[arg-type]
    assert Uniform(1).bits == 1
    with pytest.raises(TypeError, match="bits must be an integer, got True"):
        Uniform(True)


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_refused_once_is_refused_again(count: int) -> None:
    for _ in range(count):
        with pytest.raises(ValueError, match="bits must be one of"):
            Uniform(5)
        with pytest.raises(TypeError):
            Mixed([2])  # type: ignore[arg-type]


def test_copies_are_equal() -> None:
    one = layout()
    for other in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other == one
        assert hash(other) == hash(one)
