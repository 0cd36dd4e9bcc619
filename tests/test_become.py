"""A 16-bit tensor becomes a quantized cache in place: the same object, its storage freed."""

import gc
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kvq_compile.kernels.cache.become import become
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.testing.small_cache import (
    LAYOUT,
    assert_same_bytes,
    static,
    tokens,
)


def test_a_tensor_that_becomes_quantized_frees_its_storage_and_stays_the_same_object() -> None:
    module = torch.nn.Module()
    module.register_buffer("keys", tokens(100))
    tensor = module.keys
    storage, reference_, identity = (
        StorageWeakRef(tensor.untyped_storage()),
        weakref.ref(tensor),
        id(tensor),
    )
    become(tensor, QuantizedKV.from_dense(tensor, LAYOUT, kind="static", length=90))
    gc.collect()
    assert storage.expired()
    assert reference_() is tensor is module.keys
    assert id(tensor) == identity
    assert_same_bytes(tensor, static(100, 90))
    tensor[:, :, 90:91] = tokens(1, 1)
    assert module.keys.held() == 91


def test_a_tensor_whose_storage_is_shared_is_left_as_it_is() -> None:
    tensor = tokens(100)
    alias = tensor.view_as(tensor)
    for shared in (tensor, alias, torch.nn.Parameter(tokens(100))):
        kind = type(shared)
        with pytest.raises(
            RuntimeError, match=r"must not share its storage|must not require gradients"
        ):
            become(shared, static(100, 90))
        assert type(shared) is kind
        assert torch.equal(shared, tokens(100))
    del alias, shared
    become(tensor, static(100, 90))
    assert_same_bytes(tensor, static(100, 90))  # type: ignore[arg-type]


def test_a_view_that_only_a_caught_error_holds_keeps_no_tensor_from_becoming_quantized() -> None:
    """Regression: what an analysis had looked at when it gave up shared the storage, until the next collection."""
    tensor = tokens(100)

    def give_up(view: torch.Tensor) -> None:
        try:
            raise ValueError(view.shape)
        except ValueError as error:
            kept = error  # noqa: F841  (a frame that holds an error which holds the frame)

    gc.disable()
    try:
        give_up(tensor.view_as(tensor))
        become(tensor, static(100, 90))
    finally:
        gc.enable()
    assert_same_bytes(tensor, static(100, 90))  # type: ignore[arg-type]
