"""Searched margins: in range, never worse for attention's output than none, and the best where groups stand alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.calibration.attention_change import Text, attend, exact
from kvq_compile.calibration.fit import Fitted, fit_uniform, quantize_dequantize
from kvq_compile.calibration.margins import MARGINS, search_margins
from kvq_compile.calibration.rotate import rotate, unrotate
from kvq_compile.lowering.find.rotation import Rotation

H, D, GROUP, SINKS, WINDOW = 2, 16, 4, 2, 4
NEIGHBOURS = tuple(range(0, D, 2)) + tuple(range(1, D, 2))  # pairs of neighbouring channels
ROTATION = Rotation(NEIGHBOURS, tuple(2**31 // 5**i for i in range(D // 2)))


def text(seed: int, T: int = 60, queries_per_kv: int = 2) -> Text:
    """Return a text whose keys and values have outliers, which clipping costs most."""
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, H, T, D, generator=generator)
    key, value = key * key.abs(), value * value.abs()
    place = (torch.randperm(T - SINKS - WINDOW, generator=generator)[:20] + SINKS + WINDOW).sort()
    query = torch.randn(H * queries_per_kv, 20, D, generator=generator)
    return Text(query, place.values, key, value, D**-0.5)


def fitted(texts: list[Text], role: str, rotation: Rotation | None) -> Fitted:
    x = torch.cat([coded(t, role, rotation) for t in texts])
    return fit_uniform(x, group_size=GROUP, paired=rotation is not None, reorder=True)


def coded(t: Text, role: str, rotation: Rotation | None) -> Tensor:
    x = getattr(t, role).transpose(0, 1)
    return x if rotation is None else unrotate(x, torch.arange(len(x)), rotation)


def change(tables: Fitted, texts: list[Text], role: str, rotation: Rotation | None) -> Tensor:
    """Return the squared change of each KV head's output by channel, ``[H, D]``."""
    total = torch.zeros(H, D)
    for t in texts:
        stored = quantize_dequantize(
            coded(t, role, rotation), tables, levels=3, group_size=GROUP, fp8=True
        )
        if rotation is not None:
            stored = rotate(stored, torch.arange(len(stored)), rotation)
        stored = stored.transpose(0, 1)
        pair = (stored, t.value) if role == "key" else (t.key, stored)
        off = attend(t, *pair, SINKS, WINDOW) - exact(t)
        total += off.square().view(H, -1, D).sum(1)
    return total


def searched(tables: Fitted, texts: list[Text], role: str, rotation: Rotation | None) -> Fitted:
    return search_margins(
        tables, texts, role, rotation,  # type: ignore[arg-type]
        levels=3, group_size=GROUP, fp8=True, sinks=SINKS, window=WINDOW,
    )  # fmt: skip


CASES = pytest.mark.parametrize(
    ("role", "rotation"), [("key", None), ("key", ROTATION), ("value", None)]
)


@CASES
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_a_search_is_never_worse_than_any_common_margin(
    role: str, rotation: Rotation | None, seed: int
) -> None:
    texts = [text(seed), text(seed + 1, T=40)]
    tables = fitted(texts, role, rotation)
    found = searched(tables, texts, role, rotation)
    least = change(found, texts, role, rotation).sum(-1)
    for margin in MARGINS:
        plain = replace(tables, margin=torch.full_like(tables.margin, margin))
        assert bool((least <= change(plain, texts, role, rotation).sum(-1) * (1 + 1e-4)).all())
    groups = found.margin.unflatten(-1, (-1, GROUP))
    assert torch.equal(groups, groups[..., :1].expand_as(groups))
    assert all(any(abs(m - tried) < 1e-6 for tried in MARGINS) for m in groups.flatten().tolist())


def test_each_group_of_values_gets_the_margin_that_is_best_for_it() -> None:
    texts = [text(7)]
    tables = fitted(texts, "value", None)
    cost = torch.stack(
        [
            change(replace(tables, margin=torch.full_like(tables.margin, m)), texts, "value", None)
            .gather(1, tables.order)
            .unflatten(-1, (-1, GROUP))
            .sum(-1)
            for m in MARGINS
        ]
    )
    best = torch.tensor(MARGINS)[cost.argmin(0)]
    found = searched(tables, texts, "value", None)
    torch.testing.assert_close(found.margin[:, ::GROUP], best)


def test_numbers_that_no_query_sees_coded_are_not_clipped() -> None:
    near = replace(text(3), place=torch.full((20,), SINKS))
    for role in ("key", "value"):
        tables = fitted([near], role, None)
        assert not searched(tables, [near], role, None).margin.any()


def test_a_search_reads_no_margins() -> None:
    texts = [text(5)]
    tables = fitted(texts, "key", ROTATION)
    clipped = replace(tables, margin=torch.full_like(tables.margin, 0.3))
    first, second = (searched(t, texts, "key", ROTATION).margin for t in (tables, clipped))
    assert torch.equal(first, second)


# Attention


@given(seed=st.integers(0, 2**16), window=st.integers(1, 70), sinks=st.integers(0, 5))
def test_only_tokens_between_sinks_and_window_are_read_as_stored(
    seed: int, window: int, sinks: int
) -> None:
    t = text(seed)
    slot = torch.arange(60)
    output = attend(t, t.key * 2, t.value + 1, sinks, window)
    for row, place in enumerate(t.place.tolist()):
        old = ((slot >= sinks) & (slot <= place - window))[:, None]
        key, value = torch.where(old, t.key * 2, t.key), torch.where(old, t.value + 1, t.value)
        key, value = (x[:, : place + 1].repeat_interleave(2, 0) for x in (key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(
            t.query[:, row : row + 1], key, value
        )
        torch.testing.assert_close(output[:, row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_nothing_quantized_is_plain_attention() -> None:
    t = text(1)
    torch.testing.assert_close(exact(t), attend(t, t.key, t.value, SINKS, WINDOW))


@given(st.integers(0, 2**16))
def test_keys_are_turned_back_and_forth(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, H, D, generator=generator)
    place = torch.randint(0, 4096, (9,), generator=generator)
    assert float((unrotate(x, place, ROTATION) - x[..., list(NEIGHBOURS)])[place > 0].abs().max())
    torch.testing.assert_close(rotate(unrotate(x, place, ROTATION), place, ROTATION), x)
