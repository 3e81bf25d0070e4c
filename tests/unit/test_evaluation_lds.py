"""The linear datamodeling score where the answer is known, and real retrainings of a tiny model: against a plain loop,
twice, after a kill, and on a real Ray."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from tests import tiny
from trackstar.encode import Example
from trackstar.engine import LocalEngine
from trackstar.errors import CorruptArtifact, InvalidRequest
from trackstar.evaluation import retraining
from trackstar.evaluation.intervals import Bootstrap
from trackstar.evaluation.lds import (
    datamodeling_score,
    draw_subsets,
    loss_rises,
    mean_ranks,
    plan_removals,
    spearman,
    subset_sums,
)
from trackstar.evaluation.retraining import Budget, Experiment, make_experiment, rate, retrain, schedule
from trackstar.model import load_model

# --- the score ------------------------------------------------------------------------------------------------------


def test_ranks_and_correlations_by_hand() -> None:
    values_SQ = np.array([[3.0, 1.0, 5.0], [1.0, 1.0, 5.0], [2.0, 0.0, 5.0], [2.0, 7.0, 5.0]])
    assert mean_ranks(values_SQ).T.tolist() == [[3, 0, 1.5, 1.5], [1.5, 1.5, 0, 3], [1.5] * 4]
    others_SQ = np.tile(np.array([[10.0], [20.0], [30.0], [40.0]]), (1, 3))
    # Ranks about their means are (1.5, -1.5, 0, 0), (0, 0, -1.5, 1.5) and nothing; the others' (-1.5, -.5, .5, 1.5).
    expected = [-1.5 / np.sqrt(4.5 * 5), 1.5 / np.sqrt(4.5 * 5), 0.0]
    np.testing.assert_allclose(spearman(values_SQ, others_SQ), expected, rtol=1e-12)


@settings(max_examples=40)
@given(st.integers(3, 12), st.integers(0, 1000), st.integers(2, 9))
def test_correlations_are_those_of_scipy(num_subsets: int, seed: int, levels: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(seed)
    one = generator.integers(0, levels, (num_subsets, 2)).astype(float)
    other = generator.normal(size=(num_subsets, 2))
    for mine, a, b in zip(spearman(one, other), one.T, other.T, strict=True):
        expected = 0.0 if len(set(a)) == 1 else stats.spearmanr(a, b).statistic
        assert mine == pytest.approx(expected, abs=1e-12)


N, Q = 30, 6
MASKS = draw_subsets(N, count=40, seed=1)
FEW = Bootstrap(resamples=5)


def linear_model() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least squares in which each passage has a feature of its own, and what each passage is worth to each query.

    The fit of least norm knows w_i = y_i of the passages it saw and 0 of the others, so a query's loss, which is linear
    in the prediction, is a sum over passages: the datamodel is exact.
    """
    generator = np.random.default_rng(0)
    targets_N, queries_QN = generator.normal(size=N), generator.normal(size=(Q, N))
    losses = []
    for mask_N in MASKS:
        weights_N, *_ = np.linalg.lstsq(np.eye(N)[mask_N], targets_N[mask_N], rcond=None)
        losses.append(5.0 - queries_QN @ weights_N)
    return queries_QN * targets_N, np.array(losses)


