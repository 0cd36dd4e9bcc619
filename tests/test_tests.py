"""Tests assert what they say whatever is drawn: no assertion that a draw may skip, no number without a seed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
# Draw from the generator of torch where they are given none; hypothesis neither seeds nor replays that one.
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
DRAWS |= {"rand_like", "randn_like", "randint_like"}


def drawn_tests(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield the functions that hypothesis gives their arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names = {ast.unparse(d).split("(")[0] for d in node.decorator_list}
            if names & {"given", "rule", "invariant"}:
                yield node


def asserts(node: ast.AST) -> bool:
    """Return whether a statement holds an assertion, an assertion helper or an expected error."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assert):
            return True
        if isinstance(inner, ast.Call):
            name = ast.unparse(inner.func)
            if name.split(".")[-1].startswith("assert_") or name == "pytest.raises":
                return True
    return False


def skipped_assertions(body: list[ast.stmt]) -> Iterator[int]:
    """Yield the lines of conditions that leave some of a test's draws with fewer assertions than others."""
    for index, node in enumerate(body):
        if isinstance(node, ast.If):
            otherwise = node.orelse
            if isinstance(node.body[-1], ast.Return | ast.Continue):
                otherwise = [*otherwise, *body[index + 1 :]]
            if any(map(asserts, node.body)) != any(map(asserts, otherwise)):
                yield node.lineno
        for name in ("body", "orelse", "finalbody"):
            yield from skipped_assertions(getattr(node, name, []))


def unseeded_draws(function: ast.FunctionDef) -> Iterator[int]:
    """Yield the lines that draw numbers of torch without a generator, where no seed is set."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    names = [ast.unparse(call.func) for call in calls]
    if "torch.manual_seed" in names:
        return
    for call, name in zip(calls, names, strict=True):
        given = {keyword.arg for keyword in call.keywords}
        if name.startswith("torch.") and name[6:] in DRAWS and "generator" not in given:
            yield call.lineno


def faults(source: str) -> list[int]:
    tree = ast.parse(source)
    return sorted(
        line
        for test in drawn_tests(tree)
        for line in (*skipped_assertions(test.body), *unseeded_draws(test))
    )


def test_no_draw_skips_an_assertion_or_goes_without_a_seed() -> None:
    found = {path.name: faults(path.read_text()) for path in sorted(TESTS.glob("*.py"))}
    assert len(found) > 1
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        ("if x:\n  assert x", [3]),
        ("for y in x:\n  if y:\n   torch.testing.assert_close(x, y)", [4]),
        ("if x:\n  return\n assert x", [3]),
        ("y = torch.randn(3)\n assert y", [3]),
        ("if x:\n  assert x\n else:\n  assert not x", []),
        ("if x:\n  assert x\n  return\n assert not x", []),
        ("assume(x)\n assert x", []),
        ("y = torch.randn(3, generator=x)\n assert y", []),
        ("torch.manual_seed(x)\n assert torch.randn(3)", []),
    ],
)
def test_faults_are_found(body: str, lines: list[int]) -> None:
    """Negative twins of what the tests of this project must not do."""
    assert faults(f"@given(st.integers())\ndef test(x):\n {body}\n") == lines
    assert faults(f"@fixture\ndef test(x):\n {body}\n") == []
