"""The command line parses, runs and explains itself."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers")

import kvq_compile
from kvq_compile import cli, console
from kvq_compile.compiling import compiling, watched_by
from kvq_compile.demo import compare, protocol_for
from kvq_compile.evaluation.perplexity import Score
from kvq_compile.evaluation.runner import parse_method
from kvq_compile.loading import DEMO_MODEL, DEMO_TEXT, encode_file, load_model
from one_layer import load_one_layer, save_one_layer

SMALL = "sinks=2,window=32,page_size=32,inner=eager"


@pytest.fixture
def run(monkeypatch):
    """Return a function that runs `kvq` and returns its exit code and everything it printed."""
    monkeypatch.setattr(console.console, "_width", 80)

    def invoke(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "80"})
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return invoke


@pytest.fixture(scope="module")
def shallow(tmp_path_factory) -> Path:
    """Return a folder of a model with one layer."""
    folder = tmp_path_factory.mktemp("models") / "one-layer"
    save_one_layer(folder)
    return folder


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


@pytest.mark.parametrize("arguments", [["-h"], ["eval", "-h"], ["explain", "--help"]])
def test_help_has_a_short_and_a_long_name(run, arguments) -> None:
    code, output = run(*arguments)
    assert code == 0
    assert "Usage" in output


def test_help_says_what_is_taken_where_nothing_is_given(run) -> None:
    """Regression: ``[default: our own]`` was taken for markup, and left out."""
    _, output = run("demo", "--help")
    for default in ("our own", "the demo's own", "the backend's"):
        assert f"[default: ({default})]" in " ".join(output.replace("│", " ").split())


def test_the_version_is_that_of_the_package(run) -> None:
    assert run("--version") == (0, f"kvq-compile {kvq_compile.__version__}\n")


def test_the_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "kvq_compile", "--version"]
    done = subprocess.run(command, cwd="/", check=True, capture_output=True, text=True)
    assert done.stdout == f"kvq-compile {kvq_compile.__version__}\n"


def test_the_package_lists_its_public_names() -> None:
    assert set(kvq_compile.__all__) <= set(dir(kvq_compile))
    assert all(getattr(kvq_compile, name) is not None for name in dir(kvq_compile))


MODEL = ("--model", str(DEMO_MODEL))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--method", "kivvi"), "did you mean 'kivi'"),
        (("eval", *MODEL, "--method", "int4:bitz=2"), "got 'bitz'"),
        (("eval", *MODEL), "--method must be given"),
        (("eval", *MODEL, "--method", "int4", "--prefill", "4096"), "prefill must be"),
        (("eval", *MODEL, "--method", "int4", "--plain", "fast"), "compiled or eager"),
        (("eval", *MODEL, "--method", "no.safetensors"), "calibration must be a file"),
        (("eval", *MODEL, "--method", "int4", "--calibrate-on", "/no/x"), "No such file"),
        (("eval", *MODEL, "--method", "int4", "--task", "quiz"), "task must be one of perplexity"),
        (("eval", *MODEL, "--sweep", "--task", "greedy"), "task must be perplexity"),
        (
            ("eval", *MODEL, "--method", "int4", "--task", "greedy", "--prompts", "0"),
            "prompts must",
        ),
        (("eval", *MODEL, "--method", "int4", "--task", "passkey", "--depths", "0"), "depths must"),
        (("eval", *MODEL, "--method", "int4", *2 * ("--text", str(DEMO_TEXT))), "demo.txt twice"),
        (("model", "smallm", "--out", "x"), "model must be one of smollm2, got 'smallm'"),
        (("demo", "--dtype", "int7"), "dtype must be"),
        (("demo", "--text", "/no/such/file"), "No such file"),
        (("demo", "--text", str(DEMO_MODEL / "model.safetensors")), "text must be UTF-8, got"),
        (("demo", "--model", "/no/such/folder"), "got /no/such/folder: No such folder"),
        (("explain", "--model", str(DEMO_TEXT.parent)), "which has none"),
        (("explain", "--model", str(DEMO_TEXT)), "a Hugging Face id, got the file"),
        (("explain", "--model", "no-such-model"), "that transformers can load, got no-such-model"),
        (("explain", *MODEL, "--device", "tpu"), "device must be auto, cpu, cuda"),
        (("explain", *MODEL, "--device", "cuda:99"), "device must be one that torch sees"),
        (("calibrate", *MODEL, "--text", str(DEMO_TEXT), "--out", "x", "--method", "int4"), "skvq"),
        (("calibrate", *MODEL, "--text", str(DEMO_TEXT), "--out", "/"), "got the folder /"),
    ],
)
def test_a_wrong_argument_ends_in_one_sentence(run, arguments, message) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert message in output


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", *MODEL, "--method", "int4", "--out"),
        ("calibrate", *MODEL, "--text", str(DEMO_TEXT), "--out"),
    ],
)
def test_results_that_cannot_be_written_are_told_before_anything_is_loaded(
    run, arguments, tmp_path: Path, monkeypatch
) -> None:
    for command in ("eval", "calibrate"):
        name = f"kvq_compile.commands.{command}.load"
        monkeypatch.setattr(name, lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    code, output = run(*arguments, str(tmp_path / "file" / "below"))
    assert code == 2
    assert "out must be a folder that can be written to" in output


def test_an_unexpected_error_is_named_and_its_traceback_is_shown_on_request(
    run, monkeypatch
) -> None:
    def fails(*_: object) -> None:
        raise KeyError("rope_theta")

    monkeypatch.setattr("kvq_compile.commands.explain.check_places", fails)
    code, output = run("explain", *MODEL)
    assert code == 1
    assert output == "error: KeyError: 'rope_theta'; kvq --traceback shows where\n"
    with pytest.raises(KeyError):
        run("--traceback", "explain", *MODEL)


def test_a_foreign_calibration_is_named(run, tmp_path: Path, fresh_dynamo) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, vocab_size=64,
        num_hidden_layers=1, intermediate_size=64,
    )  # fmt: skip
    other = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.arange(150)[None] % 64
    made = kvq_compile.calibrate(other, [tokens], "skvq", tokens=100)
    made.save(tmp_path / "c.safetensors")
    code, output = run("explain", *MODEL, "--method", str(tmp_path / "c.safetensors"))
    assert code == 2
    assert output.startswith("error: calibration must be of this model")
    assert output.count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "argv", ["kvq", "demo"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 1
    printed = "".join(capsys.readouterr().err.split())
    assert "pipinstallkvq-compile[transformers]" in printed


def test_the_demo_shows_both_caches(run, shallow, fresh_dynamo) -> None:
    code, output = run(
        "demo", "--model", str(shallow), "--method", f"int4:{SMALL}", "--tokens", "6", "--prompt", "150",
        "--windows", "1", "--plain", "eager",
    )  # fmt: skip
    assert code == 0
    for word in ("plain cache", "int4", "codes", "params", "exact", "effective bits", "tokens/s"):
        assert word in output
    assert "Perplexity on the text" in output


@pytest.mark.long
@pytest.mark.filterwarnings("error:`past_key_values` is deprecated")
def test_the_demo_generates_what_it_was_asked_for(fresh_dynamo) -> None:
    model, tokenizer = load_one_layer()
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


def test_eval_writes_its_table(run, shallow, tmp_path: Path, fresh_dynamo) -> None:
    code, output = run(
        "eval", "--model", str(shallow), "--method", "int8:sinks=2,window=32,page_size=32",
        "--windows", "1", "--window", "160", "--prefill", "96", "--chunk", "32",
        "--recall", "500", "--exams", "1", "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0
    assert "recall in percent of digits" in output
    lines = [line for line in output.splitlines() if not line.startswith("wrote ")]  # a path
    assert len(lines) > 2 and max(map(len, lines)) <= 80
    assert (tmp_path / "eval.csv").read_text().count("\n") == 3
    stored = json.loads((tmp_path / "eval.json").read_text())
    assert stored["about"]["model"] == shallow.name
    assert str(tmp_path) not in json.dumps(stored)
    assert [row["method"] for row in stored["scores"]] == [
        "plain",
        "int8:sinks=2,window=32,page_size=32",
    ]
    assert not (tmp_path / "eval.part.jsonl").exists()


@pytest.mark.long
def test_eval_runs_every_task_on_every_text(run, shallow, tmp_path: Path, fresh_dynamo) -> None:
    other = tmp_path / "other.txt"
    other.write_text(DEMO_TEXT.read_text()[4000:])
    code, output = run(
        "eval", "--model", str(shallow), "--method", "int8:sinks=2,window=32,page_size=32",
        "--text", str(DEMO_TEXT), "--text", str(other), "--batch", "2",
        *("--task", "perplexity", "--windows", "2", "--window", "80", "--prefill", "40"),
        *("--task", "passkey", "--length", "150", "--depths", "2", "--samples", "1"),
        *("--task", "greedy", "--prompts", "2", "--prompt", "60", "--tokens", "3"),
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0
    lines = [line for line in output.splitlines() if not line.startswith("wrote ")]  # a path
    assert max(map(len, lines)) <= 80
    assert "passkeys found" in output and "greedy continuations by 3 tokens" in output
    stored = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert stored["about"]["texts"] == ["demo.txt", "other.txt"]
    for name, key, rows in (
        ("eval", "scores", 4),
        ("passkey", "passkey", 8),
        ("greedy", "greedy", 4),
    ):
        assert len(stored[key]) == rows
        assert (tmp_path / "out" / f"{name}.csv").read_text().count("\n") == rows + 1
    assert not (tmp_path / "out" / "eval.part.jsonl").exists()


def test_explain_needs_no_text_and_no_tokenizer(run, tmp_path: Path, fresh_dynamo) -> None:
    """Regression: it read the demo's text, which is not installed with the package."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO_MODEL / name)
    code, output = run("explain", "--model", str(tmp_path), "--method", "int4")
    assert code == 0
    assert "4 attentions, 4 rewritten" in output
    assert (
        output.count("attentions 0 to 3  rewritten: ") == 2
    )  # told once a call, since they are alike
    assert "a prompt" in output
    assert "a token after it" in output


