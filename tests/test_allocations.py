"""Nothing that the project allocates depends on the process: not on the default dtype, not on the default device.

The rule, which the first test holds every source file to: where a torch factory is called, a function that makes a
tensor without taking dtype and device from another tensor, ``dtype`` and ``device`` are both named. Where it becomes
the target of a graph node, the node's keyword arguments name both. Functions ``*_like`` and methods ``new_*`` take
from their tensor what they do not name, so they may leave it out.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LINKS = (ROOT / "kvq_compile" / "kernels", ROOT / "kvq_compile" / "lowering")
SOURCES = sorted(
    path
    for folder in ("kernels", "lowering", "kvq_compile")
    for path in (ROOT / folder).rglob("*.py")
    if not any(path.is_relative_to(link) for link in LINKS)
)
NAMED = {"dtype", "device"}


def factories() -> set[str]:
    """Return the names of the functions of torch whose schemas take a dtype and a device, but for ``*_like``."""
    found = {"tensor", "as_tensor", "asarray"}  # written in Python or C++, without a schema
    for name in dir(torch):
        packet = getattr(torch.ops.aten, name, None) if not name.startswith("_") else None
        if packet is None or name.endswith("_like"):
            continue
        schemas = (getattr(packet, overload)._schema for overload in packet.overloads())
        if any({x.name for x in schema.arguments} >= NAMED for schema in schemas):
            found.add(name)
    return found


FACTORIES = factories()


def is_factory(node: ast.Attribute) -> bool:
    return ast.unparse(node.value) == "torch" and node.attr in FACTORIES


def named_by(call: ast.Call) -> set[str]:
    """Return what a call names: its keywords and the keys of the dicts written among its arguments."""
    dicts = [x for x in call.args if isinstance(x, ast.Dict)]
    keys = {key.value for x in dicts for key in x.keys if isinstance(key, ast.Constant)}
    return {str(key) for key in keys} | {str(keyword.arg) for keyword in call.keywords}


def unnamed_allocations(text: str) -> Iterator[str]:
    """Yield ``line: source`` of each factory in ``text`` that leaves its dtype or device to the process."""
    tree = ast.parse(text)
    named: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from (f"{node.lineno}: {x.name}" for x in node.names if x.name in FACTORIES)
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) == "torch.Tensor":
                yield f"{node.lineno}: {ast.unparse(node)}"
            if named_by(node) >= NAMED:
                named |= {id(x) for x in (node.func, *node.args)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_factory(node) and id(node) not in named:
            yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_allocation_names_its_dtype_and_its_device(path: Path) -> None:
    assert not list(unnamed_allocations(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "text",
    [
        "torch.empty(3)",
        "torch.zeros((), dtype=torch.float32)",
        "torch.arange(4, device=x.device)",
        "torch.tensor([1, 2])",
        "torch.full((2,), 1.0, dtype=torch.float32)",
        "torch.Tensor(3)",
        "from torch import zeros",
        "graph.call_function(torch.ones, (2,), {'dtype': torch.bool})",
        "make = torch.empty",
    ],
)
def test_an_allocation_that_leaves_one_to_the_process_is_found(text: str) -> None:
    assert len(list(unnamed_allocations(text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "torch.empty(3, dtype=torch.float32, device='cpu')",
        "graph.call_function(torch.ones, (2,), {'dtype': torch.bool, 'device': device})",
        "torch.zeros_like(x)",
        "x.new_empty(3)",
        "def f(x: torch.Tensor) -> list[torch.Tensor]: return isinstance(x, torch.Tensor)",
        "torch.cat([x, y])",
    ],
)
def test_what_names_both_or_inherits_them_is_left_alone(text: str) -> None:
    assert not list(unnamed_allocations(text))


def test_the_factories_are_those_of_torch() -> None:
    assert {"empty", "zeros", "ones", "full", "arange", "rand", "randn", "randperm"} <= FACTORIES
    assert not FACTORIES & {"cat", "where", "zeros_like", "to", "add"}
