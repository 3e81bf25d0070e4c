"""What is trained on: the sentences that state what is asked, distractors, and their tokens.

Contract: a sentence is a passage, and positions are numbers of passages. Sentences keep the order of the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from trackstar.corpus import Corpus, CorpusConfig
from trackstar.encode import Example
from trackstar.errors import InvalidRequest
from trackstar.evaluation.selection import Selection
from trackstar.evaluation.sentences import TRIPLES, Sentences
from trackstar.evaluation.store import Asked
from trackstar.model import load_tokenizer
from trackstar.passages import Cursor, begin_token, read_passages
from trackstar.queries import tokenize
from trackstar.results import Query
from trackstar.storage import publish


def reduced(
    sentences: Sentences, selection: Selection, distractors: int | None, seed: int
) -> tuple[Sentences, Selection]:
    """The gold sentences of every query and so many others, drawn by the seed; everything if `distractors` is None.

    Raises:
        InvalidRequest: there are not so many others.
    """
    if distractors is None:
        return sentences, selection
    parts = (selection.evaluated, selection.held_out, selection.task)
    gold = {position for asked in parts for fact in asked.facts for position in fact.gold}
    others = np.setdiff1d(np.arange(len(sentences)), np.array(sorted(gold), dtype=np.int64))
    if distractors > len(others):
        raise InvalidRequest(
            f"{distractors:,} distractors are asked for and only {len(others):,} of the corpus's {len(sentences):,} "
            "sentences state nothing that is asked; ask for fewer"
        )
    drawn = np.random.default_rng((seed, len(others))).permutation(others)[:distractors]
    kept = sorted([*gold, *drawn.tolist()])
    number = {position: place for place, position in enumerate(kept)}

    def renumbered(asked: Asked) -> Asked:
        facts = [replace(fact, gold=tuple(number[position] for position in fact.gold)) for fact in asked.facts]
        return Asked(queries=asked.queries, facts=facts)

    left = Sentences.of(
        *([part[place] for place in kept] for part in (sentences.ids, sentences.texts, sentences.triples))
    )
    evaluated, held_out, task = (renumbered(asked) for asked in parts)
    return left, Selection(evaluated=evaluated, held_out=held_out, task=task)


def write_corpus(sentences: Sentences, path: Path) -> CorpusConfig:
    """Sentences as a file in the release's format, and how to read it."""
    lines = []
    for name, text, stated in zip(sentences.ids, sentences.texts, sentences.triples, strict=True):
        record = {"sentence_id": name, "text": text, TRIPLES: json.loads(stated) if stated else []}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    publish(path, "".join(lines).encode())
    return CorpusConfig(paths=(str(path),))


def passages_of(corpus: CorpusConfig, sentences: Sentences, model: str) -> list[Example]:
    """Every sentence's tokens, as its row in an index is made of.

    Raises:
        InvalidRequest: a sentence has no tokens, or more than the model's window.
    """
    tokenizer, window = load_tokenizer(model)
    add_bos = begin_token(tokenizer) is not None
    found: list[Example] = []
    read = read_passages(
        Corpus(corpus), tokenizer, window_tokens=window, add_bos=add_bos, start=Cursor(0, 0), first_id=0
    )
    for passage, _ in read:
        expected = sentences.ids[len(found)] if len(found) < len(sentences) else ""
        if passage.doc_id != expected:
            few = passage.token_start == 0
            raise InvalidRequest(
                f"the sentence {expected!r} has no tokens; leave it out of the corpus"
                if few
                else f"the sentence {passage.doc_id!r} has more tokens than the model's window of {window}; retraining "
                "takes whole sentences, so leave it out of the corpus"
            )
        found.append(Example(tokens=passage.tokens))
    if len(found) < len(sentences):
        raise InvalidRequest(f"the sentence {sentences.ids[len(found)]!r} has no tokens; leave it out of the corpus")
    return found


def examples_of(queries: Sequence[Query], model: str) -> list[Example]:
    """Every query's tokens.

    Raises:
        InvalidRequest: a query cannot be tokenised.
    """
    tokenizer, window = load_tokenizer(model)
    add_bos = begin_token(tokenizer) is not None
    return [tokenize(query, tokenizer, add_bos=add_bos, max_tokens=window) for query in queries]
