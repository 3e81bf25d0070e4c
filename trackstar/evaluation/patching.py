"""Tail-patch as part of an evaluation: from settings, queries and lists of texts to effects.

Passages are judged by their texts: tokens of the text, led by the begin token where the model has one, up to the
model's window. What a text has beyond the window does not count.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from trackstar.encode import Example
from trackstar.evaluation.influence import check_target
from trackstar.evaluation.method import OnStep, unheard
from trackstar.evaluation.patch_settings import TailPatchSettings
from trackstar.evaluation.tail_patch_judge import Effects, TailPatchJudge
from trackstar.passages import begin_token
from trackstar.queries import tokenize
from trackstar.results import Query
from trackstar.tail_patch import PatchStep

EFFECTS = "effects.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """Effects on queries by step and text; the steps by name, and the checkpoint's digest."""

    queries: Sequence[Query]
    effects: Effects
    steps: Mapping[str, PatchStep]
    model: str


class Patching:
    """A checkpoint and the steps that are taken from it.

    Args:
        settings: model, optimizer and steps; their `queries` and `depths` are the caller's business.
        out: folder of the evaluation, for effects that no other file keeps.

    Raises:
        TrackstarError: the checkpoint, its optimizer state or the file of effects cannot be used.
    """

    def __init__(self, settings: TailPatchSettings, out: Path) -> None:
        import torch

        from trackstar.model import load_model

        self._loaded = load_model(
            settings.model,
            dtype=torch.float32,
            device=settings.device,
            trust_remote_code=settings.trust_remote_code,
            exclude=(),
        )
        self._begin = begin_token(self._loaded.tokenizer)
        kept = out / EFFECTS if settings.effects is None else Path(settings.effects)
        self._judge = TailPatchJudge(self._loaded, kept, optimizer=settings.optimizer_path)
        self.steps = settings.named_steps(self._judge.carried)

    def measure(
        self, queries: Sequence[Query], wanted: Sequence[Collection[str]], on_step: OnStep = unheard
    ) -> Measured:
        """The effect of every step on each query's texts.

        Args:
            queries: prompts and targets.
            wanted: each query's texts.
            on_step: progress.

        Raises:
            InvalidRequest: a target cannot be tokenised, or as `TailPatchJudge.measure`.
            NotReady: another process adds to the file of effects.
        """
        effects = self._judge.measure(
            [self._query(query) for query in queries],
            cache(self._passage),
            wanted,
            self.steps,
            on_passage=lambda done, total: on_step("tail-patching", done, total),
        )
        return Measured(queries=queries, effects=effects, steps=self.steps, model=self._loaded.digest)

    def _query(self, query: Query) -> Example:
        loaded = self._loaded
        check_target(query, loaded.tokenizer)
        return tokenize(query, loaded.tokenizer, add_bos=self._begin is not None, max_tokens=loaded.max_tokens)

    def _passage(self, text: str) -> Example:
        ids = self._loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        head = [] if self._begin is None else [self._begin]
        return Example(tokens=np.array([*head, *ids][: self._loaded.max_tokens], dtype=np.int32))


def first_of(lists: Mapping[str, Sequence[Sequence[str]]], depth: int) -> list[dict[str, None]]:
    """For each query the texts among any method's first `depth`, in order."""
    return [
        {text: None for texts in several for text in texts[:depth]} for several in zip(*lists.values(), strict=True)
    ]


def drawn(num: int, wanted: int | None, seed: int) -> list[int]:
    """Which of `num` queries are judged: `wanted` of them at most, drawn by the seed, in order."""
    if wanted is None or wanted >= num:
        return list(range(num))
    return sorted(np.random.default_rng(seed).permutation(num)[:wanted].tolist())
