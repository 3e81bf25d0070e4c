"""Rows against a float64 loop of autograd, on every architecture, with every kind of correction; and their
invariances."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny
from trackstar.capture import Factors
from trackstar.encode import Contributions, Encoder, Example, fold_factors, padded_length, plan_batches
from trackstar.errors import InvalidRequest, UnsupportedModel
from trackstar.model import LoadedModel
from trackstar.projection import BlockLayout, normal_factor
from trackstar.separable import SeparableScale

SEED, ROWS, COLS = 5, 16, 16


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def examples(
    seed: int = 0, lengths: tuple[tuple[int, int], ...] = ((12, 1), (20, 5), (7, 1), (12, 3), (40, 1))
) -> list[Example]:
    generator = np.random.default_rng(seed)
    return [
        Example(tokens=generator.integers(0, tiny.VOCABULARY, length, dtype=np.int32), first_target=first)
        for length, first in lengths
    ]


def ones(loaded: LoadedModel) -> dict[str, SeparableScale | Tensor]:
    return {
        member.name: SeparableScale(
            out=torch.ones(1, member.out_features), in_=torch.ones(1, member.in_features), error=0.0
        )
        for member in loaded.members
    }


def layout_of(loaded: LoadedModel) -> BlockLayout:
    return loaded.layout(layer_blocks=2, rows=ROWS, cols=COLS)


def encoder_of(
    loaded: LoadedModel, correction: Mapping[str, SeparableScale | Tensor] | None = None, max_batch_tokens: int = 8192
) -> Encoder:
    layout = layout_of(loaded)
    return Encoder(
        loaded,
        layout,
        fold_factors(loaded, layout, correction or ones(loaded), seed=SEED),
        max_batch_tokens=max_batch_tokens,
    )


def weight_gradients(loaded: LoadedModel, example: Example) -> dict[str, Tensor]:
    """Float64 gradient [m, n] of every member, by plain autograd on the whole loss of one example."""
    model = loaded.model
    model.requires_grad_(True)
    model.zero_grad()
    tokens = torch.from_numpy(example.tokens.astype(np.int64))[None]
    log_probabilities = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    first = max(1, example.first_target)
    targets = tokens[0, first:]
    (-log_probabilities[first - 1 : -1].gather(1, targets[:, None]).sum()).backward()
    parameters = dict(model.named_parameters())
    gradients = {}
    for member in loaded.members:
        name, _, expert = member.name.partition("[")
        gradient = parameters[name].grad
        if gradient is None:  # an expert that no token chose
            gradients[member.name] = torch.zeros(member.out_features, member.in_features, dtype=torch.float64)
            continue
        if expert:
            gradient = gradient[int(expert[:-1])]
        module = model.get_submodule(member.module_name)
        if member.kind == "conv1d" or (member.kind == "expert" and module.is_transposed):
            gradient = gradient.mT
        gradients[member.name] = gradient.clone()
    model.requires_grad_(False)
    return gradients


def oracle(
    folder: Path, loaded: LoadedModel, batch: list[Example], scale: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Rows [N, d] in float64 from explicit gradients: divide by sqrt(V), project, sum within the block."""
    exact = tiny.load(folder, torch.float64)
    if any(member.kind == "expert" for member in exact.members):
        exact.model.set_experts_implementation("eager")
    layout = layout_of(loaded)
    rows = torch.zeros(len(batch), layout.dim, dtype=torch.float64)
    for row, example in zip(rows, batch, strict=True):
        gradients = weight_gradients(exact, example)
        for member in loaded.members:
            gradient = gradients[member.name]
            if scale is not None:
                gradient = gradient * scale[member.name].double()
            block = loaded.block_of(member, layout)
            out = normal_factor(seed=SEED, name=member.name, side="out", size=ROWS, features=range(member.out_features))
            in_ = normal_factor(seed=SEED, name=member.name, side="in", size=COLS, features=range(member.in_features))
            row[layout.span(block)] += (out.double().mT @ gradient @ in_.double()).reshape(-1)
    return rows


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(((found.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_rows_equal_the_float64_loop(architecture: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", architecture)
    loaded = tiny.load(folder)
    encoded = encoder_of(loaded).encode(examples())
    assert relative_error(encoded.rows_ND, oracle(folder, loaded, examples())) < 1e-5


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mixtral"])
@pytest.mark.parametrize("terms", [1, 3])
def test_separable_correction_is_folded_in(architecture: str, terms: int, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", architecture)
    loaded = tiny.load(folder)
    generator = torch.Generator().manual_seed(1)
    correction: dict[str, SeparableScale | Tensor] = {}
    full: dict[str, Tensor] = {}
    for member in loaded.members:
        out = torch.rand(terms, member.out_features, generator=generator)
        in_ = torch.rand(terms, member.in_features, generator=generator)
        correction[member.name] = SeparableScale(out=out, in_=in_, error=0.1)
        full[member.name] = out.double().mT @ in_.double()
    rows = encoder_of(loaded, correction).encode(examples()).rows_ND
    assert relative_error(rows, oracle(folder, loaded, examples(), full)) < 1e-5


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_exact_correction_is_applied_to_every_gradient(architecture: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", architecture)
    loaded = tiny.load(folder)
    generator = torch.Generator().manual_seed(2)
    full: dict[str, SeparableScale | Tensor] = {
        member.name: torch.rand(member.out_features, member.in_features, generator=generator)
        for member in loaded.members
    }
    encoder = encoder_of(loaded, full)
    rows = encoder.encode(examples()).rows_ND
    expected = oracle(folder, loaded, examples(), {name: s for name, s in full.items() if isinstance(s, Tensor)})
    assert relative_error(rows, expected) < 1e-5
    query = torch.randn(rows.shape[1], generator=generator)
    check_contributions(encoder.contributions(examples(), query), rows, query)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "gpt_oss"])
def test_contributions_sum_to_the_inner_product(architecture: str, tmp_path: Path) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path / "model", architecture))
    encoder = encoder_of(loaded)
    rows = encoder.encode(examples()).rows_ND
    query = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(3))
    found = encoder.contributions(examples(), query)
    check_contributions(found, rows, query)
    for item, row in zip(found, rows, strict=True):
        by_block = torch.stack(
            [part @ q for part, q in zip(encoder.layout.split(row), encoder.layout.split(query), strict=True)]
        )
        torch.testing.assert_close(
            item.by_token_Tb.sum(0) + item.unplaced_b, by_block, rtol=1e-4, atol=1e-5 * float(row.norm())
        )


def check_contributions(found: list[Contributions], rows: Tensor, query: Tensor) -> None:
    for item, row, example in zip(found, rows, examples(), strict=True):
        assert item.by_token_Tb.shape[0] == len(example.tokens)
        assert abs(item.total - float(row.double() @ query.double())) < 1e-5 * float(row.norm() * query.norm())


def test_a_tokens_contribution_is_its_own_part_of_the_gradient(tmp_path: Path) -> None:
    """The last token predicts nothing and no one attends to it from a target, so it contributes exactly nothing."""
    loaded = tiny.load(tiny.save_model(tmp_path / "model", "llama"))
    encoder = encoder_of(loaded)
    (found,) = encoder.contributions(examples()[:1], torch.ones(encoder.layout.dim))
    assert float(found.by_token_Tb[-1].abs().max()) == 0.0
    assert float(found.by_token_Tb[:-1].abs().sum(1).min()) > 0.0


def test_plain_experts_are_encoded_one_by_one(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "mixtral")
    loaded, oracle_model = tiny.load(folder), tiny.load(folder, torch.float64)
    plain = tiny.with_plain_experts(loaded)
    layout = layout_of(plain)
    encoder = encoder_of(plain)
    rows = encoder.encode(examples()).rows_ND
    exact = tiny.with_plain_experts(oracle_model)
    expected = torch.zeros(rows.shape, dtype=torch.float64)
    for row, example in zip(expected, examples(), strict=True):
        for name, gradient in weight_gradients(exact, example).items():
            member = next(member for member in plain.members if member.name == name)
            out = normal_factor(
                seed=SEED, name=name, side="out", size=ROWS, features=range(member.out_features)
            ).double()
            in_ = normal_factor(seed=SEED, name=name, side="in", size=COLS, features=range(member.in_features)).double()
            row[layout.span(plain.block_of(member, layout))] += (out.mT @ gradient @ in_).reshape(-1)
    assert relative_error(rows, expected) < 1e-5
    query = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(3))
    check_contributions(encoder.contributions(examples(), query), rows, query)


