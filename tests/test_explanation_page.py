"""An explanation tells the same as text, as JSON and as a page, and the page is fit to be read anywhere."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile import explain
from kvq_compile.advice import SPELL, advice
from kvq_compile.explanation_page import summary, words
from kvq_compile.explanations import Explanation
from kvq_compile.flow_picture import LANES, WIDTH, picture, place
from kvq_compile.lowering.find import reasons
from kvq_compile.lowering.sites import DENSE, Step

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)  # fmt: skip
OPTIONS = {"method": "int4", "sinks": 2, "window": 4, "page_size": 32}


class Layer(torch.nn.Module):
    """Attention to a dynamic cache, in a spelling."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor]) -> Any:
        keys, values = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        if self.spelling == "erf":
            weights = torch.softmax(torch.erf(q @ keys.mT), -1)
            return weights @ values, (keys, values)
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values), (keys, values)


class Decoder(torch.nn.Module):
    """Layers of given spellings."""

    def __init__(self, *spellings: str) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(map(Layer, spellings))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past: Any) -> Any:
        new = []
        for layer, held in zip(self.layers, past, strict=True):
            q, grown = layer(q, k, v, held)
            new.append(grown)
        return q, new


def rows(count: int) -> Tensor:
    return torch.randn(1, 2, count, 64, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def told() -> Explanation:
    """Two calls of a decoder: two attentions are served, one is read dense, one is left alone by an option."""
    torch._dynamo.reset()
    model = Decoder("sdpa", "sdpa", "erf", "sdpa")
    options = OPTIONS | {"layers": {3: None}}
    past = [(rows(70), rows(70)) for _ in model.layers]
    with torch.no_grad():
        first = explain(model, *(rows(1) for _ in range(3)), past, options=options)
        then = explain(model, *(rows(1) for _ in range(3)), first.result[1], options=options)
    return first + then


def test_text_json_and_page_tell_the_same_of_each_attention(told: Explanation) -> None:
    page = told.html("a decoder")
    seen = Text.of(page)
    graphs = json.loads(told.json())["graphs"]
    assert [asdict(graph) for graph in told.lines] == [_with_tuples(graph) for graph in graphs]
    text = " ".join(str(told).split())
    for line in (line for graph in told.lines for line in graph.attentions):
        assert line.detail in text
        assert line.detail.casefold() in seen.casefold()
        assert line.advice in text
        assert line.advice in seen
        assert line.source in text
        assert Path(line.source).name in seen


def _with_tuples(x: Any) -> Any:
    """Return what JSON made lists of as the tuples that they were."""
    if isinstance(x, dict):
        return {name: _with_tuples(value) for name, value in x.items()}
    return tuple(map(_with_tuples, x)) if isinstance(x, list) else x


def test_outcomes_bytes_and_heads_are_those_of_the_caches(told: Explanation) -> None:
    for graph in told.lines:
        outcomes = [line.outcome for line in graph.attentions]
        assert outcomes == ["rewritten", "rewritten", DENSE, "left alone"]
        first = graph.attentions[0]
        assert first.heads == "2 query, 2 KV heads of 64"
        assert first.facts.bytes_before == 2 * 2 * 64 * 2
        assert first.facts.bytes_after == 2 * 2 * 64 * 4.5 / 8
        assert first.saving == pytest.approx(16 / 4.5)
        assert first.bound is not None
        assert graph.attentions[3].saving is None
        assert graph.attentions[3].bound is None


def test_the_source_is_the_line_of_the_model(told: Explanation) -> None:
    lines = Path(__file__).read_text().splitlines()
    for line in told.lines[1].attentions[:2]:
        file, number = line.source.rsplit(":", 1)
        assert Path(file) == Path(__file__)
        assert "scaled_dot_product_attention" in lines[int(number) - 1]
        assert line.stack[-1].startswith(line.source)


def test_the_graph_is_shown_as_captured_and_as_rewritten(told: Explanation) -> None:
    for line in told.lines[1].attentions[:2]:
        assert [step.does for step in line.before if step.kind == "step"] == ["cat", "cat"]
        assert line.before[-1].does == "scaled_dot_product_attention"
        kinds = [step.kind for step in line.after]
        assert [kinds.count(kind) for kind in ("packed", "attention", "write", "step")] == [
            2,
            1,
            2,
            0,
        ]
        attend = next(step for step in line.after if step.kind == "attention")
        assert attend.does == "kvq.attend"
        assert set(attend.inputs) == {
            step.name for step in line.after if step.kind in ("input", "packed")
        }
        names = {step.name for step in line.after}
        assert all(set(step.inputs) <= names for step in line.after)
        assert f"past[{line.layer}][0] = packed cache" in words(line.after)


def test_one_attention_is_another_ones_input_and_no_part_of_its_picture(told: Explanation) -> None:
    for flow in (told.lines[1].attentions[2].before, told.lines[1].attentions[2].after):
        attentions = ("scaled_dot_product_attention", "kvq.attend")
        assert not [step for step in flow if step.does in attentions]
        assert "other attention" in [step.does for step in flow]


def test_a_summary_counts_what_the_last_call_became(told: Explanation) -> None:
    said = summary(told.lines)
    assert said.startswith(
        "3 of 4 attentions keep their cache quantized, by int4. 1 of them reads it"
    )
    assert said.endswith("3.6 times less than in bfloat16.")
    assert summary(()).startswith("No attention was met")
    assert "No attention was met" in Explanation((), None).html()


@pytest.mark.parametrize(
    "reason", [value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str)]
)  # fmt: skip
def test_a_reason_that_has_a_name_has_an_advice_of_its_own(reason: str) -> None:
    spells = reasons.A_PART_IS_KEPT, reasons.OVERWRITTEN, reasons.NOT_UNDERSTOOD
    assert advice(reason) != SPELL or reason in spells
    assert advice(reason).endswith(".")


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("attention reads a cache that this call does not write", "in one graph"),
        (
            "the cache reaches attention through cat, which is not understood as new tokens behind those held",
            "drop tokens between the calls",
        ),
        (
            "the cache reaches attention through getitem; attention reads a part of it (sliding window?)",
            "a mask, or what is kept, leaves tokens out",
        ),
    ],
)
def test_advice_is_about_what_the_reason_says(reason: str, words: str) -> None:
    """Regression: the advice was to change tokens before they are written, or to report the line of source."""
    assert words in advice(reason)


