"""The chunked loss against whole logits in float64: values, gradients, masks, and how much of the logits exists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import tiny
from trackstar import loss
from trackstar.loss import MIN_KERNEL_ROWS, Objective, cross_entropy

# A soft cap behind the head, an untied head with biases elsewhere, a tied head, and a mixture whose outputs hold more.
ARCHITECTURES = ("gemma2", "gpt_neox", "llama_tied", "mixtral")
BATCH, LENGTH = 3, 40


@dataclass
class Probe:
    """What one backward pass gave: values [B], gradients of embeddings and last hidden states, head outputs."""

    values_B: Tensor
    embedded_BTH: Tensor
    hidden_BTH: Tensor
    head_shapes: list[tuple[int, ...]] = field(default_factory=list)


def made(architecture: str, folder: Path, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Any:
    """A frozen model; a scale of 3 brings logits to where a soft cap bends them."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {"final_logit_softcapping": 2.0} if architecture == "gemma2" else {}
    model: Any = tiny.load(tiny.save_model(folder, architecture, scale=scale, **options), dtype).model
    if architecture == "mixtral":
        model.set_experts_implementation("eager")  # the others do not take float64
    return model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One model for the tests that need no other."""
    return made("gpt_neox", tmp_path_factory.mktemp("shared"))


@contextmanager
def listening(model: Any, kept: dict[str, Any]) -> Iterator[None]:
    """Let gradients start at the embeddings, and keep embeddings, last hidden states and the head's output shapes."""

    def embedded(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        kept["embedded"] = output.detach().requires_grad_(True)
        started: Tensor = kept["embedded"]
        return started

    def hidden(_module: nn.Module, _inputs: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        kept["hidden"] = output.last_hidden_state

    def head(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        kept.setdefault("shapes", []).append(tuple(output.shape))

    handles = [
        model.get_input_embeddings().register_forward_hook(embedded),
        model.base_model.register_forward_hook(hidden),
        model.get_output_embeddings().register_forward_hook(head),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def chunked(model: Any, tokens_BT: Tensor, is_target_BT: Tensor, **options: Any) -> Probe:
    kept: dict[str, Any] = {}
    with listening(model, kept):
        values_B = loss.backward(model, tokens_BT, is_target_BT, **options)
    return Probe(values_B, kept["embedded"].grad, kept["hidden"].grad, kept.get("shapes", []))


def whole(model: Any, tokens_BT: Tensor, is_target_BT: Tensor) -> Probe:
    """The same through the model's own forward, with all logits and a log-softmax written out."""
    kept: dict[str, Any] = {}
    with listening(model, kept):
        logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        assert logits_BTV.dtype == torch.float64
        log_p_BTV = logits_BTV - logits_BTV.exp().sum(-1, keepdim=True).log()
        values_B = torch.stack(
            [
                -sum(
                    (log_p_TV[t - 1, tokens_T[t]] for t in range(1, len(tokens_T)) if is_target_T[t]),
                    torch.zeros((), dtype=torch.float64),
                )
                for log_p_TV, tokens_T, is_target_T in zip(log_p_BTV, tokens_BT, is_target_BT, strict=True)
            ]
        )
        (values_B.sum() + 0.0 * logits_BTV.sum()).backward()  # the second term only keeps a graph without targets
    return Probe(values_B.detach(), kept["embedded"].grad, kept["hidden"].grad)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A passage, a query with a prompt, and a short one with padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, tiny.VOCABULARY, (BATCH, LENGTH), generator=generator)
    is_target_BT = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    is_target_BT[0, 1:] = True
    is_target_BT[1, 30:] = True
    is_target_BT[2, 1:9] = True
    return tokens_BT, is_target_BT


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((found.double() - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("chunk_tokens", [1, 7, MIN_KERNEL_ROWS, 50, 1024])
def test_chunks_equal_whole_logits(model: Any, chunk_tokens: int) -> None:
    tokens_BT, is_target_BT = batch()
    found, expected = chunked(model, tokens_BT, is_target_BT, chunk_tokens=chunk_tokens), whole(model, *batch())
    assert found.values_B.dtype == torch.float32
    assert close(found.values_B, expected.values_B, 1e-6)
    assert close(found.hidden_BTH, expected.hidden_BTH, 1e-12)
    assert close(found.embedded_BTH, expected.embedded_BTH, 1e-12)


@settings(max_examples=30)
@given(st.integers(1, 200), st.integers(0, 2**32))
def test_any_targets_and_any_chunk(shared: Any, chunk_tokens: int, seed: int) -> None:
    tokens_BT, _ = batch(seed)
    is_target_BT = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(seed)) < (seed % 5) / 4
    found = chunked(shared, tokens_BT, is_target_BT, chunk_tokens=chunk_tokens)
    expected = whole(shared, tokens_BT, is_target_BT)
    assert close(found.values_B, expected.values_B, 1e-6)
    assert close(found.embedded_BTH, expected.embedded_BTH, 1e-12)


def test_the_soft_cap_is_felt(tmp_path: Path) -> None:
    """Or the tests above would say nothing of it."""
    capped = made("gemma2", tmp_path / "capped")
    tokens_BT, _ = batch()
    with torch.no_grad():
        logits_BTV = capped(input_ids=tokens_BT, use_cache=False).logits
        raw_BTV = capped.get_output_embeddings()(
            capped.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        )
    assert float(logits_BTV.abs().max()) <= 2.0 < float(raw_BTV.abs().max()) / 2
    torch.testing.assert_close(logits_BTV, 2.0 * torch.tanh(raw_BTV / 2.0))


@pytest.mark.parametrize("chunk_tokens", [1, 7, 50, 1024])
def test_logits_never_stand_whole(model: Any, chunk_tokens: int) -> None:
    """The head gives at most a chunk (or the least a kernel takes) of logits at a time, and none for other tokens."""
    found = chunked(model, *batch(), chunk_tokens=chunk_tokens)
    num_targets = int(batch()[1].sum())
    assert num_targets < BATCH * LENGTH / 2
    heights = [shape[-2] for shape in found.head_shapes]
    assert all(shape[-1] == tiny.VOCABULARY and len(shape) <= 3 for shape in found.head_shapes)
    assert all(shape[0] == 1 for shape in found.head_shapes if len(shape) == 3)
    full, rest = divmod(num_targets, chunk_tokens)
    expected = [max(size, MIN_KERNEL_ROWS) for size in [chunk_tokens] * full + [rest] * (rest > 0)]
    assert heights == expected


def test_prompts_and_padding_do_not_count(model: Any) -> None:
    """Hidden states that predict no target get exactly no gradient; tokens behind the last target change nothing."""
    tokens_BT, is_target_BT = batch()
    found = chunked(model, tokens_BT, is_target_BT)
    predicts_BT = torch.cat([is_target_BT[:, 1:], torch.zeros(BATCH, 1, dtype=torch.bool)], dim=1)
    assert not found.hidden_BTH[~predicts_BT].any()
    assert bool(found.hidden_BTH[predicts_BT].any(dim=-1).all())
    other_BT = tokens_BT.clone()
    other_BT[2, 9:] = (other_BT[2, 9:] + 1) % tiny.VOCABULARY
    changed = chunked(model, other_BT, is_target_BT)
    assert float(found.values_B[2]) == pytest.approx(float(changed.values_B[2]), rel=1e-6)
    assert close(changed.embedded_BTH[2, :9], found.embedded_BTH[2, :9], 1e-12)
    assert not changed.embedded_BTH[2, 9:].any()


def test_the_first_token_has_no_prediction(model: Any) -> None:
    tokens_BT, is_target_BT = batch()
    with_first_BT = is_target_BT.clone()
    with_first_BT[:, 0] = True
    found, expected = chunked(model, tokens_BT, with_first_BT), chunked(model, tokens_BT, is_target_BT)
    assert torch.equal(found.values_B, expected.values_B)
    assert torch.equal(found.embedded_BTH, expected.embedded_BTH)


def test_without_targets_everything_is_zero(model: Any) -> None:
    tokens_BT, is_target_BT = batch()
    found = chunked(model, tokens_BT, torch.zeros_like(is_target_BT))
    assert not found.values_B.any()
    assert not found.embedded_BTH.any()
    assert found.head_shapes == []


def test_examples_do_not_mix(model: Any) -> None:
    """The gradient of one example's inputs is that of the example alone."""
    tokens_BT, is_target_BT = batch()
    together = chunked(model, tokens_BT, is_target_BT, chunk_tokens=11)
    for row in range(BATCH):
        alone = chunked(model, tokens_BT[row : row + 1], is_target_BT[row : row + 1])
        assert close(together.embedded_BTH[row], alone.embedded_BTH[0], 1e-12)
        assert float(together.values_B[row]) == pytest.approx(float(alone.values_B[0]), rel=1e-6)


def squared_margin(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    return (logits_nV.gather(1, targets_n[:, None])[:, 0] - logits_nV.mean(dim=1)) ** 2


def test_any_objective_is_summed(shared: Any) -> None:
    tokens_BT, is_target_BT = batch()
    objective: Objective = squared_margin
    found = chunked(shared, tokens_BT, is_target_BT, objective=objective, chunk_tokens=9)
    kept: dict[str, Any] = {}
    with listening(shared, kept):
        logits_BTV = shared(input_ids=tokens_BT, use_cache=False).logits[:, :-1]
        values_BT = squared_margin(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten()).view(BATCH, -1)
        values_B = (values_BT * is_target_BT[:, 1:]).sum(dim=1)
        values_B.sum().backward()
    assert close(found.values_B, values_B.detach(), 1e-6)
    assert close(found.embedded_BTH, kept["embedded"].grad, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_lower_precision_is_close_and_its_objective_sees_float32(
    dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    rounded = made("gpt_neox", tmp_path, dtype, scale=1.0)
    seen: list[torch.dtype] = []

    def objective(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
        seen.append(logits_nV.dtype)
        return cross_entropy(logits_nV, targets_n)

    found = chunked(rounded, *batch(), objective=objective)
    expected = whole(made("gpt_neox", tmp_path, scale=1.0), *batch())
    assert seen == [torch.float32]
    assert found.values_B.dtype == torch.float32
    assert close(found.values_B, expected.values_B, tolerance)
    assert close(found.embedded_BTH, expected.embedded_BTH, tolerance)


def test_the_model_is_left_as_it_was(shared: Any) -> None:
    base, names = shared.base_model, [name for name, _ in shared.named_modules()]
    before = {name: parameter.clone() for name, parameter in shared.named_parameters()}

    def failing(_logits_nV: Tensor, _targets_n: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loss.backward(shared, *batch(), objective=failing)
    chunked(shared, *batch())
    assert shared.base_model is base
    assert [name for name, _ in shared.named_modules()] == names
    for name, parameter in shared.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_a_frozen_model_without_hooks_still_gives_values(shared: Any) -> None:
    values_B = loss.backward(shared, *batch())
    assert close(values_B, whole(shared, *batch()).values_B, 1e-6)
