"""Limits in time, as the project's own error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from trackstar.errors import DeadlineExceeded


@asynccontextmanager
async def within(seconds: float, what: str) -> AsyncIterator[None]:
    """Cancel what runs inside after `seconds`.

    Raises:
        DeadlineExceeded: naming `what` took too long.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded(f"{what} takes longer than the {seconds:.2g} s it was given; allow more time") from error
