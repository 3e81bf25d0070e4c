"""The speed benchmark runs on a tiny model: every contestant takes part, does the same tokens, and is compared."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import index_speed

_TINY: dict[str, int] = {
    "layers": 1,
    "width": 8,
    "heads": 2,
    "vocabulary": 300,
    "window": 16,
    "layer-blocks": 1,
    "rows": 2,
    "cols": 2,
    "batch-tokens": 64,
    "passages": 4,
    "mixed-passages": 6,
    "index-passages": 8,
    "rounds": 2,
    "exact-every": 2,
}


def test_every_contestant_is_compared_at_every_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speed.json"
    index_speed.main([*(f"--{name}={value}" for name, value in _TINY.items()), "--no-memory", "--json", str(path)])
    report = json.loads(path.read_text())
    for setting in index_speed.SETTINGS:
        found = report[setting]
        assert list(found) == index_speed.contestant_names(setting)
        assert found[index_speed.FLOOR]["over_floor"] == [1.0, 1.0, 1.0]
        assert found[index_speed.TRAIN]["over_training_step"] == [1.0, 1.0, 1.0]
        assert all(values["over_floor"][0] > 0 for values in found.values())
    assert report["fixed"]["rows, none"]["turns"] == 2
    assert report["fixed"]["rows, Adam, exact"]["turns"] == 1
    assert "index, none" in capsys.readouterr().out


def test_synthetic_texts_vary_in_length_and_repeat() -> None:
    texts = index_speed.synthetic_texts(200, seed=1)
    assert texts == index_speed.synthetic_texts(200, seed=1) != index_speed.synthetic_texts(200, seed=2)
    sizes = [len(text.split()) for text in texts]
    assert min(sizes) < 12
    assert max(sizes) > 40


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_counts_what_a_turn_needs(tmp_path: Path) -> None:
    settings = index_speed.Settings(
        layers=1,
        width=8,
        heads=2,
        vocabulary=300,
        window=256,
        layer_blocks=1,
        passages=64,
        batch_tokens=1 << 14,
        index_passages=64,
        mixed_passages=6,
    )
    index_speed.make_fixture(tmp_path, settings, None, "text")
    # 16,384 tokens of logits alone take 18.75 MiB.
    assert index_speed.memory_of(tmp_path, settings, "fixed", index_speed.FLOOR) > 18 << 20
