"""Queries: which fields are read, how prompt and target are joined, where the target starts, and every refusal."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, PythonBackend

from tests import tiny
from trackstar.errors import InvalidRequest, NotFound
from trackstar.queries import read_queries, tokenize, tokenize_span
from trackstar.results import Query


def byte_level() -> PreTrainedTokenizerFast:
    """As of GPT-2: a space belongs to the word behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["The capital of France is Paris. Paris is the capital of France."] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", model_max_length=8)


def prepending() -> PreTrainedTokenizerFast:
    """As of Llama 2: every text that is tokenised gets a space in front."""
    pieces = [
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁France", -1.0),
        ("▁is", -1.0),
        ("▁Paris", -1.0),
        ("Paris", -3.0),
        ("<s>", 0.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


BYTES, SPACED = byte_level(), prepending()


def query(prompt: str, target: str) -> Query:
    return Query(query_id="q7", prompt=prompt, target=target)


def parts(
    prompt: str, target: str, tokenizer: PreTrainedTokenizerBase = BYTES, add_bos: bool = False
) -> tuple[list[str], list[str]]:
    """Tokens before the target, and the target's."""
    example = tokenize(query(prompt, target), tokenizer, add_bos=add_bos, max_tokens=1000)
    assert example.tokens.dtype == np.int32
    assert example.num_targets == len(example.tokens) - example.first_target
    names = [str(tokenizer.convert_ids_to_tokens(token)) for token in example.tokens.tolist()]
    return names[: example.first_target], names[example.first_target :]


def write(folder: Path, *lines: object) -> Path:
    path = folder / "queries.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "p", "target": "t"}, ("p", "t")),
        ({"inputs_plaintext": "p", "targets_plaintext": "t"}, ("p", "t")),
        ({"prompt0": "p", "prompt1": "no", "entity0": "no", "entity1": "t"}, ("p", "t")),
        ({"prompt": "p", "target": "t", "inputs_plaintext": "no", "targets_plaintext": "no"}, ("p", "t")),
        ({"prompt": "alone", "prompt0": "p", "entity1": "t"}, ("p", "t")),
        ({"prompt": "", "target": "t"}, ("", "t")),
        ({"prompt": " p ", "target": " t "}, (" p ", " t ")),
    ],
)
def test_fields_are_found(record: dict[str, str], expected: tuple[str, str], tmp_path: Path) -> None:
    (found,) = read_queries(write(tmp_path, record))
    assert (found.prompt, found.target) == expected


def test_named_fields_come_first(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "p", "target": "t", "q": "Q", "a": "A"})
    for prompt_field, target_field, expected in [
        ("q", "a", ("Q", "A")),
        ("q", None, ("Q", "t")),
        (None, "a", ("p", "A")),
    ]:
        (found,) = read_queries(path, prompt_field=prompt_field, target_field=target_field)
        assert (found.prompt, found.target) == expected


def test_ids_are_the_records_own_or_the_line(tmp_path: Path) -> None:
    pair = {"prompt": "p", "target": "t"}
    path = write(
        tmp_path, pair, {**pair, "fact_id": 12, "example_id": "e"}, b"", {**pair, "query_id": 0, "fact_id": 1}, pair
    )
    assert [found.query_id for found in read_queries(path)] == ["1", "e", "0", "5"]


def test_all_fields_are_kept(tmp_path: Path) -> None:
    record = {"prompt": "p", "target": "t", "query_set": "trex", "aliases": ["a", "b"], "n": {"x": None}}
    assert read_queries(write(tmp_path, record))[0].fields == record


def test_empty_lines_are_passed_over_and_a_limit_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, b"", {"prompt": "1", "target": "t"}, b"  \t", {"prompt": "2", "target": "t"}, b"not read")
    assert [found.prompt for found in read_queries(path, limit=2)] == ["1", "2"]
    with pytest.raises(InvalidRequest, match=r"queries\.jsonl:5: not valid JSON"):
        read_queries(path)


def test_no_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no query file"):
        read_queries(tmp_path / "none.jsonl")
    with pytest.raises(NotFound, match="no query file"):
        read_queries(tmp_path)


