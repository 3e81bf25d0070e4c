"""What every part of the gateway may know about the call it works for: its id, its caller and its deadline.

Interceptors fill a `RequestContext` in once; servicers read it with `current()`. The clock is monotonic.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase

from trackstar.errors import DeadlineExceeded, PermissionDenied

# Shares of the remaining time that a stage may use: what follows must still have a chance.
_SHARES = {"encode": 0.5, "search": 0.5, "rerank": 0.7, "evidence": 0.9, "verify": 0.95, "passages": 0.95}


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who asks. `generations`: shell patterns of the generations it may ask; `may_activate`: may switch them;
    `may_reindex`: may start, see and end jobs."""

    name: str
    generations: tuple[str, ...] = ("*",)
    may_activate: bool = False
    may_reindex: bool = False

    def may_ask(self, generation: str) -> bool:
        """Whether it may ask this generation, given by its concrete name."""
        return any(fnmatchcase(generation, pattern) for pattern in self.generations)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestContext:
    """One call. `deadline` is a time of `time.monotonic`."""

    request_id: str
    principal: Principal
    deadline: float

    def seconds_left(self) -> float:
        """Until the deadline.

        Raises:
            DeadlineExceeded: none are left.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the deadline has passed; give the call more time")
        return left

    def stage_seconds(self, stage: str) -> float:
        """What the stage may take of what is left."""
        return self.seconds_left() * _SHARES[stage]

    def check_generation(self, generation: str) -> None:
        """Refuse a generation that the caller may not ask.

        Raises:
            PermissionDenied: it may not.
        """
        if not self.principal.may_ask(generation):
            raise PermissionDenied(f"{self.principal.name!r} may not ask generation {generation!r}")


_CURRENT: ContextVar[RequestContext] = ContextVar("request")


def current() -> RequestContext:
    """The call that is being worked for."""
    return _CURRENT.get()


def enter(context: RequestContext) -> None:
    """Make `context` the current one for this task and those it starts."""
    _CURRENT.set(context)
