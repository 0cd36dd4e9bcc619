"""The page of decoders that are served says what its rows say, and a row what became of a model's caches."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings(
        "ignore:.*should not be instantiated:DeprecationWarning"
    ),  # torch, under Dynamo
]


@pytest.fixture(scope="module")
def support():
    spec = importlib.util.spec_from_file_location("support", ROOT / "benchmarks/support.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_decoders_is_what_its_rows_say(support) -> None:
    rows = (ROOT / "benchmarks/results/support.jsonl").read_text(encoding="utf-8")
    expected = support.page([json.loads(line) for line in rows.splitlines()])
    assert support.PAGE.read_text(encoding="utf-8") == expected


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
