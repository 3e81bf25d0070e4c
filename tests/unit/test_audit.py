"""Audits against float64 brute force; what they find, what they forgive, and the gate they keep."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from prometheus_client import generate_latest
from torch import Tensor

from services.gateway.metrics import GatewayMetrics
from tests import tiny
from trackstar import exact
from trackstar.audit import AuditConfig, audit_generation, make_audit_config
from trackstar.audit_record import NAME, Audit, check_audited, publish_audit, read_audit, withdraw_audit
from trackstar.blobs import local
from trackstar.build import build_index, make_config
from trackstar.coarse import CoarseIndex, MemoryIndex
from trackstar.code_store import CodeStore
from trackstar.codes import sigma
from trackstar.errors import CorruptArtifact, InvalidRequest, NotReady
from trackstar.exact import Rankings, merge, scan_shard
from trackstar.generation import Generation
from trackstar.index import Index
from trackstar.reranker import Reranker
from trackstar.results import Query
from trackstar.rows import RowStore
from trackstar.tracer import Tracer

DAMPING, PASSAGES, SHARD, BITS = 0.1, 120, 16, 64
SIGNS = (1.0, -1.0)
WORDS = ["cat", "mat", "sat", "one", "two", "three", "red", "green", "blue", "on", "a", "the"]


def build(root: Path, texts: Sequence[str], *, name: str = "index", **changes: Any) -> Path:
    """An index of these texts with a code of 64 bits, held in memory."""
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if not (root / "model").is_dir():
        tiny.save_model(root / "model", "llama", scale=2.0)
    settings = {
        "corpus": {"paths": (str(root / "corpus.jsonl"),)},
        "model": str(root / "model"),
        "projection": {"layer_blocks": 2, "rows": 4, "cols": 4},
        "mix": {"damping": DAMPING},
        "row_dtype": "float32",
        "shard_passages": SHARD,
        "code": {"store": "memory", "kind": "bits", "size": BITS},
        "background": 50,
        **changes,
    }
    build_index(make_config(settings), root / name).close()
    return root / name


def some_texts(count: int) -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, generator.integers(2, 9))) for _ in range(count)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """An index with its generation, ready to be audited."""

    index: Index
    rows: RowStore
    generation: Generation
    codes: CodeStore

    @classmethod
    def open(cls, path: Path) -> Opened:
        index = Index(str(path))
        rows = index.rows()
        name = index.active()
        return cls(
            index=index,
            rows=rows,
            generation=index.generation(name, rows=rows),
            codes=CodeStore.open(index.catalog, name),
        )

    def close(self) -> None:
        self.generation.close()
        self.rows.close()

    def audit(self, *, coarse: CoarseIndex | None = None, query: dict[str, Any] | None = None, **changes: Any) -> Audit:
        return audit_generation(
            self.generation,
            self.rows,
            self.generation.coarse if coarse is None else coarse,
            AuditConfig(**{"min_recall": 0.9, **changes}),
            codes=self.codes,
            coarse_name="memory",
            **(query or {}),
        )

    def whitened(self) -> NDArray[np.float64]:
        """Unit rows [N, d] in float64, whitened by a dense inverse root: nothing of the generation's."""
        rows_Nd = self.rows.read(np.arange(self.rows.num_passages)).double()
        parts = []
        for part_ND in self.index.layout.split(rows_Nd):
            correlation = part_ND.mT @ part_ND / len(part_ND)
            values, vectors = torch.linalg.eigh(correlation)
            parts.append(part_ND @ (vectors @ torch.diag((values + DAMPING * values.mean()) ** -0.5) @ vectors.mT))
        found: NDArray[np.float64] = torch.nn.functional.normalize(torch.cat(parts, 1), dim=1).numpy()
        return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("audit")
    build(root, some_texts(PASSAGES))
    return root


