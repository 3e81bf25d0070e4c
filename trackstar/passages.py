"""Cuts the documents of a corpus into passages: what the model reads at once, and the unit that gets one gradient row.

Contract: passages are numbered densely in corpus order. A document's tokens are cut into consecutive windows that cover
them exactly, each led by the begin token where the model expects one; the texts of a document's windows, put together,
are its text. Every passage comes with the cursor behind it, and reading from that cursor gives exactly the passages
that would have followed.

It does not pad, pack or order by length, and it drops nothing: a window may be too short to hold a target token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from trackstar.corpus import Document
from trackstar.errors import Incompatible, InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A batch is full at either bound: the first keeps fast tokenizers busy, the second bounds memory for long documents.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Passage:
    """One window of one document.

    passage_id: its global row number. token_start, token_end: its span among the document's own tokens, no specials.
    tokens: int32 [T], what the model reads: the begin token if there is one, then the span. text: the window's part of
    the document's text; a character whose bytes two windows share stands in the first of them.
    """

    passage_id: int
    doc_id: str
    text: str
    source: str
    metadata: dict[str, str]
    token_start: int
    token_end: int
    tokens: NDArray[np.int32]


class Cursor(NamedTuple):
    """Where the next passage starts: the document's ordinal among the good ones, and the window within it."""

    document: int
    window: int


class Documents(Protocol):
    """Where passages are cut from; a `Corpus` is one."""

    def documents(self, start: int) -> Iterator[Document]:
        """The documents from that ordinal on."""


def read_passages(
    corpus: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window_tokens: int,
    add_bos: bool,
    start: Cursor,
    first_id: int,
) -> Iterator[tuple[Passage, Cursor]]:
    """Streams (passage, cursor behind it) from `start` on, giving the first the id `first_id`.

    `window_tokens` counts the begin token. Documents are tokenised without special tokens, each for itself, so that
    batches do not show in the result. A document without any token gives no passage. Tokenizers without offsets (the
    slow ones) get the text of a window by decoding it, if the document has more than one.

    Raises InvalidRequest for a window that leaves no room for a token and for whatever the corpus raises; Incompatible
    for a start inside a document that has fewer windows.
    """
    begin = begin_token(tokenizer) if add_bos else None
    head = np.array([] if begin is None else [begin], dtype=np.int32)
    span = window_tokens - len(head)
    if span < 1:
        raise InvalidRequest(f"A window of {window_tokens} tokens leaves no room for text; make it at least 2 tokens.")
    passage_id = first_id
    for documents in _batches(corpus.documents(start.document)):
        for document, (ids, encoding) in zip(documents, _tokenise(tokenizer, documents), strict=True):
            cuts = [*range(0, len(ids), span), len(ids)]
            skipped = start.window if document.ordinal == start.document else 0
            if skipped and skipped >= len(cuts) - 1:
                raise Incompatible(
                    f"The document {document.doc_id} has {len(cuts) - 1} windows of {window_tokens} tokens, so reading "
                    f"cannot go on at window {skipped}; corpus, tokenizer and window must be those of the start."
                )
            texts = _texts(document.text, ids, encoding, cuts, tokenizer)
            for window in range(skipped, len(cuts) - 1):
                token_start, token_end = cuts[window : window + 2]
                passage = Passage(
                    passage_id=passage_id,
                    doc_id=document.doc_id,
                    text=texts[window],
                    source=document.source,
                    metadata=document.metadata,
                    token_start=token_start,
                    token_end=token_end,
                    tokens=np.concatenate([head, ids[token_start:token_end]]),
                )
                last = window == len(cuts) - 2
                yield passage, Cursor(document.ordinal + last, 0 if last else window + 1)
                passage_id += 1


def count_tokens(documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Number of tokens of each document, without specials."""
    for batch in _batches(documents):
        yield from (len(ids) for ids, _ in _tokenise(tokenizer, batch))


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that leads a sequence: the tokenizer's BOS, else its EOS (as GPT-2 and Pythia are trained), else none."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    assert token is None or isinstance(token, int), "only the additional specials are lists"
    return token


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> Iterator[tuple[NDArray[np.int32], Any]]:
    """(token ids int32 [T], the fast tokenizer's encoding or None) of each document."""
    batch = tokenizer(
        [document.text for document in documents],
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # else it warns of every document longer than the model's window
    )
    encodings = batch.encodings or [None] * len(documents)
    for ids, encoding in zip(batch["input_ids"], encodings, strict=True):
        yield np.asarray(ids, dtype=np.int32), encoding


def _texts(
    text: str, ids: NDArray[np.int32], encoding: Any, cuts: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """The text of every window; `cuts` holds the windows' borders among the tokens, int [windows + 1]."""
    if len(cuts) <= 2:
        return [text]
    if encoding is None:
        return [
            str(tokenizer.decode(ids[first:last].tolist(), clean_up_tokenization_spaces=False))
            for first, last in pairwise(cuts)
        ]
    # Cut behind the furthest character reached so far: tokens that share a character all reach behind it, and spaces
    # that a tokenizer trims off its offsets go with the token they lead.
    reached = np.maximum.accumulate(np.array([end for _, end in encoding.offsets], dtype=np.int64))
    borders = [0, *(int(reached[cut - 1]) for cut in cuts[1:-1]), len(text)]
    return [text[first:last] for first, last in pairwise(borders)]
