"""Every printed formula, read again and computed, gives its figure; the figures against hand arithmetic."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackstar.costs import Assumptions, Cost, Workload, costs
from trackstar.errors import InvalidRequest
from trackstar.formula import amount
from trackstar.planner import MAX_CANDIDATES, plan

PAPER = Workload(
    num_passages=365_000_000,
    tokens_per_passage=256,
    num_layers=32,
    num_parameters=8 * 10**9,
    num_layer_blocks=8,
    rows=64,
    cols=64,
)


def computed(formula: str) -> float:
    """What a formula says, all words taken out."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", formula)
    text = re.sub(r"[A-Za-z]+/[a-z]+", "", text).replace(" x ", " * ")
    text = re.sub(r"\b(?!ceil\()[A-Za-z][\w']*", "", text).replace(",", "").replace("'", "")
    text = re.sub(r"\(\s*\)", "", text)
    return float(eval(text, {"__builtins__": {}, "ceil": math.ceil}))


def planned(work: Workload, assumed: Assumptions | None = None, *, score: float = 0.05) -> dict[tuple[str, str], Cost]:
    chosen = plan(work.num_passages, work.dim, score)
    return {(cost.group, cost.name): cost for cost in costs(chosen, work, assumed)}


def test_figures_of_the_papers_size() -> None:
    assumed = Assumptions(
        sustained_flops=4e14, days=10, gpus_per_node=8, node_memory_bytes=float(512 << 30), replicas=2
    )
    found = planned(PAPER, assumed)
    candidates = plan(PAPER.num_passages, PAPER.dim, 0.05).candidates
    value = {name: cost.value for (_, name), cost in found.items()}
    assert value["gradient rows"] == 365e6 * 131_072
    assert found["disk", "gradient rows"].formula == "365,000,000 passages x 65,536 numbers x 2 bytes (bf16)"
    assert value["coarse codes"] == 365e6 * 4_096
    assert value["norms in each reranker"] == 365e6 * 4
    assert value["norms"] == value["ids of the codes"] == 365e6 * 8
    assert value["whitener in memory"] == 2**30
    assert value["one partial sum of R"] == 2**31
    assert value["leaves of R, together"] == math.ceil(365e6 * 131_072 / 2**35) * 2**31
    assert value["rows read"] == 2 * candidates * 131_072
    assert value["training, per token"] == 1.5 * value["encoding, per token"] == 48e9
    per_token = value["encoding, per token"] + value["projecting, per token"]
    assert value["encoding"] == pytest.approx(365e6 * 256 * per_token / 4e14 / 3600)
    assert value["statistics"] == pytest.approx(365e6 * 2 * 16 * 4_096**2 / 4e14 / 3600)
    loaded = 365e6 * (4_096 * 1.2 + 200) + 280 * 2**20
    assert value["one generation, loaded"] == pytest.approx(loaded)
    assert value["Milvus query nodes"] == 2 * math.ceil(loaded / (0.9 * 512 * 2**30))
    assert value["scan"] == pytest.approx(2 * 365e6 * 4_096 / (math.ceil(loaded / (0.9 * 512 * 2**30)) * 1e11))
    assert value["GPUs"] == math.ceil(value["all GPU time"] / 240)
    assert value["GPU machines"] == math.ceil(value["GPUs"] / 8)
    assert value["read"] == 3 * 365e6 * 131_072
    parts = ("encoding", "statistics", "eigenvectors", "coding", "audit")
    assert value["all GPU time"] == pytest.approx(sum(value[name] for name in parts))
    again = value["another mix or code: GPU time"]
    assert again == pytest.approx(value["eigenvectors"] + value["coding"])
    assert value["appending: import"] == pytest.approx(value["import"] / 100)


works = st.builds(
    Workload,
    num_passages=st.integers(1, 2_000_000_000),
    tokens_per_passage=st.floats(1, 4_000),
    num_layers=st.integers(1, 100),
    num_parameters=st.integers(100_000, 10**12),
    num_layer_blocks=st.integers(1, 16),
    rows=st.sampled_from([8, 16, 64]),
    cols=st.sampled_from([8, 32, 64]),
)
assumptions = st.builds(
    Assumptions,
    sustained_flops=st.floats(1e9, 1e15),
    gpus_per_node=st.integers(1, 16),
    days=st.floats(0.1, 100),
    replicas=st.integers(1, 5),
    append_passages=st.none() | st.integers(1, 10**9),
    leaf_passages=st.none() | st.integers(1, 10**6),
)


@given(work=works, assumed=assumptions, score=st.floats(0.01, 0.5))
def test_every_formula_gives_its_figure(work: Workload, assumed: Assumptions, score: float) -> None:
    for cost in planned(work, assumed, score=score).values():
        # Formulas show four digits, so what is rounded up may come out one apart.
        slack = 0 if "ceil" not in cost.formula else max(1.0, 2e-3 * cost.value) * max(assumed.replicas, cost.value)
        assert computed(cost.formula) == pytest.approx(cost.value, rel=2e-3, abs=slack), cost


def test_costs_grow_linearly_with_passages() -> None:
    once, twice = planned(PAPER), planned(replace(PAPER, num_passages=2 * PAPER.num_passages))
    for key in [("disk", "gradient rows"), ("disk", "texts and spans"), ("build", "encoding"), ("build", "coding")]:
        assert twice[key].value == pytest.approx(2 * once[key].value)


def test_no_plan_asks_for_more_candidates_than_the_server_returns() -> None:
    hard = planned(PAPER, score=0.01)
    assert hard["query", "ranged reads"].value == 2 * MAX_CANDIDATES


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="days must be above zero, not 0"):
        Assumptions(days=0)
    with pytest.raises(InvalidRequest, match="rows must be at least 1, not 0"):
        costs(plan(10, 64, 0.5), replace(PAPER, rows=0))


def test_amounts_put_brackets_where_they_are_needed() -> None:
    total = (amount(2, "a") + amount(3, "b")) * amount(4, "c") / (amount(5) * amount(0.5, "d"))
    assert (total.value, total.text) == (8.0, "(2 a + 3 b) x 4 c / (5 x 0.5 d)")
    whole = (amount(7) / amount(2)).rounded_up() * amount(10_000)
    assert (whole.value, whole.text) == (40_000.0, "ceil(7 / 2) x 10,000")
    assert total.named("").text == "8"
    assert (amount(0.3) / amount(0.1)).rounded_up().value == 3