@pytest.fixture
def opened(root: Path) -> Iterator[Opened]:
    found = Opened.open(root / "index")
    yield found
    found.close()


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(root / "index", tmp_path / "copy"))


# --- recall


@pytest.mark.parametrize("candidates", [10, 25, 60])
def test_recall_is_that_of_a_float64_brute_force(opened: Opened, candidates: int) -> None:
    k, asked = 10, np.array([3, 17, 44, 45, 80, 119])
    unit_Nd = opened.whitened()
    cosines_QN = unit_Nd[asked] @ unit_Nd.T
    codes_Nw = np.concatenate([shard.codes for shard in opened.codes.shards()])
    bits_Nk = np.unpackbits(codes_Nw, axis=1).astype(np.int64)
    recalls, expected = {sign: list[float]() for sign in SIGNS}, list[float]()
    noise, normal = sigma("bits", BITS, opened.rows.dim), NormalDist()
    for query, cosines_N in zip(asked.tolist(), cosines_QN, strict=True):
        hamming_N = (bits_Nk != bits_Nk[query]).sum(axis=1)
        others = [passage_id for passage_id in range(PASSAGES) if passage_id != query]
        for sign in SIGNS:
            best = sorted(others, key=lambda other: -sign * cosines_N[other])[:k]
            proposed = sorted(others, key=lambda other: (sign * hamming_N[other], other))[:candidates]
            recalls[sign].append(len(set(best) & set(proposed)) / k)
            expected += [
                normal.cdf(sign * cosines_N[other] / noise - normal.inv_cdf(1 - candidates / PASSAGES))
                for other in best
            ]
    found = opened.audit(query={"query_rows": opened.rows.read(asked), "exclude_Q": asked}, k=k, candidates=candidates)
    assert found.recall == pytest.approx(np.mean(recalls[1.0] + recalls[-1.0]), abs=1e-12)
    assert found.recall_opponents == pytest.approx(np.mean(recalls[-1.0]), abs=1e-12)
    assert 0.1 < found.recall < 1.0
    assert found.expected_recall == pytest.approx(np.mean(expected), abs=1e-5)
    assert (found.queries, found.k, found.candidates) == (6, k, candidates)


@pytest.mark.parametrize("candidates", [PASSAGES, 5000])
def test_all_passages_as_candidates_find_everything(opened: Opened, candidates: int) -> None:
    found = opened.audit(candidates=candidates)
    assert (found.recall, found.recall_opponents, found.expected_recall) == (1.0, 1.0, 1.0)
    assert (found.candidates, found.num_codes, found.num_passages) == (PASSAGES, PASSAGES, PASSAGES)
    assert found.passed
    assert found.reasons == ()
    assert found.queries == 64
    assert (found.codes_compared, found.codes_differing, found.bits_differing, found.norms_differing) == (120, 0, 0, 0)


