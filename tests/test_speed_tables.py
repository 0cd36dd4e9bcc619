"""Tables of speed take the newest rows of one machine, and name what is slower than 16 bit."""

import importlib
import sys
from pathlib import Path

import pytest

from kvq_compile.bench.rows import add_rows

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
KERNEL = {
    "method": "int4", "batch": 1, "context": 32768, "heads": 32, "kv_heads": 8, "head_size": 128,
    "dtype": "bfloat16", "us": 50.0, "baseline_us": 100.0, "append_us": 10.0, "flush_us": 40.0,
    "hardware": "H", "torch": "2.11.0", "triton": "3.6.0", "transformers": "", "commit": "abc",
}  # fmt: skip
STEP = {
    "model": "m", "layers": 32, "run": "hf-static", "batch": 1, "context": 4096, "waited": 10.0,
    "hardware": "H", "torch": "2.11.0", "triton": "", "transformers": "5.17.0", "commit": "abc",
}  # fmt: skip


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return the script as a module that reads rows from an empty folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delitem(sys.modules, "speed_tables", raising=False)
    module = importlib.import_module("speed_tables")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.delitem(sys.modules, "speed_tables")
    return module


def kernel_table(tables, **more):
    methods = {"int4": "four", "cq-4c8b": "book", "int8": "eight"}
    return tables.KernelTable("t", "README.md", methods, **more)


def test_a_cell_is_the_newest_row_with_its_own_baseline(tables, tmp_path: Path) -> None:
    same = tables.SPEED_FILES["kernels.csv"]
    add_rows(tmp_path / "kernels.csv", [KERNEL, KERNEL | {"commit": "def", "us": 25.0}], same)
    lines = kernel_table(tables).lines()
    assert lines[0] == "| batch x context | 16 bit | four |"
    assert lines[2] == "| 1 x 32k | 100.0 | 25.0 (4.0x) |"
    assert lines[-1] == "Measured on H, torch 2.11, triton 3.6, commit def."


def test_what_is_slower_than_16_bit_is_named_and_what_is_not_run_left_out(tables, tmp_path) -> None:
    slow = {"method": "cq-4c8b", "us": 130.0, "commit": ""}
    refused = {"method": "int8", "us": "", "refused": "why"}
    rows = [KERNEL, KERNEL | slow, KERNEL | refused]
    add_rows(tmp_path / "kernels.csv", rows, tables.SPEED_FILES["kernels.csv"])
    lines = kernel_table(tables, writes=True, digits=0).lines()
    assert lines[2] == "| 1 x 32k | 100 | 50 (2.0x) | 130 (0.8x) |"
    assert "Slower than 16 bit: book." in lines
    assert any("takes 10 µs, and 40 µs in the one step of 128" in line for line in lines)
    assert lines[-1].endswith("commit abc and some not recorded.")


def test_rows_of_another_machine_than_the_newest_are_left_out(tables, tmp_path: Path) -> None:
    rows = [KERNEL | {"method": "int8", "hardware": "old"}, KERNEL]
    add_rows(tmp_path / "kernels.csv", rows, tables.SPEED_FILES["kernels.csv"])
    assert kernel_table(tables).lines()[0] == "| batch x context | 16 bit | four |"


def test_several_head_sizes_get_a_row_each(tables, tmp_path: Path) -> None:
    rows = [KERNEL | {"head_size": size, "us": us} for size, us in ((64, 20.0), (96, 40.0))]
    add_rows(tmp_path / "kernels.csv", rows, tables.SPEED_FILES["kernels.csv"])
    lines = kernel_table(tables, sizes=(64, 96, 256)).lines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == [
        "| 1 x 32k, heads of 64", "| 1 x 32k, heads of 96",
    ]  # fmt: skip


def test_steps_are_held_against_the_first_run_at_their_shape(tables, tmp_path: Path) -> None:
    rows = [
        STEP,
        STEP | {"run": "int4", "waited": 4.0},
        STEP | {"run": "tc:bits=4", "waited": 12.5},
    ]
    add_rows(tmp_path / "decode.csv", rows, tables.SPEED_FILES["decode.csv"])
    runs = {"hf-static": "16 bit", "int4": "four", "tc:bits=4": "tc"}
    lines = tables.StepTable("t", "README.md", runs, ((1, 4096), (1, 32768))).lines()
    assert lines[2] == "| 1 x 4k | 10.0 | 4.0 (2.5x) | 12.5 (0.8x) |"
    assert "Slower than 16 bit: tc at 1 x 4k." in lines
    assert lines[-1] == "Measured on H, torch 2.11, transformers 5.17, commit abc."


def test_a_table_without_rows_says_so(tables) -> None:
    assert kernel_table(tables).lines() == ["Not measured yet."]
    assert tables.StepTable("t", "README.md", {"int4": "four"}, ((1, 1),)).lines() == [
        "Not measured yet."
    ]