def test_a_linear_model_is_predicted_by_its_own_datamodel() -> None:
    worth_QN, losses_SQ = linear_model()
    scores = worth_QN.astype(np.float32)
    found = datamodeling_score(scores, MASKS, losses_SQ, bootstrap=Bootstrap(resamples=50))
    np.testing.assert_allclose(found.values_Q, 1.0, atol=1e-3)
    assert found.over_queries["mean"] == pytest.approx(1.0, abs=1e-3)
    np.testing.assert_allclose(datamodeling_score(-scores, MASKS, losses_SQ, bootstrap=FEW).values_Q, -1.0, atol=1e-3)
    # Only the order counts, and a passage that every subset has or lacks tells nothing.
    np.testing.assert_array_equal(
        datamodeling_score(4 * scores, MASKS, losses_SQ, bootstrap=FEW).values_Q, found.values_Q
    )
    nothing = datamodeling_score(np.zeros_like(scores), MASKS, losses_SQ, bootstrap=FEW)
    assert nothing.values_Q.tolist() == [0.0] * Q
    # Half of the passages known, half guessed as 0: of half the variance, so about the root of a half.
    half = np.where(np.arange(N) < N // 2, scores, 0)
    assert 0.4 < datamodeling_score(half, MASKS, losses_SQ, bootstrap=FEW).over_queries["mean"] < 0.95
    noise = np.random.default_rng(9).normal(size=(Q, N)).astype(np.float32)
    assert abs(datamodeling_score(noise, MASKS, losses_SQ, bootstrap=FEW).over_queries["mean"]) < 0.25


def test_scores_may_come_in_pieces() -> None:
    scores = np.random.default_rng(2).normal(size=(Q, N)).astype(np.float32)
    pieces = ((start, scores[:, start : start + 7]) for start in range(0, N, 7))
    whole = subset_sums(scores, MASKS)
    np.testing.assert_allclose(subset_sums(pieces, MASKS), whole, rtol=1e-12, atol=1e-12)
    by_hand = [[scores[q, mask].astype(np.float64).sum() for q in range(Q)] for mask in MASKS]
    np.testing.assert_allclose(whole, by_hand, rtol=1e-12, atol=1e-12)


def test_intervals_hold_the_mean_and_come_out_the_same_twice() -> None:
    worth_QN, losses_SQ = linear_model()
    noisy = (worth_QN + np.random.default_rng(4).normal(size=worth_QN.shape)).astype(np.float32)
    one, two = (
        datamodeling_score(noisy, MASKS, losses_SQ, bootstrap=Bootstrap(resamples=200, seed=3)) for _ in range(2)
    )
    assert (one.over_queries, one.over_subsets) == (two.over_queries, two.over_subsets)
    assert one.over_queries["low"] < one.over_queries["mean"] < one.over_queries["high"]
    assert one.over_subsets["low"] < one.over_subsets["high"]
    assert one.over_subsets["mean"] == one.over_queries["mean"] == pytest.approx(one.values_Q.mean())
    means = [float(noisy[:, drawn].mean()) for drawn in (np.arange(N), np.full(N, 3))]
    given = Bootstrap(resamples=100).statistic(lambda drawn: float(noisy[:, drawn].mean()), N)
    assert given["mean"] == means[0]
    assert given["low"] < means[0] < given["high"]
    alike = Bootstrap(resamples=100).numbers(noisy.mean(0, dtype=np.float64))
    assert given == pytest.approx(alike, rel=1e-5)


def test_subsets_are_of_one_size_and_drawn_alike_whatever_their_number() -> None:
    assert (MASKS.sum(1) == 15).all()
    assert len({mask.tobytes() for mask in MASKS}) == 40
    np.testing.assert_array_equal(draw_subsets(N, count=50, seed=1)[:40], MASKS)
    assert not np.array_equal(draw_subsets(N, count=40, seed=2), MASKS)
    assert (draw_subsets(N, count=3, fraction=0.9).sum(1) == 27).all()


def test_scores_and_subsets_that_do_not_fit_are_refused() -> None:
    scores, losses = np.zeros((Q, N), dtype=np.float32), np.zeros((40, Q))
    with pytest.raises(InvalidRequest, match="2 subsets tell nothing"):
        draw_subsets(N, count=2)
    for fraction in (0.0, 1.0, 0.01):
        with pytest.raises(InvalidRequest, match="give one that keeps some and not all"):
            draw_subsets(N, count=4, fraction=fraction)
    with pytest.raises(InvalidRequest, match="the method scores 29 passages, the subsets are of 30"):
        subset_sums(scores[:, 1:], MASKS)
    with pytest.raises(InvalidRequest, match="gives no score of passage 7"):
        subset_sums([(0, scores[:, :7]), (8, scores[:, 8:])], MASKS)
    with pytest.raises(InvalidRequest, match="scores that are no numbers"):
        subset_sums(np.full_like(scores, np.nan), MASKS)
    with pytest.raises(InvalidRequest, match="the method scores 0 passages"):
        subset_sums([], MASKS)
    with pytest.raises(InvalidRequest, match="losses of 6 queries after 39 runs, and scores of 6 queries for 40 sub"):
        datamodeling_score(scores, MASKS, losses[1:])


# --- removals -------------------------------------------------------------------------------------------------------

DOCUMENTS = ["a", "b", "b", "c", "d", "e"]


def test_a_removal_leaves_out_what_was_listed_first() -> None:
    lists = {"m": [["b", "a"], ["c"], []], "other": [["e"], ["e"], ["e"]]}
    alone = plan_removals(lists, DOCUMENTS, depth=1)
    assert alone["m"].kept == ((0, 3, 4, 5), (0, 1, 2, 4, 5), (0, 1, 2, 3, 4, 5))
    assert alone["m"].run_Q.tolist() == [0, 1, 2]
    assert alone["m"].num_removed == pytest.approx(1.0)
    joint = plan_removals(lists, DOCUMENTS, depth=2, queries_per_run=2)
    assert joint["m"].kept == ((4, 5), (0, 1, 2, 3, 4, 5))
    assert joint["m"].run_Q.tolist() == [0, 0, 1]
    assert joint["other"].kept == ((0, 1, 2, 3, 4),) * 2
    rises = loss_rises(joint["m"], np.array([[3.0, 4.0, 9.0], [8.0, 7.0, 1.5]]), np.array([1.0, 1.0, 1.0]))
    assert rises.tolist() == [2.0, 3.0, 0.5]


def test_removals_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="the method 'm' lists 'z', which is not in the corpus"):
        plan_removals({"m": [["z"]]}, DOCUMENTS, depth=1)
    with pytest.raises(InvalidRequest, match="leaves nothing to train on"):
        plan_removals({"m": [DOCUMENTS]}, DOCUMENTS, depth=9)
    with pytest.raises(InvalidRequest, match="must be at least 1"):
        plan_removals({"m": []}, DOCUMENTS, depth=0)


