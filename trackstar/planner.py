"""What an index of N passages needs: which projection, which coarse code, and how many candidates.

    recall = Phi(s / sigma - Phi^-1(1 - L/N))

is the probability that a passage of score s is among the best L of N coarse estimates, whose error has the standard
deviation sigma of `trackstar.codes` (METHOD: "The coarse code"). What the choice costs is told by `trackstar.costs`.
Nothing here is measured and nothing is built; the target score is the caller's
assumption, and small models score several times higher than large ones, so a plan made from a small model's scores is
too optimistic for a large one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from trackstar import codes
from trackstar.codes import CodeKind, CodeSpec
from trackstar.errors import InvalidRequest

# What one query to Milvus can return at most.
MAX_CANDIDATES = 16_384
# Milvus stores dense float vectors up to this dimension, and bits up to this one in current versions; 2.3.5 takes
# 32,768 of either (`trackstar.milvus_collection.largest_code` asks a server).
MAX_PREFIX = 32_768
MAX_BITS = 262_144
_MIN_SIZE = 1_024
# Below this a rerank has too little to choose from, whatever the law says of one passage.
_MIN_CANDIDATES = 100

_PAPER_LAYER_BLOCKS, _PAPER_SIDE, _MIN_SIDE = 8, 64, 8
# A whitened dimension of a block is estimated from at least this many rows.
_ROWS_PER_DIMENSION = 2
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One coarse code for one corpus.

    `candidates` is L, `sigma` the noise of an estimated cosine, `recall` the probability that a passage of the target
    score is among the candidates, `code_bytes` what one passage's code takes.
    """

    kind: CodeKind
    size: int
    candidates: int
    sigma: float
    recall: float
    meets_target: bool
    code_bytes: int
    explanation: str


class ProjectionProposal(NamedTuple):
    """A layout of the projection: `num_layer_blocks` x {attention, MLP} blocks of rows x cols, and why."""

    num_layer_blocks: int
    rows: int
    cols: int
    explanation: str


def recall(score: float, sigma: float, candidates: int, num_passages: int) -> float:
    """Probability that a passage of this score is among the best `candidates` of `num_passages` estimates."""
    if candidates >= num_passages or (sigma == 0 and score > 0):
        return 1.0
    if sigma == 0:
        return candidates / num_passages
    return _NORMAL.cdf(score / sigma + _NORMAL.inv_cdf(candidates / num_passages))


def required_candidates(score: float, sigma: float, recall_target: float, num_passages: int) -> int:
    """Fewest candidates, 1 to `num_passages`, that reach the recall; 0 < `recall_target` < 1."""
    if sigma == 0:
        return 1 if score > 0 else math.ceil(recall_target * num_passages)
    share = _NORMAL.cdf(_NORMAL.inv_cdf(recall_target) - score / sigma)
    return min(num_passages, max(1, math.ceil(share * num_passages)))


def options(
    num_passages: int,
    dim: int,
    target_score: float,
    *,
    recall_target: float = 0.95,
    kinds: Sequence[CodeKind] = ("bits", "prefix"),
    max_candidates: int = MAX_CANDIDATES,
    max_bits: int = MAX_BITS,
) -> tuple[Plan, ...]:
    """Every code of 1,024, 2,048, ... coordinates up to all of them, cheapest first; see `plan` for the arguments."""
    if num_passages < 1 or dim < 1 or max_candidates < 1:
        raise InvalidRequest("a plan needs at least one passage, one dimension and one candidate")
    if max_candidates > MAX_CANDIDATES:
        raise InvalidRequest(f"Milvus returns at most {MAX_CANDIDATES:,} candidates per query, not {max_candidates:,}")
    if not 0 < recall_target < 1:
        raise InvalidRequest(f"the recall must lie between 0 and 1, not {recall_target}")
    if not -1 <= target_score <= 1:
        raise InvalidRequest(f"the target score is a cosine and lies between -1 and 1, not {target_score}")
    whole = codes.padded_dim(dim)
    sizes = [1 << exponent for exponent in range(whole.bit_length()) if min(_MIN_SIZE, whole) <= 1 << exponent]
    found = []
    for kind in kinds:
        for size in sizes:
            if size > (max_bits if kind == "bits" else MAX_PREFIX) or (kind == "bits" and size % 8):
                continue
            sigma = codes.sigma(kind, size, dim)
            required = max(_MIN_CANDIDATES, required_candidates(target_score, sigma, recall_target, num_passages))
            candidates = min(required, max_candidates, num_passages)
            reached = recall(target_score, sigma, candidates, num_passages)
            code_bytes = CodeSpec(kind=kind, size=size, seed=0).row_bytes
            what = f"{size:,} sign bits" if kind == "bits" else f"the first {size:,} coordinates as floats"
            found.append(
                Plan(
                    kind=kind,
                    size=size,
                    candidates=candidates,
                    sigma=sigma,
                    recall=reached,
                    # At the cut the law is met up to rounding.
                    meets_target=reached >= recall_target - 1e-9,
                    code_bytes=code_bytes,
                    explanation=(
                        f"{what} ({code_bytes:,} bytes per passage) estimate a cosine to ±{sigma:.4f}, so a passage of "
                        f"score {target_score:g} is among {candidates:,} candidates of {num_passages:,} passages with "
                        f"probability {reached:.2f}"
                    ),
                )
            )
    return tuple(sorted(found, key=lambda plan: (plan.code_bytes, plan.candidates)))


