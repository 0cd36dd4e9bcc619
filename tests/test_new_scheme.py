"""A new scheme is one dataclass and one file of the specification; what finds it by its name needs no change."""

import ast
import io
import sys
import warnings
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from kvq_compile.kernels import ops, schemes
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.reference import uniform
from kvq_compile.kernels.schemes import Channelwise, Codebook, Mixed, Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.testing import assert_matches_dequantized

ROOT = Path(__file__).resolve().parent.parent
# Who may know a scheme by name. A row that goes is a file less that a new scheme touches.
MAY_KNOW = {
    "kernels/schemes.py",
    "kernels/mixed_scheme.py",
    "kernels/channelwise_scheme.py",
    "kernels/spec.py",  # the default of `CacheSpec`
    "kernels/layout.py",  # the type of an accessor
    "kernels/cache/saved.py",  # a format in which its pages were others
    *(f"kernels/cpu/{name}.py" for name in ("append", "native")),
    *(
        f"kernels/triton/{name}.py"
        for name in ("append", "arguments", "attend", "constants", "launch")
    ),
    *(f"kernels/triton/{name}.py" for name in ("pages", "schemes")),
    "kernels/tables.py",  # a section of tables that is called as the scheme that reads it
    "lowering/find/key_rotation.py",  # tells it how keys are rotated
    "lowering/find/sites.py",  # takes a cache that was told otherwise
    "kvq_compile/methods.py",  # names for users
    "kvq_compile/qaq.py",
    "kvq_compile/transform_coding.py",
    "kvq_compile/bounds.py",  # bounds that are derived; those of other schemes are measured
    "kvq_compile/bench/caches.py",  # random tables of what a scheme learns
    "kvq_compile/testing/small_cache.py",
    "kvq_compile/testing/small_tables.py",
    "kvq_compile/testing/strategies.py",
}


LAYOUTS = {
    scheme.name: Layout("key", 64, Regions(0, 0, 32), scheme)
    for scheme in (Uniform(4), Codebook(4, 4, tables="0123456789abcdef"), Mixed(2), Channelwise(2))
}


@dataclass(frozen=True, repr=False)
class Complement(Uniform):
    """Uniform codes, each as far from the highest code as it would be from the lowest."""

    name: ClassVar[str] = "complement"


def complement_file() -> ModuleType:
    """Return a file of the specification for `Complement`."""
    module = ModuleType("complement")

    def quantize_coded(
        coded: Tensor,
        layout: Layout,
        calibrated: Calibrated,
        first: int,
        importance: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        codes, params = uniform.quantize_coded(coded, layout, calibrated, first, importance)
        return ~codes, params

    def packed_values(
        codes: Tensor, params: Tensor, layout: Layout, calibrated: Calibrated
    ) -> Tensor:
        return uniform.packed_values(~codes, params, layout, calibrated)

    vars(module).update(
        quantize_coded=quantize_coded,
        packed_values=packed_values,
        check_pages=uniform.check_pages,
    )
    return module


def check_like_uniform(parts: list[Tensor], x: Tensor, layout: Layout) -> None:
    """Append the tokens of ``x`` from 90 on, and compare with all of them in uniform codes."""
    ops.append_(parts, [], x[:, :, 90:], None, 90, layout)
    plain = replace(layout, scheme=Uniform(4))
    whole = ops.quantize(x, x.shape[2], False, plain, [])
    pages = int(whole[3][1])
    assert pages == int(parts[3][1]) > 0
    assert torch.equal(parts[0][:, :, :pages], ~whole[0][:, :, :pages])
    read = ops.dequantize(parts, [], x.shape[2], layout)
    assert torch.equal(read, ops.dequantize(whole, [], x.shape[2], plain))


def test_a_scheme_that_no_backend_knows_runs_as_specified_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "kvq_compile.kernels.reference.complement", complement_file())
    monkeypatch.setattr(schemes, "SCHEMES", (*schemes.SCHEMES, Complement))
    spec = CacheSpec(Complement(4), Complement(4), sinks=2, window=5, page_size=32)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 2, 100, 64, generator=generator) for _ in range(2))
    layouts = [spec.layout("key", 64), spec.layout("value", 64)]
    new = tuple(x[:, :, 90:91] for x in (key, value))
    query = torch.randn(1, 4, 1, 64, generator=generator)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        cut = [
            ops.quantize(x[:, :, :90], 90, False, layout, [])
            for x, layout in zip((key, value), layouts, strict=True)
        ]
        out = ops.attend(query, *new, *cut, [], None, None, 90, Score(0.125), *layouts)
        held = [
            QuantizedKV.from_dense(x[:, :, :90], layout)
            for x, layout in zip((key, value), layouts, strict=True)
        ]
        assert_matches_dequantized(out, query, *new, (held[0], held[1]), scale=0.125)
        for parts, x, layout in zip(cut, (key, value), layouts, strict=True):
            check_like_uniform(parts, x, layout)
    texts = {str(warning.message) for warning in told}
    assert {text for text in texts if "complement" in text} == {
        "caches of scheme complement run as slow torch operations: "
        "kvq_compile.kernels.cpu.backend has no code for them"
    }
    file = io.BytesIO()
    torch.save(QuantizedKV.from_dense(key, layouts[0]), file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded.page_layout == layouts[0]
    assert torch.equal(loaded.dequantize(), ops.dequantize(cut[0], [], 100, layouts[0]))


@pytest.mark.parametrize("name", ["append_", "append_both_", "attend", "importance", "dequantize"])
@pytest.mark.parametrize("kind", [scheme.name for scheme in schemes.SCHEMES])
def test_a_device_without_code_of_its_own_takes_the_specification(name: str, kind: str) -> None:
    backend = ops.Backend(ops.SPECIFICATION)
    found = backend.find(name, LAYOUTS[kind])
    assert found is getattr(import_module(ops.SPECIFICATION), name)


@pytest.mark.parametrize("module", [*ops.BACKENDS.values(), ops.SPECIFICATION])
def test_every_backend_says_which_schemes_it_has_code_for(module: str) -> None:
    assert import_module(module).SCHEMES.issuperset(kind.name for kind in schemes.SCHEMES)


def names_of_schemes(path: Path) -> set[str]:
    """Return the classes and names of schemes that a file names, or compares with."""
    kinds = {kind.__name__ for kind in schemes.SCHEMES}
    words = {kind.name for kind in schemes.SCHEMES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and node.id in kinds:
            found.add(node.id)
        if isinstance(node, ast.Compare):
            constants = (x.value for x in ast.walk(node) if isinstance(x, ast.Constant))
            found |= {x for x in constants if isinstance(x, str) and x in words}
    return found


def test_only_listed_files_know_a_scheme_by_name() -> None:
    files = [
        path.relative_to(ROOT)
        for top in ("kernels", "lowering", "kvq_compile")
        for path in (ROOT / top).rglob("*.py")
        if not {"kvq_compile/kernels", "kvq_compile/lowering"}
        & set(map(str, path.relative_to(ROOT).parents))
    ]
    assert len(files) > 100
    knowing = {str(path) for path in files if names_of_schemes(ROOT / path)}
    assert knowing == MAY_KNOW