# --- retraining -----------------------------------------------------------------------------------------------------

BUDGET = Budget(steps=8, batch_passages=4, learning_rate=0.01, seed=5)


def example(seed: int, length: int, first_target: int = 1) -> Example:
    tokens = np.random.default_rng(seed).integers(0, tiny.VOCABULARY, length, dtype=np.int32)
    return Example(tokens=tokens, first_target=first_target)


PASSAGES = [example(seed, 6 + seed % 5) for seed in range(12)]
# The first queries ask for the last words of the first passages.
QUERIES = [Example(tokens=one.tokens, first_target=len(one.tokens) - 2) for one in PASSAGES[:3]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(tiny.save_model(tmp_path_factory.mktemp("retraining") / "model", "gpt2"))


def experiment_of(checkpoint: str, **changes: Any) -> Experiment:
    return make_experiment(checkpoint, PASSAGES, QUERIES, BUDGET.model_copy(update=changes))


def by_hand(experiment: Experiment, kept: Sequence[int], initial: Any) -> list[float]:
    """A plain loop, one passage at a time, in float64."""
    budget = experiment.budget
    model = copy.deepcopy(initial).double()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0}])

    def loss(one: Example) -> torch.Tensor:
        ids = torch.from_numpy(one.tokens.astype(np.int64))
        log_p = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        total: torch.Tensor = -sum(log_p[t - 1, ids[t]] for t in range(max(1, one.first_target), len(ids)))
        return total

    order = [np.random.default_rng((budget.seed, epoch)).permutation(len(PASSAGES)) for epoch in range(9)]
    stream = np.concatenate(order)
    for step in range(budget.steps):
        batch = [PASSAGES[n] for n in stream[step * 4 : step * 4 + 4] if n in kept]
        if not batch:
            continue
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate * rate(step, budget)
        optimizer.zero_grad()
        (sum(loss(one) for one in batch) / sum(one.num_targets for one in batch)).backward()
        optimizer.step()
    return [float(loss(query).detach()) for query in QUERIES]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_is_a_plain_loop_over_what_is_kept(fresh: bool, checkpoint: str, tmp_path: Path) -> None:
    experiment = experiment_of(checkpoint, fresh=fresh)
    initial = retraining.initial_model(load_model(checkpoint), experiment.budget)
    runs = [range(12), [0, 2, 3, 7, 11], [5]]
    found = retrain(experiment, runs, tmp_path, LocalEngine())
    expected = [by_hand(experiment, list(kept), initial) for kept in runs]
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    # What the first query asks for was in the first passage alone: with it, it is expected more.
    assert (found[0] < found[2]).all()


