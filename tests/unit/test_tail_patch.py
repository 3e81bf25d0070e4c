"""One step on one passage: against plain autograd in float64, exact restoration, and a serving model left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.unit.test_encode import encoder_of
from trackstar.encode import Example
from trackstar.model import LoadedModel
from trackstar.tail_patch import PatchStep, TailPatcher

ARCHITECTURES = ["gpt2", "llama_tied", "gemma2", "mixtral"]


def example(seed: int, length: int, first_target: int = 1) -> Example:
    tokens = np.random.default_rng(seed).integers(0, tiny.VOCABULARY, length, dtype=np.int32)
    return Example(tokens=tokens, first_target=first_target)


QUERY, PASSAGES = example(0, 12, first_target=9), [example(1, 20), example(2, 7), example(3, 15)]


def loss(loaded: LoadedModel, some: Example) -> torch.Tensor:
    tokens = torch.from_numpy(some.tokens.astype(np.int64))[None]
    log_probabilities = loaded.model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    targets = tokens[0, some.first_target :]
    total: torch.Tensor = -log_probabilities[some.first_target - 1 : -1].gather(1, targets[:, None]).sum()
    return total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gradient_step_equals_the_one_by_hand(architecture: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path, architecture)
    step = PatchStep(learning_rate=0.01)
    found = TailPatcher(tiny.load(folder, torch.float64).model).measure(QUERY, PASSAGES, step)
    for passage, effect in zip(PASSAGES, found, strict=True):
        by_hand = tiny.load(folder, torch.float64)
        by_hand.model.set_experts_implementation("eager")
        by_hand.model.requires_grad_(True)
        assert effect.loss_before == pytest.approx(float(loss(by_hand, QUERY).detach()), rel=1e-9)
        (loss(by_hand, passage) / (len(passage.tokens) - 1)).backward()
        with torch.no_grad():
            for parameter in by_hand.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad)
        assert effect.loss_after == pytest.approx(float(loss(by_hand, QUERY).detach()), rel=1e-9)
        assert effect.probability_change == pytest.approx(np.exp(-effect.loss_after) - np.exp(-effect.loss_before))


def test_small_steps_follow_the_inner_product_of_gradients(tmp_path: Path) -> None:
    # Layer norms of this one stay in float64; RMS norms do not.
    loaded = tiny.load(tiny.save_model(tmp_path, "gpt_neox"), torch.float64)
    rate = 1e-6
    found = TailPatcher(loaded.model).measure(QUERY, PASSAGES, PatchStep(learning_rate=rate))
    loaded.model.requires_grad_(True)
    parameters = list(loaded.model.parameters())
    query = torch.autograd.grad(loss(loaded, QUERY), parameters)
    for passage, effect in zip(PASSAGES, found, strict=True):
        other = torch.autograd.grad(loss(loaded, passage) / (len(passage.tokens) - 1), parameters)
        inner = sum(float((a * b).sum()) for a, b in zip(query, other, strict=True))
        assert effect.loss_after - effect.loss_before == pytest.approx(-rate * inner, rel=1e-3)


def test_a_fresh_adamw_moves_every_parameter_by_its_sign(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path, "llama")
    (effect,) = TailPatcher(tiny.load(folder, torch.float64).model).measure(
        QUERY, PASSAGES[:1], PatchStep(optimizer="adamw", learning_rate=1e-3)
    )
    by_hand = tiny.load(folder, torch.float64)
    by_hand.model.requires_grad_(True)
    (loss(by_hand, PASSAGES[0]) / (len(PASSAGES[0].tokens) - 1)).backward()
    with torch.no_grad():
        for parameter in by_hand.model.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-3 * parameter.grad / (parameter.grad.abs() + 1e-8))
    assert effect.loss_after == pytest.approx(float(loss(by_hand, QUERY).detach()), rel=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_the_serving_model_and_its_hooks_are_left_alone(architecture: str, tmp_path: Path) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path, architecture))
    encoder = encoder_of(loaded)
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    rows_before = encoder.encode(PASSAGES).rows_ND
    patcher = TailPatcher(loaded.model)
    first = patcher.measure(QUERY, PASSAGES, PatchStep(optimizer="adamw", learning_rate=0.1))
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad
        assert parameter.grad is None
    assert torch.equal(encoder.encode(PASSAGES).rows_ND, rows_before)
    # The copy is as it was, so the same question gets the same answer.
    assert patcher.measure(QUERY, PASSAGES, PatchStep(optimizer="adamw", learning_rate=0.1)) == first


def test_a_failure_in_between_leaves_the_copy_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path, "llama"))
    patcher = TailPatcher(loaded.model)
    expected = patcher.measure(QUERY, PASSAGES, PatchStep(learning_rate=0.1))

    def fail(self: torch.optim.SGD, closure: object = None) -> None:
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(7.0)
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            patcher.measure(QUERY, PASSAGES, PatchStep(learning_rate=0.1))
    assert patcher.measure(QUERY, PASSAGES, PatchStep(learning_rate=0.1)) == expected


def test_stopping_leaves_the_rest_out_and_nothing_to_learn_changes_nothing(tmp_path: Path) -> None:
    patcher = TailPatcher(tiny.load(tiny.save_model(tmp_path, "llama")).model)
    assert len(patcher.measure(QUERY, PASSAGES, PatchStep(), should_stop=lambda: True)) == 1
    (effect,) = patcher.measure(QUERY, [example(4, 1)], PatchStep())
    assert effect.loss_after == effect.loss_before