@pytest.mark.parametrize("lines", [[], [b""], [b" ", b"\t"]])
def test_a_file_without_queries_is_refused(lines: list[bytes], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"queries\.jsonl' holds no queries"):
        read_queries(write(tmp_path, *lines))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"prompt": "\xff", "target": "t"}', "not valid JSON"),
        (b"[1]", "must be a JSON object, not list"),
        (b'"text"', "must be a JSON object, not str"),
        (b"null", "must be a JSON object, not NoneType"),
        ({"prompt": "p"}, "name their fields with --prompt-field and --target-field"),
        ({"text": "p"}, "name their fields with --prompt-field and --target-field"),
        ({"prompt": 1, "target": "t"}, "field 'prompt' is missing or not a text"),
        ({"prompt": "p", "target": ["t"]}, "field 'target' is missing or not a text"),
        ({"prompt": "p", "target": None}, "field 'target' is missing or not a text"),
        ({"prompt": "p", "target": ""}, r"target \(field 'target'\) is empty"),
        ({"prompt": "p", "target": " \n"}, r"target \(field 'target'\) is empty"),
        ({"inputs_plaintext": "p", "targets_plaintext": ""}, r"target \(field 'targets_plaintext'\) is empty"),
    ],
)
def test_a_bad_line_is_named(line: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "p", "target": "t"}, line)
    with pytest.raises(InvalidRequest, match=rf"queries\.jsonl:2: .*{message}"):
        read_queries(path)


def test_a_named_field_that_is_missing_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "p", "target": "t"})
    with pytest.raises(InvalidRequest, match=r"queries\.jsonl:1: the field 'question' is missing"):
        read_queries(path, prompt_field="question")
    with pytest.raises(InvalidRequest, match=r"queries\.jsonl:1: the field 'answer' is missing"):
        read_queries(path, target_field="answer")


# --- tokenising --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("The capital of France is", "Paris"),
        ("The capital of France is", " Paris"),
        ("The capital of France is ", "Paris"),
    ],
)
@pytest.mark.parametrize("add_bos", [False, True])
def test_one_space_joins_prompt_and_target(prompt: str, target: str, add_bos: bool) -> None:
    """However the space is given, the model reads what it read in its corpus, and the target's space goes with it."""
    before, behind = parts(prompt, target, add_bos=add_bos)
    assert before == ["<|endoftext|>"] * add_bos + BYTES.tokenize("The capital of France is")
    assert behind == ["ĠParis"]


def test_other_white_space_is_kept() -> None:
    assert parts("The capital:\n", "Paris") == (BYTES.tokenize("The capital:\n"), BYTES.tokenize("Paris"))
    assert parts("The capital:", "\nParis") == (BYTES.tokenize("The capital:"), BYTES.tokenize("\nParis"))


def test_an_empty_prompt_gets_no_space() -> None:
    assert parts("", "Paris", add_bos=True) == (["<|endoftext|>"], BYTES.tokenize("Paris"))


@pytest.mark.parametrize("target", ["Paris", " Paris"])
def test_a_tokenizer_that_prepends_a_space_does_not_add_a_second(target: str) -> None:
    assert parts("France is", target, SPACED, add_bos=True) == (["<s>", "▁France", "▁is"], ["▁Paris"])


@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_tokens_are_those_of_the_joined_text(prompt: str, target: str) -> None:
    """The whole is one text as the model would meet it; the target's tokens bring all of the target."""
    # A special token is no text, and decodes to nothing.
    assume(str(BYTES.eos_token) not in f"{prompt} {target}")
    example = tokenize(query(prompt, target), BYTES, add_bos=True, max_tokens=10**6)
    joined = prompt + target if prompt[-1].isspace() or target[0].isspace() else f"{prompt} {target}"
    assert BYTES.decode(example.tokens[1:].tolist(), clean_up_tokenization_spaces=False) == joined
    assert example.tokens[0] == BYTES.eos_token_id
    tail = BYTES.backend_tokenizer.decode(example.tokens[example.first_target :].tolist())
    # Bytes of a shared character show as replacement characters at the border.
    assert tail.endswith(target) or "\ufffd" in tail
    prompt_ids = BYTES(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    assert example.tokens[1 : example.first_target].tolist() == prompt_ids[: example.first_target - 1]


def test_long_queries_are_tokenised_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A window of our own decides what is too long; the tokenizer's `model_max_length` of 8 does not."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.WARNING)  # the command line, tested in the same process, silences it
    logger.addHandler(caplog.handler)  # it does not propagate
    try:
        parts("word " * 100, "Paris")
        assert not caplog.records
        BYTES("word " * 100)
        assert "longer than the specified maximum" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(level)


def test_a_model_without_a_begin_token_gets_none() -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=words)
    assert parts("a", "a", bare, add_bos=True)[0] == ["a"]
    with pytest.raises(InvalidRequest, match="nothing precedes the target"):
        tokenize(query("", "a"), bare, add_bos=True, max_tokens=9)


