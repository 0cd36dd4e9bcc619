"""The front holds what no other method beats, and the plot is drawn."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq_compile.evaluation.perplexity import Score

pytest.importorskip("matplotlib")

from kvq_compile.evaluation.sweep import draw, front

BASE = Score("plain", 16.0, 16.0, 30.0, 0.0, 0.0, 100.0, 10, 5.0)
POINTS = st.lists(st.tuples(st.integers(1, 8), st.integers(30, 40)), min_size=1, max_size=12)


@given(POINTS)
def test_the_front_is_all_that_nothing_beats(points: list[tuple[int, int]]) -> None:
    scores = [
        replace(BASE, method=str(i), packed_bits=float(bits), perplexity=float(perplexity))
        for i, (bits, perplexity) in enumerate(points)
    ]
    best = front(scores)
    for score in scores:
        beaten = any(
            (other.packed_bits <= score.packed_bits and other.perplexity < score.perplexity)
            or (other.packed_bits < score.packed_bits and other.perplexity <= score.perplexity)
            for other in scores
        )  # fmt: skip
        same = any(
            (b.packed_bits, b.perplexity) == (score.packed_bits, score.perplexity) for b in best
        )
        assert same != beaten


def test_a_sweep_is_drawn_as_png_and_svg(tmp_path: Path) -> None:
    scores = [
        BASE,
        replace(BASE, method="int4", packed_bits=4.25, perplexity=30.1, difference=0.3),
        replace(BASE, method="qaq:bits=2.3", packed_bits=2.3, perplexity=30.3, difference=1.0),
    ]
    png, svg = draw(scores, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "int4" in svg.read_text() or "svg" in svg.read_text()[:400]
