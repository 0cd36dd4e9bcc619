"""The package installs under one name, imports in one direction and imports little."""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "lowering")
LOWERING = sorted((ROOT / "lowering").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
TOP = sorted(
    path
    for path in (ROOT / "kvq_compile").rglob("*.py")
    if path.relative_to(ROOT / "kvq_compile").parts[0] not in LINKED
)


def run_python(code: str) -> str:
    """Run ``code`` in a fresh interpreter outside the checkout and return what it prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imported_names(path: Path) -> Iterator[str]:
    """Yield the full name of everything ``path`` imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_the_name_kernels_is_left_to_hugging_face() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or "site-packages" in spec.origin
    origin = run_python(
        "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    )
    assert origin == "None" or "site-packages" in origin


@pytest.mark.parametrize("folder", ["kernels", "lowering"])
def test_linked_folders_have_no_init_file(folder: str) -> None:
    link = ROOT / "kvq_compile" / folder
    if (ROOT / "PKG-INFO").exists():  # an unpacked source distribution, where links are copies
        names = sorted(path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py"))
        assert names == sorted(path.relative_to(link) for path in link.rglob("*.py"))
        assert all((link / x).read_bytes() == (ROOT / folder / x).read_bytes() for x in names)
    else:
        assert link.resolve() == ROOT / folder
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the names of the files of the source distribution, below its folder."""
    build_meta = pytest.importorskip("setuptools.build_meta")
    out = tmp_path_factory.mktemp("sdist")
    copy = out / "checkout"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".*", "*.egg-info"))
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert build_meta is not None
    [archive] = out.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        return {name.partition("/")[2] for name in packed.getnames()}


def test_the_source_distribution_carries_what_its_tests_need(distributed: set[str]) -> None:
    """Regression: it had neither the tests' helpers nor the model that they load."""
    needed = {"Makefile", "README.md", "pyproject.toml", "tests/conftest.py"}
    for folder in ("tests", "examples", "benchmarks", "docs", "kernels", "lowering"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        needed |= {
            path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts
        }
    assert len(needed) > 100  # an empty walk would prove nothing
    assert needed - distributed == set()
    assert not [name for name in distributed if "__pycache__" in name or name.endswith(".pyc")]


def test_every_module_is_in_the_source_distribution(distributed: set[str]) -> None:
    modules = {f"kvq_compile/{path.relative_to(ROOT)}" for path in (*KERNELS, *LOWERING)}
    modules |= {str(path.relative_to(ROOT)) for path in TOP}
    native = [path for kind in ("*.cpp", "*.h") for path in (ROOT / "kernels").rglob(kind)]
    modules |= {f"kvq_compile/{path.relative_to(ROOT)}" for path in native}
    assert native
    assert modules - distributed == set()


def test_no_module_hides_something_public() -> None:
    """A module `report` would take the place of the function `report` as soon as anything imports it."""
    import kvq_compile

    folder = ROOT / "kvq_compile"
    modules = {path.stem if path.is_file() else path.name for path in folder.iterdir()}
    assert {"reports", "options", "kernels"} <= modules
    assert modules & set(kvq_compile.__all__) == set()


def test_the_version_is_written_once() -> None:
    import kvq_compile

    assert f'"{kvq_compile.__version__}"' not in (ROOT / "pyproject.toml").read_text()


def test_every_folder_of_code_is_a_package_that_gets_installed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    folders = {path.parent.relative_to(ROOT) for path in (*KERNELS, *LOWERING)}
    folders = {Path("kvq_compile") / folder for folder in folders}
    folders |= {path.parent.relative_to(ROOT) for path in TOP}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == {".".join(folder.parts) for folder in folders}
    assert len(folders) > 10  # an empty walk would prove nothing


def test_the_installed_package_is_an_ordinary_one() -> None:
    """Regression: installed before it had an `__init__.py`, it was found as a bare namespace."""
    origin = run_python("import kvq_compile; print(kvq_compile.__file__)")
    assert origin.endswith("kvq_compile/__init__.py")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_backend_never_imports_the_specification_nor_the_other_way_round(backend: str) -> None:
    """What it is held to would otherwise say nothing; `ops` alone puts the one in the other's place."""
    folders = {name: ROOT / "kernels" / name for name in (backend, "reference")}
    for folder, other in ((backend, "reference"), ("reference", backend)):
        files = sorted(folders[folder].glob("*.py"))
        assert len(files) > 5  # an empty walk would prove nothing
        names = {name for path in files for name in imported_names(path)}
        assert not [name for name in names if is_inside(name, f"kvq_compile.kernels.{other}")]


def test_importing_the_package_leaves_triton_and_transformers_alone() -> None:
    code = (
        "import sys, json, kvq_compile;"
        "print(json.dumps([m for m in ('triton', 'transformers', 'typer') if m in sys.modules]))"
    )
    assert json.loads(run_python(code)) == []


def test_the_backend_is_known_to_torch_before_the_package_is_imported() -> None:
    code = (
        "import sys, torch;"
        "names = torch._dynamo.list_backends();"
        "assert 'kvq_compile' not in sys.modules;"
        "print('kvq' in names)"
    )
    assert run_python(code) == "True"


def test_the_backend_is_registered_once() -> None:
    """An entry point and a decorator together make torch raise 'duplicate name'."""
    found = entry_points(group="torch_dynamo_backends", name="kvq")
    assert {point.value for point in found} == {"kvq_compile.backend:kvq"}
    code = (
        "from torch._dynamo.backends.registry import lookup_backend;"
        "first = lookup_backend('kvq'); import kvq_compile.backend as b;"
        "print(lookup_backend('kvq') is first, first is b.kvq)"
    )
    assert run_python(code) == "True True"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_nothing_above_them(path: Path) -> None:
    ours = [name for name in imported_names(path) if is_inside(name, "kvq_compile")]
    assert all(is_inside(name, "kvq_compile.kernels") for name in ours), ours
    assert not [name for name in imported_names(path) if is_inside(name, "kernels", "lowering")]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_backend_imports_neither_the_specification_nor_another(backend: str) -> None:
    """What is held to the specification in tests must not be made of it."""
    paths = sorted((ROOT / "kernels" / backend).glob("*.py"))
    assert len(paths) > 4
    others = {"cpu", "triton", "reference"} - {backend}
    for path in paths:
        names = [f"kvq_compile.kernels.{other}" for other in others]
        assert not [name for name in imported_names(path) if is_inside(name, *names)], path.name


@pytest.mark.parametrize("path", LOWERING, ids=lambda path: path.name)
def test_lowering_imports_kernels_only_and_never_triton(path: Path) -> None:
    names = list(imported_names(path))
    ours = [name for name in names if is_inside(name, "kvq_compile")]
    assert all(is_inside(name, "kvq_compile.kernels", "kvq_compile.lowering") for name in ours), (
        ours
    )
    assert not [name for name in names if is_inside(name, "triton", "kernels", "lowering")]


@pytest.mark.parametrize("path", TOP, ids=lambda path: path.name)
def test_the_public_layer_never_imports_triton(path: Path) -> None:
    names = list(imported_names(path))
    assert not [name for name in names if is_inside(name, "triton", "kernels", "lowering")]