def test_fresh_weights_follow_the_seed_and_leave_chance_alone(checkpoint: str) -> None:
    state = torch.random.get_rng_state()
    loaded = load_model(checkpoint)
    models = [retraining.initial_model(loaded, Budget(steps=1, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    one, same, other = (next(model.parameters()) for model in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, next(loaded.model.parameters()))


def test_every_passage_comes_once_in_an_epoch_and_the_rate_goes_up_and_down() -> None:
    budget = Budget(steps=9, batch_passages=5, warmup=0.3)
    planned = list(schedule(12, budget))
    assert [len(batch) for batch in planned] == [5] * 9
    stream = [number for batch in planned for number in batch]
    for epoch in range(3):
        assert sorted(stream[12 * epoch : 12 * epoch + 12]) == list(range(12))
    assert stream[:12] != stream[12:24]
    rates = [rate(step, budget) for step in range(9)]
    assert max(rates) <= 1.0
    assert rates[0] < rates[1] < rates[2] > rates[3] > rates[8] > 0
    assert rate(0, Budget(steps=1)) > 0


class Dying(LocalEngine):
    """Is killed before its second item."""

    def map(self, stage: Any, make: Any, items: Sequence[Any], *, report: Any = None) -> Iterator[Any]:
        worker = make(lambda _tokens: None)
        yield worker(items[0])
        raise KeyboardInterrupt


class Watching(LocalEngine):
    """Remembers what was asked of it."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def map(self, stage: Any, make: Any, items: Sequence[Any], *, report: Any = None) -> Iterator[Any]:
        assert stage == "retraining"
        self.items += items
        return super().map(stage, make, items, report=report)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_runs_are_done_once_and_come_out_the_same(checkpoint: str, tmp_path: Path) -> None:
    experiment = experiment_of(checkpoint)
    runs = [np.flatnonzero(mask).tolist() for mask in draw_subsets(12, count=4, seed=0)]
    runs.append(runs[1][::-1])
    heard: list[tuple[int, int]] = []
    whole = retrain(experiment, runs, tmp_path / "whole", LocalEngine(), on_run=lambda *numbers: heard.append(numbers))
    assert heard == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    np.testing.assert_array_equal(whole[4], whole[1])

    with pytest.raises(KeyboardInterrupt):
        retrain(experiment, runs, tmp_path / "killed", Dying())
    assert len(files(tmp_path / "killed")) == 1
    engine = Watching()
    np.testing.assert_array_equal(retrain(experiment, runs, tmp_path / "killed", engine), whole)
    assert len(engine.items) == 3
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    # Neither the order of runs nor what ran before them matters.
    alone = retrain(experiment, runs[3:4], tmp_path / "alone", engine)
    np.testing.assert_array_equal(alone[0], whole[3])
    np.testing.assert_array_equal(retrain(experiment, runs, tmp_path / "killed", engine), whole)
    assert len(engine.items) == 4


def test_other_settings_do_not_share_runs(checkpoint: str, tmp_path: Path) -> None:
    kept = list(range(6))
    first = experiment_of(checkpoint)
    others = [
        experiment_of(checkpoint, seed=6),
        experiment_of(checkpoint, fresh=False),
        make_experiment(checkpoint, PASSAGES, QUERIES[:2], BUDGET),
        make_experiment(checkpoint, PASSAGES[:11], QUERIES, BUDGET),
        make_experiment(str(tiny.save_model(tmp_path / "other", "gpt2", seed=1)), PASSAGES, QUERIES, BUDGET),
    ]
    assert len({experiment.key(kept) for experiment in [first, *others]}) == 6
    assert first.key(kept) == experiment_of(checkpoint).key(kept)
    assert first.key(kept) != first.key(kept[1:])


def test_what_cannot_be_retrained_is_refused(checkpoint: str, tmp_path: Path) -> None:
    for passages, queries, says in [
        ([], QUERIES, "at least one passage"),
        (PASSAGES, [], "at least one query"),
        ([example(0, 65)], QUERIES, "passage 0 has 65 tokens, more than the model's window of 64; shorten it"),
        (PASSAGES, [example(0, 5, first_target=5)], "query 0 has no target token"),
    ]:
        with pytest.raises(InvalidRequest, match=says):
            make_experiment(checkpoint, passages, queries, BUDGET)
    experiment = experiment_of(checkpoint)
    bad: list[list[int]] = [[], [12], [-1]]
    for kept in bad:
        with pytest.raises(InvalidRequest, match="keeps some of the passages 0 to 11"):
            retrain(experiment, [kept], tmp_path, LocalEngine())
    with pytest.raises(InvalidRequest, match="training at learning_rate 10 diverged; give a smaller one"):
        retrain(experiment_of(checkpoint, learning_rate=10.0, weight_decay=1.0, steps=400), [[1]], tmp_path, _broken())
    with pytest.raises(ValidationError):
        Budget(steps=0)
    path = tmp_path / f"run-{experiment.key([1])}.json"
    contents: list[Any] = [{"losses": [1.0]}, {"losses": [1.0, 2.0, None]}, [], {"kept": [1]}]
    for content in contents:
        path.write_text(json.dumps(content))
        with pytest.raises(CorruptArtifact, match="holds no losses of these queries; delete it"):
            retrain(experiment, [[1]], tmp_path, LocalEngine())


def _broken() -> LocalEngine:
    """An engine whose workers' weights are no numbers."""

    class Broken(LocalEngine):
        def map(self, stage: Any, make: Any, items: Sequence[Any], *, report: Any = None) -> Iterator[Any]:
            def made(hears: Any) -> Any:
                worker = make(hears)
                for value in worker._initial.values():
                    value.fill_(float("nan"))
                return worker

            return super().map(stage, made, items, report=report)

    return Broken()


def test_the_judge_from_end_to_end(checkpoint: str, tmp_path: Path) -> None:
    """A few subsets and steps: true leave-one-out effects predict runs on subsets better than the same ones turned."""
    experiment = experiment_of(checkpoint, steps=30)
    engine = LocalEngine()
    masks = draw_subsets(12, count=12, seed=0)
    losses = retrain(experiment, [np.flatnonzero(mask).tolist() for mask in masks], tmp_path, engine)
    # The method: what leaving one passage out does. Its own ranking says which passages to remove.
    whole = retrain(experiment, [range(12)], tmp_path, engine)[0]
    without = [[other for other in range(12) if other != number] for number in range(12)]
    scores = (retrain(experiment, without, tmp_path, engine) - whole).T.astype(np.float32)
    found = datamodeling_score(scores, masks, losses, bootstrap=Bootstrap(resamples=100))
    assert found.over_queries["mean"] > 0.3
    ids = [f"d{number}" for number in range(12)]
    lists = {
        "best": [[ids[number] for number in np.argsort(-scores_N)] for scores_N in scores],
        "worst": [[ids[number] for number in np.argsort(scores_N)] for scores_N in scores],
    }
    planned = plan_removals(lists, ids, depth=1)
    rises = {
        method: loss_rises(removal, retrain(experiment, removal.kept, tmp_path, engine), whole)
        for method, removal in planned.items()
    }
    np.testing.assert_allclose(rises["best"], scores.max(axis=1), rtol=1e-5)
    assert (rises["best"] > rises["worst"]).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
def test_ray_makes_the_bytes_of_one_process(checkpoint: str, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from services.reindex.config import Pool, Workers
    from services.reindex.ray_engine import RayEngine

    experiment = experiment_of(checkpoint)
    runs = [np.flatnonzero(mask).tolist() for mask in draw_subsets(12, count=4, seed=0)]
    alone = retrain(experiment, runs, tmp_path / "alone", LocalEngine())
    # Short, because sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=80 * 2**20,
            _temp_dir=folder,
        )
        try:
            engine = RayEngine(Workers(encoders=Pool(cpus=0.5, max=2)))
            heard: list[int] = []
            made = retrain(experiment, runs, tmp_path / "ray", engine, on_run=lambda done, _total: heard.append(done))
            with pytest.raises(InvalidRequest, match="diverged"):
                list(engine.map("retraining", partial(_Refusing), [("key", (1,))]))
        finally:
            ray.shutdown()
    np.testing.assert_array_equal(made, alone)
    assert files(tmp_path / "ray") == files(tmp_path / "alone")
    assert heard == [0, 1, 2, 3, 4]


class _Refusing:
    """What Ray brings back of a run that fails for good."""

    def __init__(self, report: Callable[[int], None]) -> None:
        pass

    def __call__(self, item: Any) -> Any:
        raise InvalidRequest("training diverged")
