"""Calls between deployments: the time that is left, other replicas for those that were lost, and errors of our own.

Everything a replica of ours does only reads, so a call whose replica died under it is simply given to another, as long
as its time lasts; Serve replaces the lost one meanwhile.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from services.timing import within
from trackstar.errors import DeadlineExceeded, NotReady, Overloaded, TrackstarError

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 1.0


async def call(method: Any, *arguments: Any, timeout_seconds: float, what: str) -> Any:
    """The answer of a deployment's method, which gets the seconds that are left as its last argument.

    Args:
        method: a method of a `DeploymentHandle`.
        arguments: its arguments.
        timeout_seconds: what is left.
        what: names the work in errors.

    Raises:
        NotReady: no replica answered in time.
        Overloaded: too many calls wait for one.
        TrackstarError: what the method raised.
    """
    until = time.monotonic() + timeout_seconds
    pause = _FIRST_PAUSE_SECONDS
    lost: Exception | None = None
    while (left := until - time.monotonic()) > 0:
        try:
            async with within(left, what):
                return await method.remote(*arguments, left)
        except RayTaskError as error:
            # Ray's copy of the error carries the replica's traceback as its message.
            if not isinstance(error.cause, TrackstarError):
                raise
            if not isinstance(error.cause, NotReady):
                raise error.cause from None
            lost = error.cause
        except BackPressureError as error:
            raise Overloaded(f"too many calls wait for {what}; try again later") from error
        except (RayActorError, DeploymentUnavailableError, NotReady) as error:
            lost = error
        except DeadlineExceeded:
            if lost is None:
                raise
            break
        await asyncio.sleep(min(pause * random.uniform(0.5, 1.5), max(0.0, until - time.monotonic())))
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    raise NotReady(f"no replica was there for {what} within {timeout_seconds:.2g} s; try again") from lost
