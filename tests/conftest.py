"""Settings that must hold before any test module is imported."""

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What PyTorch remembers of fake tensors pays where a graph is traced twice; tests trace thousands once.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")  # read when torch is imported
import kvq_compile  # noqa: F401  (a checkout named by PYTHONPATH is tested, not the one that is installed)

# Keeps `import kernels` meaning Hugging Face's package: transformers looks for it by that name.
sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT]

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the workers are the parallelism

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when kernels are imported
pytest.register_assert_rewrite(
    "aot",
    "attention_site",
    "layout_steps",
    "refused_steps",
    "rotated_keys",
    "spelled_attention",
    "written_caches",
)
torch.set_num_threads(1)  # small tensors; threads of several workers would only wait for each other

# One example may compile a model, so neither a deadline nor a slow generator is a fault.
_COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("dev", max_examples=15, **_COMMON)
settings.register_profile("ci", max_examples=15, derandomize=True, database=None, **_COMMON)
settings.register_profile("thorough", max_examples=500, **_COMMON)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the mark `long` from the cases that it names in ``but``; a name that no case has is an error."""
    named, found = set(), set()
    for item in items:
        mark = item.get_closest_marker("long")
        if mark is None or "but" not in mark.kwargs:
            continue
        name = f"{item.location[0]}::{getattr(item, 'originalname', item.name)}"
        case = item.name.partition("[")[2][:-1]
        named |= {(name, each) for each in mark.kwargs["but"]}
        found.add((name, case))
        if case in mark.kwargs["but"]:
            item.own_markers[:] = [each for each in item.own_markers if each.name != "long"]
    quick = config.option.markexpr and not torch.cuda.is_available()  # others have other cases
    if quick and not any("::" in argument for argument in config.args) and named - found:
        raise pytest.UsageError(f"long(but=...) must name cases, got {sorted(named - found)}")


def pytest_collection_finish() -> None:
    """Set what costs much time and says nothing about what is tested; the thorough profile leaves all as it is."""
    from thorough import THOROUGH  # once the profile is loaded

    if not THOROUGH:
        _leave_out_what_pays_where_code_is_called_often()
        if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
            import quick_interpreter

            quick_interpreter.install()
    gc.collect()
    gc.freeze()  # what is imported by now is left out of every later collection, where it takes most of the time
    gc.set_threshold(20_000, 20, 20)


def _leave_out_what_pays_where_code_is_called_often() -> None:
    """Let Dynamo's guards be the conditions as they are: common parts are not looked for, time is not measured.

    That is a sixth of the time of a model that is compiled and called a few times. What a version of PyTorch does not
    have is left alone.
    """
    from torch._dynamo import guards

    if hasattr(guards, "PyExprCSEPass"):
        guards.PyExprCSEPass.count = lambda self, exprs: None
        guards.PyExprCSEPass.replace = lambda self, expr: ([], expr)
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *args: 0.0
    if hasattr(torch._dynamo.config, "run_gc_after_compile"):
        torch._dynamo.config.run_gc_after_compile = False


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Start and leave with no compiled code, so that graph counts are the test's own."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter, which pays by the operation, hold more at once than registers do."""
    from kvq_compile.kernels.triton import append

    if not torch.cuda.is_available():
        monkeypatch.setattr(append, "TILE", 1 << 15)
