"""The picture of the architecture is true: its block of imports is what the files import."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = ("examples", "kvq_compile", "lowering", "kernels")
LINKED = ("kernels", "lowering")  # parts of kvq_compile that lie beside it


def folder_of(name: str) -> Path:
    """Return the folder, relative to the root, that holds a module or a name of ``kvq_compile``."""
    parts = name.split(".")
    folder = Path(*parts[1:2] if len(parts) > 1 and parts[1] in LINKED else parts[:1])
    for part in parts[2:] if folder.name in LINKED else parts[1:]:
        if not (ROOT / folder / part).is_dir():
            break
        folder /= part
    return folder


def imported_folders(path: Path) -> set[Path]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        found |= {folder_of(name) for name in names if name.split(".")[0] == "kvq_compile"}
    return found


def drawn_imports() -> str:
    """Return one line a folder: what its files import of other folders."""
    lines = []
    for top in TOP:
        files = [
            path
            for path in sorted((ROOT / top).rglob("*.py"))
            if not (top == "kvq_compile" and path.relative_to(ROOT / top).parts[0] in LINKED)
        ]
        assert files, f"{top} holds no code"
        for folder in sorted({path.parent for path in files}):
            here = folder.relative_to(ROOT)
            others = {x for path in files if path.parent == folder for x in imported_folders(path)}
            targets = ", ".join(str(x) for x in sorted(others - {here}))
            if targets:
                lines.append(f"{here!s:24} -> {targets}")
    return "\n".join(lines)


def test_the_block_of_imports_is_what_the_files_import() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"```imports\n(.*?)\n```", text, re.DOTALL)
    assert block is not None, "docs/architecture.md must have a block of imports"
    assert block.group(1) == drawn_imports()


def test_no_folder_imports_one_above_it() -> None:
    order = {name: place for place, name in enumerate(TOP)}
    for line in drawn_imports().splitlines():
        here, targets = line.split(" -> ")
        place = order[here.strip().split("/")[0]]
        assert all(order[target.split("/")[0]] >= place for target in targets.split(", ")), line


def test_no_backend_imports_the_reference() -> None:
    lines = dict(line.split(" -> ") for line in drawn_imports().splitlines())
    backends = {name.strip(): targets for name, targets in lines.items()}
    for name in ("kernels/cpu", "kernels/triton"):
        assert "kernels/reference" not in backends[name].split(", "), name


def test_every_folder_of_the_picture_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    picture = text.split("## Folders")[1].split("```")[1]
    names, above = re.findall(r"^( *)([\w/]+/) ", picture, re.MULTILINE), ""
    assert len(names) > 8
    for indent, name in names:
        above = above if indent else name
        assert (ROOT / (above if indent else "") / name).is_dir(), name


@pytest.mark.parametrize("top", LINKED)
def test_every_file_is_told_of_in_the_readme_of_its_folder(top: str) -> None:
    words = set(re.findall(r"\w+", (ROOT / top / "README.md").read_text()))
    own = [path for path in (ROOT / top).rglob("*.py") if path.resolve().is_relative_to(ROOT / top)]
    assert own
    untold = [path.name for path in own if path.stem.strip("_") not in {"init", "main", *words}]
    assert not untold
