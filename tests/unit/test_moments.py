"""Second moments against the optimizers' own state in memory, and against squared gradients of a float64 loop."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from tests import tiny
from trackstar.errors import CorruptArtifact, Incompatible, InvalidRequest, NotFound
from trackstar.model import Member, find_members
from trackstar.moments import MomentEstimator, Moments, load_moments, save_moments, squared_gradient_sums

STEPS = 3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def fresh(architecture: str, **overrides: Any) -> Any:
    model_type, settings = tiny.ARCHITECTURES[architecture]
    layers = {"n_layer": 2} if architecture == "gpt2" else {"num_hidden_layers": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**settings, **layers, **overrides}))


def train(architecture: str, optimizer: str, folder: Path) -> tuple[nn.Module, dict[str, dict[str, Any]], Path]:
    """A real Trainer run: the model, the optimizer's state in memory by parameter name, and the checkpoint."""
    model = fresh(architecture)
    tokens = torch.randint(tiny.VOCABULARY, (4 * STEPS, 10), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=4,
        optim=optimizer,
        use_cpu=True,
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
    trainer.train()
    assert trainer.optimizer is not None
    state = trainer.optimizer.state
    by_name = {name: state[parameter] for name, parameter in model.named_parameters()}
    return fresh(architecture), by_name, folder / f"checkpoint-{STEPS}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """Every training run once per module."""
    runs: dict[tuple[str, str], Any] = {}

    def get(architecture: str, optimizer: str) -> Any:
        key = (architecture, optimizer)
        if key not in runs:
            runs[key] = train(architecture, optimizer, tmp_path_factory.mktemp("run"))
        return runs[key]

    return get


def members(model: Any) -> tuple[Member, ...]:
    return find_members(model)[0]


def oriented(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """[out, in] of a stored parameter or moment, independently of the code under test."""
    return tensor.T if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else tensor


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "llama_tied"])
def test_adam_moments_are_the_optimizers_own(run: Callable[..., Any], architecture: str) -> None:
    model, state, checkpoint = run(architecture, "adamw_torch")
    moments = load_moments(str(checkpoint), model)
    assert moments.kind == "adam"
    assert moments.eps == 1e-8
    assert not moments.factored
    assert set(moments.full) == {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
    for member in members(model):
        own = oriented(model, member.name, state[member.name]["exp_avg_sq"].double() / (1 - 0.999**STEPS))
        shape = (member.out_features, member.in_features)
        torch.testing.assert_close(moments.full[member.name].double(), own, rtol=1e-6, atol=0.0)
        live = own > 1e-12 * own.mean()
        exact = moments.exact(member.name, shape)
        torch.testing.assert_close(exact[live].double(), 1 / (own.sqrt() + 1e-8)[live], rtol=1e-5, atol=0.0)
        scale = moments.scale(member.name, shape, 2)
        assert scale.out.shape == (2, member.out_features)
        relative = (scale.dense().double() / exact.double() - 1).square().mean()
        assert float(relative) == pytest.approx(scale.error, rel=1e-3)


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2"])
def test_transformers_adafactor_is_the_optimizers_own(run: Callable[..., Any], architecture: str) -> None:
    model, state, checkpoint = run(architecture, "adafactor")
    moments = load_moments(checkpoint / "optimizer.pt", model)
    assert moments.kind == "adafactor"
    assert not moments.full
    for member in members(model):
        row, col = (state[member.name][key].double() for key in ("exp_avg_sq_row", "exp_avg_sq_col"))
        v = oriented(model, member.name, torch.outer(row, col) / row.mean())
        scale = moments.scale(member.name, (member.out_features, member.in_features), 4)
        assert scale.error == 0.0
        live = v > 1e-20
        torch.testing.assert_close(scale.dense()[live].double(), v.rsqrt()[live], rtol=1e-5, atol=0.0)


def test_torch_adafactor_and_named_groups(tmp_path: Path) -> None:
    model = fresh("gpt2")
    optimizer: Any = torch.optim.Adafactor(list(reversed(list(model.named_parameters()))), lr=1e-3)
    tokens = torch.randint(tiny.VOCABULARY, (4, 10))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    moments = load_moments(tmp_path, model)
    assert moments.kind == "adafactor"
    assert moments.eps == pytest.approx(torch.finfo(torch.float32).eps)
    for member in members(model):
        gradient = oriented(model, member.name, model.get_parameter(member.name).grad)
        moment = moments.factored[member.name]
        torch.testing.assert_close(moment.row, gradient.square().mean(1))
        torch.testing.assert_close(moment.col, gradient.square().mean(0))


@pytest.mark.parametrize("grouping", ["one", "matrices first", "biases last"])
def test_groupings_of_other_trainers_are_recognised(tmp_path: Path, grouping: str) -> None:
    model = fresh("gpt_neox")
    named = list(model.named_parameters())
    vectors = {name for name, parameter in named if parameter.ndim < 2}
    late = {"one": set(), "matrices first": vectors, "biases last": {n for n in vectors if "bias" in n}}[grouping]
    groups = [
        {"params": [parameter for name, parameter in named if name not in late]},
        *([{"params": [parameter for name, parameter in named if name in late]}] if late else []),
    ]
    optimizer = torch.optim.AdamW(groups, amsgrad=True)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    moments = load_moments(tmp_path, model, names=[member.name for member in members(model)])
    assert set(moments.full) == {member.name for member in members(model)}
    for name, moment in moments.full.items():
        torch.testing.assert_close(moment, model.get_parameter(name).grad.square())


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor"])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_fused_experts_are_taken_apart(architecture: str, optimizer: str, tmp_path: Path) -> None:
    model = fresh(architecture)
    kind = {"adamw_torch": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}[optimizer](model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter) + 0.05
        if parameter.ndim == 3:
            parameter.grad[1] = 0.0  # an expert that no token ever reached
    kind.step()
    torch.save(kind.state_dict(), tmp_path / "optimizer.pt")
    moments = load_moments(tmp_path, model)
    experts = [member for member in members(model) if member.kind == "expert"]
    assert len(experts) == 2 * 2 * 4
    for member in experts:
        name, _, index = member.name.rstrip("]").partition("[")
        gradient = model.get_parameter(name).grad[int(index)]
        v = (gradient.T if architecture == "gpt_oss" else gradient).square()
        moment = moments.factored[member.name]
        torch.testing.assert_close(moment.row, v.mean(1), rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(moment.col, v.mean(0), rtol=1e-5, atol=1e-12)
        scale = moments.scale(member.name, (member.out_features, member.in_features), 4)
        if index == "1":
            torch.testing.assert_close(
                scale.dense(), torch.full_like(scale.dense(), moments.average**-0.5), rtol=1e-3, atol=0
            )
        elif optimizer == "adamw_torch":
            relative = (scale.dense() * (v.sqrt() + 1e-8) - 1).square().mean()
            assert scale.error == pytest.approx(float(relative), rel=1e-3)
            assert scale.error > 0.0


def test_another_width_is_named_with_both_shapes(run: Callable[..., Any]) -> None:
    checkpoint = run("gpt_neox", "adamw_torch")[2]
    with pytest.raises(
        Incompatible, match=r"embed_in.weight' has shape \(97, 32\) in the model and \(97, 16\) in the opt"
    ):
        load_moments(checkpoint, fresh("gpt_neox", hidden_size=32))


def test_another_depth_is_named(run: Callable[..., Any]) -> None:
    checkpoint = run("gpt_neox", "adamw_torch")[2]
    with pytest.raises(Incompatible, match=r"holds 28 parameters in groups of \[10, 18\] and the model has 40"):
        load_moments(checkpoint, fresh("gpt_neox", num_hidden_layers=3))


def test_another_architecture_is_refused(run: Callable[..., Any]) -> None:
    with pytest.raises(Incompatible, match="does not belong to this model"):
        load_moments(run("gpt_neox", "adafactor")[2], fresh("gpt2"))


def test_missing_and_unreadable_states(tmp_path: Path, run: Callable[..., Any]) -> None:
    model, _, checkpoint = run("gpt_neox", "adamw_torch")
    with pytest.raises(NotFound, match=f"give one of checkpoint-{STEPS} in it"):
        load_moments(checkpoint.parent, model)
    with pytest.raises(NotFound, match=r"holds no optimizer\.pt; keep it when training"):
        load_moments(tmp_path, model)
    with pytest.raises(NotFound, match="there is no optimizer state"):
        load_moments(tmp_path / "nowhere", model)
    with pytest.raises(NotFound, match="there is no moments file"):
        load_moments(tmp_path / "nowhere.safetensors", model)
    broken = tmp_path / "optimizer.pt"
    whole = (checkpoint / "optimizer.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a pickle"):
        broken.write_bytes(content)
        with pytest.raises(CorruptArtifact, match="truncated, was altered, or holds objects that would run code"):
            load_moments(broken, model)
    torch.save({"state": {}, "param_groups": [], "hook": partial(print, "run")}, broken)
    assert zipfile.is_zipfile(broken)
    with pytest.raises(CorruptArtifact, match="would run code"):
        load_moments(broken, model)
    torch.save({"weights": torch.ones(2)}, broken)
    with pytest.raises(CorruptArtifact, match="not the state of a torch optimizer"):
        load_moments(broken, model)
    with pytest.raises(InvalidRequest, match="corpus sample"):
        load_moments("estimate", model)


def test_states_without_second_moments_are_refused(tmp_path: Path) -> None:
    model = fresh("gpt_neox")
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sgd.step()
    torch.save(sgd.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(InvalidRequest, match="its entries are momentum_buffer"):
        load_moments(tmp_path, model)
    adam = torch.optim.AdamW(model.parameters())
    adam.step()
    state = adam.state_dict()
    for entry in state["state"].values():
        entry["exp_avg_sq"].zero_()
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(Incompatible, match="record no gradient at all"):
        load_moments(tmp_path, model)
    state["state"][0]["exp_avg_sq"].fill_(float("nan"))
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(CorruptArtifact, match=r"negative or non-finite values for 'gpt_neox.embed_in.weight'"):
        load_moments(tmp_path, model)


def test_no_moments_are_ones() -> None:
    moments = load_moments("none", fresh("gpt2"))
    scale = moments.scale("anything", (3, 5), 4)
    assert torch.equal(scale.dense(), torch.ones(3, 5))
    assert torch.equal(moments.exact("anything", (3, 5)), torch.ones(3, 5))
    assert scale.error == 0.0


def equal(first: Moments, second: Moments) -> bool:
    return (
        (first.kind, first.eps, first.digest, first.source) == (second.kind, second.eps, second.digest, second.source)
        and set(first.full) == set(second.full)
        and set(first.factored) == set(second.factored)
        and all(torch.equal(v, second.full[name]) for name, v in first.full.items())
        and all(
            torch.equal(f.row, second.factored[name].row)
            and torch.equal(f.col, second.factored[name].col)
            and f.error == second.factored[name].error
            for name, f in first.factored.items()
        )
    )


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_oss"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
def test_saved_moments_are_read_back(architecture: str, kind: Any, tmp_path: Path) -> None:
    model = fresh(architecture)
    optimizer = kind(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    moments = load_moments(tmp_path, model)
    path = tmp_path / "moments.safetensors"
    save_moments(moments, path)
    assert equal(load_moments(path, model), moments)
    one = members(model)[-1]
    part = load_moments(path, model, names=[one.name])
    assert {name.partition("[")[0] for name in (*part.full, *part.factored)} == {one.name.partition("[")[0]}
    tensors = load_file(path)
    first = min(tensors)
    changed = {**tensors, first: tensors[first] * 2}
    with safe_open(path, "pt") as file:
        save_file(changed, path, file.metadata())
    with pytest.raises(CorruptArtifact, match="do not match its digest"):
        load_moments(path, model)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptArtifact, match="truncated or was altered"):
        load_moments(path, model)


def test_a_file_of_ones_own_lies_as_the_model_stores_it(tmp_path: Path) -> None:
    model = fresh("gpt2")
    path = tmp_path / "own.safetensors"
    name, other = "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight"
    stored = torch.rand(model.get_parameter(name).shape)
    v = torch.rand(model.get_parameter(other).shape)
    save_file({name: stored, f"{other}.row": v.mean(1), f"{other}.col": v.mean(0)}, path)
    moments = load_moments(path, model)
    assert moments.kind == "file"
    assert torch.equal(moments.full[name], stored.T)
    torch.testing.assert_close(moments.factored[other].row, v.mean(0))
    torch.testing.assert_close(moments.factored[other].col, v.mean(1))
    with pytest.raises(Incompatible, match=r"hold no weight 'transformer.h.1.mlp.c_fc.weight'"):
        moments.scale("transformer.h.1.mlp.c_fc.weight", (64, 16), 1)
    with pytest.raises(Incompatible, match=r"has shape \(16, 64\) in the model and \(64, 16\) in the moments"):
        moments.exact(name, (16, 64))
    for tensors, sentence, kind in (
        ({name: stored.T.contiguous()}, r"must have shape \(16, 64\) and has \(64, 16\)", Incompatible),
        ({"layer.weight": stored}, "which has no 'layer.weight'", Incompatible),
        ({f"{other}.row": v.mean(1)}, "must hold both", CorruptArtifact),
        ({name: -stored}, "negative or non-finite", CorruptArtifact),
    ):
        save_file(tensors, path)
        with pytest.raises(kind, match=sentence):
            load_moments(path, model)


def test_the_digest_tells_moments_apart(run: Callable[..., Any]) -> None:
    checkpoint = run("gpt_neox", "adamw_torch")[2]
    model = fresh("gpt_neox")
    whole = load_moments(checkpoint, model)
    assert load_moments(checkpoint, model).digest == whole.digest
    digests = {whole.digest, load_moments("none", model).digest}
    digests.add(load_moments(checkpoint, model, names=[members(model)[0].name]).digest)
    digests.add(load_moments(run("gpt_neox", "adafactor")[2], model).digest)
    assert len(digests) == 4


def test_the_estimate_is_the_mean_squared_gradient_of_single_examples() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 7, bias=False, dtype=torch.float64)
    head = nn.Linear(7, 3, dtype=torch.float64)
    inputs = torch.randn(6, 9, 5, dtype=torch.float64)
    mask = (torch.arange(9) < torch.tensor([9, 4, 1, 7, 9, 2])[:, None])[..., None]
    squares = torch.zeros(7, 5, dtype=torch.float64)
    deltas = []
    for example, kept in zip(inputs, mask, strict=True):
        hidden = layer(example)
        loss = (torch.tanh(head(torch.tanh(hidden))) * kept).square().sum()
        gradient, delta = torch.autograd.grad(loss, (layer.weight, hidden))
        squares += gradient.square()
        deltas.append(delta)
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-5)):
        estimator = MomentEstimator()
        for part in (slice(0, 4), slice(4, 6)):
            estimator.add("layer.weight", torch.stack(deltas)[part].to(dtype), inputs[part].to(dtype))
        moments = estimator.finish(6)
        assert moments.kind == "estimate"
        moment = moments.factored["layer.weight"]
        torch.testing.assert_close(moment.row.double(), squares.mean(1) / 6, rtol=tolerance, atol=0.0)
        torch.testing.assert_close(moment.col.double(), squares.mean(0) / 6, rtol=tolerance, atol=0.0)
        assert moments.scale("layer.weight", (7, 5), 3).error == 0.0


def test_gram_chunks_and_low_precision_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, a = torch.randn(5, 6, 4).bfloat16(), torch.randn(5, 6, 3).bfloat16()
    gradient = delta.double().mT @ a.double()
    monkeypatch.setattr("trackstar.moments.GRAM_ELEMENTS", 2 * 36)
    row, col = squared_gradient_sums(delta, a)
    torch.testing.assert_close(row, gradient.square().sum(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(col, gradient.square().sum(1), rtol=1e-5, atol=1e-6)
    assert row.dtype == torch.float64


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty sample"):
        MomentEstimator().finish(3)