def test_explain_as_json_has_every_attention_and_nothing_else_on_stdout(fresh_dynamo) -> None:
    result = CliRunner().invoke(cli.app, ["explain", *MODEL, "--method", "int8", "--json"])
    assert result.exit_code == 0
    graphs = json.loads(result.stdout)["graphs"]
    assert [graph["title"] for graph in graphs] == ["a prompt", "a token after it"]
    outcomes = [[site["outcome"] for site in graph["attentions"]] for graph in graphs]
    assert outcomes == 2 * [["rewritten"] * 4]


@given(st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1, max_size=60))
def test_the_table_of_scores_fits_80_columns_whatever_the_method_is_called(method: str) -> None:
    score = Score(method, 16.0, 16.0, 31790.123, -100.0, 10.12345, 100.0, 9_999_000_000, 99999.0)
    score = replace(score, recall=dict.fromkeys((1024, 4096, 131072), 100.0))
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "console", Console(file=printed, width=80))
        console.show_scores([score, replace(score, method="plain")])
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "31790.123" in printed.getvalue()
    assert "9999.00 MB" in printed.getvalue()


def test_compiling_is_told_to_a_terminal_only(monkeypatch) -> None:
    terminal, pipe = io.StringIO(), io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    for stream in (terminal, pipe):
        monkeypatch.setattr(sys, "stderr", stream)
        with compiling("a graph of 3 attentions"):
            pass
    assert "kvq: compiling a graph of 3 attentions ..." in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
    assert pipe.getvalue() == ""


def test_a_program_that_watches_is_told_instead_of_the_terminal(monkeypatch) -> None:
    told: list[str | None] = []
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with watched_by(told.append), pytest.raises(ZeroDivisionError), compiling("a graph"):
        raise ZeroDivisionError
    assert told == ["a graph", None]
