"""The plan's figures against a small real index: bytes within a few percent, FLOP as they are counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plan_check import Figure, build, byte_figures, compute_figures, table


def test_bytes_and_flop_are_those_of_a_small_index(tmp_path: Path) -> None:
    index = build(tmp_path, passages=600, layer_blocks=4, rows=16, cols=16)
    found = {item.name: item for item in byte_figures(index)}
    # How well text is packed differs; all else is arithmetic and the headers of files.
    texts = found.pop("texts and spans")
    assert texts.ratio == pytest.approx(1, abs=0.15)
    for item in found.values():
        assert item.ratio == pytest.approx(1, abs=0.02), item
    flop = {item.name: item for item in compute_figures(index, passages=256, rounds=1) if item.unit == "FLOP"}
    # The width of the layers is only guessed from the number of parameters, embeddings included.
    assert flop.pop("projecting, per token").ratio == pytest.approx(1, abs=0.3)
    for item in flop.values():
        assert item.ratio == pytest.approx(1, abs=0.06), item


def test_the_table_shows_ratios() -> None:
    shown = table([Figure(name="rows", unit="bytes", predicted=1000, measured=1100)])
    assert shown.splitlines()[-1] == "| rows | bytes | 1,000 | 1,100 | 1.100 |"
