"""Page tokens, and the rankings that later pages are cut from.

A token names the generation, the request and where the next page starts; it is bound to both and carries no authority,
so it is not secret: whoever comes with it is checked like anyone else. A ranking that was forgotten is computed again,
with the same result, because a generation never changes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

from trackstar.errors import InvalidRequest

_VERSION = 1
_HEAD = struct.Struct("<B16sq")
_CHECK_BYTES = 8

Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True, kw_only=True)
class PageToken:
    """Where a page starts: `offset` into the answer that `generation` gives to the request of `digest` (16 bytes)."""

    generation: str
    digest: bytes
    offset: int

    def encode(self) -> str:
        """The token as text."""
        body = _HEAD.pack(_VERSION, self.digest, self.offset) + self.generation.encode()
        return base64.urlsafe_b64encode(body + _check(body)).decode().rstrip("=")


def decode(text: str, *, generation: str, digest: bytes) -> PageToken:
    """Read a token back.

    Args:
        text: the token.
        generation: the generation that the request names; "" if it names none.
        digest: of the request it comes with.

    Raises:
        InvalidRequest: it is garbled, or was given for another request or generation.
    """
    token = _parse(text)
    if token is None:
        raise InvalidRequest("page_token: this is no token that an answer gave", field="page_token")
    if token.digest != digest or generation not in ("", token.generation):
        raise InvalidRequest(
            "page_token: it belongs to another request; repeat everything else as it was", field="page_token"
        )
    return token


def _parse(text: str) -> PageToken | None:
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
        body, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
        if len(body) < _HEAD.size or _check(body) != check:
            return None
        version, digest, offset = _HEAD.unpack_from(body)
        generation = body[_HEAD.size :].decode()
    except (binascii.Error, ValueError):
        return None
    return (
        PageToken(generation=generation, digest=digest, offset=offset) if version == _VERSION and offset >= 0 else None
    )


def _check(body: bytes) -> bytes:
    """Tells a token of ours from a garbled one."""
    return hashlib.sha256(b"trackstar.page" + body).digest()[:_CHECK_BYTES]


class RecentRankings(Generic[Kept]):
    """The last few rankings by generation and request.

    Args:
        limit: how many are kept.
    """

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._kept: OrderedDict[tuple[str, bytes], Kept] = OrderedDict()

    def get(self, generation: str, digest: bytes) -> Kept | None:
        """What was put, unless it has been forgotten."""
        found = self._kept.get((generation, digest))
        if found is not None:
            self._kept.move_to_end((generation, digest))
        return found

    def put(self, generation: str, digest: bytes, ranking: Kept) -> None:
        """Keep a ranking, and forget the one that was used least recently."""
        self._kept[generation, digest] = ranking
        self._kept.move_to_end((generation, digest))
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
