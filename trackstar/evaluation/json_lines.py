"""Records of JSON lines, and fields that must be in them; what is wrong is told with file, line and field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trackstar.errors import InvalidRequest, NotFound


def json_lines(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of every line that is not blank.

    Args:
        path: the file.
        what: one record is, for errors.

    Raises:
        NotFound: no such file.
        InvalidRequest: a line that is no JSON object.
    """
    if not path.is_file():
        raise NotFound(f"there is no file {str(path)!r}")
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise InvalidRequest(f"{place}: not valid JSON") from error
            if not isinstance(record, dict):
                raise InvalidRequest(f"{place}: {what} must be a JSON object, not {type(record).__name__}")
            yield place, record


def text_field(record: Mapping[str, Any], place: str, name: str) -> str:
    """A field that must hold a text which is not blank.

    Raises:
        InvalidRequest: it does not.
    """
    found = record.get(name)
    if not isinstance(found, str) or not found.strip():
        raise InvalidRequest(f"{place}: the field {name!r} is missing, empty or not a text")
    return found


def texts_field(record: Mapping[str, Any], place: str, name: str) -> list[str]:
    """A field that must hold a list of texts.

    Raises:
        InvalidRequest: it does not.
    """
    found = record.get(name)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise InvalidRequest(f"{place}: the field {name!r} is missing or not a list of texts")
    return found


def choice_field(record: Mapping[str, Any], place: str, name: str, choices: range) -> int:
    """A field that must hold one of some whole numbers, as a number or a text.

    Raises:
        InvalidRequest: it does not.
    """
    found = record.get(name)
    number = int(found) if isinstance(found, str) and found.strip().isdecimal() else found
    if not isinstance(number, int) or isinstance(number, bool) or number not in choices:
        raise InvalidRequest(f"{place}: the field {name!r} is missing or none of {', '.join(map(str, choices))}")
    return number
