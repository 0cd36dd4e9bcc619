"""Tables of quality are what their rows say, and rows go on where they were cut short."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch):
    """Return a script of benchmarks as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tables(monkeypatch):
    return load("quality_tables", monkeypatch)


def test_every_table_of_the_documents_is_what_its_rows_say(tables) -> None:
    """So are the figures that warnings quote; `make tables` writes them."""
    for path, text in tables.documents().items():
        assert path.read_text(encoding="utf-8") == text, path.name


def test_every_figure_that_a_warning_quotes_has_a_row(tables) -> None:
    from kvq_compile.measured import BETTER, FIGURES, MODEL

    rows = {
        row["method"]
        for row in tables.read("quality.csv")
        if (row["model"], row["text"]) == (MODEL, "wikitext")
    }
    assert {figure.method for figure in (*FIGURES, BETTER)} <= rows


ROW = {"hardware": "H", "commit": "c", "model": "m", "text": "t", "method": "int4", "kl": 0.5}


def test_a_row_of_the_same_measurement_is_replaced_and_moves_to_the_end(
    tables, tmp_path: Path
) -> None:
    path = tmp_path / "quality.csv"
    tables.add_rows(path, [ROW, {**ROW, "method": "int8"}])
    tables.add_rows(path, [{**ROW, "kl": 0.25, "recall_9": 1.0}, {**ROW, "commit": "d"}])
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["method"], row["commit"], row["kl"], row["recall_9"]) for row in rows] == [
        ("int8", "c", "0.50000", ""),
        ("int4", "c", "0.25000", "1.00000"),
        ("int4", "d", "0.50000", ""),
    ]


def test_a_document_without_markers_is_refused(tables) -> None:
    with pytest.raises(ValueError, match="README.md must have the markers <!-- table front-page"):
        tables.with_tables("README.md", "nothing")


@given(st.floats(-400, 400))
def test_a_change_keeps_its_sign_and_its_size_to_half_a_percent_of_it_or_of_a_hundredth(x) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shown = load("quality_tables", patch).percent(x)
    assert shown.endswith(" %")
    assert abs(float(shown[:-2]) - x) <= max(0.01 * abs(x), 0.00501)
    assert "-0.00" not in shown


@pytest.mark.long(but=["perplexity", "greedy"])
@pytest.mark.parametrize("task", ["perplexity", "passkey", "greedy"])
def test_a_model_is_measured_into_rows_with_where_and_on_what(
    tables, task: str, tmp_path: Path, monkeypatch
) -> None:
    pytest.importorskip("transformers")
    from kvq_compile.loading import DEMO_TEXT
    from one_layer import save_one_layer

    save_one_layer(tmp_path / "model")
    quality = load("quality", monkeypatch)
    arguments = [
        "--model", f"tiny={tmp_path / 'model'}", "--text", f"demo={DEMO_TEXT}",
        "--out", str(tmp_path / "rows"),
        "--task", task, "--method", "int8:sinks=2,window=32,page_size=32", "--windows", "1",
        "--length", "150", "--samples", "1", "--batch", "5",
        "--prompts", "2", "--tokens", "2", "--commit", "abc", "--device", "cpu",
    ]  # fmt: skip
    short = quality.Protocol(window=64, prefill=32, windows=1)
    monkeypatch.setattr(quality, "Protocol", lambda **_: short)
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
    quality.main()
    kind = {"perplexity": "eval"}.get(task, task)
    rows = list(csv.DictReader((tmp_path / "rows" / tables.FILES[kind]).read_text().splitlines()))
    assert {row["method"] for row in rows} == {"plain", "int8:sinks=2,window=32,page_size=32"}
    assert {(row["commit"], row["model"], row["text"]) for row in rows} == {("abc", "tiny", "demo")}
    assert all(row["hardware"] and row["torch"] and row["dtype"] == "float32" for row in rows)
    assert [path.name for path in (tmp_path / "rows").iterdir()] == [tables.FILES[kind]]
