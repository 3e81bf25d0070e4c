"""One step on one passage: against plain autograd in float64, exact restoration, and a serving model left alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers.optimization import Adafactor

from tests import tiny
from tests.unit.test_encode import encoder_of
from trackstar.encode import Example
from trackstar.errors import Incompatible, InvalidRequest, NotReady
from trackstar.loss import backward, cross_entropy
from trackstar.model import LoadedModel
from trackstar.optimizer_state import read_adafactor_moments, read_adam_moments
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
        # RMS norms are taken in float32, where a padded pass rounds otherwise.
        assert effect.loss_before == pytest.approx(float(loss(by_hand, QUERY).detach()), rel=1e-7)
        (loss(by_hand, passage) / (len(passage.tokens) - 1)).backward()
        with torch.no_grad():
            for parameter in by_hand.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad)
        assert effect.loss_after == pytest.approx(float(loss(by_hand, QUERY).detach()), rel=1e-7)
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


@pytest.mark.parametrize("method", ["_loss", "_take", "_watch"])
def test_a_failure_in_between_leaves_the_copy_and_the_model_as_they_were(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path, "llama"))
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    patcher = TailPatcher(loaded.model)
    step = PatchStep(learning_rate=0.1)
    expected = patcher.measure(QUERY, PASSAGES, step)
    working = getattr(patcher, method)
    calls = 0

    def fail_the_second_time(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        found = working(*arguments)
        if calls == 2:
            raise RuntimeError("in the middle")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(patcher, method, fail_the_second_time)
        with pytest.raises(RuntimeError, match="in the middle"):
            patcher.measure(QUERY, PASSAGES, step)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(patcher._parameters[name], before[name])
        assert patcher._parameters[name].grad is None
        assert not parameter.requires_grad
    assert patcher.measure(QUERY, PASSAGES, step) == expected


@pytest.mark.parametrize("architecture", ["gpt2", "llama_tied", "gemma2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_step_moves_every_parameter_of_the_copy_and_none_of_the_model(
    architecture: str, hooked: bool, tmp_path: Path
) -> None:
    """What capture puts into routers and experts leads to the serving weights; the copy must have none of it."""
    loaded = tiny.load(tiny.save_model(tmp_path, architecture, scale=2.0))
    plain = TailPatcher(tiny.load(tmp_path).model).measure(QUERY, PASSAGES, PatchStep(learning_rate=0.1))
    if hooked:
        encoder_of(loaded)
    patcher = TailPatcher(loaded.model)
    assert patcher.measure(QUERY, PASSAGES, PatchStep(learning_rate=0.1)) == plain
    serving = {storage(parameter) for parameter in [*loaded.model.parameters(), *loaded.model.buffers()]}
    assert not serving & {storage(tensor) for tensor in [*patcher._model.parameters(), *patcher._model.buffers()]}
    (patcher._loss(PASSAGES[0]) / 19).backward()
    patcher._take(PatchStep(learning_rate=0.1))
    moved = {name for name, p in loaded.model.named_parameters() if not torch.equal(p, patcher._parameters[name])}
    assert moved >= {name for name, p in patcher._parameters.items() if p.grad is not None and bool(p.grad.any())}
    assert {type_of(name) for name in moved} == {type_of(name) for name in patcher._parameters}


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def type_of(name: str) -> str:
    """The parameter's name without the layer's number."""
    return re.sub(r"\d+", "", name)


def test_plain_expert_modules_and_a_model_without_its_checkpoint_are_copied(tmp_path: Path) -> None:
    loaded = tiny.with_plain_experts(tiny.load(tiny.save_model(tmp_path, "mixtral"), torch.float64))
    encoder_of(loaded)
    fused = TailPatcher(tiny.load(tmp_path, torch.float64).model).measure(QUERY, PASSAGES, PatchStep())
    plain = TailPatcher(loaded.model).measure(QUERY, PASSAGES, PatchStep())
    assert [e.loss_after for e in plain] == pytest.approx([e.loss_after for e in fused], rel=1e-9)


def test_the_copy_of_a_bfloat16_model_does_not_swallow_the_step(tmp_path: Path) -> None:
    """Against the same rounded weights in float64: in bfloat16 two of these six effects are zero and two turned."""
    folder = tiny.save_model(tmp_path, "llama")
    exact = tiny.load(folder, torch.float64).model
    half = tiny.load(folder, torch.bfloat16).model
    with torch.no_grad():
        for wide, narrow in zip(exact.parameters(), half.parameters(), strict=True):
            wide.copy_(narrow)
    for step in (PatchStep(), PatchStep(optimizer="adamw", learning_rate=1e-5)):
        found = [effect.loss_change for effect in TailPatcher(half).measure(QUERY, PASSAGES, step)]
        expected = [effect.loss_change for effect in TailPatcher(exact).measure(QUERY, PASSAGES, step)]
        assert found == pytest.approx(expected, rel=0.02)
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())


def test_copying_and_stepping_leave_chance_alone_and_work_where_gradients_are_off(tmp_path: Path) -> None:
    model = tiny.load(tiny.save_model(tmp_path, "llama")).model
    expected = TailPatcher(model).measure(QUERY, PASSAGES, PatchStep())
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        assert TailPatcher(model).measure(QUERY, PASSAGES, PatchStep()) == expected
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_that_runs_meanwhile_is_not_copied(tmp_path: Path) -> None:
    """The backward pass puts something else in the decoder's place; a copy of that would answer wrongly."""
    loaded = tiny.load(tiny.save_model(tmp_path, "llama"))
    refused = 0

    def objective(logits_nV: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
        nonlocal refused
        with pytest.raises(NotReady, match="try again"):
            TailPatcher(loaded.model)
        refused += 1
        return cross_entropy(logits_nV, targets_n)

    tokens_BT = torch.from_numpy(QUERY.tokens.astype(np.int64))[None]
    backward(loaded.model, tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool), objective=objective)
    assert refused == 1
    TailPatcher(loaded.model)