# Gemma 2 has eager attention (soft caps), whose matrix products see the batch; it is in the test of rounding below.
FUSED_ATTENTION = ["gpt2", "gpt_neox", "llama", "qwen3", "olmo2", "gemma"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("architecture", FUSED_ATTENTION)
def test_rows_do_not_depend_on_batch_size_order_or_neighbours(architecture: str, threads: int, tmp_path: Path) -> None:
    torch.set_num_threads(threads)
    loaded = tiny.load(tiny.save_model(tmp_path / "model", architecture))
    batch = examples(lengths=tuple((length, 1) for length in (9, 9, 9, 17, 17, 30, 30, 30, 2, 5, 40, 33)))
    whole = encoder_of(loaded, max_batch_tokens=4096).encode(batch).rows_ND
    small = encoder_of(loaded, max_batch_tokens=64).encode(batch).rows_ND
    alone = torch.cat([encoder_of(loaded).encode([example]).rows_ND for example in batch])
    order = np.random.default_rng(0).permutation(len(batch))
    shuffled = torch.empty_like(whole)
    shuffled[torch.from_numpy(order)] = encoder_of(loaded).encode([batch[index] for index in order]).rows_ND
    for other in (small, alone, shuffled):
        assert torch.equal(whole, other)


@pytest.mark.parametrize("architecture", ["gemma2", "mixtral"])
def test_eager_attention_and_experts_depend_on_the_batch_by_rounding_only(architecture: str, tmp_path: Path) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path / "model", architecture))
    batch = examples(lengths=tuple((length, 1) for length in (9, 9, 9, 17, 17, 30)))
    whole = encoder_of(loaded).encode(batch).rows_ND
    alone = torch.cat([encoder_of(loaded).encode([example]).rows_ND for example in batch])
    assert relative_error(alone, whole.double()) < 1e-5