def plan(
    num_passages: int,
    dim: int,
    target_score: float,
    *,
    recall_target: float = 0.95,
    kinds: Sequence[CodeKind] = ("bits", "prefix"),
    max_candidates: int = MAX_CANDIDATES,
    max_bits: int = MAX_BITS,
) -> Plan:
    """The code of fewest bytes that reaches the recall, or failing that the one of highest recall, which it says.

    Args:
        num_passages: N.
        dim: d, dimension of the rows.
        target_score: cosine of the passages that must be found; tops of large corpora are near 0.05.
        recall_target: probability, between 0 and 1, with which they must be among the candidates.
        kinds: codes the index can hold; Milvus Lite holds ("prefix",) only.
        max_candidates: most candidates per query; Milvus returns up to 16,384.
        max_bits: of the largest code the server takes; 32,768 with Milvus 2.3.5.

    Raises:
        InvalidRequest: an argument out of range, or no code of these kinds fits the dimension.
    """
    found = options(
        num_passages,
        dim,
        target_score,
        recall_target=recall_target,
        kinds=kinds,
        max_candidates=max_candidates,
        max_bits=max_bits,
    )
    if not found:
        raise InvalidRequest(f"no code of kind {' or '.join(kinds)} fits {dim} dimensions; allow another kind")
    return next((option for option in found if option.meets_target), max(found, key=lambda option: option.recall))


def propose_projection(
    num_layers: int, num_parameters: int, num_passages: int | None, *, row_bytes_available: float | None = None
) -> ProjectionProposal:
    """A layout for a model and a corpus: the paper's 8 x {attention, MLP} x 64 x 64, or smaller blocks with the reason.

    Args:
        num_layers: layers of the model.
        num_parameters: all its parameters; with the layers they give its width roughly.
        num_passages: passages of the corpus, None if not known.
        row_bytes_available: bytes the gradient rows may take, None for no limit.

    Raises:
        InvalidRequest: a count below 1.
    """
    if num_layers < 1 or num_parameters < 1 or (num_passages is not None and num_passages < 1):
        raise InvalidRequest("a projection needs a model with layers and parameters, and at least one passage")
    blocks = min(_PAPER_LAYER_BLOCKS, num_layers)
    # A transformer layer of width w holds about 12 w^2 parameters.
    width = math.sqrt(num_parameters / (12 * num_layers))
    side, reasons = _PAPER_SIDE, list[str]()

    def shrink(fits: bool, reason: str) -> bool:
        if not fits and reason not in reasons:
            reasons.append(reason)
        return not fits

    while side > _MIN_SIDE and (
        shrink(side <= width, f"the model's matrices are only some {width:,.0f} wide")
        or (
            num_passages is not None
            and (
                shrink(
                    num_passages >= _ROWS_PER_DIMENSION * side**2,
                    f"{num_passages:,} passages cannot settle larger whitening blocks, whose every dimension wants "
                    f"{_ROWS_PER_DIMENSION} rows",
                )
                or shrink(
                    row_bytes_available is None or 4 * num_passages * blocks * side**2 <= row_bytes_available,
                    f"the gradient rows must fit {_bytes(row_bytes_available or 0)}",
                )
            )
        )
    ):
        side //= 2

    dim = 2 * blocks * side**2
    storage = "" if num_passages is None else f", {_bytes(2.0 * num_passages * dim)} for {num_passages:,} passages"
    explanation = (
        f"{blocks} groups of layers x {{attention, MLP}} x {side} x {side} = {dim:,} dimensions "
        f"({_bytes(2 * dim)} per passage{storage}; {2 * blocks} eigendecompositions of {side**2:,} x {side**2:,})"
    )
    if blocks < _PAPER_LAYER_BLOCKS:
        reasons.append(f"the model has only {num_layers} layers")
    if reasons:
        loss = f"scores carry projection noise of about ±{1 / math.sqrt(dim):.4f}"
        explanation += f"; fewer than the paper's 65,536 because {' and '.join(reasons)}; {loss}"
    else:
        explanation += ", as in the paper"
    return ProjectionProposal(blocks, side, side, explanation + ".")


def _bytes(value: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"
