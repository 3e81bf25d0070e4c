"""Tail-patch of lists against a plain loop in float64; each pair measured once, and again after a kill only what was
not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.unit.test_tail_patch import adamw, example, loss, trained, transformers_adafactor
from trackstar.encode import Example
from trackstar.errors import CorruptArtifact, InvalidRequest, NotReady
from trackstar.evaluation.tail_patch_judge import DEPTHS, Judgement, TailPatchJudge, steps_side_by_side
from trackstar.locks import writing
from trackstar.model import LoadedModel
from trackstar.tail_patch import PatchStep, TailPatcher

QUERIES = [example(0, 12, first_target=9), example(50, 9, first_target=6), example(51, 7, first_target=5)]
PASSAGES = {f"d{number}": example(1 + number, 8 + number) for number in range(14)}
LISTS = {
    "long": [[f"d{number}" for number in order] for order in (range(12), range(11, -1, -1), range(2, 14))],
    "short": [["d3", "d0"], [], ["d13"]],
}
STEPS = {"SGD": PatchStep(learning_rate=0.02), "AdamW": PatchStep(optimizer="adamw", learning_rate=1e-3)}


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    torch.set_num_threads(1)
    return tiny.load(tiny.save_model(tmp_path / "model", "gpt2"), torch.float64)


def judge_of(loaded: LoadedModel, cache: Path, **options: Any) -> list[Judgement]:
    judge = TailPatchJudge(loaded, cache, **options)
    return judge.judge(QUERIES, PASSAGES.__getitem__, LISTS, STEPS)


def by_hand(loaded: LoadedModel, query: Example, passage: Example, make: Any) -> tuple[float, float]:
    """Change of probability and loss over one step of torch's own optimizer on a deep copy."""
    other = copy.deepcopy(loaded)
    other.model.requires_grad_(True)
    optimizer = make(list(other.model.parameters()))
    before = float(loss(other, query).detach())
    (loss(other, passage) / (len(passage.tokens) - 1)).backward()
    optimizer.step()
    after = float(loss(other, query).detach())
    return np.exp(-after) - np.exp(-before), after - before


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.02),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
}


def test_judgements_are_those_of_a_plain_loop(loaded: LoadedModel, tmp_path: Path) -> None:
    found = {(one.step, one.method, one.depth): one for one in judge_of(loaded, tmp_path / "effects.jsonl")}
    assert list(found) == [(step, method, depth) for step in STEPS for method in LISTS for depth in DEPTHS]
    for step, make in MAKERS.items():
        effects = {
            (place, document): by_hand(loaded, query, PASSAGES[document], make)
            for place, query in enumerate(QUERIES)
            for method in LISTS.values()
            for document in method[place][:10]
        }
        for method, lists in LISTS.items():
            for depth in DEPTHS:
                one = found[step, method, depth]
                for place, documents in enumerate(lists):
                    some = [effects[place, document] for document in documents[:depth]] or [(0.0, 0.0)]
                    assert one.probability_Q[place] == pytest.approx(np.mean([p for p, _ in some]), rel=1e-6, abs=1e-15)
                    assert one.loss_Q[place] == pytest.approx(np.mean([change for _, change in some]), rel=1e-6)
                assert one.tail_patch == pytest.approx(one.probability_Q.sum() / 3)
    # A passage that helps lowers the loss; the two measures are of one step.
    one = found["SGD", "long", 1]
    assert (np.sign(one.probability_Q) == -np.sign(one.loss_Q)).all()