def test_padding_changes_nothing_but_rounding(tmp_path: Path) -> None:
    """The same tokens at their own length and at a padded one."""
    loaded = tiny.load(tiny.save_model(tmp_path / "model", "gpt_neox", max_position_embeddings=160))
    encoder = encoder_of(loaded)
    tokens = np.random.default_rng(0).integers(0, tiny.VOCABULARY, 160, dtype=np.int32)
    exact = encoder_of(tiny.load(tmp_path / "model", torch.float64))
    for length in (65, 67, 129, 131):
        assert padded_length(length) > length
        padded = encoder.encode([Example(tokens=tokens[:length])]).rows_ND
        assert relative_error(padded, exact.encode([Example(tokens=tokens[:length])]).rows_ND.double()) < 1e-5


def test_rows_are_linear_in_the_gradient(tmp_path: Path) -> None:
    """A passage's row is the sum of the rows of its single targets."""
    loaded = tiny.load(tiny.save_model(tmp_path / "model", "llama"))
    tokens = examples()[0].tokens
    encoder = encoder_of(loaded)
    whole = encoder.encode([Example(tokens=tokens)]).rows_ND
    prefixes = [Example(tokens=tokens[: end + 1], first_target=end) for end in range(1, len(tokens))]
    torch.testing.assert_close(encoder.encode(prefixes).rows_ND.sum(0, keepdim=True), whole, rtol=1e-4, atol=1e-4)


def test_losses_are_the_summed_cross_entropy(tmp_path: Path) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path / "model", "gemma2"))
    found = encoder_of(loaded).encode(examples()).loss_N
    for value, example in zip(found, examples(), strict=True):
        tokens = torch.from_numpy(example.tokens.astype(np.int64))[None]
        logits = loaded.model(input_ids=tokens, use_cache=False).logits[0].double()
        first = max(1, example.first_target)
        expected = torch.nn.functional.cross_entropy(logits[first - 1 : -1], tokens[0, first:], reduction="sum")
        assert float(value) == pytest.approx(float(expected), rel=1e-5)


