"""`kvq bench` times every method against what else is installed, and says what it could not run."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvq_compile.bench import clock, kernels
from kvq_compile.bench.caches import ROLES, Shape, boundary, filled, random_spec
from kvq_compile.bench.peers import BASELINE, PEERS
from kvq_compile.bench.place import place
from kvq_compile.bench.rows import add_rows, read_rows
from kvq_compile.kernels import ops

CPU = torch.device("cpu")
SMALL = Shape(2, 700, heads=4, kv_heads=2, head_size=64)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Time a call once: what is tested here is not how fast it is."""
    monkeypatch.setitem(clock.ROUNDS, "cpu", 1)
    monkeypatch.setattr(clock, "COLD_BYTES", 4)


@pytest.mark.parametrize("method", kernels.METHODS)
@pytest.mark.parametrize("head_size", [64, 96])
def test_every_method_attends_as_exactly_as_16_bit(method: str, head_size: int) -> None:
    case = kernels.Case(method, replace(SMALL, head_size=head_size), writes=True)
    (row,) = kernels.measure([case], CPU)
    assert row.refused == ""
    assert not row.is_wrong
    assert min(row.us, row.append_us, row.flush_us, row.gbps, row.error) > 0
    assert 1 <= row.bits < 9


@pytest.mark.parametrize("role", ROLES)
def test_a_cache_holds_its_context_and_one_token_before_the_next_page_fills_it(role) -> None:
    cache = filled(random_spec("tc:bits=3", SMALL), role, SMALL, torch.float32, CPU)
    length, pages = cache.parts[3].tolist()
    assert length == SMALL.context
    assert pages == cache.layout.pages_at(length)
    last = boundary(cache.layout, length)
    assert cache.layout.pages_at(last) == pages + 1
    assert cache.layout.pages_at(last - 1) == pages


def test_the_step_that_fills_a_page_fills_it() -> None:
    step = kernels.Step(kernels.Case("int4", SMALL), CPU)
    cursor = step.caches[0].parts[3]
    pages = int(cursor[1])
    last = boundary(step.caches[0].layout, SMALL.context) - 1
    for slot, filled_pages in ((last, pages + 1), (last, pages + 1), (SMALL.context, pages)):
        assert kernels.append_time([step], slot) > 0  # it writes as often as it is timed
        assert cursor.tolist() == [slot + 1, filled_pages]
        cursor[1] = pages


def test_layers_in_turn_have_caches_of_their_own_and_are_alike(monkeypatch) -> None:
    step = kernels.Step(kernels.Case("kivi:bits=2", SMALL), CPU)
    monkeypatch.setattr(clock, "COLD_BYTES", 2 * sum(each.packed_bytes for each in step.caches) + 1)
    layers = step.in_turn()
    assert len(layers) == 3
    kept = [part.data_ptr() for each in layers for cache in each.caches for part in cache.parts]
    assert len(kept) == len(set(kept))
    outputs = [each.attend()() for each in layers]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_an_attention_that_is_wrong_is_found(monkeypatch) -> None:
    right = ops.attend
    monkeypatch.setattr(kernels.ops, "attend", lambda *given: 1.05 * right(*given))
    (row,) = kernels.measure([kernels.Case("int8", SMALL)], CPU)
    assert row.is_wrong
    assert row.error == pytest.approx(0.05, rel=0.1)


def test_the_baseline_is_measured_first_in_each_shape() -> None:
    shapes = [SMALL, replace(SMALL, context=800)]
    wanted = kernels.cases(["int4"], ["sdpa-math", BASELINE], shapes, torch.float32)
    assert [case.method for case in wanted] == 2 * [BASELINE, "sdpa-math", "int4"]
    rows = list(kernels.measure(wanted, CPU))
    for first in (0, 3):
        assert {row.baseline_us for row in rows[first : first + 3]} == {rows[first].us}
    assert rows[0].speedup == 1


