"""The command line parses, runs and explains itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")

import kvq_compile.cli as cli
from kvq_compile.demo import compare, protocol_for
from kvq_compile.evaluation.perplexity import parse_method
from kvq_compile.loading import DEMO_MODEL, DEMO_TEXT, encode_file, load_model

SMALL = "sinks=2,window=32,page_size=32,inner=eager"


@pytest.fixture
def run(monkeypatch):
    """Return a function that runs `kvq` and returns its exit code and everything it printed."""
    monkeypatch.setattr(cli.console, "_width", 200)

    def invoke(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return invoke


def test_help_lists_the_commands(run) -> None:
    code, output = run("--help")
    assert code == 0
    assert all(command in output for command in ("demo", "eval", "explain"))


def test_help_does_not_load_transformers() -> None:
    code = (
        "import sys\nfrom kvq_compile.cli import main\nsys.argv = ['kvq', '--help']\n"
        "try: main()\nexcept SystemExit: pass\nassert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd="/", check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--method", "kivvi"), "kivi"),
        (("eval", "--model", "x", "--method", "int4:bitz=2"), "bitz"),
        (("eval", "--model", "x", "--method", "int4", "--prefill", "4096"), "prefill must be"),
        (("eval", "--model", "x", "--method", "int4", "--plain", "fast"), "compiled or eager"),
        (("demo", "--dtype", "int7"), "dtype must be"),
        (("demo", "--text", "/no/such/file"), "No such file"),
        (("demo", "--model", "/no/such/folder"), "/no/such/folder"),
    ],
)
def test_a_wrong_argument_is_named(run, arguments, message) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert message in " ".join(output.split())


def test_a_missing_extra_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "argv", ["kvq", "demo"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 1
    printed = "".join(capsys.readouterr().err.split())
    assert "pipinstallkvq-compile[transformers]" in printed


def test_the_demo_shows_both_caches(run, fresh_dynamo) -> None:
    code, output = run(
        "demo", "--method", f"int4:{SMALL}", "--tokens", "6", "--prompt", "150",
        "--windows", "1", "--plain", "eager",
    )  # fmt: skip
    assert code == 0
    for word in ("plain cache", "int4", "codes", "params", "exact", "effective bits", "tokens/s"):
        assert word in output
    assert "Perplexity on the text" in output


@pytest.mark.filterwarnings("error:`past_key_values` is deprecated")
def test_the_demo_generates_what_it_was_asked_for(fresh_dynamo) -> None:
    model, tokenizer = load_model(str(DEMO_MODEL), "float32", "cpu")
    ids = encode_file(tokenizer, DEMO_TEXT)[:200]
    method = parse_method(f"int8:{SMALL}")
    result = compare(model, tokenizer, ids, method, 150, 6, 1, compile_plain=False)
    assert result.plain.tokens == result.quantized.tokens == 6
    assert result.agreed == 6
    assert result.quantized.text == result.plain.text
    assert result.quantized.cache.tokens == result.plain.cache.tokens == 155
    assert result.quantized.cache.bytes < result.plain.cache.bytes


def test_windows_shrink_to_the_model_and_the_text() -> None:
    model, _ = load_model(str(DEMO_MODEL), "float32", "cpu")
    assert protocol_for(model, 5000, 2).window == 2048
    assert protocol_for(model, 2049, 2).windows == 1
    assert protocol_for(model, 801, 2).window == 800
    model.config.max_position_embeddings = 1024
    assert protocol_for(model, 5000, 2).window == 1024
    with pytest.raises(ValueError, match="at least 17 tokens"):
        protocol_for(model, 16, 1)


def test_eval_writes_its_table(run, tmp_path: Path, fresh_dynamo) -> None:
    code, output = run(
        "eval", "--model", str(DEMO_MODEL), "--method", f"int8:{SMALL}",
        "--windows", "1", "--window", "160", "--prefill", "96", "--chunk", "32",
        "--recall", "500", "--exams", "1", "--plain", "eager", "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0
    assert "recall 500" in output
    assert (tmp_path / "eval.csv").read_text().count("\n") == 3
    stored = json.loads((tmp_path / "eval.json").read_text())
    assert stored["about"]["model"] == DEMO_MODEL.name
    assert str(tmp_path) not in json.dumps(stored)
    assert [row["method"] for row in stored["scores"]] == ["plain", f"int8:{SMALL}"]


def test_explain_lists_every_attention(run, fresh_dynamo) -> None:
    code, output = run("explain", "--method", "int4:inner=eager")
    assert code == 0
    assert output.strip().count("\n") >= 4
