"""The page of decoders that are served says what its rows say, and a row what became of a model's caches."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
FIRST = (BENCHMARKS / "results/support.jsonl").read_text(encoding="utf-8").partition("\n")[0]
if not json.loads(FIRST)["versions"].endswith(f"transformers {transformers.__version__}"):
    pytest.skip("decoders of another transformers were surveyed", allow_module_level=True)
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings(
        "ignore:.*should not be instantiated:DeprecationWarning"
    ),  # torch, under Dynamo
]


@pytest.fixture(scope="module")
def support():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        spec = importlib.util.spec_from_file_location("support", BENCHMARKS / "support.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(support) -> list[dict]:
    return [json.loads(line) for line in support.ROWS.read_text(encoding="utf-8").splitlines()]


def test_the_page_of_decoders_is_what_its_rows_say(support, rows) -> None:
    assert support.PAGE.read_text(encoding="utf-8") == support.page(rows)


def test_every_empty_cell_of_a_mode_has_its_reason(support) -> None:
    text = support.PAGE.read_text(encoding="utf-8")
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    empty = {
        (mode.strip(), cells[0].strip(" `"))
        for cells in table[1:]
        for mode, cell in zip(table[0][1:5], cells[1:5], strict=True)
        if not cell.strip()
    }
    _, _, left = text.partition("## Modes that models do not run in without kvq")
    reasons = re.findall(r"^- (\w+, \w+): (?:.+) \((.+)\)$", left, re.MULTILINE)
    assert {(mode, model) for mode, models in reasons for model in models.split(", ")} == empty


@pytest.mark.parametrize("left", [[], [{"unfinished": "took too long or ended its process"}]])
def test_a_mode_that_was_not_surveyed_to_its_end_is_not_written_as_an_empty_cell(
    support, rows, left
) -> None:
    mode = {"model": "llama", "attention": "sdpa", "cache": "static"}
    others = [row for row in rows if not mode.items() <= row.items()]
    versions = {"versions": rows[0]["versions"]}
    with pytest.raises(ValueError, match="got none of llama sdpa-static; survey these"):
        support.page([*others, *[mode | versions | more for more in left]])


@pytest.mark.long(but=["diffllama-dense"])
@pytest.mark.parametrize(
    ("model", "kind"), [("llama", "packed"), ("deepseek_v2", "packed"), ("diffllama", "dense")]
)
def test_a_row_counts_the_tensors_that_are_read_packed_and_dense(support, model, kind) -> None:
    row = support.survey(model, "eager", "dynamic")
    counts = {name: row[name] for name in ("packed", "dense", "plain")}
    assert counts == {"packed": 0, "dense": 0, "plain": 0, kind: 4}
    assert row["error"] < 0.01


def test_what_keeps_a_model_from_being_tried_is_told(support) -> None:
    row = support.survey("bloom", "sdpa", "dynamic")
    assert row["untried"].startswith("ValueError: BloomForCausalLM does not support")


@pytest.mark.parametrize(
    "model", ["bamba", "granitemoehybrid", "recurrent_gemma", "zamba2", "lfm2_moe"]
)
def test_a_surveyed_model_has_layers_that_attend(support, model) -> None:
    config = support.small_config(model, {})
    assert any(support.ATTENDING.search(kind) for kind in support.kinds_of_layers(config))
    assert config.num_hidden_layers <= 4


@pytest.mark.parametrize("model", ["mamba", "openai-gpt"])
def test_a_model_without_keys_and_values_is_told_from_one_that_fails(support, model) -> None:
    row = support.survey(model, "eager", "dynamic")
    assert row["untried"].startswith("the model keeps no keys and values: it returns logits")
