"""The CPU backend loads a library that is this user's and whole, wherever home is, and builds it where it must."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from kvq_compile import QuantizedKV, make_spec
from kvq_compile.kernels import ops
from kvq_compile.kernels.cpu import library, native
from kvq_compile.kernels.score import Score

NOBODY_HOME = "HOME", "XDG_CACHE_HOME"


@pytest.fixture(scope="module")
def built() -> bytes:
    """The bytes of the library."""
    return (library.find() or library.build()).read_bytes()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, temporary folders included; returns where the library belongs."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "cache" / "kvq_compile"


def put(content: bytes, folder: Path, mode: int = 0o700) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / library.library_name()
    path.write_bytes(content)
    path.chmod(mode)
    return path


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)


def without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away HOME and the entry in the table of users."""

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in NOBODY_HOME:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)


def test_a_library_is_found_without_a_compiler(
    built: bytes, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(built, home)
    without_compiler(monkeypatch)
    assert library.find() == path
    loaded = library.load.__wrapped__()
    assert loaded is not None


def test_without_library_and_compiler_the_specification_is_told_to_stand_in(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_compiler(monkeypatch)
    with pytest.warns(UserWarning, match=r"slow torch operations.*no C\+\+ compiler was found"):
        assert library.load.__wrapped__() is None


def test_a_compiler_that_fails_is_told_with_what_it_said(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "FLAGS", ("--no-such-flag",))
    with pytest.warns(UserWarning, match="no-such-flag"):
        assert library.load.__wrapped__() is None


@pytest.mark.parametrize("left", [0, 10, 0.5, -1])
def test_a_library_that_was_cut_off_is_not_loaded(left: float, built: bytes, home: Path) -> None:
    put(built[: int(left * len(built)) if isinstance(left, float) else left], home)
    assert library.find() is None


def test_an_altered_library_is_built_anew(
    built: bytes, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ("-O0" if flag == "-O3" else flag for flag in library.FLAGS)  # a quarter of the time
    monkeypatch.setattr(library, "FLAGS", tuple(plain))
    path = put(built[:5000] + b"!" + built[5001:], home)
    assert library.find() is None
    assert library.build() == path == library.find()


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_what_others_may_write_is_not_loaded(mode: int, built: bytes, home: Path) -> None:
    path = put(built, home)
    path.chmod(mode)
    assert library.find() is None
    path.chmod(0o700)
    assert library.find() == path
    home.chmod(mode)
    assert library.find() is None
    home.chmod(0o700)


def test_what_belongs_to_another_user_is_not_loaded(
    built: bytes, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(built, home)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert library.find() is None
    assert not library.is_ours(path, stat.S_ISREG)


def test_a_link_to_a_library_is_not_loaded(built: bytes, home: Path, tmp_path: Path) -> None:
    path = put(built, home)
    elsewhere = path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(elsewhere)
    assert library.find() is None


def test_without_a_home_the_library_is_private_among_temporary_files(
    built: bytes, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_home(monkeypatch)
    folders = list(library.folders())
    assert [folder.parent for folder in folders] == [Path(tempfile.gettempdir())]
    assert library._is_usable(folders[0])
    assert stat.S_IMODE(folders[0].stat().st_mode) == 0o700
    path = put(built, folders[0])
    assert library.find() == path


def test_where_every_folder_is_shared_the_library_is_the_process_s_own(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in library.folders():
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    usable = [folder for folder in library.folders(make=True) if library._is_usable(folder)]
    assert len(usable) == 1
    assert stat.S_IMODE(usable[0].stat().st_mode) == 0o700
    assert usable[0].name not in {folder.name for folder in library.folders()}


def test_a_folder_that_cannot_be_made_is_passed_over(home: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    usable = next(folder for folder in library.folders() if library._is_usable(folder))
    assert usable == tmp_path / ".cache" / "kvq_compile"


def test_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None and library.find() is None:
        pytest.skip("there is neither a compiler nor a library")
    native._functions.__wrapped__()
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE.replace("is_key", "is_value"))
    with pytest.raises(RuntimeError, match="interface"):
        native._functions.__wrapped__()


def attended() -> torch.Tensor:
    """Return attention over 300 tokens in a cache and one new one."""
    x = torch.randn(1, 1, 301, 64, generator=torch.Generator().manual_seed(0))
    layouts = [make_spec("int8").layout(role, 64) for role in ("key", "value")]
    caches = [QuantizedKV.from_dense(x[:, :, :300], layout).parts for layout in layouts]
    new = x[:, :, 300:]
    return ops.attend(new, new, new, *caches, [], None, None, 300, Score(0.125), *layouts)


def test_a_machine_without_a_compiler_is_served_slowly_and_told_once(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PATH": "/nowhere"}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    command = [sys.executable, "-W", "always", __file__, str(tmp_path / "attended.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("slow torch operations") == 1
    torch.testing.assert_close(torch.load(tmp_path / "attended.pt"), attended())


if __name__ == "__main__":
    torch.save(attended(), sys.argv[1])
