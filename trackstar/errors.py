"""The one exception tree of the project.

Every error that a user can cause or repair is a `TrackstarError` whose message is one clear sentence: it names the
thing and says what to do. Anything else that escapes is a defect. Services map these classes to gRPC status codes in a
single table; the command line prints the message and exits with `exit_code`.
"""

from __future__ import annotations


class TrackstarError(Exception):
    """Base of all errors the project raises on purpose; `exit_code` is what the command line exits with."""

    exit_code = 1


class InvalidRequest(TrackstarError):
    """The caller asked for something that cannot be done as asked: a bad record, an empty target, an unknown key.

    `field` is the dotted name of the request's field that is at fault, where a service knows it.
    """

    exit_code = 2

    def __init__(self, message: str = "", *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotFound(TrackstarError):
    """A named file, folder, passage or generation does not exist.

    `kind` and `name` say which, such as `generation` and `g1`, where a service knows them.
    """

    exit_code = 3

    def __init__(self, message: str = "", *, kind: str | None = None, name: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.name = name


class NotReady(TrackstarError):
    """The thing exists but is not finished yet, such as an index whose rows are still being built.

    `retry_after_seconds`: when another try has a chance, where that is known.
    """

    exit_code = 4

    def __init__(self, message: str = "", *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Overloaded(TrackstarError):
    """There is no capacity for the request now; the same request can succeed later.

    `retry_after_seconds`: when another try has a chance, where that is known.
    """

    exit_code = 5

    def __init__(self, message: str = "", *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class CorruptArtifact(TrackstarError):
    """An artifact on disk does not hold what its receipt says: truncated, altered or unreadable."""

    exit_code = 6


class Incompatible(TrackstarError):
    """Two artifacts do not belong together: rows of another checkpoint, moments of another model."""

    exit_code = 7


class UnsupportedModel(TrackstarError):
    """The model holds a weight that should contribute gradients and cannot."""

    exit_code = 8


class StorageFull(TrackstarError):
    """The disk is full; what was committed before stays valid."""

    exit_code = 9


class DeadlineExceeded(TrackstarError):
    """The time the caller gave was not enough; the same request with more time can succeed."""

    exit_code = 10


class Unauthenticated(TrackstarError):
    """The caller did not say who it is, or not in a way that is accepted."""

    exit_code = 11


class PermissionDenied(TrackstarError):
    """The caller is known and may not do this."""

    exit_code = 12