def test_threads_take_turns(tmp_path: Path) -> None:
    patcher = TailPatcher(tiny.load(tiny.save_model(tmp_path, "llama")).model)
    steps = [PatchStep(learning_rate=rate) for rate in (0.1, 0.2, 0.3, 0.4)]
    expected = [patcher.measure(QUERY, PASSAGES, step) for step in steps]
    with ThreadPoolExecutor(max_workers=4) as threads:
        assert list(threads.map(lambda step: patcher.measure(QUERY, PASSAGES, step), steps)) == expected


@pytest.mark.parametrize("architecture", ["gpt2", "llama_tied", "gemma2"])
def test_a_loss_has_the_same_bits_whoever_is_watched_beside_it(architecture: str, tmp_path: Path) -> None:
    """Steps share the passage's gradient, and queries a pass; neither shows in what is measured, in float32."""
    patcher = TailPatcher(tiny.load(tiny.save_model(tmp_path, architecture)).model)
    queries = [example(200 + length, length, first_target=length - 2) for length in (4, 9, 16, 17, 23, 40, 64)]
    steps = [PatchStep(learning_rate=0.1), PatchStep(optimizer="adamw"), PatchStep(optimizer="adafactor")]
    together = patcher.losses_after(PASSAGES[0], [(step, queries) for step in steps])
    assert patcher.losses(queries) == [patcher.losses([query])[0] for query in queries]
    for step, losses in zip(steps, together, strict=True):
        assert losses == [patcher.measure(query, PASSAGES[:1], step)[0].loss_after for query in queries]
    assert together[0] != together[1]


# --- optimizers --------------------------------------------------------------------------------------------------


