"""Completion with keys and values kept equals completion without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.unit.test_encode import encoder_of
from trackstar.complete import complete
from trackstar.encode import Example
from trackstar.errors import InvalidRequest

PROMPT = np.array([0, 7, 12, 40, 33], dtype=np.int32)


@pytest.mark.parametrize("architecture", sorted(tiny.ARCHITECTURES))
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


def test_a_model_that_keeps_nothing_reads_the_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.load(tiny.save_model(tmp_path, "llama", scale=2.0), torch.float64).model
    expected = complete(model, PROMPT, max_new_tokens=6)
    working = model.forward

    def forward(input_ids: torch.Tensor, past_key_values: object, use_cache: bool) -> object:
        assert past_key_values is None
        outputs = working(input_ids=input_ids, use_cache=False)
        assert outputs.past_key_values is None
        return outputs

    monkeypatch.setattr(model, "forward", forward)
    found = complete(model, PROMPT, max_new_tokens=6)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.log_probability == pytest.approx(expected.log_probability)


def test_it_leaves_rows_as_they_were_and_its_loss_is_the_rows(tmp_path: Path) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path, "gpt_oss", scale=2.0))
    encoder = encoder_of(loaded)
    found = complete(loaded.model, PROMPT, max_new_tokens=6)
    example = Example(tokens=np.concatenate([PROMPT, found.tokens]), first_target=len(PROMPT))
    before = encoder.encode([example])
    complete(loaded.model, PROMPT, max_new_tokens=6)
    after = encoder.encode([example])
    assert torch.equal(before.rows_ND, after.rows_ND)
    assert float(after.loss_N[0]) == pytest.approx(-found.log_probability, rel=1e-4)


def test_nothing_to_continue_from_is_refused(tmp_path: Path) -> None:
    model = tiny.load(tiny.save_model(tmp_path, "llama")).model
    with pytest.raises(InvalidRequest, match="no token to continue from"):
        complete(model, PROMPT[:0], max_new_tokens=6)
    with pytest.raises(InvalidRequest, match="max_new_tokens must be at least 0"):
        complete(model, PROMPT, max_new_tokens=-1)