def test_hooks_leave_the_model_as_it_was(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "mixtral")
    loaded = tiny.load(folder)
    tokens = torch.arange(20)[None]
    before = loaded.model(input_ids=tokens).logits
    encoder = encoder_of(loaded)
    encoder.encode(examples())
    encoder.close()
    assert torch.equal(loaded.model(input_ids=tokens).logits, before)
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_a_passage_without_targets_has_a_zero_row(tmp_path: Path) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path / "model", "llama"))
    encoded = encoder_of(loaded).encode([Example(tokens=np.array([3], dtype=np.int32)), *examples()])
    assert float(encoded.rows_ND[0].abs().max()) == 0.0
    assert float(encoded.loss_N[0]) == 0.0


def test_too_long_and_empty_examples_are_refused(tmp_path: Path) -> None:
    encoder = encoder_of(tiny.load(tiny.save_model(tmp_path / "model", "llama")))
    with pytest.raises(InvalidRequest, match="65 tokens, more than the model's window of 64"):
        encoder.encode([Example(tokens=np.zeros(65, dtype=np.int32))])
    with pytest.raises(InvalidRequest, match="no tokens"):
        encoder.encode([Example(tokens=np.zeros(0, dtype=np.int32))])


def test_a_module_without_gradient_is_named(tmp_path: Path) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path / "model", "llama"))
    mlp = loaded.model.get_submodule("model.layers.1.mlp")
    mlp.forward = lambda x: x
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\.gate_proj"):
        encoder_of(loaded)


def test_padding_never_exceeds_the_window(tmp_path: Path) -> None:
    assert padded_length(1000) == 1008
    assert padded_length(1000, limit=1000) == 1000
    assert padded_length(9, step=8, limit=12) == 12
    # A window that no step divides, and positions that are looked up.
    loaded = tiny.load(tiny.save_model(tmp_path, "gpt2", n_positions=50))
    layout = layout_of(loaded)
    factors = fold_factors(loaded, layout, ones(loaded), seed=SEED)
    encoder = Encoder(loaded, layout, factors, length_step=8)
    assert encoder.encode(examples(lengths=((50, 1), (49, 1)))).rows_ND.shape == (2, layout.dim)


def test_longer_steps_change_rows_by_rounding_only(tmp_path: Path) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path, "llama"))
    layout = layout_of(loaded)
    factors = fold_factors(loaded, layout, ones(loaded), seed=SEED)
    batch = examples()
    alone = Encoder(loaded, layout, factors)
    expected = alone.encode(batch)
    alone.close()
    stepped = Encoder(loaded, layout, factors, length_step=8)
    found = stepped.encode(batch)
    assert relative_error(found.rows_ND, expected.rows_ND.double()) < 1e-5
    # Still the same bits whoever else is in the batch.
    for index, example in enumerate(batch):
        assert torch.equal(stepped.encode([example]).rows_ND[0], found.rows_ND[index])


def test_padded_length_is_close_and_monotone() -> None:
    lengths = [padded_length(length) for length in range(1, 5000)]
    assert all(length <= padded <= length * 33 / 32 for length, padded in enumerate(lengths, start=1))
    assert lengths == sorted(lengths)
    assert lengths[:63] == list(range(1, 64))


def test_batches_cover_everything_once_within_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 1000).tolist()
    batches = list(plan_batches(lengths, 1024))
    assert sorted(index for batch in batches for index in batch) == list(range(1000))
    for batch in batches:
        padded = {padded_length(lengths[index]) for index in batch}
        assert len(padded) == 1
        assert len(batch) == 1 or len(batch) * padded.pop() <= 1024


def test_factors_name_their_block(tmp_path: Path) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path / "model", "gpt2"))
    layout = layout_of(loaded)
    factors: dict[str, Factors] = fold_factors(loaded, layout, ones(loaded), seed=SEED)
    assert layout.blocks[factors["transformer.h.2.mlp.c_fc.weight"].block].name == "layers 2-2 mlp"
    assert layout.blocks[factors["transformer.h.0.attn.c_attn.weight"].block].name == "layers 0-1 attention"