def trained(folder: Path, make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> LoadedModel:
    """Three steps of training, after which model and optimizer state lie in the folder."""
    loaded = tiny.load(folder, torch.float64)
    loaded.model.requires_grad_(True)
    optimizer = make(list(loaded.model.parameters()))
    for seed in range(3):
        optimizer.zero_grad()
        (loss(loaded, example(100 + seed, 24)) / 23).backward()
        optimizer.step()
    optimizer.zero_grad()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return loaded


def after_steps_of(
    loaded: LoadedModel, passage: Example, make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
) -> float:
    """The query's loss after one step of torch's own optimizer on a deep copy."""
    model = copy.deepcopy(loaded.model).requires_grad_(True)
    other = replace(loaded, model=model)
    optimizer = make(list(model.parameters()))
    (loss(other, passage) / (len(passage.tokens) - 1)).backward()
    optimizer.step()
    return float(loss(other, QUERY).detach())


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=3e-3, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1)


@pytest.mark.parametrize(
    ("step", "make"),
    [
        ({"optimizer": "sgd"}, lambda p: torch.optim.SGD(p, lr=3e-3, weight_decay=0.1)),
        ({"optimizer": "adamw", "betas": (0.8, 0.95), "eps": 1e-7}, adamw),
        ({"optimizer": "adafactor"}, lambda p: torch.optim.Adafactor(p, lr=3e-3, weight_decay=0.1)),
    ],
)
def test_fresh_optimizers_are_torchs(step: dict[str, Any], make: Any, tmp_path: Path) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path, "gpt2"), torch.float64)
    found = TailPatcher(loaded.model).measure(QUERY, PASSAGES, PatchStep(learning_rate=3e-3, weight_decay=0.1, **step))
    for passage, effect in zip(PASSAGES, found, strict=True):
        assert effect.loss_after == pytest.approx(after_steps_of(loaded, passage, make), rel=1e-9)
        assert effect.loss_change != 0.0


