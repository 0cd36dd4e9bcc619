"""`kvq bench` times chunks, prompts, first calls and new processes, and says what it could not run."""

import csv
from pathlib import Path

import pytest
import torch

from kvq_compile.bench import calls, chunks, clock, steps
from kvq_compile.bench.caches import Shape
from kvq_compile.commands import bench_calls
from versions import need_static_layers_that_count

CPU = torch.device("cpu")
SHAPE = Shape(2, 300, heads=4, kv_heads=2, head_size=64)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time a call once, and a model of no size: what is tested here is not how fast it is."""
    monkeypatch.setattr(clock, "LAUNCHED", 1)
    sizes = {
        "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 64, "num_hidden_layers": 1,
    }  # fmt: skip
    monkeypatch.setitem(steps.SHAPES, "small", sizes)


@pytest.mark.parametrize("method", ["int4", "tc:bits=4", "skvq:bits=2"])
def test_a_chunk_is_attended_to_as_exactly_as_in_16_bit(method: str) -> None:
    plain, row = chunks.measure([method], [SHAPE], [40], torch.float32, CPU)
    assert (plain.method, plain.refused, row.refused) == (chunks.BASELINE, "", "")
    assert min(plain.ms, row.ms, row.read_ms, row.error) > 0
    assert row.baseline_ms == plain.ms
    assert row.times_baseline == row.ms / plain.ms
    assert not row.is_wrong


def test_a_chunk_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunks.ops.attend
    monkeypatch.setattr(chunks.ops, "attend", lambda *given: 1.05 * right(*given))
    _, row = chunks.measure(["int8"], [SHAPE], [40], torch.float32, CPU)
    assert row.is_wrong
    assert row.error == pytest.approx(0.05, rel=0.1)


def test_what_cannot_be_measured_says_why() -> None:
    _, row = chunks.measure(["cq-4c8b"], [Shape(1, 40, 2, 1, 6)], [4], torch.float32, CPU)
    assert row.ms is None
    assert row.refused != ""


@pytest.mark.long
@pytest.mark.usefixtures("fresh_dynamo")
def test_prompts_are_timed_beside_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(steps, "options_of", lambda run: {"method": run, "inner": "eager"})
    bench_calls.prefill(
        run=["int4"], shape=["1x40"], model="small", layers=1, device="cpu", commit="c",
        out=tmp_path, as_json=True,
    )  # fmt: skip
    with (tmp_path / "prefill.csv").open() as file:
        plain, row = csv.DictReader(file)
    assert (plain["run"], row["run"]) == (calls.PLAIN, "int4")
    assert float(row["plain_ms"]) == float(plain["ms"]) > 0
    assert plain["refused"] == row["refused"] == ""


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("run", ["int4", "int4-static"])
def test_a_first_call_meets_a_cache_in_16_bit(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_static_layers_that_count()
    monkeypatch.setattr(steps, "options_of", lambda run: {"method": "int4", "inner": "eager"})
    model = steps.make_model("small", 1, CPU)
    (row,) = calls.measure_first_calls(model, "small", [run], [(1, 300)])
    assert row.refused == ""
    assert row.seconds >= 0
    assert row.layer_gib * 2**30 >= 2 * 300 * 16 * 2


@pytest.mark.parametrize("run", ["hf-static", "int4-static", "unknown"])
def test_runs_without_a_dynamic_cache_are_refused(run: str) -> None:
    with pytest.raises(ValueError, match="run must|method must"):
        bench_calls._check_runs(calls, [run])


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_new_process_is_timed_from_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(steps, "options_of", lambda run: {"method": "int4", "inner": "eager"})
    monkeypatch.setattr(calls, "PROMPTED", 20)
    found = calls.start("small", 1, "int4", CPU, calls.time.time() - 1)
    assert found["first_token"] >= found["imports"] + found["prompt"] >= 1
    assert found["steps"] >= found["step"] > 0


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    row = calls._start(calls.Start("no such model", 1, "int4", "cold"), CPU, tmp_path)
    assert "KeyError" in row.refused
