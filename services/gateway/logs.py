"""Log lines as JSON objects, one a line, on standard error.

Contract: every line has `time` (UTC), `level`, `logger` and `message`, the request's id where one is worked for, and
whatever stands in the record's `fields`. Values are never a caller's prompt, a token or a secret: whoever logs sees to
it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from services.gateway.request import current


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """See the module."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        with contextlib.suppress(LookupError):
            line["request_id"] = current().request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str, stream: TextIO | None = None) -> None:
    """Make the process log this way; what was configured before is dropped.

    Args:
        level: debug, info, warning or error.
        stream: where lines go; standard error for None.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