def test_carried_moments_take_the_step_that_training_would_take(tmp_path: Path) -> None:
    """The state comes through its file; betas and eps are its own, not the step's."""
    loaded = trained(tiny.save_model(tmp_path, "gpt2"), adamw)
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)

    def going_on(parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
        optimizer = adamw(parameters)
        optimizer.load_state_dict(copy.deepcopy(state))
        return optimizer

    moments = read_adam_moments(tmp_path, loaded.model)
    kept = {name: (one.first.clone(), one.second.clone()) for name, one in moments.items()}
    patcher = TailPatcher(loaded.model, moments=moments)
    step = PatchStep(optimizer="adamw", learning_rate=3e-3, weight_decay=0.1, carry="both")
    for passage, effect in zip(PASSAGES, patcher.measure(QUERY, PASSAGES, step), strict=True):
        assert effect.loss_after == pytest.approx(after_steps_of(loaded, passage, going_on), rel=1e-9)
    for name, (first, second) in kept.items():
        assert torch.equal(moments[name].first, first)
        assert torch.equal(moments[name].second, second)

    # The second moment alone: the same optimizer whose first moment is silent.
    for entry in state["state"].values():
        entry["exp_avg"].zero_()
    step = step.model_copy(update={"carry": "second"})
    for passage, effect in zip(PASSAGES, patcher.measure(QUERY, PASSAGES, step), strict=True):
        assert effect.loss_after == pytest.approx(after_steps_of(loaded, passage, going_on), rel=1e-9)


def transformers_adafactor(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    options = {"scale_parameter": False, "relative_step": False, "weight_decay": 0.1, "decay_rate": -0.7}
    return Adafactor(parameters, lr=3e-3, clip_threshold=0.8, **options)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_carried_adafactor_takes_the_step_that_training_would_take(architecture: str, tmp_path: Path) -> None:
    loaded = trained(tiny.save_model(tmp_path, architecture), transformers_adafactor)
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)

    def going_on(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = transformers_adafactor(parameters)
        optimizer.load_state_dict(copy.deepcopy(state))
        return optimizer

    moments = read_adafactor_moments(tmp_path, loaded.model)
    assert moments.keys() == dict(loaded.model.named_parameters()).keys()
    kept = {name: [copy.deepcopy(part) for part in (m.row, m.col, m.whole)] for name, m in moments.items()}
    patcher = TailPatcher(loaded.model, moments=moments)
    step = PatchStep(optimizer="adafactor", learning_rate=3e-3, weight_decay=0.1, carry="second")
    for passage, effect in zip(PASSAGES, patcher.measure(QUERY, PASSAGES, step), strict=True):
        assert effect.loss_after == pytest.approx(after_steps_of(loaded, passage, going_on), rel=1e-9)
        assert effect.loss_change != 0.0
    for name, parts in kept.items():
        for part, now in zip(parts, (moments[name].row, moments[name].col, moments[name].whole), strict=True):
            assert (part is None and now is None) or torch.equal(torch.as_tensor(part), torch.as_tensor(now))
    with pytest.raises(InvalidRequest, match="of another optimizer than adamw"):
        patcher.measure(QUERY, PASSAGES, PatchStep(optimizer="adamw", carry="second"))
    with pytest.raises(InvalidRequest, match="not that of Adam or AdamW"):
        read_adam_moments(tmp_path, loaded.model)
    for make in (adamw, torch.optim.Adafactor):
        trained(tmp_path, make)
        with pytest.raises(InvalidRequest, match="not that of transformers' Adafactor"):
            read_adafactor_moments(tmp_path, loaded.model)


def test_moments_that_cannot_be_carried_are_refused(tmp_path: Path) -> None:
    model = tiny.load(tiny.save_model(tmp_path, "gpt2")).model
    with pytest.raises(InvalidRequest, match="no optimizer state") as caught:
        TailPatcher(model).measure(QUERY, PASSAGES, PatchStep(optimizer="adamw", carry="both"))
    assert caught.value.field == "carry"
    for make in (lambda p: torch.optim.AdamW(p, amsgrad=True), torch.optim.Adafactor):
        trained(tmp_path, make)
        with pytest.raises(InvalidRequest, match="not that of Adam or AdamW"):
            read_adam_moments(tmp_path, model)
    trained(tmp_path, adamw)
    tiny.save_model(tmp_path / "other", "gpt2", n_embd=8)
    with pytest.raises(Incompatible, match="does not belong to this model"):
        read_adam_moments(tmp_path, tiny.load(tmp_path / "other").model)


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": 11.0},
        {"weight_decay": -0.1},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"optimizer": "lion"},
        {"momentum": 0.9},
        {"carry": "both"},
        {"optimizer": "adafactor", "carry": "both"},
    ],
)
def test_a_step_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PatchStep(**settings)


def test_a_step_into_nothing_is_refused_and_forgotten(tmp_path: Path) -> None:
    model = tiny.load(tiny.save_model(tmp_path, "gpt2", scale=30.0)).model
    patcher = TailPatcher(model)
    with torch.no_grad():
        patcher._originals["transformer.ln_f.bias"] = torch.nn.Parameter(torch.full((16,), float("nan")))
    patcher._restore()
    with pytest.raises(InvalidRequest, match="give a smaller learning_rate") as caught:
        patcher.measure(QUERY, PASSAGES, PatchStep())
    assert caught.value.field == "learning_rate"
    with pytest.raises(InvalidRequest, match="no target token"):
        patcher.measure(example(0, 5, first_target=5), PASSAGES, PatchStep())


def test_stopping_leaves_the_rest_out_and_nothing_to_learn_changes_nothing(tmp_path: Path) -> None:
    patcher = TailPatcher(tiny.load(tiny.save_model(tmp_path, "llama")).model)
    assert len(patcher.measure(QUERY, PASSAGES, PatchStep(), should_stop=lambda: True)) == 1
    (effect,) = patcher.measure(QUERY, [example(4, 1)], PatchStep())
    assert effect.loss_after == effect.loss_before
