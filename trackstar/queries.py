"""Queries: a prompt and the target whose causes are sought, from a command line or a JSONL file.

Accepted field names for prompt and target, the first pair that is present: `prompt`/`target`,
`inputs_plaintext`/`targets_plaintext` (the release's records), `prompt0`/`entity1` (the release's facts). The query's
id is `query_id`, `example_id`, `fact_id` or the line number. All fields are kept, so that answers can repeat them.

Reading needs neither torch nor transformers; `tokenize` needs both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trackstar.errors import InvalidRequest, NotFound
from trackstar.passages import begin_token
from trackstar.results import Query

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trackstar.encode import Example

_FIELDS = (("prompt", "target"), ("inputs_plaintext", "targets_plaintext"), ("prompt0", "entity1"))
_IDS = ("query_id", "example_id", "fact_id")


def read_queries(
    path: str | Path, *, prompt_field: str | None = None, target_field: str | None = None, limit: int | None = None
) -> list[Query]:
    """Queries of a JSONL file.

    Args:
        path: the file.
        prompt_field: field of the prompt; found by itself if None.
        target_field: field of the target; found by itself if None.
        limit: read this many at most.

    Raises:
        NotFound: no such file.
        InvalidRequest: no query in it, or a bad line; the message names file and line.
    """
    file = Path(path)
    if not file.is_file():
        raise NotFound(f"there is no query file {str(path)!r}")
    queries: list[Query] = []
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            if limit is not None and len(queries) == limit:
                break
            queries.append(_parse(line, f"{file}:{number}", number, prompt_field, target_field))
    if not queries:
        raise InvalidRequest(f"{str(path)!r} holds no queries")
    return queries


def _parse(line: bytes, place: str, number: int, prompt_field: str | None, target_field: str | None) -> Query:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{place}: not valid JSON") from error
    if not isinstance(record, dict):
        raise InvalidRequest(f"{place}: a query must be a JSON object, not {type(record).__name__}")
    pairs = [(prompt, target) for prompt, target in _FIELDS if prompt in record and target in record]
    if prompt_field is None and target_field is None and not pairs:
        raise InvalidRequest(f"{place}: no prompt and target; name their fields with --prompt-field and --target-field")
    prompt_name = prompt_field or (pairs[0][0] if pairs else "prompt")
    target_name = target_field or (pairs[0][1] if pairs else "target")
    for name in (prompt_name, target_name):
        if not isinstance(record.get(name), str):
            raise InvalidRequest(f"{place}: the field {name!r} is missing or not a text")
    if not record[target_name].strip():
        raise InvalidRequest(f"{place}: the target (field {target_name!r}) is empty")
    query_id = next((str(record[name]) for name in _IDS if name in record), str(number))
    return Query(query_id=query_id, prompt=record[prompt_name], target=record[target_name], fields=record)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpanExample:
    """A span of a completion as the model reads it, and where it lies once it is snapped to whole tokens.

    `start` and `end` count Unicode code points of the completion; `end` is exclusive.
    """

    example: Example
    start: int
    end: int


def tokenize(query: Query, tokenizer: PreTrainedTokenizerBase, *, add_bos: bool, max_tokens: int) -> Example:
    """Tokens of prompt and target, with the loss on the target only.

    A space joins the two unless one of them brings white space. They are tokenised together, as the model met them in
    its corpus, and the target starts at the first token that the prompt alone does not have. A BOS token leads where
    passages have one.

    Raises:
        InvalidRequest: the target is empty or tokenises to nothing, has nothing before it to be predicted from, or both
            together exceed the model's window.
    """
    if not query.target.strip():
        raise InvalidRequest(f"query {query.query_id!r}: the target is empty; say which words are to be explained")
    text = query.prompt + _joint(query.prompt, query.target) + query.target
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = _num_shared(query.prompt, ids, tokenizer)
    if first == len(ids):
        raise InvalidRequest(f"query {query.query_id!r}: the target {query.target!r} tokenises to nothing")
    return _example(ids, first, query.query_id, tokenizer, add_bos=add_bos, max_tokens=max_tokens)


def tokenize_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerBase, *, add_bos: bool, max_tokens: int
) -> NDArray[np.int32]:
    """Tokens int32 [T] that the model is given to continue: those of a prompt before any target.

    Raises:
        InvalidRequest: as `tokenize`.
    """
    any_target = Query(query_id="completion", prompt=prompt, target="?")
    example = tokenize(any_target, tokenizer, add_bos=add_bos, max_tokens=max_tokens)
    return example.tokens[: example.first_target]


def tokenize_span(
    prompt: str,
    completion: str,
    start: int,
    end: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_bos: bool,
    max_tokens: int,
    query_id: str = "query",
) -> SpanExample:
    """Tokens of prompt and completion up to the end of a span, with the loss on the tokens that overlap the span.

    Prompt and completion are joined and tokenised as by `tokenize`. A span from the very beginning starts where the
    target does there, so the whole completion gives the same example. What follows the span is cut off: a causal
    model's loss on the span does not depend on it.

    Args:
        prompt: what the model was given.
        completion: what it said.
        start: where the span starts in the completion, in code points.
        end: where it ends, exclusive.
        tokenizer: a fast one, which knows where its tokens lie.
        add_bos: whether a BOS token leads.
        max_tokens: the model's window.
        query_id: names the query in errors.

    Raises:
        InvalidRequest: the span is empty, blank or not within the completion, or as `tokenize`.
    """
    if not 0 <= start < end <= len(completion):
        raise InvalidRequest(
            f"query {query_id!r}: the span {start} to {end} is not within the {len(completion)} characters",
            field="query.span",
        )
    if not completion[start:end].strip():
        raise InvalidRequest(f"query {query_id!r}: the span holds no words", field="query.span")
    if not tokenizer.is_fast:
        raise InvalidRequest(
            f"query {query_id!r}: this tokenizer does not tell where its tokens lie; give a target instead of a span",
            field="query.span",
        )
    joint = _joint(prompt, completion)
    base = len(prompt) + len(joint)
    encoding = tokenizer(
        prompt + joint + completion, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    chosen = [token for token, (first, last) in enumerate(offsets) if first < base + end and last > base + start]
    first = chosen[0] if start and chosen else _num_shared(prompt, ids, tokenizer)
    last = len(ids) - 1 if end == len(completion) else max(chosen, default=-1)
    if last < first or (start and not chosen):
        raise InvalidRequest(f"query {query_id!r}: the span tokenises to nothing", field="query.span")
    # Some tokenizers leave white space out of a token's place; the span as given is within what is explained anyway.
    return SpanExample(
        example=_example(ids[: last + 1], first, query_id, tokenizer, add_bos=add_bos, max_tokens=max_tokens),
        start=max(0, min(start, offsets[first][0] - base)),
        end=max(end, *(place[1] - base for place in offsets[first : last + 1])),
    )


def _num_shared(prompt: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Leading tokens of `ids` that the prompt alone has too."""
    prompt_ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, ids, strict=False)))


def _joint(prompt: str, continuation: str) -> str:
    """What stands between the two: a space unless one of them brings white space."""
    return "" if prompt == "" or prompt[-1].isspace() or continuation[0].isspace() else " "


def _example(
    ids: Sequence[int],
    first_target: int,
    query_id: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_bos: bool,
    max_tokens: int,
) -> Example:
    from trackstar.encode import Example

    bos = begin_token(tokenizer) if add_bos else None
    head = [] if bos is None else [bos]
    if not head and not first_target:
        raise InvalidRequest(
            f"query {query_id!r}: nothing precedes the target, so it cannot be predicted; give a prompt"
        )
    num_tokens = len(head) + len(ids)
    if num_tokens > max_tokens:
        raise InvalidRequest(
            f"query {query_id!r}: prompt and target have {num_tokens} tokens, more than the window of "
            f"{max_tokens}; shorten it"
        )
    return Example(tokens=np.array([*head, *ids], dtype=np.int32), first_target=len(head) + first_target)
