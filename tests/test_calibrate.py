"""Calibrating: what texts and options may be, which are refused before they are read, and what is fitted to them."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import kvq_compile
from calibrated_llama import calibrated, ids, make_model
from kvq_compile.calibration.choose import Choice, choose
from kvq_compile.errors import KVQError
from kvq_compile.kernels.tables import read_section
from kvq_compile.testing.small_tables import random_tables

LOOKS_FAR: list[tuple[str, dict[str, Any]]] = [  # what is judged by attention beyond the window
    ("tc", {}), ("auto", {"bits": 3}),
    ("skvq", {"key_clip": "search"}), ("skvq", {"value_clip": "search"}),
]  # fmt: skip


def test_little_memory_means_more_passes_and_the_same_tables() -> None:
    texts = [ids(300, seed) for seed in range(2)]
    small = kvq_compile.calibrate(make_model(), texts, "skvq", tokens=256, value_bits=1.5, memory=1)
    assert small == calibrated("skvq")


def test_clips_that_are_searched_differ_by_group() -> None:
    texts = [ids(300, seed) for seed in range(2)]
    options = {"key_clip": "search", "value_clip": "search", "group_size": 32}
    found = kvq_compile.calibrate(make_model(), texts, "skvq", tokens=256, **options)
    found_margins = set()
    for layer in found.layers:
        for tables in (layer.key, layer.value):
            assert tables is not None
            margin = read_section(tables.words, "margin", 64).unflatten(-1, (2, 32))
            assert torch.equal(margin, margin[..., :1].expand_as(margin))
            found_margins |= set(margin.unique().tolist())
    assert len(found_margins) > 1


def test_skvq_needs_no_gradients() -> None:
    model, seen = make_model(), set()
    model.lm_head.register_forward_pre_hook(lambda *_: seen.add(torch.is_grad_enabled()))
    kvq_compile.calibrate(model, [ids(300)], "skvq", tokens=256)
    assert seen == {False}


@pytest.mark.long(but=["tc-options0"])
@pytest.mark.parametrize(("method", "options"), LOOKS_FAR)
def test_texts_whose_mask_hides_nothing_are_whole_texts(method: str, options: Any) -> None:
    plain = [ids(270, seed) for seed in range(2)]
    masked = [{"input_ids": text, "attention_mask": torch.ones_like(text)} for text in plain]
    made = [
        kvq_compile.calibrate(make_model(), texts, method, tokens=128, **options)
        for texts in (plain, masked)
    ]
    for ours, theirs in zip(made[0].layers, made[1].layers, strict=True):
        changes = [
            torch.tensor(layer.key_changes + layer.value_changes) for layer in (ours, theirs)
        ]
        torch.testing.assert_close(*changes, rtol=1e-2, atol=0)  # a mask is another product
        assert method != "skvq" or ours == theirs


@pytest.mark.long(but=["tc-options0", "skvq-options2"])
@pytest.mark.parametrize(("method", "options"), LOOKS_FAR)
def test_texts_that_no_query_outgrows_are_too_short(method: str, options: Any) -> None:
    most = 133 if method == "skvq" else 260  # by then no page is full
    message = f"sequence without padding of more than {most} tokens for "
    with pytest.raises(ValueError, match=message):
        kvq_compile.calibrate(make_model(), [ids(most)], method, tokens=128, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"key_clip": "serch"},
            "key_clip must be a number in (0, 1], \"search\" or None, got 'serch'",
        ),
        ({"value_clip": 1.5}, "value_clip must be a number in (0, 1]"),
        ({"equalize": -1}, "equalize must be a number from 0, channels as they are, to 1"),
        ({"equalize": "half"}, "got 'half'"),
        ({"reorder": 1}, "reorder must be True or False, got 1"),
        ({"pre_rope": "no"}, "pre_rope must be True or False, got 'no'"),
    ],
)
def test_options_that_cannot_be_fitted_are_named_before_texts_are_read(
    options: Any, message: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below, brackets and all
        kvq_compile.calibrate(torch.nn.Identity(), [ids(20)], "skvq", **options)
    assert message in str(caught.value)


def test_the_choice_is_the_best_within_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = random_tables(1, 16, group_size=16, rotary=False, codebook=None, seed=0)
    widths = (1.0, 2.125, 3.5)
    errors = torch.rand(4, 3, generator=generator).tolist()
    tensors = [
        [Choice({}, tables, w, e) for w, e in zip(widths, row, strict=True)] for row in errors
    ]
    for bits in (1.0, 1.7, 2.2, 3.0, 4.0):
        best = min(
            sum(errors[i][j] for i, j in enumerate(pick))
            for pick in torch.cartesian_prod(*[torch.arange(3)] * 4).tolist()
            if sum(widths[j] for j in pick) <= bits * 4
        )
        chosen = choose(tensors, bits)
        assert sum(c.error for c in chosen) == pytest.approx(best)
        assert sum(c.bits for c in chosen) <= bits * 4
    with pytest.raises(ValueError, match="bits must be 1.00 or more"):
        choose(tensors, 0.9)


def test_batches_that_cannot_be_calibrated_on_are_named() -> None:
    with pytest.raises(ValueError, match="batches must hold a sequence"):
        kvq_compile.calibrate(make_model(), [], "skvq")
    with pytest.raises(ValueError, match="must be one that is calibrated"):
        kvq_compile.calibrate(make_model(), [ids(20)], "int4")
    assert issubclass(KVQError, Exception)


@pytest.mark.parametrize(
    ("batches", "got"),
    [
        (ids(20), "got one Tensor; put it into a list"),
        ({"input_ids": ids(20)}, "got one dict; put it into a list"),
        ("text", "got one str"),
        (3, "got one int"),
        ([ids(20)[0]], "got torch.int64 [20] at place 0"),
        ([ids(20), torch.zeros(1, 20)], "got torch.float32 [1, 20] at place 1"),
        (["text"], "got str at place 0"),
    ],
)
def test_what_is_no_list_of_texts_is_named_before_anything_is_read(batches: Any, got: str) -> None:
    with pytest.raises(TypeError) as caught:
        kvq_compile.calibrate(torch.nn.Identity(), batches)
    assert got in str(caught.value)