def test_the_same_seed_asks_the_same_queries(opened: Opened) -> None:
    first, again, other = (opened.audit(candidates=20, queries=8, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.expected_recall != other.expected_recall


class Tied:
    """Proposes what scores best exactly, of equal scores the larger ids: the other end of every tie.

    It is asked for one query after the other, first for proponents, then for opponents.
    """

    def __init__(self, index: CoarseIndex, unit_Nd: NDArray[np.float64], asked: NDArray[np.int64]) -> None:
        self._index = index
        self._cosines_QN = unit_Nd[asked] @ unit_Nd.T
        self._calls = 0

    def add(self, passage_ids: NDArray[np.int64], codes: NDArray[Any]) -> None:
        raise NotImplementedError

    def search(
        self, codes: NDArray[Any], limit: int, *, timeout_seconds: float | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        assert len(codes) == 1
        end, query = divmod(self._calls, len(self._cosines_QN))
        self._calls += 1
        scores_N = (1 - 2 * end) * self._cosines_QN[query].round(9)
        order = np.lexsort((-np.arange(len(scores_N)), -scores_N))[:limit]
        return order[None], np.zeros((1, limit), np.float32)

    def count(self) -> int:
        return self._index.count()

    def close(self) -> None:
        pass


def test_a_tie_at_the_last_rank_is_no_miss(tmp_path: Path) -> None:
    copies = Opened.open(build(tmp_path, some_texts(25) * 4))
    asked = np.arange(0, 100, 7)
    query = {"query_rows": copies.rows.read(asked), "exclude_Q": asked}
    tied = Tied(copies.generation.coarse, copies.whitened(), asked)
    assert copies.audit(coarse=tied, query=query, k=10, candidates=10).recall == 1.0
    copies.close()


# --- scans


def duals(opened: Opened, ids: Sequence[int]) -> Tensor:
    whitener, rows_Qd = opened.generation.whitener, opened.rows.read(ids)
    found: Tensor = whitener.apply_twice(rows_Qd) / whitener.apply(rows_Qd).norm(dim=1, keepdim=True)
    return found


def shards_in(order: Sequence[int], opened: Opened) -> Callable[[Tensor, Sequence[float], int], Rankings]:
    def scan(dual_Qd: Tensor, signs: Sequence[float], k: int) -> Rankings:
        parts = (scan_shard(opened.rows, opened.generation, shard, dual_Qd, signs, k) for shard in order)
        return merge(parts, num_queries=len(dual_Qd), signs=signs, k=k)

    return scan


def test_the_scan_is_a_float64_brute_force(opened: Opened) -> None:
    asked = list(range(0, PASSAGES, 5))
    unit_Nd = opened.whitened()
    cosines_QN = unit_Nd[asked] @ unit_Nd.T
    found = Reranker(opened.rows, opened.generation).scan(duals(opened, asked), signs=SIGNS, k=PASSAGES)
    for ends, cosines_N in zip(found, cosines_QN, strict=True):
        for ranking, sign in zip(ends, SIGNS, strict=True):
            assert np.abs(ranking.scores - cosines_N[ranking.ids]).max() < 1e-5
            assert (np.diff(sign * cosines_N[ranking.ids]) < 1e-5).all()
            assert sorted(ranking.ids.tolist()) == list(range(PASSAGES))


def test_shards_merge_to_the_same_bytes_in_every_order(opened: Opened) -> None:
    dual_Qd = duals(opened, [5, 50, 100, 7, 8, 9, 10, 11])
    whole = Reranker(opened.rows, opened.generation).scan(dual_Qd, signs=SIGNS, k=7)
    orders = itertools.islice(itertools.permutations(range(opened.rows.num_shards)), 0, 5040, 999)
    for order in orders:
        for mine, theirs in zip(whole, shards_in(order, opened)(dual_Qd, SIGNS, 7), strict=True):
            for one, other in zip(mine, theirs, strict=True):
                assert one.ids.tobytes() == other.ids.tobytes()
                assert one.scores.tobytes() == other.scores.tobytes()
    assert opened.audit(candidates=20, query={"scan": shards_in((7, 3, 0, 1, 2, 6, 5, 4), opened)}) == opened.audit(
        candidates=20
    )


@pytest.mark.parametrize(("chunk_rows", "queries"), [(7, 3), (16, 8), (1, 1)])
def test_rows_and_queries_are_taken_some_at_a_time(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, chunk_rows: int, queries: int
) -> None:
    dual_Qd = duals(opened, range(20))
    whole = Reranker(opened.rows, opened.generation).scan(dual_Qd, signs=SIGNS, k=PASSAGES)
    monkeypatch.setattr(exact, "_CHUNK_BYTES", 4 * opened.rows.dim * chunk_rows)
    monkeypatch.setattr(exact, "_CHUNK_ROWS", 1)
    monkeypatch.setattr(exact, "_MAX_SCORES", SHARD * queries)
    parts = Reranker(opened.rows, opened.generation).scan(dual_Qd, signs=SIGNS, k=PASSAGES)
    assert len(parts) == 20
    for one, other in zip(itertools.chain(*whole), itertools.chain(*parts), strict=True):
        in_order, again = np.argsort(one.ids), np.argsort(other.ids)
        np.testing.assert_allclose(one.scores[in_order], other.scores[again], atol=1e-6)


@pytest.mark.parametrize("shard", [7, 50, 200])
def test_the_size_of_shards_changes_nothing(root: Path, opened: Opened, shard: int) -> None:
    other = Opened.open(build(root, some_texts(PASSAGES), name=f"shards of {shard}", shard_passages=shard))
    ids = list(range(0, PASSAGES, 3))
    mine, theirs = (
        Reranker(some.rows, some.generation).scan(duals(some, ids), signs=SIGNS, k=10) for some in (opened, other)
    )
    for one, two in zip(itertools.chain(*mine), itertools.chain(*theirs), strict=True):
        assert one.ids.tolist() == two.ids.tolist()
        np.testing.assert_allclose(one.scores, two.scores, atol=2e-6)
    first, second = opened.audit(candidates=20), other.audit(candidates=20)
    assert second.recall == pytest.approx(first.recall, abs=1e-9)
    assert second.expected_recall == pytest.approx(first.expected_recall, abs=1e-5)
    other.close()


def test_many_queries_share_one_reading_of_every_shard(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer.open(str(root / "index"))
    queries = [
        Query(
            query_id=str(number), prompt=f"the {WORDS[number % 12]} sat {WORDS[number % 7]}", target=WORDS[number % 5]
        )
        for number in range(150)
    ]
    expected = list(tracer.trace_many(queries, k=5, exact=True))
    reads = list[int]()
    shard = tracer.rows.shard

    def counted(number: int, *, verify: bool = False) -> Tensor:
        reads.append(number)
        return shard(number, verify=verify)

    def refused(ids: Sequence[int]) -> Tensor:
        raise AssertionError(ids)

    monkeypatch.setattr(tracer.rows, "shard", counted)
    monkeypatch.setattr(tracer.rows, "read", refused)
    for batch, scans in ((1000, 1), (60, 3)):
        reads.clear()
        steps = list[tuple[str, int, int]]()
        found = list(
            tracer.trace_many(
                queries,
                k=5,
                exact=True,
                batch=batch,
                on_step=lambda *step: steps.append(step),  # noqa: B023
            )
        )
        assert sorted(reads) == sorted(scans * list(range(tracer.rows.num_shards)))
        assert [step for step in steps if step[0] == "encoding"][-1] == ("encoding", 150, 150)
        assert steps.count(("scanning", PASSAGES, PASSAGES)) == scans
        for mine, theirs in zip(expected, found, strict=True):
            assert theirs.query is mine.query
            for one, two in zip(mine.proponents + mine.opponents, theirs.proponents + theirs.opponents, strict=True):
                assert one.passage.passage_id == two.passage.passage_id
                assert one.score == pytest.approx(two.score, abs=1e-6)
    tracer.close()


# --- what is found


@pytest.mark.parametrize("changes", [{}, {"queries": 1, "codes": 1}], ids=["by a row", "by the scan"])
def test_a_shard_that_is_not_what_was_written_is_named(copied: Path, changes: dict[str, Any]) -> None:
    path = copied / "rows" / "000003.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    damaged = Opened.open(copied)
    with pytest.raises(CorruptArtifact, match=r"000003\.safetensors") as caught:
        damaged.audit(**changes)
    assert len(str(caught.value).splitlines()) == 1
    damaged.close()


def test_a_damaged_code_file_is_named(copied: Path) -> None:
    damaged = Opened.open(copied)
    path = local(damaged.generation.home) / "codes" / "000002.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"codes/000002\.safetensors"):
        damaged.audit()
    damaged.close()


def alter(opened: Opened, monkeypatch: pytest.MonkeyPatch, passage_id: int, mask: Any) -> None:
    """Let one code be another, as if it had been written so."""
    shard = opened.codes.shard

    def altered(number: int) -> Any:
        found = shard(number)
        codes = found.codes.copy()
        codes[found.passage_ids == passage_id] ^= np.asarray(mask, dtype=np.uint8)
        return dataclasses.replace(found, codes=codes)

    monkeypatch.setattr(opened.codes, "shard", altered)


def test_a_code_of_another_row_is_found(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    alter(opened, monkeypatch, 77, 255)
    found = opened.audit(candidates=PASSAGES)
    assert (found.codes_differing, found.bits_differing, found.norms_differing) == (1, BITS, 0)
    assert not found.passed
    assert found.reasons == (
        "1 of 120 sampled codes are not those of their rows; delete the generation and give the index command again",
    )


def test_rounding_may_turn_a_bit_unless_equal_bits_are_asked_for(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened.audit(candidates=PASSAGES, bit_share=0.0).passed
    alter(opened, monkeypatch, 77, [4, 0, 0, 0, 0, 0, 0, 0])
    forgiven, counted = opened.audit(candidates=PASSAGES), opened.audit(candidates=PASSAGES, bit_share=0.0)
    assert forgiven.passed
    assert (forgiven.codes_differing, forgiven.bits_differing) == (0, 1)
    assert (counted.codes_differing, counted.bits_differing, counted.passed) == (1, 1, False)


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_wrong_norm_is_found(opened: Opened, wrong: float) -> None:
    opened.generation.norms_N = opened.generation.norms_N.copy()
    opened.generation.norms_N[8] *= np.float32(wrong)
    found = opened.audit(candidates=PASSAGES)
    assert (found.codes_differing, found.norms_differing, found.passed) == (0, 1, False)


def test_prefixes_are_compared_as_vectors(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(root, some_texts(PASSAGES), name="prefix", code={"store": "memory", "kind": "prefix", "size": 32})
    opened = Opened.open(path)
    assert opened.audit(candidates=PASSAGES).passed
    shard = opened.codes.shard
    for factor, differing in ((1 + 1e-5, 0), (1 + 1e-3, PASSAGES), (float("nan"), PASSAGES)):
        monkeypatch.setattr(
            opened.codes,
            "shard",
            lambda number, factor=factor: dataclasses.replace(
                (found := shard(number)), codes=found.codes * np.float32(factor)
            ),
        )
        assert opened.audit(candidates=PASSAGES).codes_differing == differing
    opened.close()


def test_missing_codes_are_counted(opened: Opened) -> None:
    half = MemoryIndex(opened.generation.spec, opened.rows.dim)
    for number in range(4):
        shard = opened.codes.shard(number)
        half.add(shard.passage_ids, shard.codes)
    found = opened.audit(coarse=half, min_recall=0.0)
    assert (found.num_codes, found.num_passages, found.passed) == (64, PASSAGES, False)
    assert found.reasons == ("the coarse index holds 64 codes of 120 passages; fill it again",)


def test_passages_without_a_row_ask_nothing(opened: Opened) -> None:
    zero = np.zeros(PASSAGES, dtype=np.float32)
    zero[40:43] = opened.generation.norms_N[40:43]
    opened.generation.norms_N = zero
    assert opened.audit(candidates=PASSAGES, codes=1).queries == 3
    opened.generation.norms_N = np.zeros_like(zero)
    found = opened.audit(candidates=PASSAGES, codes=1)
    assert (found.queries, found.recall, found.passed) == (0, 0.0, False)
    assert "nothing can be ranked" in found.reasons[0]


def test_one_passage_has_nothing_else_to_find(tmp_path: Path) -> None:
    alone = Opened.open(build(tmp_path, ["the cat sat"]))
    found = alone.audit()
    assert (found.passed, found.queries, found.recall, found.candidates) == (True, 1, 1.0, 1)
    alone.close()


def test_queries_of_another_kind_are_refused(opened: Opened) -> None:
    with pytest.raises(InvalidRequest, match=r"float32 \[Q, 64\]"):
        opened.audit(query={"query_rows": torch.zeros(2, 3)})
    with pytest.raises(InvalidRequest, match="gradient is zero"):
        opened.audit(query={"query_rows": torch.zeros(2, 64)})
    with pytest.raises(InvalidRequest, match="5 candidates cannot hold the best 10"):
        make_audit_config({"candidates": 5})
    with pytest.raises(InvalidRequest, match="the audit's recal: "):
        make_audit_config({"recal": 0.5})


# --- the gate


def test_a_code_that_is_far_too_small_does_not_pass(root: Path) -> None:
    path = build(root, some_texts(PASSAGES), name="small", code={"store": "memory", "kind": "bits", "size": 8})
    small = Opened.open(path)
    home = small.generation.home
    withdraw_audit(home)
    with pytest.raises(NotReady, match="was not audited yet") as missing:
        check_audited(home)
    assert read_audit(home) is None
    found = small.audit(candidates=12)
    assert found.recall < 0.7
    assert found.expected_recall < 0.7
    publish_audit(home, found)
    assert read_audit(home) == found
    with pytest.raises(NotReady, match="failed its audit: coarse search and rerank find 0") as failed:
        check_audited(home)
    for part in ("--code-size", "--candidates", "--min-recall", "less than 0.9", f"{found.expected_recall:.3f}"):
        assert part in str(failed.value)
    assert f"give `trackstar audit {path} --generation {small.generation.name}`" in str(missing.value)
    for error in (missing.value, failed.value):
        assert len(str(error).splitlines()) == 1
    publish_audit(home, small.audit(candidates=PASSAGES))
    check_audited(home)
    withdraw_audit(home)
    withdraw_audit(home)
    assert read_audit(home) is None
    small.close()


@pytest.mark.parametrize("content", ["{}", "[]", '{"cut sh', '{"generation": "another"}'])
def test_a_note_that_is_no_audit(tmp_path: Path, content: str) -> None:
    home = tmp_path / "generations" / "g1"
    home.mkdir(parents=True)
    (home / NAME).write_text(content)
    with pytest.raises(CorruptArtifact, match=r"audit\.json"):
        check_audited(home)


def an_audit(**changes: Any) -> Audit:
    audit = Audit(
        generation="g1",
        coarse="memory",
        queries=64,
        k=10,
        candidates=1000,
        recall=0.75,
        recall_opponents=0.5,
        expected_recall=0.8125,
        min_recall=0.9,
        num_codes=9,
        num_passages=9,
        codes_compared=9,
        codes_differing=2,
        bits_differing=80,
        norms_differing=0,
        passed=False,
        reasons=("one", "two"),
    )
    return dataclasses.replace(audit, **changes)


def test_an_audit_of_another_generation_does_not_count(tmp_path: Path) -> None:
    audit = an_audit()
    assert Audit.from_dict(json.loads(json.dumps(audit.to_dict()))) == audit
    home = tmp_path / "generations" / "g2"
    publish_audit(home, audit)
    with pytest.raises(CorruptArtifact, match="is no audit of this generation"):
        read_audit(home)


def test_gauges_show_the_generation_that_answers() -> None:
    metrics = GatewayMetrics()
    metrics.audit(an_audit(generation="old"))
    metrics.audit(an_audit(generation="new", passed=True))
    text = generate_latest(metrics.registry).decode()
    assert "old" not in text
    for line in ("recall", 0.75), ("expected_recall", 0.8125), ("codes_differing", 2.0), ("passed", 1.0):
        assert f'trackstar_audit_{line[0]}{{generation="new"}} {line[1]}\n' in text
    metrics.audit(None)
    assert "new" not in generate_latest(metrics.registry).decode()
