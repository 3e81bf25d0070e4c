"""Forecasts against the number of tokens that a build would read."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.tiny import save_tokenizer
from trackstar.corpus import Corpus, CorpusConfig
from trackstar.forecast import TokenForecast
from trackstar.passages import Cursor, read_passages


def waited(forecast: TokenForecast) -> int | None:
    """The forecast once its thread has come to an end."""
    forecast.tokens()
    deadline = time.monotonic() + 60
    while (found := forecast.tokens()) is None and forecast.running and time.monotonic() < deadline:
        time.sleep(0.005)
    return found


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_corpus_larger_than_the_sample_is_forecast_closely(tmp_path: Path, tokenizer: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": "é" * (n % 3) + "abc " * (1 + n % 9)}) + "\n" for n in range(1000)))
    config = CorpusConfig(paths=(str(corpus),))
    passages = read_passages(
        Corpus(config),
        AutoTokenizer.from_pretrained(tokenizer),
        window_tokens=64,
        add_bos=True,
        start=Cursor(0, 0),
        first_id=0,
    )
    exact = sum(len(passage.tokens) for passage, _ in passages)
    assert waited(TokenForecast(config, str(tokenizer))) == pytest.approx(exact, rel=0.02)


def test_what_cannot_be_read_gives_no_forecast_and_no_error(tmp_path: Path, tokenizer: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    assert waited(TokenForecast(CorpusConfig(paths=(str(bad),)), str(tokenizer))) is None
    good = tmp_path / "good.jsonl"
    good.write_text('{"text": "abc"}\n')
    assert waited(TokenForecast(CorpusConfig(paths=(str(good),)), str(tmp_path / "no model"))) is None


def test_remote_corpora_are_not_read_twice(tokenizer: Path) -> None:
    forecast = TokenForecast(CorpusConfig(paths=("memory://nowhere/corpus.jsonl",)), str(tokenizer))
    assert forecast.tokens() is None
    assert not forecast.running
    forecast.stop()


def test_a_stopped_forecast_ends_its_thread(tmp_path: Path, tokenizer: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "abc"}\n' * 20000)
    forecast = TokenForecast(CorpusConfig(paths=(str(corpus),)), str(tokenizer))
    forecast.tokens()
    forecast.stop()
    assert not forecast.running
