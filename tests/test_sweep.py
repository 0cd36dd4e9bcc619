"""The front holds what no other method beats, and the plot is drawn."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq_compile.evaluation.perplexity import Score

pytest.importorskip("matplotlib")

from kvq_compile.evaluation.plot import Point, check_plot, draw, front, points_of

BASE = Score("plain", 16.0, 16.0, 30.0, 0.0, 0.0, 100.0, 10, 5.0)
POINTS = st.lists(st.tuples(st.integers(1, 8), st.integers(30, 40)), min_size=1, max_size=12)


@given(POINTS)
def test_the_front_is_all_that_nothing_beats(drawn: list[tuple[int, int]]) -> None:
    points = [Point("", str(i), float(bits), float(kl)) for i, (bits, kl) in enumerate(drawn)]
    best = front(points)
    for point in points:
        beaten = any(
            (other.bits <= point.bits and other.kl < point.kl)
            or (other.bits < point.bits and other.kl <= point.kl)
            for other in points
        )
        same = any((b.bits, b.kl) == (point.bits, point.kl) for b in best)
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
    points = points_of(scores)
    assert [point.family for point in points] == ["int", "qaq"] * 2  # the plain cache is no point
    png, svg = draw(points, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    drawn = svg.read_text()
    assert "<svg" in drawn[:800]
    draw(points, tmp_path)
    assert svg.read_text() == drawn


def test_a_sweep_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"kvq-compile\[plot\]"):
        check_plot(measured=True)


def test_a_sweep_draws_perplexity_and_so_must_measure_it() -> None:
    with pytest.raises(ValueError, match="task must be perplexity"):
        check_plot(measured=False)
