"""Completion with keys and values kept equals completion without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.unit.test_encode import encoder_of
from trackstar.complete import complete

PROMPT = np.array([0, 7, 12, 40, 33], dtype=np.int32)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "mistral", "gemma2", "mixtral"])
def test_it_equals_the_loop_over_the_whole_text(architecture: str, tmp_path: Path) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path, architecture, scale=2.0), torch.float64)
    encoder_of(loaded)  # its hooks stay silent
    found = complete(loaded.model, PROMPT, max_new_tokens=10)
    tokens, total = PROMPT.tolist(), 0.0
    with torch.no_grad():
        for _ in range(10):
            logits = loaded.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
            tokens.append(int(logits.argmax()))
            total += float(logits.max())
    assert found.tokens.tolist() == tokens[len(PROMPT) :]
    assert found.log_probability == pytest.approx(total)


def test_a_stop_token_ends_it_and_is_left_out(tmp_path: Path) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path, "llama", scale=2.0))
    whole = complete(loaded.model, PROMPT, max_new_tokens=6).tokens.tolist()
    stop = whole[3]
    found = complete(loaded.model, PROMPT, max_new_tokens=6, stop_tokens=(stop,)).tokens.tolist()
    assert found == whole[: whole.index(stop)]
    assert complete(loaded.model, PROMPT, max_new_tokens=0).tokens.tolist() == []
