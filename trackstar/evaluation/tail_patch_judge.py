"""Tail-patch over retrieved lists: how much do the passages that a method finds move the model towards the target?

    tail-patch(method, k) = mean over queries of  mean over the first k passages m of a query's list of
                            p(target | prompt, theta after one step on m) - p(target | prompt, theta)

Every step starts from the final checkpoint, which is put back after it (`trackstar.tail_patch`). Which step is the
right one is open: one that divides by the root of the second moment shares its geometry with rows that do, so no single
one is a neutral referee, and a judgement comes for each of several steps side by side.

A list shorter than k counts with the passages it has, and an empty one with no change. What a step on a passage makes
of the model does not depend on the query, so pairs are measured passage by passage: one gradient, then each step once,
with all queries that list the passage watched together. A pair is measured once for each step, whatever number of
methods list it, and kept: the cache is a file of JSON lines to which every passage's pairs are added as they are done,
so a run that was killed goes on where it was. Its keys are digests of all that decides an effect (checkpoint, carried
optimizer state, step, tokens), so one file serves any number of runs.

It does not retrieve, and draws no intervals: the values of all queries come back.

Legend: Q queries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trackstar.encode import Example
from trackstar.errors import CorruptArtifact, InvalidRequest
from trackstar.locks import writing
from trackstar.model import LoadedModel
from trackstar.optimizer_state import (
    AdafactorMoments,
    AdamMoments,
    find_optimizer,
    read_adafactor_moments,
    read_adam_moments,
)
from trackstar.storage import digest_of, file_digest
from trackstar.tail_patch import PatchEffect, PatchStep, TailPatcher

DEPTHS = (1, 3, 5, 10)

# For every method, each query's documents, best first.
Lists = Mapping[str, Sequence[Sequence[str]]]
# For every step, each query's effects by document.
Effects = Mapping[str, Sequence[Mapping[str, PatchEffect]]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judgement:
    """What one method's first `depth` passages do under one step, in the queries' order.

    probability_Q: mean change of the target's probability, float64 [Q]. loss_Q: mean change of its summed loss in nats.
    """

    step: str
    method: str
    depth: int
    probability_Q: NDArray[np.float64]
    loss_Q: NDArray[np.float64]

    @property
    def tail_patch(self) -> float:
        """The measure: mean over queries."""
        return float(self.probability_Q.mean())


def steps_side_by_side(
    *, sgd: float, adamw: float, carried: Literal["none", "adamw", "adafactor"]
) -> dict[str, PatchStep]:
    """The steps of a report, by name: plain descent, AdamW from a fresh state, and those that carry training's on.

    Args:
        sgd: learning rate of plain descent.
        adamw: learning rate of AdamW and Adafactor; they move every weight by about so much, whatever the gradient's
            size.
        carried: whose state there is to carry on.
    """
    steps = {
        f"SGD {sgd:g}": PatchStep(optimizer="sgd", learning_rate=sgd),
        f"AdamW {adamw:g}, fresh": PatchStep(optimizer="adamw", learning_rate=adamw),
    }
    if carried == "adamw":
        second = PatchStep(optimizer="adamw", learning_rate=adamw, carry="second")
        steps[f"AdamW {adamw:g}, second moment carried"] = second
        steps[f"AdamW {adamw:g}, both moments carried"] = second.model_copy(update={"carry": "both"})
    elif carried == "adafactor":
        steps[f"Adafactor {adamw:g}, second moment carried"] = PatchStep(
            optimizer="adafactor", learning_rate=adamw, carry="second"
        )
    return steps


class TailPatchJudge:
    """Judges lists with one checkpoint.

    Args:
        loaded: the final checkpoint; it is copied and not touched.
        cache: the file of effects; it is made if it is missing.
        optimizer: the checkpoint's folder or optimizer.pt, for steps that carry moments on.

    Raises:
        CorruptArtifact: the cache, but for a last line that was cut off, is not what was written.
        TrackstarError: as `read_moments` and `TailPatcher`.
    """

    def __init__(self, loaded: LoadedModel, cache: Path, *, optimizer: Path | None = None) -> None:
        moments = None if optimizer is None else read_moments(optimizer, loaded)
        self._patcher = TailPatcher(loaded.model, moments=moments)
        kinds = {type(one) for one in (moments or {}).values()}
        self.carried: Literal["none", "adamw", "adafactor"] = (
            "none" if not kinds else "adamw" if kinds == {AdamMoments} else "adafactor"
        )
        self._model = loaded.digest
        self._moments = None if optimizer is None else file_digest(find_optimizer(optimizer))
        self._path = cache
        self._known = {key: effect for key, effect, _ in _read(cache)}

    def judge(
        self,
        queries: Sequence[Example],
        passages: Callable[[str], Example],
        lists: Lists,
        steps: Mapping[str, PatchStep],
        *,
        depths: Sequence[int] = DEPTHS,
        on_passage: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> list[Judgement]:
        """Every method under every step at every depth.

        Args:
            queries: prompts and targets.
            passages: the tokens of a document.
            lists: of every method; as many lists as there are queries, in their order.
            steps: by the name in results.
            depths: how many passages of each list count.
            on_passage: as of `measure`.

        Raises:
            InvalidRequest: no query, method, step or depth, lists that do not fit the queries, or as `measure`.
            NotReady: as `measure`.
        """
        _check(queries, lists, steps, depths)
        wanted = [
            {document: None for documents in lists.values() for document in documents[place][: max(depths)]}
            for place in range(len(queries))
        ]
        effects = self.measure(queries, passages, wanted, steps, on_passage=on_passage)
        return [
            judgement(name, method, depth, effects[name], documents)
            for name in steps
            for method, documents in lists.items()
            for depth in depths
        ]

    def measure(
        self,
        queries: Sequence[Example],
        passages: Callable[[str], Example],
        wanted: Sequence[Collection[str]],
        steps: Mapping[str, PatchStep],
        *,
        on_passage: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> Effects:
        """The effect of every step on each query's documents; those that are not known are measured and kept.

        Args:
            queries: prompts and targets.
            passages: the tokens of a document.
            wanted: for each query, documents.
            steps: by the name in results.
            on_passage: hears how many of all passages that are to be measured are done.

        Raises:
            InvalidRequest: as `TailPatcher.measure`.
            NotReady: another process adds to the cache.
        """
        examples = {document: passages(document) for documents in wanted for document in documents}
        with writing(self._path.parent, name=f".{self._path.name}.lock"):
            self._mend()
            keys: dict[tuple[str, int, str], str] = {}
            missing: dict[str, dict[str, dict[str, int]]] = {}
            for place, documents in enumerate(wanted):
                for document in documents:
                    for name, step in steps.items():
                        key = keys[name, place, document] = self._key(queries[place], examples[document], step)
                        if key not in self._known:
                            missing.setdefault(document, {}).setdefault(name, {})[key] = place
            if missing:
                self._measure(queries, examples, missing, steps, on_passage)
        return {
            name: [
                {document: self._known[keys[name, place, document]] for document in documents}
                for place, documents in enumerate(wanted)
            ]
            for name in steps
        }

    def _measure(
        self,
        queries: Sequence[Example],
        examples: Mapping[str, Example],
        missing: Mapping[str, Mapping[str, Mapping[str, int]]],
        steps: Mapping[str, PatchStep],
        on_passage: Callable[[int, int], None],
    ) -> None:
        """Measure and keep what is missing: by document and step, places of queries by their keys."""
        asked = sorted({place for by_step in missing.values() for keys in by_step.values() for place in keys.values()})
        before = dict(zip(asked, self._patcher.losses([queries[place] for place in asked]), strict=True))
        with self._path.open("a", encoding="utf-8") as stream:
            for number, (document, by_step) in enumerate(missing.items(), start=1):
                # Another document may have had the same tokens.
                left = {
                    name: unknown
                    for name, keys in by_step.items()
                    if (unknown := {key: place for key, place in keys.items() if key not in self._known})
                }
                if examples[document].num_targets and left:
                    watched = [
                        (steps[name], [queries[place] for place in keys.values()]) for name, keys in left.items()
                    ]
                    after = self._patcher.losses_after(examples[document], watched)
                else:
                    after = [[before[place] for place in keys.values()] for keys in left.values()]
                found = {
                    key: PatchEffect(loss_before=before[place], loss_after=loss)
                    for keys, losses in zip(left.values(), after, strict=True)
                    for (key, place), loss in zip(keys.items(), losses, strict=True)
                }
                stream.writelines(_line(key, effect) for key, effect in found.items())
                stream.flush()
                self._known |= found
                on_passage(number, len(missing))

    def _key(self, query: Example, passage: Example, step: PatchStep) -> str:
        moments = None if step.carry == "none" else self._moments
        examples = [[example.tokens.tolist(), example.first_target] for example in (query, passage)]
        return digest_of([self._model, moments, step.model_dump(mode="json"), *examples])

    def _mend(self) -> None:
        """Cut off what a kill left of a line, and learn what others added."""
        end = 0
        for key, effect, end in _read(self._path):  # noqa: B007 - the last one's end
            self._known.setdefault(key, effect)
        if self._path.is_file() and self._path.stat().st_size > end:
            with self._path.open("r+b") as stream:
                stream.truncate(end)


def read_moments(path: Path, loaded: LoadedModel) -> dict[str, AdamMoments] | dict[str, AdafactorMoments]:
    """The moments of Adam, AdamW or transformers' Adafactor in a checkpoint's folder or optimizer.pt.

    Raises:
        InvalidRequest: it is of neither.
        TrackstarError: as `read_optimizer`.
    """
    try:
        return read_adafactor_moments(path, loaded.model)
    except InvalidRequest:
        return read_adam_moments(path, loaded.model)


def judgement(
    step: str,
    method: str,
    depth: int,
    effects: Sequence[Mapping[str, PatchEffect]],
    documents: Sequence[Sequence[str]],
) -> Judgement:
    """What one method's first passages do.

    Args:
        step: its name.
        method: its name.
        depth: how many passages of each list count.
        effects: of the step; each query's, by document.
        documents: each query's list, best first.
    """
    probability_Q, loss_Q = np.zeros(len(documents)), np.zeros(len(documents))
    for place, (known, listed) in enumerate(zip(effects, documents, strict=True)):
        if first := [known[document] for document in listed[:depth]]:
            probability_Q[place] = np.mean([effect.probability_change for effect in first])
            loss_Q[place] = np.mean([effect.loss_change for effect in first])
    return Judgement(step=step, method=method, depth=depth, probability_Q=probability_Q, loss_Q=loss_Q)


def _check(queries: Sequence[Example], lists: Lists, steps: Mapping[str, PatchStep], depths: Sequence[int]) -> None:
    for what, given in (("query", queries), ("method", lists), ("step", steps), ("depth", depths)):
        if not given:
            raise InvalidRequest(f"tail-patch needs at least one {what}")
    if min(depths) < 1:
        raise InvalidRequest(f"tail-patch at a depth of {min(depths)} means nothing; give depths from 1")
    for method, documents in lists.items():
        if len(documents) != len(queries):
            raise InvalidRequest(
                f"the method {method!r} has lists for {len(documents)} queries, there are {len(queries)}; give one for "
                "each"
            )


def _line(key: str, effect: PatchEffect) -> str:
    return json.dumps({"key": key, "before": effect.loss_before, "after": effect.loss_after}) + "\n"


def _read(path: Path) -> Iterator[tuple[str, PatchEffect, int]]:
    """Key, effect and end in the file of every whole line."""
    if not path.is_file():
        return
    end = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                record = json.loads(line)
                effect = PatchEffect(loss_before=float(record["before"]), loss_after=float(record["after"]))
                yield str(record["key"]), effect, end
            except (ValueError, KeyError, TypeError) as error:
                raise CorruptArtifact(
                    f"{path}:{number} is not an effect that was measured; delete the line, or the file to measure all "
                    "anew"
                ) from error