class Text(HTMLParser):
    """Reads the text of a page, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            f"{name}={value}" for name, value in attrs if name in ("src", "href", "srcset")
        ]

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @classmethod
    def of(cls, page: str) -> str:
        parser = cls()
        parser.feed(page)
        return " ".join("".join(parser.text).split())


def test_a_page_is_one_file_without_scripts_that_loads_nothing(told: Explanation) -> None:
    parser = Text()
    page = told.html("<b>a & b</b>")
    parser.feed(page)
    assert parser.loads == []
    assert not {"script", "link", "img", "iframe", "object"} & set(parser.tags)
    assert "@import" not in page
    assert "url(" not in page
    assert "<b>a & b</b>" not in page
    assert "<b>a & b</b>" in Text.of(page)


NAMES = [f"n{i}" for i in range(8)]


@st.composite
def flows(draw: st.DrawFn) -> tuple[Step, ...]:
    """Draw steps in order, each of some of those before it, one of them an attention."""
    count = draw(st.integers(1, 8))
    attention = draw(st.integers(0, count - 1))
    steps = []
    for number, name in enumerate(NAMES[:count]):
        inputs = draw(st.lists(st.sampled_from(NAMES[:number]), unique=True)) if number else []
        kind = (
            "attention"
            if number == attention
            else draw(st.sampled_from(["step", "input", "write"]))
        )
        steps.append(
            Step(name, "does", "bfloat16 [1]", draw(st.sampled_from(LANES)), kind, tuple(inputs))
        )
    return tuple(steps)


@given(flows())
def test_boxes_of_a_picture_lie_inside_it_and_beside_one_another(flow) -> None:
    boxes = place(flow)
    assert {box.step for box in boxes} == set(flow)
    spans = [(box.row, box.left, box.left + box.width) for box in boxes]
    assert all(0 <= left < right <= WIDTH for _, left, right in spans)
    for number, (row, left, right) in enumerate(spans):
        assert all(r != row or right <= a or b <= left for r, a, b in spans[:number])
    height = int(re.search(r'viewBox="0 0 \d+ (\d+)"', picture(flow, "x"))[1])
    assert max(box.top for box in boxes) < height


# In a frame, since a window is never narrower than 500 pixels.
CHECK = """<script>addEventListener("load", () => {
  const outside = [...document.querySelectorAll("body *:not(title)")].filter(e => {
    const box = e.getBoundingClientRect(); return box.width && (box.right > innerWidth + 1 || box.left < -1) });
  parent.postMessage([innerWidth, document.documentElement.scrollWidth, outside.length,
    +matchMedia("(prefers-color-scheme: dark)").matches, document.body.innerText.length].join(" "), "*") })</script>"""
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><script>
addEventListener("message", e => document.documentElement.dataset.told = e.data)</script>
<iframe src="page.html" style="width: {width}px; height: 1200px; border: 0"></iframe>"""


def chromium(page: Path, width: int, dark: bool, *arguments: str) -> str:
    """Show a page and return what Chromium prints."""
    assert CHROMIUM is not None
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *(f"--window-size={width},1600", f"--user-data-dir={page.parent / 'profile'}", *arguments),
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.skipif(
    CHROMIUM is None,
    reason="needs Chromium: no chromium, chromium-browser or google-chrome on PATH",
)
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_fits_a_phone_and_a_desk_in_light_and_dark(told, width: int, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    page, frame = tmp_path / "page.html", tmp_path / "frame.html"
    opened = told.html("a decoder").replace("<details>", "<details open>")
    page.write_text(opened.replace("</body>", f"{CHECK}</body>"))
    frame.write_text(FRAME.format(width=width))
    brightness = []
    for dark in (False, True):
        dom = chromium(frame, 1400, dark, "--virtual-time-budget=5000", "--dump-dom")
        seen = re.search(r'data-told="([\d ]+)"', dom)
        assert seen is not None
        inner, scroll, outside, is_dark, letters = map(int, seen[1].split())
        assert (inner, outside, is_dark) == (width, 0, dark)
        assert scroll <= width
        assert letters > 1000
        shot = tmp_path / f"{dark}.png"
        chromium(page, width, dark, f"--screenshot={shot}")
        pixels = image.imread(shot)[..., :3]
        assert pixels.shape[1] == width
        brightness.append(pixels.mean())
    light, dark_ = brightness
    assert light > 0.85
    assert dark_ < 0.25


def test_the_command_writes_the_page_to_a_file(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from typer.testing import CliRunner

    from kvq_compile import cli

    torch._dynamo.reset()
    page = tmp_path / "page.html"
    result = CliRunner().invoke(cli.app, ["explain", "--method", "int8", "--html", str(page)])
    assert result.exit_code == 0, result.output
    assert f"wrote {page}" in result.output.replace(os.linesep, "")
    seen = Text.of(page.read_text())
    assert "kvq-tiny-2.6m, int8" in seen
    assert "All 4 attentions keep their cache quantized" in seen
    assert "A prompt" in seen
    assert "A token after it" in seen
    assert "llama/modeling_llama.py:" in seen
