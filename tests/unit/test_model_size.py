"""Sizes read from headers against the loaded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import load, save_model
from trackstar.errors import CorruptArtifact, InvalidRequest, NotFound
from trackstar.model_size import model_size


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "llama_tied", "mixtral"])
def test_layers_and_parameters_are_those_of_the_model(tmp_path: Path, architecture: str) -> None:
    folder = save_model(tmp_path / "model", architecture)
    loaded = load(folder)
    assert model_size(folder) == (loaded.num_layers, loaded.num_parameters)


def test_a_text_config_inside_another_is_found(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"text_config": config}))
    assert model_size(folder)[0] == 3


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no checkpoint folder"):
        model_size(tmp_path / "none")
    with pytest.raises(NotFound, match=r"config\.json"):
        model_size(tmp_path)
    folder = save_model(tmp_path / "model", "gpt2")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
        model_size(folder)
    weights.unlink()
    with pytest.raises(NotFound, match="--params"):
        model_size(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="--layers"):
        model_size(folder)
