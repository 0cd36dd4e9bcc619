"""``KVQ_LOGS`` tells what the lowering sees, changes and costs."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile.lowering import logs
from kvq_compile.lowering.pipeline import ANALYSIS, PASSES, REWRITING
from refused_steps import compile_, grown, join

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def step(query, key, value, keys, values):
    keys, values = join(keys, values, key, value)
    return sdpa(query, keys, values), keys, values


def heard(caplog, name: str) -> list[str]:
    """Return what the logger ``kvq_compile.<name>`` says while a step over quantized caches is compiled."""
    with caplog.at_level(logging.DEBUG, logger=f"kvq_compile.{name}"), torch.no_grad():
        compile_(step)(*grown(quantized=True)())
    return [
        record.getMessage() for record in caplog.records if record.name == f"kvq_compile.{name}"
    ]


def test_sites_tells_of_each_attention(caplog) -> None:
    (line,) = heard(caplog, "sites")
    assert "rewritten: reads the quantized cache, quantizes on write" in line


def test_passes_tells_each_change_under_the_name_of_its_pass(caplog) -> None:
    lines = heard(caplog, "passes")
    names = {function.__name__ for function in PASSES}
    assert {line.partition(":")[0] for line in lines} <= names
    fused = [line for line in lines if line.startswith("fuse_attention: ")]
    assert len(fused) == 1
    assert "scaled_dot_product_attention" in fused[0]


def test_graphs_shows_the_nodes_around_a_site_before_and_after(caplog) -> None:
    (text,) = heard(caplog, "graphs")
    gone = [line for line in text.splitlines() if line.startswith("-")]
    made = [line for line in text.splitlines() if line.startswith("+")]
    assert any("scaled_dot_product_attention(" in line for line in gone)
    assert sum("cat(" in line for line in gone) == 2
    assert sum(" = attend" in line for line in made) == 1
    assert sum(" = append_both_" in line for line in made) == 1


def test_timing_tells_the_time_of_every_pass(caplog) -> None:
    lines = heard(caplog, "timing")
    assert [line.partition(":")[0] for line in lines] == [
        pass_.__name__ for pass_ in (*ANALYSIS, *REWRITING)
    ]
    assert all(line.endswith(" ms") for line in lines)


def test_nothing_is_told_that_nobody_asked_for(caplog) -> None:
    with caplog.at_level(logging.DEBUG, logger="kvq_compile.timing"), torch.no_grad():
        compile_(step)(*grown(quantized=True)())
    assert {record.name for record in caplog.records if record.name.startswith("kvq_compile")} == {
        "kvq_compile.timing"
    }


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="KVQ_LOGS must list some of sites, passes, graphs, timing"
    ):
        logs.turn_on("sites, nodes")


@pytest.mark.long(but=["KVQ_LOGS-passes"])
@pytest.mark.parametrize(
    ("variable", "value"), [("KVQ_LOGS", "passes"), ("TORCH_LOGS", "+kvq_compile")]
)
def test_the_environment_turns_logs_on(variable, value) -> None:
    program = """
import torch
def step(q, k, v):
    k, v = k + 1, v + 1
    return torch.nn.functional.scaled_dot_product_attention(q, k, v), k, v
x = torch.ones(1, 2, 4, 16)
torch.compile(step, backend="kvq", options={"inner": "eager"})(x, x, x)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {variable: value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "quantize_outputs: " in done.stderr
    assert "leaves as made cache" in done.stderr
