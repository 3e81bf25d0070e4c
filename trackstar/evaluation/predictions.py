"""What the model itself answers, and whether that is right: influence is of what the model learnt, if it learnt it.

An answer is right if its words begin with those of the target or of an alias; letter case, articles in front and
punctuation do not count. Completion is greedy, up to the end of the line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from trackstar.errors import NotFound
from trackstar.evaluation.config import PredictionSettings
from trackstar.evaluation.facts import Fact
from trackstar.evaluation.method import OnStep, unheard
from trackstar.results import Query
from trackstar.storage import digest_of, file_digest, publish_json, read_json

_WORD = re.compile(r"\w+")
_ARTICLES = ("a", "an", "the")
# Changes when a model's answers change under the same settings, so that none is taken from before.
_FORMAT = 1


def is_right(answer: str, targets: Sequence[str]) -> bool:
    """Whether an answer begins with one of the targets, word by word."""
    given = _words(answer)
    wanted = [_words(target) for target in targets]
    return any(words and given[: len(words)] == words for words in wanted)


def known_correctness(facts: Sequence[Fact]) -> dict[str, bool]:
    """By fact_id, what the facts file says of the release's model; facts that say nothing are left out."""
    return {
        fact.fact_id: fact.fields["is_8b_correct"]
        for fact in facts
        if isinstance(fact.fields.get("is_8b_correct"), bool)
    }


def correctness(
    settings: PredictionSettings | None,
    out: Path,
    facts: Sequence[Fact],
    queries: Sequence[Query],
    on_step: OnStep = unheard,
) -> dict[str, bool]:
    """By fact_id, whether the model's own answer is right; of those for which that is known.

    Args:
        settings: the model; the facts' own `is_8b_correct` if None.
        out: where answers are kept.
        facts: whose targets are right.
        queries: of each fact.
        on_step: progress.
    """
    if settings is None:
        return known_correctness(facts)
    answers = kept_answers(settings, out / "predictions.json", queries, on_step)
    return {fact.fact_id: is_right(answers[fact.fact_id], fact.targets) for fact in facts}


def kept_answers(
    settings: PredictionSettings, path: Path, queries: Sequence[Query], on_step: OnStep = unheard
) -> dict[str, str]:
    """The model's answers by query id, from the file if they are there, else made and kept in it."""
    identity = {
        "format": _FORMAT,
        "model": model_files(settings.model),
        "queries": [[query.query_id, query.prompt] for query in queries],
        "max_new_tokens": settings.max_new_tokens,
    }
    digest = digest_of(identity)
    known = read_json(path) if path.is_file() else {}
    if known.get("digest") != digest:
        known = {"digest": digest, "answers": predict_all(settings, queries, on_step)}
        publish_json(path, known)
    answers: dict[str, str] = known["answers"]
    return answers


def model_files(folder: str) -> dict[str, str]:
    """Digests of the files that answers depend on, by name.

    Raises:
        NotFound: no such folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise NotFound(f"there is no folder {folder!r} of a checkpoint")
    files = sorted(file for pattern in ("*.json", "*.safetensors") for file in path.glob(pattern))
    return {file.name: file_digest(file) for file in files}


def predict_all(settings: PredictionSettings, queries: Sequence[Query], on_step: OnStep = unheard) -> dict[str, str]:
    """The model's answer to every query, by query id.

    Raises:
        InvalidRequest: a prompt cannot be tokenised.
    """
    import torch

    from trackstar.complete import complete, line_of, stop_tokens_of
    from trackstar.model import load_model
    from trackstar.passages import begin_token
    from trackstar.queries import tokenize_prompt

    loaded = load_model(
        settings.model,
        dtype=torch.float32,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        exclude=(),
    )
    tokenizer = loaded.tokenizer
    add_bos = begin_token(tokenizer) is not None
    stops = stop_tokens_of(tokenizer)
    answers: dict[str, str] = {}
    for number, query in enumerate(queries, start=1):
        given = tokenize_prompt(query.prompt, tokenizer, add_bos=add_bos, max_tokens=loaded.max_tokens)
        wanted = min(settings.max_new_tokens, loaded.max_tokens - len(given))
        found = complete(loaded.model, given, max_new_tokens=wanted, stop_tokens=stops)
        answers[query.query_id] = line_of(found, tokenizer)
        if number % 32 == 0 or number == len(queries):
            on_step("predicting", number, len(queries))
    return answers


def _words(text: str) -> list[str]:
    words = _WORD.findall(text.casefold())
    return words[1:] if len(words) > 1 and words[0] in _ARTICLES else words
