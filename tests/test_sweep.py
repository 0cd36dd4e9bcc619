"""The front holds what no other method beats, and the plot is drawn."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq_compile.evaluation.perplexity import Score

pytest.importorskip("matplotlib")

from kvq_compile.evaluation.sweep import check_plot, draw, front

BASE = Score("plain", 16.0, 16.0, 30.0, 0.0, 0.0, 100.0, 10, 5.0)
POINTS = st.lists(st.tuples(st.integers(1, 8), st.integers(30, 40)), min_size=1, max_size=12)


@given(POINTS)
def test_the_front_is_all_that_nothing_beats(points: list[tuple[int, int]]) -> None:
    scores = [
        replace(BASE, method=str(i), packed_bits=float(bits), kl=float(kl))
        for i, (bits, kl) in enumerate(points)
    ]
    best = front(scores)
    for score in scores:
        beaten = any(
            (other.packed_bits <= score.packed_bits and other.kl < score.kl)
            or (other.packed_bits < score.packed_bits and other.kl <= score.kl)
            for other in scores
        )  # fmt: skip
        same = any((b.packed_bits, b.kl) == (score.packed_bits, score.kl) for b in best)
        assert same != beaten


def test_a_sweep_of_two_texts_is_drawn_as_png_and_svg(tmp_path: Path) -> None:
    scores = [
        replace(score, text=text)
        for text in ("wiki", "code")
        for score in (
            BASE,
            replace(BASE, method="int4", packed_bits=4.25, kl=0.01),
            replace(BASE, method="qaq:bits=2.3", packed_bits=2.3, kl=0.1),
        )
    ]
    png, svg = draw(scores, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()[:800]


def test_a_sweep_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"kvq-compile\[plot\]"):
        check_plot(measured=True)


def test_a_sweep_draws_perplexity_and_so_must_measure_it() -> None:
    with pytest.raises(ValueError, match="task must be perplexity"):
        check_plot(measured=False)
