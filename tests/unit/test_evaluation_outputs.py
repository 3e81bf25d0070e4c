"""Margin and logit against autograd in float64, where the model is certain in float32, and as an index's option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import tiny
from tests.unit.test_encode import SEED, layout_of, ones
from tests.unit.test_index import TEXTS
from tests.unit.test_index import settings as index_settings
from trackstar.build import build_index, make_config
from trackstar.encode import Encoder, Example, fold_factors
from trackstar.errors import Incompatible, InvalidRequest
from trackstar.evaluation.outputs import OBJECTIVES, error, margin
from trackstar.index import Index, check_identity, fix_identity
from trackstar.index_settings import settings_of
from trackstar.loss import Objective

TOKENS = 7


def probabilities(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    odds_nV = logits_nV.exp()
    return odds_nV[torch.arange(len(targets_n)), targets_n] / odds_nV.sum(1)


def margin_by_hand(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    p_n = probabilities(logits_nV, targets_n)
    return (p_n / (1 - p_n)).log()


def logit_by_hand(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    return torch.stack([row[target] for row, target in zip(logits_nV, targets_n, strict=True)])


BY_HAND: dict[str, Objective] = {"margin": margin_by_hand, "logit": logit_by_hand}


def gradient(objective: Objective, logits_nV: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
    logits_nV = logits_nV.clone().requires_grad_(True)
    values_n = objective(logits_nV, targets_n)
    (found_nV,) = torch.autograd.grad(values_n.sum(), logits_nV)
    return values_n.detach(), found_nV


@pytest.mark.parametrize("name", ["margin", "logit"])
@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 4.0), vocabulary=st.integers(2, 30))
def test_values_and_gradients_are_those_by_hand(name: Any, seed: int, scale: float, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_nV = scale * torch.randn(TOKENS, vocabulary, generator=generator, dtype=torch.float64)
    targets_n = torch.randint(0, vocabulary, (TOKENS,), generator=generator)
    expected = gradient(BY_HAND[name], logits_nV, targets_n)
    found = gradient(OBJECTIVES[name], logits_nV, targets_n)
    narrow = gradient(OBJECTIVES[name], logits_nV.float(), targets_n)
    for one, two, three in zip(expected, found, narrow, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)
        assert three.dtype == torch.float32
        torch.testing.assert_close(three.double(), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gap", [-200.0, -30.0, 0.0, 30.0, 90.0])
def test_certainty_leaves_margin_and_error_exact_in_float32(gap: float) -> None:
    """Above a gap of 17, 1 - p is zero in float32 and the log of it would be infinite."""
    logits_nV = torch.tensor([[gap + 3.0, 3.0, 2.0, 3.0]])
    targets_n = torch.tensor([0])
    exact = gap - np.log(2 + np.exp(-1.0))
    values_n, gradient_nV = gradient(margin, logits_nV, targets_n)
    assert float(values_n) == pytest.approx(exact, rel=1e-6)
    shares = np.array([1.0, np.exp(-1.0), 1.0]) / (2 + np.exp(-1.0))
    np.testing.assert_allclose(gradient_nV[0].numpy(), [1.0, *-shares], rtol=1e-5)
    wrong = np.exp(-np.logaddexp(0.0, exact))
    assert float(error(logits_nV, targets_n)) == pytest.approx(wrong, rel=1e-4)
    # d loss / d margin is minus the error, so gradients of the loss are those of the margin times that.
    _, of_loss_nV = gradient(OBJECTIVES["loss"], logits_nV.double(), targets_n)
    _, of_margin_nV = gradient(margin, logits_nV.double(), targets_n)
    torch.testing.assert_close(of_loss_nV, -error(logits_nV.double(), targets_n) * of_margin_nV, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
@pytest.mark.parametrize("name", ["margin", "logit"])
def test_rows_hold_the_gradient_of_the_output(architecture: str, name: Any, tmp_path: Path) -> None:
    """Prompts do not count, targets add up, and the projection of whole weight gradients gives the same row."""
    loaded = tiny.load(tiny.save_model(tmp_path, architecture), torch.float64)
    layout = layout_of(loaded)
    factors = fold_factors(loaded, layout, ones(loaded), seed=SEED)
    encoder = Encoder(loaded, layout, factors, objective=OBJECTIVES[name])
    tokens = np.random.default_rng(5).integers(0, tiny.VOCABULARY, 11, dtype=np.int32)
    example = Example(tokens=tokens, first_target=6)
    found = encoder.encode([example])
    encoder.close()

    loaded.model.requires_grad_(True)
    ids = torch.from_numpy(tokens.astype(np.int64))
    logits_TV = loaded.model(input_ids=ids[None], use_cache=False).logits[0]
    values_n = BY_HAND[name](logits_TV[5:-1], ids[6:])
    assert float(found.loss_N[0]) == pytest.approx(float(values_n.detach().sum()), rel=1e-6)
    weights = dict(loaded.model.named_parameters())
    gradients = torch.autograd.grad(values_n.sum(), [weights[member.name] for member in loaded.members])
    expected_d = torch.zeros(layout.dim, dtype=torch.float64)
    for member, whole in zip(loaded.members, gradients, strict=True):
        factor = factors[member.name]
        whole_mn = whole.mT if member.kind == "conv1d" else whole
        expected_d[layout.span(factor.block)] += (factor.out.mT @ whole_mn @ factor.in_).flatten()
    torch.testing.assert_close(found.rows_ND[0].double(), expected_d, rtol=1e-4, atol=1e-5)


# --- as an index's option -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    tiny.save_model(root / "model", "gpt2")
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name in ("loss", "margin"):
        build_index(make_config(index_settings(root, objective=name)), root / name).close()
    return root


def test_an_index_of_margins_encodes_queries_alike(world: Path) -> None:
    index, of_loss = Index(world / "margin"), Index(world / "loss")
    rows = index.rows()
    encoder = index.encoder(index.load_model())
    found = encoder.encode([Example(tokens=passage.tokens) for passage in rows.passages(range(rows.num_passages))])
    encoder.close()
    torch.testing.assert_close(found.rows_ND, rows.read(range(rows.num_passages)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.loss_N.numpy(), rows.column("loss"), rtol=1e-6)
    assert not torch.allclose(of_loss.rows().read([0]), rows.read([0]))


def test_an_index_of_the_loss_is_what_it_was_before_there_was_a_choice(world: Path) -> None:
    assert "objective" not in Index(world / "loss").facts
    assert Index(world / "margin").facts["objective"] == "margin"
    assert make_config(settings_of(world / "loss")).objective == "loss"
    assert make_config(settings_of(world / "margin")).objective == "margin"
    build_index(make_config(index_settings(world)), world / "loss").close()
    for there, wanted in (("loss", "margin"), ("margin", "loss")):
        with pytest.raises(Incompatible, match=f"was started with objective = '{there}', this command has '{wanted}'"):
            build_index(make_config(index_settings(world, objective=wanted)), world / there)


def test_an_index_without_the_key_goes_on_as_one_of_the_loss(tmp_path: Path) -> None:
    fix_identity(tmp_path, {"format": 2})
    check_identity(tmp_path, {"format": 2, "objective": "loss"})
    with pytest.raises(Incompatible, match="objective = 'loss', this command has 'logit'"):
        check_identity(tmp_path, {"format": 2, "objective": "logit"})


def test_unknown_outputs_are_refused(world: Path) -> None:
    with pytest.raises(InvalidRequest, match="the config's objective"):
        make_config(index_settings(world, objective="entropy"))
    index = Index(world / "margin")
    index.facts["objective"] = "entropy"
    with pytest.raises(Incompatible, match="holds gradients of 'entropy', this version knows loss, margin, logit"):
        _ = index.objective