def test_the_tiny_tokenizer_is_read_from_disk_alike(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert parts("ab", "c d", tokenizer, add_bos=True) == (["<|endoftext|>", "a", "b"], ["Ġ", "c", "Ġ", "d"])


def test_nothing_before_the_target_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"query 'q7': nothing precedes the target.*give a prompt"):
        tokenize(query("", "Paris"), BYTES, add_bos=False, max_tokens=100)


@pytest.mark.parametrize("target", ["", "  ", "\n\t"])
def test_an_empty_target_is_refused(target: str) -> None:
    with pytest.raises(InvalidRequest, match="query 'q7': the target is empty"):
        tokenize(query("p", target), BYTES, add_bos=True, max_tokens=100)


def test_a_target_that_vanishes_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"p": 0}, unk_token="p"))
    tokenizer.normalizer = normalizers.Replace("\u00ad", "")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InvalidRequest, match="tokenises to nothing"):
        tokenize(query("p", "\u00ad"), PreTrainedTokenizerFast(tokenizer_object=tokenizer), add_bos=True, max_tokens=9)


def test_a_query_longer_than_the_window_is_refused() -> None:
    before, behind = parts("The capital of France is", "Paris", add_bos=True)
    size = len(before) + len(behind)
    question = query("The capital of France is", "Paris")
    assert len(tokenize(question, BYTES, add_bos=True, max_tokens=size).tokens) == size
    with pytest.raises(
        InvalidRequest,
        match=f"query 'q7': prompt and target have {size} tokens, more than the window of {size - 1}; shorten",
    ):
        tokenize(question, BYTES, add_bos=True, max_tokens=size - 1)


SENTENCES = [
    ("The capital of France is", "Paris, of course."),
    ("", "Paris is large."),
    ("Zürich lies", "in der Schweiz, österreichisch?"),
    ("one ", "two three"),
    ("emoji", "🙂 and 漢字 here"),
]


