"""Entailment by a local cross-encoder of natural language inference, such as those trained on MNLI.

    score = p(entailment | premise = the passage, hypothesis = prompt and target)

Any folder that transformers loads as a sequence classifier will do if one of its labels is called entailment: of two
labels (entailment, not_entailment) or three. Nothing is downloaded and no code of the folder is run.

Every batch of scores is kept, as one line of JSON, when it is done, so a run that was killed goes on where it was, and
with the same batches: how a text is padded shows in the last digits of its score. Keys are digests of model, hypothesis
and passage, so one file serves any number of runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trackstar.errors import CorruptArtifact, InvalidRequest, NotFound
from trackstar.evaluation.entailment import Pair
from trackstar.evaluation.entailment_settings import NliSettings
from trackstar.evaluation.predictions import model_files
from trackstar.locks import writing
from trackstar.storage import digest_of


class Nli:
    """Judges with one model, which is loaded when it is needed first.

    Args:
        settings: the model.
        cache: file of scores; made if it is missing.

    Raises:
        NotFound: there is no such folder, or it holds no model.
        InvalidRequest: none of the model's labels is entailment, or several are.
        CorruptArtifact: a line of the cache, but for a last one that was cut off, is not what was written.
    """

    def __init__(self, settings: NliSettings, cache: Path) -> None:
        self._settings = settings
        self._cache = cache
        self._label = _entailment_label(Path(settings.model))
        self._identity = digest_of([model_files(settings.model), settings.max_tokens])
        self._loaded: tuple[Any, Any] | None = None
        self._known: dict[str, float] = {}
        self._read()
        self.threshold = settings.threshold
        self.name = f"nli ({Path(settings.model).resolve().name}, {settings.threshold:g} or more)"

    def scores(self, pairs: Sequence[Pair], on_pairs: Callable[[int, int], None]) -> NDArray[np.float64]:
        """See `entailment.Judge`.

        Raises:
            NotReady: another process adds to the cache.
        """
        keys = [digest_of([self._identity, pair.hypothesis, pair.text]) for pair in pairs]
        missing = list({key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._known}.items())
        if missing:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with writing(self._cache.parent, name=f".{self._cache.name}.lock"):
                self._mend()
                for start in range(0, len(missing), self._settings.batch):
                    batch = dict(missing[start : start + self._settings.batch])
                    found = dict(zip(batch, self._classify(list(batch.values())), strict=True))
                    with self._cache.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(found) + "\n")
                    self._known |= found
                    on_pairs(start + len(batch), len(missing))
        return np.array([self._known[key] for key in keys], dtype=np.float64)

    def _classify(self, pairs: Sequence[Pair]) -> list[float]:
        import torch

        model, tokenizer = self._model()
        inputs = tokenizer(
            [pair.text for pair in pairs],
            [pair.hypothesis for pair in pairs],
            padding=True,
            truncation="longest_first",
            max_length=self._length(model, tokenizer),
            return_tensors="pt",
        )
        with torch.no_grad():
            logits_BL = model(**inputs.to(model.device)).logits.double()
        found: list[float] = logits_BL.softmax(dim=1)[:, self._label].tolist()
        return found

    def _model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            folder = self._settings.model
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            )
            model = model.float().eval().to(self._settings.device)
            self._loaded = (model, AutoTokenizer.from_pretrained(folder, local_files_only=True))
        return self._loaded

    def _length(self, model: Any, tokenizer: Any) -> int:
        positions = getattr(model.config, "max_position_embeddings", None) or self._settings.max_tokens
        return min(self._settings.max_tokens, int(tokenizer.model_max_length), int(positions))

    def _read(self) -> int:
        """Learn what the cache holds; returns where its last whole line ends."""
        end = 0
        if self._cache.is_file():
            with self._cache.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if not line.endswith(b"\n"):
                        break
                    try:
                        self._known |= {str(key): float(score) for key, score in json.loads(line).items()}
                    except (ValueError, AttributeError, TypeError) as error:
                        raise CorruptArtifact(
                            f"{self._cache}:{number} holds no scores; delete the line, or the file to judge all anew"
                        ) from error
                    end += len(line)
        return end

    def _mend(self) -> None:
        """Cut off what a kill left of a line."""
        end = self._read()
        if self._cache.is_file() and self._cache.stat().st_size > end:
            with self._cache.open("r+b") as stream:
                stream.truncate(end)


def _entailment_label(folder: Path) -> int:
    """Number of the label that means entailment."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFound(f"there is no model of natural language inference in {str(folder)!r}") from error
    except ValueError as error:
        raise InvalidRequest(f"{str(folder / 'config.json')!r} is not valid JSON") from error
    labels = config.get("id2label")
    labels = labels if isinstance(labels, dict) else {}
    found = [number for number, label in labels.items() if re.fullmatch(r"entail(s|ment|ed)?", str(label).casefold())]
    if len(found) != 1:
        told = ", ".join(map(str, labels.values())) or "no names"
        raise InvalidRequest(
            f"the model in {str(folder)!r} has no label of its own for entailment (its labels: {told}); name them in "
            "the id2label of its config.json, or take another model"
        )
    return int(found[0])