def test_a_carried_state_is_trainings_own(tmp_path: Path) -> None:
    model = trained(tiny.save_model(tmp_path / "model", "gpt2"), adamw)
    state = torch.load(tmp_path / "model" / "optimizer.pt", weights_only=True)

    def going_on(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = adamw(parameters)
        optimizer.load_state_dict(copy.deepcopy(state))
        return optimizer

    judge = TailPatchJudge(model, tmp_path / "effects.jsonl", optimizer=tmp_path / "model")
    steps = {"both": PatchStep(optimizer="adamw", learning_rate=3e-3, weight_decay=0.1, carry="both")}
    (one,) = judge.judge(QUERIES[:1], PASSAGES.__getitem__, {"m": [["d1"]]}, steps, depths=[1])
    expected, _ = by_hand(model, QUERIES[0], PASSAGES["d1"], going_on)
    assert one.tail_patch == pytest.approx(expected, rel=1e-6)


class Counting:
    """Counts the passages and pairs that are measured, and may die in the middle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies_at: int | None = None) -> None:
        self.pairs: list[bytes] = []
        self.calls = 0
        original = TailPatcher.losses_after

        def losses_after(patcher: TailPatcher, passage: Example, watched: Any) -> Any:
            self.calls += 1
            if self.calls == dies_at:
                raise KeyboardInterrupt
            self.pairs += [
                repr((query.tokens.tolist(), passage.tokens.tolist(), step)).encode()
                for step, queries in watched
                for query in queries
            ]
            return original(patcher, passage, watched)

        monkeypatch.setattr(TailPatcher, "losses_after", losses_after)


def values(found: list[Judgement]) -> list[Any]:
    return [(one.step, one.method, one.depth, one.probability_Q.tolist(), one.loss_Q.tolist()) for one in found]


def test_a_pair_is_measured_once_whoever_lists_it(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(monkeypatch)
    first = judge_of(loaded, tmp_path / "effects.jsonl")
    # 10 of the long list and, of the short one, what is not among them: d13 of the third query is.
    assert len(counting.pairs) == len(set(counting.pairs)) == 2 * (10 + 10 + 11)
    # One gradient for each of the 13 passages that are listed at all.
    assert counting.calls == 13
    again = judge_of(loaded, tmp_path / "effects.jsonl")
    assert len(counting.pairs) == 2 * (10 + 10 + 11)
    assert values(again) == values(first)
    assert values(judge_of(loaded, tmp_path / "other.jsonl")) == values(first)


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_run_that_was_killed_goes_on(
    cut: int, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = values(judge_of(loaded, tmp_path / "whole.jsonl"))
    path = tmp_path / "effects.jsonl"
    with monkeypatch.context() as patch:
        counting = Counting(patch, dies_at=3)
        with pytest.raises(KeyboardInterrupt):
            judge_of(loaded, path)
        done = len(counting.pairs)
    # Killed while it wrote: the last line is not whole.
    path.write_bytes(path.read_bytes()[: -cut or None])
    counting = Counting(monkeypatch)
    assert values(judge_of(loaded, path)) == expected
    assert len(counting.pairs) == 2 * (10 + 10 + 11) - done + (cut > 0)
    assert sorted(path.read_text().splitlines()) == sorted((tmp_path / "whole.jsonl").read_text().splitlines())


def test_another_checkpoint_step_or_state_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch)
    cache = tmp_path / "effects.jsonl"
    steps = [
        PatchStep(),
        PatchStep(learning_rate=0.1),
        PatchStep(optimizer="adamw"),
        PatchStep(optimizer="adamw", carry="second"),
    ]
    for number in (0, 1):
        folder = tiny.save_model(tmp_path / f"model-{number}", "gpt2", seed=number)
        model = trained(folder, adamw)
        for repetition in (0, 1):
            judge = TailPatchJudge(model, cache, optimizer=folder)
            for step in steps:
                judge.judge(QUERIES[:1], PASSAGES.__getitem__, {"m": [["d0"]]}, {"s": step})
            assert counting.calls == (number + 1) * len(steps), repetition
    # The same checkpoint with another state: only what carries it on is new.
    model = tiny.load(tmp_path / "model-1", torch.float64)
    judge = TailPatchJudge(model, cache, optimizer=tmp_path / "model-0")
    for step in steps:
        judge.judge(QUERIES[:1], PASSAGES.__getitem__, {"m": [["d0"]]}, {"s": step})
    assert counting.calls == 2 * len(steps) + 1


def test_what_cannot_be_judged_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "effects.jsonl"
    judge = TailPatchJudge(loaded, path)
    get = PASSAGES.__getitem__
    cases: list[tuple[list[Example], dict[str, Any], dict[str, PatchStep], tuple[int, ...], str]] = [
        ([], {"m": []}, STEPS, (1,), "at least one query"),
        (QUERIES, {}, STEPS, (1,), "at least one method"),
        (QUERIES, LISTS, {}, (1,), "at least one step"),
        (QUERIES, LISTS, STEPS, (), "at least one depth"),
        (QUERIES, LISTS, STEPS, (0, 1), "at a depth of 0 means nothing"),
        (QUERIES[:2], LISTS, STEPS, (1,), "the method 'long' has lists for 3 queries, there are 2; give one for each"),
        (QUERIES, LISTS, {"c": PatchStep(optimizer="adamw", carry="both")}, (1,), "there is no optimizer state"),
    ]
    for queries, lists, steps, depths, says in cases:
        with pytest.raises(InvalidRequest, match=says):
            judge.judge(queries, get, lists, steps, depths=depths)
    with writing(tmp_path, name=".effects.jsonl.lock"), pytest.raises(NotReady, match="another process"):
        judge.judge(QUERIES, get, LISTS, STEPS)
    for line in ("{}\n", "[1]\n", '{"key": "k", "before": "x", "after": 1}\n', "nonsense\n"):
        path.write_text(line)
        with pytest.raises(CorruptArtifact, match=re.escape(f"{path}:1 is not an effect")):
            TailPatchJudge(loaded, path)


def test_adafactors_state_is_carried_too(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "gpt2")
    model = trained(folder, transformers_adafactor)
    state = torch.load(folder / "optimizer.pt", weights_only=True)

    def going_on(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = transformers_adafactor(parameters)
        optimizer.load_state_dict(copy.deepcopy(state))
        return optimizer

    judge = TailPatchJudge(model, tmp_path / "effects.jsonl", optimizer=folder)
    steps = {"a": PatchStep(optimizer="adafactor", learning_rate=3e-3, weight_decay=0.1, carry="second")}
    (one,) = judge.judge(QUERIES[:1], PASSAGES.__getitem__, {"m": [["d1"]]}, steps, depths=[1])
    expected, _ = by_hand(model, QUERIES[0], PASSAGES["d1"], going_on)
    assert one.tail_patch == pytest.approx(expected, rel=1e-6)


def test_the_steps_of_a_report() -> None:
    assert list(steps_side_by_side(sgd=0.01, adamw=1e-4, carried="none")) == ["SGD 0.01", "AdamW 0.0001, fresh"]
    steps = steps_side_by_side(sgd=0.01, adamw=1e-4, carried="adamw")
    assert [step.carry for step in steps.values()] == ["none", "none", "second", "both"]
    assert [step.learning_rate for step in steps.values()] == [0.01, 1e-4, 1e-4, 1e-4]
    steps = steps_side_by_side(sgd=0.01, adamw=1e-4, carried="adafactor")
    assert [(step.optimizer, step.carry) for step in steps.values()][2:] == [("adafactor", "second")]