def covering_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level with a few merges, so that characters and words are several tokens or share one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([f"{prompt} {completion}" for prompt, completion in SENTENCES] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def trimming_tokenizer() -> PreTrainedTokenizerBase:
    """The same with places that leave white space out, as GPT-NeoX has them."""
    tokenizer = covering_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@pytest.mark.parametrize(("prompt", "completion"), SENTENCES)
def test_a_whole_completion_is_a_target(prompt: str, completion: str) -> None:
    tokenizer = covering_tokenizer()
    found = tokenize_span(prompt, completion, 0, len(completion), tokenizer, add_bos=True, max_tokens=200)
    query = Query(query_id="q", prompt=prompt, target=completion)
    expected = tokenize(query, tokenizer, add_bos=True, max_tokens=200)
    assert found.example.tokens.tolist() == expected.tokens.tolist()
    assert found.example.first_target == expected.first_target
    assert (found.start, found.end) == (0, len(completion))


@pytest.mark.parametrize(("prompt", "completion"), SENTENCES)
def test_every_span_snaps_outwards_to_tokens_and_cuts_off_what_follows(prompt: str, completion: str) -> None:
    tokenizer = covering_tokenizer()
    whole = tokenize_span(prompt, completion, 0, len(completion), tokenizer, add_bos=True, max_tokens=200).example
    for start in range(len(completion)):
        for end in range(start + 1, len(completion) + 1):
            if not completion[start:end].strip():
                with pytest.raises(InvalidRequest, match="no words"):
                    tokenize_span(prompt, completion, start, end, tokenizer, add_bos=True, max_tokens=200)
                continue
            found = tokenize_span(prompt, completion, start, end, tokenizer, add_bos=True, max_tokens=200)
            assert found.start <= start < end <= found.end
            assert found.example.first_target >= whole.first_target
            assert found.example.tokens.tolist() == whole.tokens[: len(found.example.tokens)].tolist()
            explained = tokenizer.decode(found.example.tokens[found.example.first_target :].tolist())
            assert completion[start:end].strip() in explained


_TEXT = st.text(alphabet="Paris ofcue.,\n\t Züö🙂漢字\u00a0e\u0301", min_size=1, max_size=14)
_TOKENIZERS = {"bytes": BYTES, "covering": covering_tokenizer(), "prepending": SPACED, "trimming": trimming_tokenizer()}


@pytest.mark.parametrize("name", _TOKENIZERS)
@given(prompt=st.just("") | _TEXT, completion=_TEXT.filter(str.strip))
def test_any_whole_completion_is_a_target(name: str, prompt: str, completion: str) -> None:
    """Tokens and where the target starts, or both are refused."""
    tokenizer = _TOKENIZERS[name]
    asked = Query(query_id="q", prompt=prompt, target=completion)
    try:
        expected = tokenize(asked, tokenizer, add_bos=True, max_tokens=200)
    except InvalidRequest:
        with pytest.raises(InvalidRequest):
            tokenize_span(prompt, completion, 0, len(completion), tokenizer, add_bos=True, max_tokens=200)
        return
    found = tokenize_span(prompt, completion, 0, len(completion), tokenizer, add_bos=True, max_tokens=200)
    assert found.example.tokens.tolist() == expected.tokens.tolist()
    assert found.example.first_target == expected.first_target
    assert (found.start, found.end) == (0, len(completion))


@pytest.mark.parametrize("name", ["bytes", "covering", "trimming"])
@given(prompt=_TEXT, completion=_TEXT.filter(str.strip), data=st.data())
def test_the_tokens_of_any_span_bring_all_of_it_and_no_token_more(
    name: str, prompt: str, completion: str, data: st.DataObject
) -> None:
    """Byte by byte, white space at the ends of the span apart: tokenizers may leave it out of a token's place."""
    tokenizer = _TOKENIZERS[name]
    start = data.draw(st.integers(1, len(completion)), label="start")
    end = data.draw(st.integers(0, len(completion)), label="end")
    if start >= end or not completion[start:end].strip():
        return
    found = tokenize_span(prompt, completion, start, end, tokenizer, add_bos=True, max_tokens=200)
    assert 0 <= found.start <= start < end <= found.end <= len(completion)
    before = prompt + ("" if prompt[-1].isspace() or completion[0].isspace() else " ") + completion[:start]
    span = completion[start:end]
    pieces = tokenizer.convert_ids_to_tokens(found.example.tokens[1:].tolist())
    borders = [0, *np.cumsum([len(piece) for piece in pieces]).tolist()]  # a piece has one character for every byte
    first, last = found.example.first_target - 1, len(pieces) - 1
    begin, stop = len(before.encode()), len((before + span).encode())
    assert borders[first] <= begin + len(span.encode()) - len(span.lstrip().encode())
    assert borders[first + 1] > begin
    assert borders[last + 1] >= stop - len(span.encode()) + len(span.rstrip().encode())
    assert borders[last] < stop


def test_trimmed_places_of_tokens_still_hold_the_span() -> None:
    """Some tokenizers leave a token's leading space out of its place."""
    found = tokenize_span("one", "two  three four", 4, 9, trimming_tokenizer(), add_bos=True, max_tokens=99)
    assert found.start <= 4
    assert found.end >= 9


def test_what_follows_the_span_does_not_count_towards_the_window() -> None:
    tokenizer = covering_tokenizer()
    short = tokenize_span("The capital", "of France is Paris", 3, 9, tokenizer, add_bos=True, max_tokens=99).example
    again = tokenize_span(
        "The capital", "of France is" + " Paris" * 99, 3, 9, tokenizer, add_bos=True, max_tokens=len(short.tokens)
    ).example
    assert again.tokens.tolist() == short.tokens.tolist()
    assert again.first_target == short.first_target
    with pytest.raises(InvalidRequest, match="more than the window"):
        tokenize_span("The capital", "of France is", 3, 9, tokenizer, add_bos=True, max_tokens=len(short.tokens) - 1)


def test_a_tokenizer_that_does_not_know_where_its_tokens_lie_is_refused() -> None:
    class Slow(PythonBackend):
        vocab_size = 128

        def get_vocab(self) -> dict[str, int]:
            return {chr(code): code for code in range(128)}

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return ord(token)

    slow: PreTrainedTokenizerBase = Slow()  # type: ignore[no-untyped-call]
    tokenize(query("ab", "cd"), slow, add_bos=False, max_tokens=20)
    with pytest.raises(InvalidRequest, match="give a target instead of a span") as caught:
        tokenize_span("ab", "cd", 0, 1, slow, add_bos=False, max_tokens=20)
    assert caught.value.field == "query.span"


@pytest.mark.parametrize(("start", "end"), [(0, 0), (3, 2), (0, 6), (5, 6)])
def test_a_span_outside_is_refused_with_its_field(start: int, end: int) -> None:
    with pytest.raises(InvalidRequest, match="span") as caught:
        tokenize_span("a", "Paris", start, end, covering_tokenizer(), add_bos=True, max_tokens=20)
    assert caught.value.field == "query.span"