def test_what_does_not_run_is_told_and_the_rest_goes_on() -> None:
    wanted = kernels.cases(["skvq:group_size=48", "int8"], ["sdpa-cudnn"], [SMALL], torch.bfloat16)
    rows = {row.method: row for row in kernels.measure(wanted, CPU)}
    assert rows["sdpa-cudnn"].us is None
    assert "No viable backend" in rows["sdpa-cudnn"].refused
    assert "group_size" in rows["skvq:group_size=48"].refused
    assert rows["int8"].us > 0


def test_rows_are_kept_and_not_measured_again_in_the_same_place(tmp_path: Path) -> None:
    about = place(CPU, "abc")
    path = tmp_path / "kernels.csv"
    wanted = kernels.cases(["int4"], ["sdpa-cudnn"], [SMALL], torch.bfloat16)
    for row in kernels.measure(wanted, CPU):
        kernels.add(path, row, about)
    kept = kernels.rows_in(path, about)
    assert set(kept) == {kernels.key(case) for case in wanted if case.method != "sdpa-cudnn"}
    assert kernels.rows_in(path, about | {"commit": "def"}) == {}
    again = {
        row.method: row
        for row in kernels.measure(wanted, CPU, lambda case: kept.get(kernels.key(case)))
    }
    assert again["int4"] == kept[kernels.key(wanted[-1])]
    assert again["sdpa-cudnn"].refused
    (line,) = [line for line in read_rows(path) if line["method"] == "int4"]
    assert line["commit"] == "abc"
    assert line["hardware"].endswith("threads")
    assert float(line["speedup"]) > 0


def test_a_row_of_the_same_measurement_is_replaced_and_new_columns_are_added(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.csv"
    add_rows(path, [{"a": 1, "b": 2}, {"a": 2, "b": 2}], ("a",))
    add_rows(path, [{"a": 1, "b": 3, "c": 4}], ("a",))
    assert list(csv.reader(path.read_text().splitlines())) == [
        ["a", "b", "c"], ["2", "2", ""], ["1", "3", "4"]
    ]  # fmt: skip


def test_cases_run_in_processes_of_their_own_ahead(monkeypatch) -> None:
    checkout = Path(__file__).resolve().parent.parent
    monkeypatch.syspath_prepend(
        checkout
    )  # which processes inherit: they import what is tested here
    wanted = [kernels.Case(name, SMALL) for name in ("int4", "int8")]
    assert list(kernels.compile_ahead(wanted, CPU, 1)) == [(1, 2), (2, 2)]


def test_the_command_writes_rows_and_plots(tmp_path: Path) -> None:
    command = [
        *(
            sys.executable,
            "-m",
            "kvq_compile",
            "bench",
            "kernels",
            "--device",
            "cpu",
            "--commit",
            "abc",
        ),
        *("--shape", "1x1k", "--heads", "4", "--kv-heads", "2", "--head-size", "64"),
        *("--method", "int4", "--peer", "none", "--out", str(tmp_path), "--json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["commit"] == "abc"
    assert [row["context"] for row in document["rows"]] == [1024, 1024]
    assert {line["method"] for line in read_rows(tmp_path / "kernels.csv")} == {BASELINE, "int4"}
    names = {path.name for path in tmp_path.iterdir()}
    plots = {f"kernels-{what}.{kind}" for what in ("time", "speedup") for kind in ("png", "svg")}
    assert names - plots == {"kernels.csv"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "8k"], "shape must read BATCHxCONTEXT"),
        (["--method", "auto"], "method must be one whose widths are known"),
        (["--method", "int5"], "did you mean 'int"),
        (["--peer", "triton"], f"peer must be one of {', '.join(PEERS)} or none"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--kv-heads", "3"], "heads must be a multiple of kv_heads"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(options, message, tmp_path) -> None:
    from typer.testing import CliRunner

    from kvq_compile import cli

    result = CliRunner().invoke(
        cli.app, ["bench", "kernels", "--device", "cpu", "--out", str(tmp_path), *options]
    )
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())
