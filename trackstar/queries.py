"""Queries: a prompt and the target whose causes are sought, from a command line or a JSONL file.

Accepted field names for prompt and target, the first pair that is present: `prompt`/`target`,
`inputs_plaintext`/`targets_plaintext` (the release's records), `prompt0`/`entity1` (the release's facts). The query's
id is `query_id`, `example_id`, `fact_id` or the line number. All fields are kept, so that answers can repeat them.

Reading needs neither torch nor transformers; `tokenize` needs both.
"""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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


def tokenize(query: Query, tokenizer: PreTrainedTokenizerBase, *, add_bos: bool, max_tokens: int) -> Example:
    """Tokens of prompt and target, with the loss on the target only.

    A space joins the two unless one of them brings white space. They are tokenised together, as the model met them in
    its corpus, and the target starts at the first token that the prompt alone does not have. A BOS token leads where
    passages have one.

    Raises:
        InvalidRequest: the target is empty or tokenises to nothing, has nothing before it to be predicted from, or both
            together exceed the model's window.
    """
    from trackstar.encode import Example

    if not query.target.strip():
        raise InvalidRequest(f"query {query.query_id!r}: the target is empty; say which words are to be explained")
    joined = query.prompt == "" or query.prompt[-1].isspace() or query.target[0].isspace()
    text = query.prompt + ("" if joined else " ") + query.target
    prompt_ids, ids = (
        tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in (query.prompt, text)
    )
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, ids, strict=False)))
    bos = begin_token(tokenizer) if add_bos else None
    prefix = ([] if bos is None else [bos]) + list(ids[:shared])
    target_ids = list(ids[shared:])
    if not target_ids:
        raise InvalidRequest(f"query {query.query_id!r}: the target {query.target!r} tokenises to nothing")
    if not prefix:
        raise InvalidRequest(
            f"query {query.query_id!r}: nothing precedes the target, so it cannot be predicted; give a prompt"
        )
    num_tokens = len(prefix) + len(target_ids)
    if num_tokens > max_tokens:
        raise InvalidRequest(
            f"query {query.query_id!r}: prompt and target have {num_tokens} tokens, more than the window of "
            f"{max_tokens}; shorten it"
        )
    return Example(tokens=np.array(prefix + target_ids, dtype=np.int32), first_target=len(prefix))
