"""What one rank, or the whole model in one process, computes for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests import tiny
from trackstar.complete import complete
from trackstar.encode import Encoder, Example, fold_factors
from trackstar.model import LoadedModel, decoder_layers
from trackstar.separable import SeparableScale
from trackstar.sharding import Strategy, shard

Correction = Literal["none", "separable", "exact"]
CORRECTIONS: tuple[Correction, ...] = ("none", "separable", "exact")
SEED, ROWS, COLS = 5, 16, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Rows and losses per correction, shares of <row, query> per correction, a completion, and resident sizes."""

    rows: dict[Correction, NDArray[np.float32]]
    losses: NDArray[np.float32]
    by_token: dict[Correction, list[NDArray[np.float32]]]
    unplaced: dict[Correction, list[NDArray[np.float32]]]
    completion: list[int]
    log_probability: float
    layer_bytes: int
    other_bytes: int


def examples() -> list[Example]:
    """Lengths that share batches and lengths that do not; five do not divide by two."""
    generator = np.random.default_rng(0)
    return [
        Example(tokens=generator.integers(0, tiny.VOCABULARY, length, dtype=np.int32), first_target=first)
        for length, first in ((12, 1), (20, 5), (7, 1), (12, 3), (12, 2), (40, 1), (1, 1))
    ]


def correction_of(loaded: LoadedModel, kind: Correction) -> dict[str, SeparableScale | Tensor]:
    """The same numbers on every rank, for whole matrices."""
    generator = torch.Generator().manual_seed(1)
    scales: dict[str, SeparableScale | Tensor] = {}
    for member in loaded.members:
        out = torch.rand(2, member.out_features, generator=generator)
        in_ = torch.rand(2, member.in_features, generator=generator)
        match kind:
            case "none":
                scales[member.name] = SeparableScale(
                    out=torch.ones_like(out[:1]), in_=torch.ones_like(in_[:1]), error=0.0
                )
            case "separable":
                scales[member.name] = SeparableScale(out=out, in_=in_, error=0.1)
            case "exact":
                scales[member.name] = torch.rand(member.out_features, member.in_features, generator=generator)
    return scales


def compute(folder: Path, strategy: Strategy | None, plain_experts: bool = False) -> Found:
    """Everything that is compared; `strategy` None is the whole model."""
    torch.set_num_threads(1)
    loaded = tiny.load(folder)
    if plain_experts:
        loaded = tiny.with_plain_experts(loaded)
    corrections = {kind: correction_of(loaded, kind) for kind in CORRECTIONS}
    if strategy is not None:
        loaded = shard(loaded, strategy=strategy)
    layout = loaded.layout(layer_blocks=2, rows=ROWS, cols=COLS)
    query_d = torch.randn(layout.dim, generator=torch.Generator().manual_seed(3))
    rows: dict[Correction, NDArray[np.float32]] = {}
    by_token: dict[Correction, list[NDArray[np.float32]]] = {}
    unplaced: dict[Correction, list[NDArray[np.float32]]] = {}
    for kind, scales in corrections.items():
        encoder = Encoder(loaded, layout, fold_factors(loaded, layout, scales, seed=SEED), max_batch_tokens=64)
        encoded = encoder.encode(examples())
        shares = encoder.contributions(examples(), query_d)
        rows[kind], losses = encoded.rows_ND.numpy(), encoded.loss_N.numpy()
        by_token[kind] = [item.by_token_Tb.numpy() for item in shares]
        unplaced[kind] = [item.unplaced_b.numpy() for item in shares]
        encoder.close()
    said = complete(loaded.model, examples()[0].tokens, max_new_tokens=6)
    inside, outside = _resident_bytes(loaded)
    return Found(
        rows=rows,
        losses=losses,
        by_token=by_token,
        unplaced=unplaced,
        completion=said.tokens.tolist(),
        log_probability=said.log_probability,
        layer_bytes=inside,
        other_bytes=outside,
    )


def refused(folder: Path, strategy: Strategy) -> None:
    """Shard only."""
    shard(tiny.load(folder), strategy=strategy)


def refused_with(folder: Path, changes: dict[str, str]) -> None:
    """Shard by a plan that is wrong about some modules."""
    loaded = tiny.load(folder)
    loaded.model.tp_plan.update(changes)
    shard(loaded, strategy="tensor")


def _resident_bytes(loaded: LoadedModel) -> tuple[int, int]:
    """Storage of parameters inside and outside the decoder layers."""
    layers = decoder_layers(loaded.model)[0]
    inside = outside = 0
    for name, parameter in loaded.model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if name.startswith(f"{layers}."):
            inside += local.untyped_storage().nbytes()
        else:
            outside += local.untyped_storage().nbytes()
    return inside, outside
