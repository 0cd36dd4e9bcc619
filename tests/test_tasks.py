"""Passkey retrieval and greedy continuations measure what they say they measure."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from kvq_compile.evaluation.greedy import Continuations, continue_prompts, greedy, leading
from kvq_compile.evaluation.kept import Kept
from kvq_compile.evaluation.passkey import (
    QUESTION,
    Passkeys,
    answer_length,
    ask,
    make_case,
    passkey,
)
from kvq_compile.evaluation.perplexity import Protocol
from kvq_compile.evaluation.runner import make_runners, parse_method
from kvq_compile.evaluation.tasks import check_text, usual_lengths
from kvq_compile.loading import DEMO_MODEL, DEMO_TEXT, encode_file, load_model
from one_layer import load_one_layer

SMALL = parse_method("int8:sinks=2,window=32,page_size=32,inner=eager")
COARSE = parse_method("int2:sinks=0,window=1,page_size=32,clip=0.3,inner=eager")


@pytest.fixture(scope="module")
def tiny():
    return load_model(str(DEMO_MODEL), "float32", "cpu")


@pytest.fixture(scope="module")
def shallow():
    return load_one_layer()[0]


@pytest.fixture(scope="module")
def ids(tiny):
    return encode_file(tiny[1], DEMO_TEXT)


@given(st.integers(80, 400), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.integers(0, 1 << 30))
def test_a_case_fills_its_length_and_has_its_number_at_its_depth(length, depth, seed) -> None:
    _, tokenizer = load_model(str(DEMO_MODEL), "float32", "cpu")
    filler = encode_file(tokenizer, DEMO_TEXT)
    case = make_case(tokenizer, filler, length, depth, seed)
    asked = len(tokenizer(QUESTION, add_special_tokens=False).input_ids)
    assert len(case.context) + asked + answer_length(tokenizer) == length
    assert case.digits in tokenizer.decode(case.context)
    fact = tokenizer(f"\nThe pass key is {case.digits}.", add_special_tokens=False).input_ids[:-1]
    places = [i for i in range(len(case.context)) if case.context[i : i + len(fact)] == fact]
    assert len(places) == 1
    whole = tokenizer(
        f"\nThe pass key is {case.digits}. Remember it. {case.digits} is the pass key.\n",
        add_special_tokens=False,
    ).input_ids
    assert places[0] == round(depth * (len(case.context) - len(whole)))


def test_a_case_without_room_is_refused(tiny, ids) -> None:
    with pytest.raises(ValueError, match="passkey retrieval needs more than"):
        make_case(tiny[1], ids, 30, 0.5, 0)
    with pytest.raises(ValueError, match="a text of 50"):
        make_case(tiny[1], ids[:50], 200, 0.5, 0)


def test_cases_asked_at_once_are_answered_as_one_by_one(tiny, shallow, ids) -> None:
    tokenizer = tiny[1]
    cases = [make_case(tokenizer, ids, 300, depth, 7) for depth in (0.1, 0.9)]
    for runner in make_runners(shallow, [SMALL], compile_plain=False):
        alone = [ask(runner, tokenizer, [case])[0] for case in cases]
        assert ask(runner, tokenizer, cases) == alone


def test_passkeys_are_counted_whole_and_by_digit_and_measured_once(tiny, ids, monkeypatch) -> None:
    """Answers are made up: all right for the plain cache, one digit wrong for the other."""
    model, tokenizer = tiny
    protocol = Passkeys(lengths=(150, 200), depths=2, samples=3, batch=2)
    runners = make_runners(model, [SMALL], compile_plain=False)
    asked: list[int] = []

    def answer(runner, tokenizer, cases):
        asked.append(len(cases))
        wrong = runner is not runners[0]
        return [f" {'x' if wrong else case.digits[0]}{case.digits[1:]}" for case in cases]

    monkeypatch.setattr("kvq_compile.evaluation.passkey.ask", answer)
    kept, told = Kept(), []
    rows = passkey(runners, tokenizer, ids, protocol, told.append, kept)
    assert asked == [2, 2, 2] * 4
    assert sum(told) == 2 * 2 * protocol.cases
    assert [(row.length, row.depth, row.cases) for row in rows if row.method == "plain"] == [
        (150, 0.25, 3), (150, 0.75, 3), (200, 0.25, 3), (200, 0.75, 3),
    ]  # fmt: skip
    assert {(row.found, row.digits) for row in rows if row.method == "plain"} == {(100, 100)}
    assert {(row.found, row.digits, row.plain) for row in rows if row.method != "plain"} == {
        (0, 80, 100)
    }
    assert passkey(runners, tokenizer, ids, protocol, kept=kept) == rows
    assert len(asked) == 12


def test_passkeys_whose_time_is_up_are_left_out_evenly_over_depths(tiny, ids, monkeypatch) -> None:
    model, tokenizer = tiny
    monkeypatch.setattr(
        "kvq_compile.evaluation.passkey.ask", lambda runner, tokenizer, cases: [""] * len(cases)
    )
    clock = iter(range(1000))
    monkeypatch.setattr("kvq_compile.evaluation.passkey.time.perf_counter", lambda: next(clock))
    protocol = Passkeys(lengths=(150,), depths=2, samples=5, batch=2)
    [runner] = make_runners(model, [], compile_plain=False)
    rows = passkey([runner], tokenizer, ids, protocol, seconds=3)
    assert [row.cases for row in rows] == [3, 3]


def test_the_plain_cache_continues_as_generate_does(tiny, ids) -> None:
    model, _ = tiny
    prompts = torch.tensor([ids[:90], ids[100:190]])
    [runner] = make_runners(model, [], compile_plain=False)
    expected = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, min_new_tokens=12,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    assert continue_prompts(runner, prompts, 12) == expected[:, 90:].tolist()


@pytest.mark.long
def test_a_window_over_everything_changes_no_continuation(shallow, ids) -> None:
    method = parse_method("int8:window=512,inner=eager")
    protocol = Continuations(prompts=3, prompt=70, tokens=8, batch=2)
    plain, exact = greedy(make_runners(shallow, [method], compile_plain=False), ids, protocol)
    for row in (plain, exact):
        assert (row.prompts, row.tokens) == (3, 8)
        assert (row.same, row.agreed, row.median, row.equal) == (100, 8, 8, 100)


def test_a_cache_that_is_coarse_leaves_the_continuation_early(tiny, ids) -> None:
    model, _ = tiny
    protocol = Continuations(prompts=4, prompt=200, tokens=16, batch=4)
    plain, coarse = greedy(make_runners(model, [COARSE], compile_plain=False), ids, protocol)
    assert coarse.agreed < plain.agreed == 16
    assert coarse.same < 100
    assert coarse.equal >= 100 * coarse.agreed / 16


def test_continuations_are_made_once_and_stop_when_their_time_is_up(tiny, ids, monkeypatch) -> None:
    model, _ = tiny
    protocol = Continuations(prompts=3, prompt=40, tokens=2, batch=1)
    [runner] = make_runners(model, [], compile_plain=False)
    kept = Kept()
    [cut] = greedy([runner], ids, protocol, kept=kept, seconds=1e-9)
    assert cut.prompts == 1
    [whole] = greedy([runner], ids, protocol, kept=kept)
    assert whole.prompts == 3
    monkeypatch.setattr(runner, "start", lambda: pytest.fail("it was made again"))
    assert greedy([runner], ids, protocol, kept=kept) == [whole]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.data())
def test_leading_tokens_are_those_before_the_first_that_differs(first, data) -> None:
    second = data.draw(st.lists(st.integers(0, 2), min_size=len(first), max_size=len(first)))
    count = leading(first, second)
    assert first[:count] == second[:count]
    assert count == len(first) or first[count] != second[count]


def test_a_text_or_a_context_that_is_too_short_is_told_beforehand(ids) -> None:
    check_text(Passkeys(lengths=(512,)), ids[:512], 512)
    with pytest.raises(
        ValueError, match="length must fit into the model's context of 2048, got 4096"
    ):
        check_text(Passkeys(lengths=(1024, 4096)), ids, 2048)
    with pytest.raises(ValueError, match="text must have 512 tokens for passkeys"):
        check_text(Passkeys(lengths=(512,)), ids[:511], None)
    with pytest.raises(ValueError, match="for 50 windows of 1024"):
        check_text(Continuations(), ids[:100], None)
    with pytest.raises(ValueError, match="need a text of 8193 tokens"):
        check_text(Protocol(), ids[:100], None)


def test_passkeys_are_asked_for_in_the_contexts_that_a_model_has() -> None:
    assert usual_lengths(None) == Passkeys.lengths
    assert usual_lengths(4096) == (2048, 4096)
    assert usual_lengths(1000) == (1000,)


@pytest.mark.skipif("KVQ_REAL_MODEL" not in os.environ, reason="no folder of a real model")
def test_a_real_model_finds_passkeys_through_the_default_method() -> None:
    """`kvq model smollm2` makes such a folder."""
    model, tokenizer = load_model(os.environ["KVQ_REAL_MODEL"], "float32", "cpu")
    filler = encode_file(tokenizer, Path(DEMO_TEXT))
    runners = make_runners(model, [parse_method("kivi:bits=4,inner=eager")], compile_plain=False)
    protocol = Passkeys(lengths=(1024,), depths=2, samples=2, batch=4)
    rows = passkey(runners, tokenizer, filler, protocol)
    assert all(row.plain == 100 for row in rows)
    assert all(row.found == 100 for row in rows)
