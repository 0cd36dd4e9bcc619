"""Calibrations as files: the same seed writes the same one, and what was cut short, altered or made before is told."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import safetensors
from safetensors.torch import save_file

import kvq_compile
from calibrated_llama import calibrated, ids, make_model
from kvq_compile.calibration.artifact import Calibration
from kvq_compile.kernels.tables import INTEGERS, Tables
from kvq_compile.kernels.tables import section as place_of
from kvq_compile.options import make_spec


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    texts = [ids(300, seed) for seed in range(2)]
    again = kvq_compile.calibrate(make_model(), texts, "skvq", tokens=256, value_bits=1.5)
    assert again == calibrated("skvq")
    again.save(tmp_path / "a")
    assert Calibration.load(tmp_path / "a") == again


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    whole, part = calibrated("skvq"), tmp_path / "part"
    Calibration(whole.method, whole.options, whole.layers[:1], whole.weights).save(part)
    seen: list[int] = []
    texts = [ids(300, seed) for seed in range(2)]

    def advance(stage: str, done: int, total: int) -> None:
        if stage.startswith("fitting"):
            seen.append(done)

    resumed = kvq_compile.calibrate(
        make_model(), texts, "skvq", tokens=256, value_bits=1.5, resume=part, advance=advance
    )
    assert resumed == whole
    assert seen == [1, 2]
    with pytest.raises(ValueError, match="resume must name a file of this model"):
        kvq_compile.calibrate(make_model(1), texts, "skvq", tokens=256, resume=part)


def test_a_truncated_or_altered_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    calibrated("skvq").save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="whole safetensors file"):
        Calibration.load(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="altered"):
        Calibration.load(path)
    path.write_bytes(content.replace(b'\\"value_bits\\": 1.5', b'\\"value_bits\\": 2.5'))
    with pytest.raises(ValueError, match="altered"):
        Calibration.load(path)
    path.write_text(json.dumps({}))
    with pytest.raises(ValueError, match="whole safetensors file"):
        Calibration.load(path)
    with pytest.raises(FileNotFoundError, match="calibration must be a file"):
        Calibration.load(tmp_path / "none")


def put(section: str, value: float) -> Any:
    """Return a function that writes a number into a section of the first layer's keys, whatever it means there."""

    def alter(words: dict[str, Tensor], about: dict[str, Any]) -> None:
        part = words["layers.0.key"]
        first, _ = place_of(section, 64, True)
        number = torch.tensor(value, dtype=torch.float32).view(torch.int32)
        part[0, first] = int(value) if section in INTEGERS else number

    return alter


def drop_a_column(words: dict[str, Tensor], about: dict[str, Any]) -> None:
    words["layers.1.value"] = words["layers.1.value"][:, :-1].contiguous()


def drop_a_head(words: dict[str, Tensor], about: dict[str, Any]) -> None:
    words["layers.1.value"] = words["layers.1.value"][:1].contiguous()


ALTERATIONS: list[tuple[str, Any, str]] = [
    ("skvq", put("order", 63), "order must be a permutation of 64 channels"),
    ("skvq", put("order", -1), "order must be a permutation"),
    ("skvq", put("order", 1 << 20), "order must be a permutation"),
    ("skvq", put("mean", float("nan")), "mean must be finite"),
    ("skvq", put("scale", float("inf")), "scale must be finite"),
    ("skvq", put("scale", 0.0), "scale must be positive"),
    ("skvq", put("scale", -1.0), "scale must be positive"),
    ("skvq", put("inverse", 3.0), "inverse must be 1 / scale"),
    ("skvq", put("margin", 0.5), "margin must be in [0, 0.5)"),
    ("cq-4c4b", put("codebook", float("nan")), "codebook must be finite"),
    ("skvq", drop_a_column, "must have"),
    ("skvq", drop_a_head, "for the same heads"),
    ("skvq", lambda w, a: w.update({"layers.0.key": w["layers.0.key"].float()}), "must be int32"),
    ("skvq", lambda w, a: w.pop("layers.0.key"), "for the same heads"),
    (
        "skvq",
        lambda w, a: w.update({"layers.7.key": w["layers.0.key"].clone()}),
        "belong to a layer",
    ),
    ("skvq", lambda w, a: a["head_dims"].update({"layers.0.key": -64}), "tables must be int32"),
    ("skvq", lambda w, a: a["head_dims"].update({"layers.0.key": "64"}), "head_dim must be an int"),
    ("skvq", lambda w, a: a["head_dims"].clear(), "is missing"),
    ("skvq", lambda w, a: a.pop("options"), "'options' is missing"),
    ("skvq", lambda w, a: a["layers"][0].__setitem__(0, "yes"), "rotary must be a bool"),
    ("skvq", lambda w, a: a["layers"].clear(), "belong to a layer"),
    ("cq-4c4b", lambda w, a: a["options"].update(bits=13), "bits of a codebook must be 1 to 12"),
    ("cq-4c4b", lambda w, a: a["options"].update(bits=5), "must have"),
    ("tc", lambda w, a: a["layers"][0][6].clear(), "must have widths of keys and of values"),
    ("tc", lambda w, a: a["layers"][0][5][0].__setitem__(1, -0.5), "change 0 or more, got"),
    ("tc", lambda w, a: a["layers"][0][5][0].__setitem__(0, 9), "widths must be up to 8 bits"),
    ("tc", lambda w, a: a["layers"][0][5][0].__setitem__(1, "0"), "change must be a number"),
]


@pytest.mark.parametrize(("method", "alter", "message"), ALTERATIONS)
def test_a_file_that_was_altered_with_a_digest_to_match_is_refused(
    method: str, alter: Any, message: str, tmp_path: Path
) -> None:
    """The digest protects from accidents, not from intent: what kernels index with must be in range."""
    path = tmp_path / "c"
    calibrated(method).save(path)
    assert Calibration.load(path) == calibrated(method)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        words = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = json.loads(metadata["about"])
    alter(words, about)
    metadata["about"] = json.dumps(about, sort_keys=True)
    tables = (
        Tables(words[name], about["head_dims"].get(name, 64))
        for index in range(len(about["layers"]))
        for name in (f"layers.{index}.key", f"layers.{index}.value")
        if name in words
    )
    content = metadata["about"] + "".join(x.digest for x in tables)
    metadata["digest"] = hashlib.sha256(content.encode()).hexdigest()
    save_file(words, path, metadata)
    with pytest.raises(ValueError, match="calibration must be as it was saved") as caught:
        Calibration.load(path)
    assert message in str(caught.value)


def test_a_file_of_another_format_says_what_to_do(tmp_path: Path) -> None:
    save_file(
        {"x": torch.zeros(1)}, tmp_path / "c", {"format": "kvq-compile calibration", "version": "0"}
    )
    with pytest.raises(ValueError, match="version 1, got .* version 0; calibrate the model anew"):
        Calibration.load(tmp_path / "c")


def test_a_file_from_before_an_option_is_read_as_it_was_made(tmp_path: Path) -> None:
    whole = calibrated("skvq")
    options = {name: value for name, value in whole.options.items() if name != "equalize"}
    Calibration(whole.method, options, whole.layers, whole.weights).save(tmp_path / "old")
    assert make_spec(calibration=tmp_path / "old") == make_spec(calibration=whole)
    with pytest.raises(ValueError, match="equalize must be as calibrated, None, got 0.5"):
        make_spec(calibration=tmp_path / "old", equalize=0.5)
