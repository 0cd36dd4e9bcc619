"""Build, find and load the library of the CPU backend from the source files in this folder.

PyTorch's own CPU compiler needs a C++ compiler too, so needing one asks for nothing new. The library is built once
for a machine, in about two seconds, and has a plain C interface, so that one build serves every Python and every
torch. A compiler is needed to build it, not to find it.

**Whose library is loaded.** A library runs with the rights of the process, so it comes from a folder that nobody else
can write to: both belong to this user, and neither may be written by its group or by others. The first of these that
is, or can be made, such a folder is taken: ``$XDG_CACHE_HOME/kvq_compile``, ``~/.cache/kvq_compile``,
``kvq_compile-<user id>`` among temporary files, a temporary folder of this process. A home is not needed, nor an entry
in the table of users. A library ends in the digest of what is before, so that one that was cut off or altered is never
loaded but built anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
# pages.cpp is exact: one rounding an operation, in the order written. In attend.cpp sums may be taken in any order;
# infinities and NaN keep their meaning, which -ffast-math would take away.
SOURCES = {
    "pages.cpp": ("-ffp-contract=off",),
    "attend.cpp": ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"),
}
HEADERS = tuple(sorted(path.name for path in FOLDER.glob("*.h")))
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno")
SANITIZE = (
    "KVQ_SANITIZE"  # environment variable: what -fsanitize is given, as in `make test-sanitize`
)
COMPILERS = ("g++", "clang++", "c++")
BUILD_SECONDS = 120
DIGEST_BYTES = 32
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_private: list[tempfile.TemporaryDirectory[str]] = []  # of this process, removed when it ends


def is_available() -> bool:
    """Say whether the library is there, building it at the first call; warn if it cannot be."""
    return load() is not None


@cache
def load() -> ctypes.CDLL | None:
    """Return the library, built if need be; ``None``, with a warning, where it cannot be built."""
    try:
        return ctypes.CDLL(str(find() or build()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(
            "the CPU backend runs in slow torch operations, since its C++ could not be built: "
            f"{detail}; install g++ or clang++, or name a compiler in CXX",
            stacklevel=2,
        )
        return None


def find() -> Path | None:
    """Return the library that was built before, if there is one that is ours and whole."""
    for folder in folders():
        library = folder / library_name()
        if is_ours(folder, stat.S_ISDIR) and is_ours(library, stat.S_ISREG) and _is_whole(library):
            return library
    return None


def build() -> Path:
    """Build the library and return its path.

    Raises:
        OSError: There is no compiler, or no folder to put the library in.
        subprocess.SubprocessError: The compiler failed.
    """
    names = (os.environ.get("CXX"), *COMPILERS)
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler was found")
    folder = next(folder for folder in folders(make=True) if _is_usable(folder))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made, objects = Path(scratch) / library_name(), []
        commands = []
        for name, flags in SOURCES.items():
            objects.append(str(Path(scratch) / f"{name}.o"))
            command = [compiler, *_flags(), *flags, "-c", str(FOLDER / name), "-o", objects[-1]]
            commands.append(command)
        _run(*commands)
        _run([compiler, *_flags(), "-shared", *objects, "-o", str(made)])
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        made.chmod(0o700)
        return made.replace(folder / made.name)  # in one step: processes may build at once


def _run(*commands: list[str]) -> None:
    """Run commands side by side.

    Raises:
        subprocess.SubprocessError: One of them failed, or took too long.
    """
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]
    try:
        for process in processes:
            _, said = process.communicate(timeout=BUILD_SECONDS)
            if process.returncode:
                text = said.decode(errors="replace")[:2000]
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=text)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _flags() -> tuple[str, ...]:
    sanitize = os.environ.get(SANITIZE)
    extra = (f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g") if sanitize else ()
    return (*FLAGS, *extra)


def library_name() -> str:
    """Return the file name of the library: another one where sources, flags or the processor are others."""
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in (*SOURCES, *HEADERS)]
    identity = "\n".join([*_flags(), str(SOURCES), platform.machine(), _processor(), *texts])
    return f"kvq_cpu-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"


def _processor() -> str:
    """Return what ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.processor()
    )


def folders(make: bool = False) -> Iterator[Path]:
    """Yield the folders that may hold the library, the one to prefer first; with ``make`` one more, of this process."""
    if home := os.environ.get("XDG_CACHE_HOME"):
        yield Path(home) / "kvq_compile"
    with suppress(RuntimeError):  # neither HOME nor an entry in the table of users
        yield Path.home() / ".cache" / "kvq_compile"
    yield Path(tempfile.gettempdir()) / f"kvq_compile-{os.getuid()}"
    if make:
        _private.append(tempfile.TemporaryDirectory(prefix="kvq_compile-"))
        yield Path(_private[-1].name)


def _is_usable(folder: Path) -> bool:
    """Make a folder if it is missing; say whether it is ours and can be written to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return is_ours(folder, stat.S_ISDIR) and os.access(folder, os.W_OK | os.X_OK)


def is_ours(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Say whether a file or folder, no link, is there, belongs to this user and is written by nobody else.

    Args:
        path: The file or folder.
        is_kind: ``stat.S_ISREG`` or ``stat.S_ISDIR``.
    """
    try:
        found = path.lstat()
    except OSError:
        return False
    ours = found.st_uid == os.geteuid() and not found.st_mode & OTHERS_WRITE
    return ours and is_kind(found.st_mode)


def _is_whole(library: Path) -> bool:
    try:
        content = library.read_bytes()
    except OSError:
        return False
    body, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    return hashlib.sha256(body).digest() == digest
