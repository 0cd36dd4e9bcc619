"""`kvq bench decode`, `memory` and `cpu` measure what they say, and tell what is not installed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvq_compile import QuantizedKV, cli
from kvq_compile.bench import memory, steps
from kvq_compile.bench.caches import Shape, random_spec
from kvq_compile.bench.rows import read_rows
from kvq_compile.kernels.packed import room_for
from versions import need_static_layers_that_count

CPU = torch.device("cpu")
SHAPE = Shape(1, 1000, heads=4, kv_heads=2, head_size=64)


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["bench", *arguments], env={"COLUMNS": "100"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.output.split())


@pytest.mark.parametrize("method", ["int4", "tc:bits=3", "cq-8c8b"])
def test_what_a_cache_takes_is_what_its_layout_says(method: str) -> None:
    """Pages with an eighth to spare, exact rows, a cursor."""
    (row,) = memory.measure([method], [SHAPE], CPU)
    assert row.refused == ""
    spec, expected = random_spec(method, SHAPE), 0.0
    for role in ("key", "value"):
        layout = spec.layout(role, SHAPE.head_size, 2)
        pages, rows = map(int, room_for(SHAPE.context, layout))
        page = layout.bits_per_element * layout.page_size * layout.head_dim / 8
        expected += SHAPE.kv_heads * (pages * page + 2 * rows * SHAPE.head_size) + 8
    assert row.bytes == expected
    assert row.bits == pytest.approx(
        8 * row.bytes / (2 * SHAPE.kv_heads * SHAPE.context * SHAPE.head_size)
    )


def test_sixteen_bits_are_sixteen_bits() -> None:
    (row,) = memory.measure([memory.PLAIN], [SHAPE], CPU)
    assert (row.bits, row.saving) == (16, 1)


def test_memory_is_counted_once_behind_views_and_inside_of_subclasses() -> None:
    x = torch.zeros(100, dtype=torch.int32)
    held = QuantizedKV.from_dense(
        torch.randn(1, 1, 40, 64), random_spec("int4", SHAPE).layout("key", 64)
    )
    parts = [held.codes, held.params, held.exact, held.cursor]
    assert memory.held_bytes({"a": x, "b": [x[:3], x.view(10, 10)]}) == 400
    assert memory.held_bytes([x, held]) == 400 + sum(
        part.untyped_storage().nbytes() for part in parts
    )


def test_the_memory_command_names_what_is_not_installed_and_goes_on(
    tmp_path: Path, monkeypatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(memory, "PEERS", (memory.PLAIN, "hf-nothing"))
    code, printed, output = invoke(
        "memory", "--device", "cpu", "--method", "int8", "--shape", "1x300", "--commit", "abc",
        "--kv-heads", "2", "--heads", "4", "--head-size", "64", "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0
    assert "times less than in 16 bit" in printed
    assert "hf-nothing: ValueError: Unknown quantization backend" in output
    rows = {row["method"]: row for row in read_rows(tmp_path / "memory.csv")}
    assert rows["16 bit"]["bytes"] == str(4 * 2 * 300 * 64)
    assert rows["hf-nothing"]["bytes"] == ""
    assert rows["int8"]["commit"] == "abc"


@pytest.mark.parametrize("run", ["int4", "tc:bits=3-static", "int4-unrecorded"])
def test_a_tuned_run_is_the_same_run_under_inductor_that_tries_tiles(run: str) -> None:
    tuned = {"inductor": {"coordinate_descent_tuning": True}}
    assert steps.method_of(run + steps.TUNED) == steps.method_of(run)
    assert steps.options_of(run + steps.TUNED) == {**steps.options_of(run), **tuned}
    steps.check_run(run + steps.TUNED)


def test_transformers_own_caches_are_tuned_where_they_compile() -> None:
    steps.check_run("hf-static-tuned")
    with pytest.raises(ValueError, match="run must be a method or one of"):
        steps.check_run("hf-quanto-tuned")


def test_steps_are_timed_over_caches_of_the_context_that_is_asked_for(tmp_path: Path) -> None:
    need_static_layers_that_count()
    runs = ("int4:inner=eager", "int4:inner=eager-static", "hf-quanto")
    arguments = [part for run in runs for part in ("--run", run)]
    code, printed, output = invoke(
        "decode", "--device", "cpu", "--model", "small", "--layers", "1", "--shape", "1x300",
        *arguments, "--commit", "abc", "--json", "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0, output
    rows = {row["run"]: row for row in json.loads(printed)["rows"]}
    assert set(rows) == set(runs)
    for run in runs[:2]:
        assert rows[run]["refused"] == ""
        assert rows[run]["waited"] > 0
        assert rows[run]["cache_bytes"] < 2 * 2 * 2 * 64 * 500
    assert rows["hf-quanto"]["waited"] is not None or "quanto" in rows["hf-quanto"]["refused"]
    kept = read_rows(tmp_path / "decode.csv")
    assert [(row["run"], row["layers"], row["commit"]) for row in kept] == [
        (run, "1", "abc") for run in runs
    ]


@pytest.mark.long
def test_a_method_decodes_the_text_that_the_plain_cache_decodes(
    monkeypatch, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    from kvq_compile.bench import cpu

    monkeypatch.setattr(cpu, "make_runners", lambda model, methods: _eager(cpu, model, methods))
    code, printed, output = invoke(
        "cpu", "--method", "int8:inner=eager", "--context", "300", "--tokens", "2", "--rounds", "2",
        "--commit", "abc", "--json", "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0, output
    plain, packed = json.loads(printed)["rows"]
    assert (plain["method"], plain["times_plain"]) == ("plain", 1)
    assert packed["method"] == "int8:inner=eager"
    assert packed["effective_bits"] < plain["effective_bits"]
    assert len(read_rows(tmp_path / "cpu.csv")) == 2


def _eager(module, model, methods):
    from kvq_compile.evaluation.runner import make_runners

    return make_runners(model, methods, compile_plain=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--device", "cpu"], "device must be a GPU for --model llama-3-8b, got cpu"),
        (["decode", "--model", "gpt"], "model must be one of llama-3-8b"),
        (["decode", "--device", "cpu", "--model", "small", "--run", "hf-static-2"], "run must be a method or one of"),
        (["decode", "--device", "cpu", "--model", "small", "--run", "int5-static"], "did you mean"),
        (["memory", "--device", "cpu", "--method", "auto"], "method must be one whose widths are known"),
        (["cpu", "--context", "100000"], "pass another --text, or a shorter --context"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_anything_is_measured(
    arguments, message, tmp_path
) -> None:
    pytest.importorskip("transformers")
    code, _, output = invoke(*arguments, "--out", str(tmp_path))
    assert code == 2
    assert message in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["hf-quanto", "hf-hqq"])
def test_the_quantized_cache_of_transformers_takes_less_than_16_bit(name: str) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip({"hf-quanto": "optimum.quanto", "hf-hqq": "hqq"}[name])
    (row,) = memory.measure([name], [replace(SHAPE, context=1024)], CPU)
    assert row.refused == ""
    assert 4 < row.bits < 8
