"""Passages: windows cover every document exactly, texts are right to the character, any cursor restarts the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trackstar import passages
from trackstar.corpus import Corpus, CorpusConfig
from trackstar.errors import Incompatible, InvalidRequest
from trackstar.passages import Cursor, Passage, begin_token, read_passages

TEXTS = [
    "The river runs to the sea, and the sea is never full.",
    "a",
    "東京は日本の首都です。",  # three bytes a character, cut by byte-level tokens
    "  leading and  double   spaces \n\n end ",
    "e\u0301 décomposé, 🌊🏳️‍🌈 and ½ of nothing",
    "word " * 40,
]


def byte_level_bpe(trim_offsets: bool = False, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<bos>", "<eos>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXTS[0], TEXTS[3], TEXTS[5]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **special)


BPE = byte_level_bpe(bos_token="<bos>", eos_token="<eos>")
ORIGIN = Cursor(0, 0)


def corpus_of(folder: Path, texts: Sequence[str]) -> Corpus:
    path = folder / "corpus.jsonl"
    records = [{"id": f"d{row}", "text": text, "year": row} for row, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Corpus(CorpusConfig(paths=(str(path),), metadata_fields=("year",)))


def read(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase = BPE,
    *,
    window_tokens: int = 5,
    add_bos: bool = True,
    start: Cursor = ORIGIN,
    first_id: int = 0,
) -> list[tuple[Passage, Cursor]]:
    return list(
        read_passages(corpus, tokenizer, window_tokens=window_tokens, add_bos=add_bos, start=start, first_id=first_id)
    )


def plain(passage: Passage) -> tuple[object, ...]:
    return (
        passage.passage_id,
        passage.doc_id,
        passage.text,
        passage.source,
        passage.metadata,
        passage.token_start,
        passage.token_end,
        passage.tokens.tolist(),
    )


def assert_covers(
    texts: Sequence[str], read_back: Sequence[tuple[Passage, Cursor]], tokenizer: Tokenizer, room: int
) -> None:
    """Ids dense, spans consecutive and full but the last, tokens those of the bare tokenizer, texts add up."""
    assert [passage.passage_id for passage, _ in read_back] == list(range(len(read_back)))
    for row, text in enumerate(texts):
        windows = [passage for passage, _ in read_back if passage.doc_id == f"d{row}"]
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert [(w.token_start, w.token_end) for w in windows] == [
            (first, min(first + room, len(expected))) for first in range(0, len(expected), room)
        ]
        assert [token for w in windows for token in w.tokens[-(w.token_end - w.token_start) :].tolist()] == expected
        assert "".join(w.text for w in windows) == text
        assert all(w.metadata == {"year": str(row)} and w.source == "corpus.jsonl" for w in windows)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("window_tokens", [2, 3, 7, 16, 1000])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_windows_cover_every_document(tmp_path: Path, window_tokens: int, add_bos: bool, trim_offsets: bool) -> None:
    tokenizer = byte_level_bpe(trim_offsets, bos_token="<bos>")
    result = read(corpus_of(tmp_path, TEXTS), tokenizer, window_tokens=window_tokens, add_bos=add_bos)
    assert_covers(TEXTS, result, tokenizer.backend_tokenizer, window_tokens - add_bos)
    for passage, _ in result:
        assert passage.tokens.dtype == np.int32
        assert len(passage.tokens) <= window_tokens
        assert (passage.tokens[0] == tokenizer.bos_token_id) == add_bos


def alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others follow from code point 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + row): byte for row, byte in enumerate(others)}


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("window_tokens", [2, 3, 6])
def test_window_text_is_what_its_tokens_spell(tmp_path: Path, trim_offsets: bool, window_tokens: int) -> None:
    """Independent of offsets: spelt from its tokens, byte by byte, a cut character in the window of its first byte."""
    tokenizer = byte_level_bpe(trim_offsets, bos_token="<bos>")
    byte_of = alphabet()
    # Trimming gives the offsets (0, 0) to a token of spaces that opens a document: its spaces go to the window behind.
    texts = [text.strip() if trim_offsets else text for text in TEXTS]
    for passage, _ in read(corpus_of(tmp_path, texts), tokenizer, window_tokens=window_tokens):
        pieces = tokenizer.convert_ids_to_tokens(passage.tokens[1:].tolist())
        spelt = bytes(byte_of[character] for piece in pieces for character in piece)
        while spelt and spelt[0] & 0xC0 == 0x80:  # the rest of a character that belongs to the window before
            spelt = spelt[1:]
        assert passage.text.encode().startswith(spelt)
        assert len(passage.text) == sum(byte & 0xC0 != 0x80 for byte in spelt)


def test_window_text_by_hand(tmp_path: Path) -> None:
    """One token a byte: a character cut by a border stands in the window where it begins, once."""
    tokenizer = Tokenizer(models.BPE(vocab=alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    corpus = corpus_of(tmp_path, ["aé東b"])  # 1 + 2 + 3 + 1 bytes
    result = read(corpus, fast, window_tokens=2, add_bos=False)
    assert [passage.text for passage, _ in result] == ["aé", "東", "", "b"]


@pytest.mark.parametrize("batch_documents", [1, 2, 256])
def test_restart_from_any_cursor_gives_the_same_rest(
    tmp_path: Path, batch_documents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = corpus_of(tmp_path, TEXTS)
    whole = [(plain(passage), cursor) for passage, cursor in read(corpus)]
    monkeypatch.setattr(passages, "_BATCH_DOCUMENTS", batch_documents)
    for first_id, cursor in enumerate([Cursor(0, 0), *(cursor for _, cursor in whole)]):
        rest = [(plain(passage), behind) for passage, behind in read(corpus, start=cursor, first_id=first_id)]
        assert rest == whole[first_id:]
    assert whole[-1][1] == Cursor(len(TEXTS), 0)


def test_batches_are_bounded_by_characters_and_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpus_of(tmp_path, TEXTS)
    whole = [plain(passage) for passage, _ in read(corpus)]
    monkeypatch.setattr(passages, "_BATCH_CHARACTERS", 60)
    assert [len(batch) for batch in passages._batches(corpus.documents())] == [3, 2, 1]
    assert [plain(passage) for passage, _ in read(corpus)] == whole


def test_a_document_without_tokens_gives_no_passage_and_keeps_the_cursor_right(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel(vocab={"x": 0, "y": 1}, unk_token="x"))
    backend.normalizer = normalizers.Replace("z", "")
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    corpus = corpus_of(tmp_path, ["z", "x y", "zz", "y", "z"])
    result = read(corpus, tokenizer, window_tokens=1, add_bos=True)
    assert [(p.doc_id, p.passage_id, p.text) for p, _ in result] == [("d1", 0, "x"), ("d1", 1, " y"), ("d3", 2, "y")]
    assert [cursor for _, cursor in result] == [Cursor(1, 1), Cursor(2, 0), Cursor(4, 0)]
    for position, (_, cursor) in enumerate(result, start=1):
        rest = read(corpus, tokenizer, window_tokens=1, add_bos=True, start=cursor, first_id=position)
        assert [plain(p) for p, _ in rest] == [plain(p) for p, _ in result[position:]]


def test_slow_tokenizer_decodes_its_windows(tmp_path: Path) -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    corpus = corpus_of(tmp_path, ["plain text, eight a window", "Zoë"])
    result = read(corpus, tokenizer, window_tokens=9)
    assert [passage.text for passage, _ in result] == ["plain te", "xt, eigh", "t a wind", "ow", "Zoë"]
    assert all(passage.tokens[0] == tokenizer.eos_token_id for passage, _ in result)
    assert [len(passage.tokens) for passage, _ in result] == [9, 9, 9, 3, 5]


def test_begin_token() -> None:
    assert begin_token(byte_level_bpe(bos_token="<bos>", eos_token="<eos>")) == 0
    assert begin_token(byte_level_bpe(eos_token="<eos>")) == 1
    assert begin_token(byte_level_bpe()) is None


def test_without_a_begin_token_the_whole_window_is_text(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    result = read(corpus_of(tmp_path, TEXTS), tokenizer, window_tokens=6, add_bos=True)
    assert_covers(TEXTS, result, tokenizer.backend_tokenizer, 6)
    assert max(len(passage.tokens) for passage, _ in result) == 6


def test_errors(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, TEXTS)
    with pytest.raises(InvalidRequest, match="A window of 1 tokens leaves no room"):
        read(corpus, window_tokens=1)
    with pytest.raises(Incompatible, match=r"The document d1 has 1 windows .* cannot go on at window 3"):
        read(corpus, start=Cursor(1, 3))
    assert read(corpus, start=Cursor(len(TEXTS), 0)) == []


@given(st.lists(st.text(min_size=1).filter(lambda t: not t.isspace()), min_size=1, max_size=6), st.integers(2, 9))
def test_any_text_is_covered(tmp_path_factory: pytest.TempPathFactory, texts: list[str], window_tokens: int) -> None:
    corpus = corpus_of(tmp_path_factory.mktemp("corpus"), texts)
    assert_covers(texts, read(corpus, window_tokens=window_tokens), BPE.backend_tokenizer, window_tokens - 1)
