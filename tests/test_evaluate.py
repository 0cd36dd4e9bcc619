"""The quality protocol measures what it says it measures."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from kvq_compile.evaluation.kept import Kept
from kvq_compile.evaluation.perplexity import Protocol, Score, Sums, chunks_to_do, evaluate
from kvq_compile.evaluation.recall import DIGITS, FACTS, Exam, count_right, make_exam, sit_exam
from kvq_compile.evaluation.results import write_results
from kvq_compile.evaluation.runner import PLAIN, Runner, make_runners, parse_method, parse_value
from kvq_compile.loading import DEMO_MODEL, DEMO_TEXT, encode_file, load_model, pick_dtype
from one_layer import load_one_layer

SHORT = Protocol(window=160, prefill=96, chunk=32, windows=1)
CURSORS = 2 * 2 * 4  # bytes: of keys and values, two integers each
SMALL = "int8:sinks=2,window=32,page_size=32,inner=eager"


@pytest.fixture(scope="module")
def tiny():
    return load_model(str(DEMO_MODEL), "float32", "cpu")


@pytest.fixture(scope="module")
def shallow():
    return load_one_layer()[0]


@pytest.fixture(scope="module")
def ids(tiny):
    return encode_file(tiny[1], DEMO_TEXT)


def plain_runner(model) -> Runner:
    return make_runners(model, [], compile_plain=False)[0]


def test_windows_cover_the_text_without_gaps_and_share_one_target() -> None:
    first, second = Protocol(window=4, prefill=1, windows=2).cut(range(9))
    assert first.tolist() == [0, 1, 2, 3, 4]
    assert second.tolist() == [4, 5, 6, 7, 8]


def test_a_text_one_token_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="need a text of 9 tokens, got 8"):
        Protocol(window=4, prefill=1, windows=2).cut(range(8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefill": 2048}, "prefill must be between 1 and window - 1 = 2047, got 2048"),
        ({"prefill": 0}, "prefill must be between"),
        ({"chunk": 0}, "chunk and windows must be 1 or more, got 0 and 4"),
        ({"batch": 0}, "batch must be 1 or more, got 0"),
    ],
)
def test_a_protocol_that_scores_nothing_is_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        Protocol(**settings)


@given(st.one_of(st.integers(-999, 999), st.floats(-9, 9), st.booleans(), st.none()))
def test_values_are_read_as_python_writes_them(value) -> None:
    assert parse_value(str(value)) == value
    assert type(parse_value(str(value))) is type(value)


def test_a_method_reads_its_options() -> None:
    method = parse_method("kivi:key_bits=2,value_bits=2,group_size=32")
    assert method.options == {
        "method": "kivi",
        "key_bits": 2,
        "value_bits": 2,
        "group_size": 32,
    }
    assert parse_method(PLAIN).options is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("kivvi", "kivi"), ("int4:group_sise=32", "group_size"), ("int4:32", "option=value")],
)
def test_a_misspelt_method_names_the_nearest(text, message) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(text)


def test_equal_logits_diverge_by_nothing() -> None:
    logits = torch.randn(7, 11)
    sums = Sums()
    sums.add(logits, logits.clone(), torch.arange(7))
    assert (sums.kl, sums.agreed) == (0.0, 7)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(7))
    assert math.isclose(sums.perplexity, math.exp(loss), rel_tol=1e-6)


def test_divergence_is_that_of_the_plain_distribution_from_the_quantized() -> None:
    logits, plain = torch.randn(7, 11), torch.randn(7, 11)
    sums = Sums()
    sums.add(logits, plain, torch.arange(7))
    p, q = plain.softmax(-1), logits.softmax(-1)
    assert math.isclose(sums.kl, float((p * (p / q).log()).sum()), rel_tol=1e-4)


def test_chunks_do_not_change_the_plain_perplexity(tiny, ids) -> None:
    model, _ = tiny
    whole = torch.tensor(ids[: SHORT.window + 1])
    with torch.no_grad():
        logits = model(whole[None, :-1]).logits[0, SHORT.prefill :]
    loss = torch.nn.functional.cross_entropy(logits, whole[SHORT.prefill + 1 :])
    for chunk in (7, 64):
        protocol = Protocol(SHORT.window, SHORT.prefill, chunk, windows=1)
        [score] = evaluate([plain_runner(model)], ids, protocol)
        assert math.isclose(score.perplexity, math.exp(loss), rel_tol=1e-4)
        assert (score.difference, score.kl, score.top1) == (0, 0, 100)


def test_eight_bits_halve_the_bytes_and_keep_the_perplexity(tiny, ids) -> None:
    model, _ = tiny
    runners = make_runners(model, [parse_method(SMALL)], compile_plain=False)
    steps: list[int] = []
    plain, quantized = evaluate(runners, ids, SHORT, steps.append)
    assert sum(steps) == chunks_to_do(SHORT, runners)
    assert plain.effective_bits == 32
    assert 8 < quantized.effective_bits < plain.effective_bits
    assert quantized.bytes < plain.bytes
    assert 0 < quantized.kl < 0.01
    assert abs(quantized.difference) < 1
    assert quantized.tokens_per_second > 0


def test_windows_fed_at_once_are_scored_as_one_by_one(shallow, ids) -> None:
    """Sums are over the same tokens; what differs is the rounding of matrix products of other shapes."""
    method = parse_method("int4:sinks=2,window=8,page_size=32,inner=eager")
    one, pair = (
        evaluate(
            make_runners(shallow, [method], compile_plain=False),
            ids,
            Protocol(window=96, prefill=48, chunk=16, windows=3, batch=batch),
        )
        for batch in (1, 2)
    )
    assert one[1].kl > 0
    for a, b in zip(one, pair, strict=True):
        assert a.windows == b.windows == 3
        assert a.bytes - CURSORS <= b.bytes <= a.bytes  # which sequences of a batch share
        assert math.isclose(a.perplexity, b.perplexity, rel_tol=1e-4)
        assert math.isclose(a.kl, b.kl, rel_tol=0.01, abs_tol=1e-9)


def test_a_row_whose_time_is_up_is_held_against_the_same_windows_of_the_plain_cache(
    shallow, ids
) -> None:
    protocol = Protocol(window=48, prefill=16, chunk=16, windows=3)
    method = parse_method("int8:sinks=2,window=8,page_size=32,inner=eager")
    runners = make_runners(shallow, [method], compile_plain=False)
    kept, one = Kept(), replace(protocol, windows=1)
    evaluate([runners[0]], ids, protocol, kept=kept)
    plain, cut = evaluate(runners, ids, protocol, kept=kept, seconds=1e-9)
    assert (plain.windows, cut.windows) == (3, 1)
    base, whole = evaluate(runners, ids, one)
    assert cut.difference == whole.difference
    assert base.perplexity != plain.perplexity


def test_rows_name_their_text_and_texts_do_not_share_what_was_kept(shallow, ids) -> None:
    protocol, kept = Protocol(window=48, prefill=16, chunk=16, windows=1), Kept()
    runner = plain_runner(shallow)
    [first] = evaluate([runner], ids, protocol, kept=kept, text="a")
    [second] = evaluate([runner], ids[100:], protocol, kept=kept, text="b")
    assert (first.text, second.text) == ("a", "b")
    assert first.perplexity != second.perplexity


def test_a_measurement_that_was_cut_short_goes_on_where_it_stopped(
    shallow, ids, tmp_path: Path
) -> None:
    """A row is there when it is measured, and is not measured twice."""
    protocol = Protocol(window=48, prefill=16, chunk=16, windows=2)
    methods = [
        parse_method(f"{name}:sinks=2,window=8,page_size=32,inner=eager")
        for name in ("int8", "int4")
    ]
    path, about = tmp_path / "part.jsonl", {"protocol": "short"}

    def run(fail_at: int | None = None) -> tuple[list[Score], int, list[int]]:
        runners, rows = make_runners(shallow, methods, compile_plain=False), []
        measured = []
        for runner in runners:

            def start(runner=runner, start=runner.start):
                if len(measured) == fail_at:
                    raise KeyboardInterrupt
                measured.append(runner.method.label)
                start()

            runner.start = start
        kept = Kept(path, about, shallow, ids)
        found = evaluate(runners, ids, protocol, kept=kept, done=lambda r: rows.append(len(r)))
        return found, measured, rows

    with pytest.raises(KeyboardInterrupt):
        run(fail_at=5)
    with path.open("a") as file:
        file.write('{"method": "cut o')
    resumed, measured, rows = run()
    assert measured == ["plain", methods[1].label]
    assert rows == [1, 2, 3, 3]
    path.unlink()
    whole, measured, _ = run()
    assert len(measured) == 6
    assert [replace(score, tokens_per_second=0.0) for score in resumed] == [
        replace(score, tokens_per_second=0.0) for score in whole
    ]


@pytest.mark.parametrize("change", ["about", "text", "model"])
def test_a_file_of_another_measurement_is_refused(tiny, ids, tmp_path: Path, change: str) -> None:
    model, path = tiny[0], tmp_path / "part.jsonl"
    Kept(path, {"a": 1}, model, ids)["recall", "text", "plain", 100] = 50.0
    assert Kept(path, {"a": 1}, model, ids)["recall", "text", "plain", 100] == 50.0
    about, text = {"a": 2 if change == "about" else 1}, ids[1:] if change == "text" else ids
    other = torch.nn.Linear(2, 2) if change == "model" else model
    with pytest.raises(ValueError, match="out must be empty or of this measurement"):
        Kept(path, about, other, text)


def test_evaluating_leaves_the_model_as_it_was(shallow, ids) -> None:
    before = set(vars(shallow))
    runners = make_runners(shallow, [parse_method(SMALL)], compile_plain=False)
    evaluate(runners, ids, SHORT)
    assert set(vars(shallow)) == before
    assert shallow._compiled_call_impl is None


def test_results_are_written_in_two_forms_with_the_same_rows(tmp_path: Path) -> None:
    scores = [
        Score("plain", 16.0, 16.0, 30.0, 0.0, 0.0, 100.0, 10, 5.0, {2048: 100.0}),
        Score("int4", 4.25, 4.5, 30.1, 0.3, 0.01, 97.0, 3, 6.0, {2048: 96.7}),
    ]
    table, document = write_results(scores, tmp_path / "new", {"model": "m"})
    rows = list(csv.DictReader(table.read_text().splitlines()))
    stored = json.loads(document.read_text())
    assert stored["about"] == {"model": "m"}
    assert [row["method"] for row in rows] == ["plain", "int4"]
    assert [{k: str(v) for k, v in row.items()} for row in stored["scores"]] == rows
    assert rows[1]["recall_2048"] == "96.7"


def test_an_exam_fills_its_length_and_plants_every_fact_once(tiny, ids) -> None:
    _, tokenizer = tiny
    for seed in range(5):
        exam = make_exam(tokenizer, ids, 1024, seed)
        asked = sum(len(q.prompt) + q.answer_length + len(q.ending) for q in exam.questions)
        assert len(exam.context) + asked == 1024
        text = tokenizer.decode(exam.context)
        assert text.count("Remember it.") == len(exam.questions) == FACTS
        for question in exam.questions:
            fact = tokenizer.decode(question.prompt).partition("? ")[2]
            assert text.count(f"\n{fact} {question.digits}. Remember it.\n") == 1
            assert len(question.digits) == DIGITS


def test_an_exam_depends_on_its_seed_alone(tiny, ids) -> None:
    _, tokenizer = tiny
    assert make_exam(tokenizer, ids, 512, 3) == make_exam(tokenizer, ids, 512, 3)
    assert make_exam(tokenizer, ids, 512, 3) != make_exam(tokenizer, ids, 512, 4)


def test_an_exam_without_room_is_refused(tiny, ids) -> None:
    with pytest.raises(ValueError, match="recall needs more than"):
        make_exam(tiny[1], ids, 100, 0)
    with pytest.raises(ValueError, match="a text of 50"):
        make_exam(tiny[1], ids[:50], 1024, 0)


def test_digits_are_compared_place_by_place() -> None:
    assert count_right(" 48213", "48213") == 5
    assert count_right(" 48713", "48213") == 4
    assert count_right("4821", "48213") == 4
    assert count_right("", "48213") == 0


def test_the_plain_model_recalls_and_a_context_without_facts_does_not(tiny, ids) -> None:
    model, tokenizer = tiny
    exam = make_exam(tokenizer, ids, 700, 0)
    assert sit_exam(plain_runner(model), tokenizer, exam) >= 0.9 * FACTS * DIGITS
    blank = Exam(ids[: len(exam.context)], exam.questions)
    assert sit_exam(plain_runner(model), tokenizer, blank) < 0.5 * FACTS * DIGITS


def test_a_quantized_model_recalls(tiny, ids) -> None:
    model, tokenizer = tiny
    runner = make_runners(model, [parse_method(SMALL)])[1]
    exam = make_exam(tokenizer, ids, 700, 0)
    assert sit_exam(runner, tokenizer, exam) >= 0.9 * FACTS * DIGITS


def test_the_dtype_is_full_precision_on_a_cpu_and_the_checkpoints_elsewhere() -> None:
    assert pick_dtype("auto", torch.device("cpu")) is torch.float32
    assert pick_dtype("auto", torch.device("cuda")) is None
    assert pick_dtype("checkpoint", torch.device("cpu")) is None
    assert pick_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be"):
        pick_dtype("int4", torch.device("cpu"))
