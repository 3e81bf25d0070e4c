"""`trackstar.v1.GenerationService` on grpc.aio: what can be asked, and switching to it.

Contract: as `trace_service`. A caller learns of no generation that it may not ask.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import Any

import grpc

from services.gateway import pages, validate
from services.gateway.generations import Generations
from services.gateway.request import current
from services.timing import within
from trackstar.catalog import GenerationFacts
from trackstar.errors import NotFound, PermissionDenied
from trackstar.v1 import generation_pb2, generation_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

_STATES = {
    "building": generation_pb2.GENERATION_STATE_BUILDING,
    "ready": generation_pb2.GENERATION_STATE_READY,
    "active": generation_pb2.GENERATION_STATE_ACTIVE,
    "retired": generation_pb2.GENERATION_STATE_RETIRED,
}
_LIST = hashlib.sha256(b"generations").digest()[:16]


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """See the protos."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    async def List(self, request: generation_pb2.ListRequest, context: Context) -> generation_pb2.ListResponse:
        """Those that the caller may ask, by name; a page starts behind the last name of the one before."""
        asked = validate.list_generations(request)
        call = current()
        behind = pages.decode(asked.page_token, generation="", digest=_LIST).generation if asked.page_token else ""
        async with within(call.seconds_left(), "reading the catalog"):
            names = [name for name in await self._generations.names() if name > behind and call.principal.may_ask(name)]
            page = names[: asked.page_size]
            response = generation_pb2.ListResponse()
            for name in page:
                # One that is collected at this moment.
                with suppress(NotFound):
                    response.generations.append(to_message(await self._generations.describe(name)))
        if len(names) > len(page):
            response.next_page_token = pages.PageToken(generation=page[-1], digest=_LIST, offset=0).encode()
        return response

    async def Get(self, request: generation_pb2.GetRequest, context: Context) -> generation_pb2.GetResponse:
        """One generation."""
        name = validate.get_generation(request)
        call = current()
        if name:
            call.check_generation(name)
        async with within(call.seconds_left(), "reading the catalog"):
            facts = await self._generations.describe(name)
        call.check_generation(facts.name)
        return generation_pb2.GetResponse(generation=to_message(facts))

    async def Activate(
        self, request: generation_pb2.ActivateRequest, context: Context
    ) -> generation_pb2.ActivateResponse:
        """Switch, for callers that may."""
        name = validate.activate(request)
        call = current()
        if not call.principal.may_activate:
            raise PermissionDenied(f"{call.principal.name!r} may not activate generations")
        call.check_generation(name)
        async with within(call.seconds_left(), "activating the generation"):
            facts, previous = await self._generations.activate(name)
        return generation_pb2.ActivateResponse(generation=to_message(facts), previous=previous)


def to_message(facts: GenerationFacts) -> generation_pb2.Generation:
    """Facts as a message."""
    return generation_pb2.Generation(
        name=facts.name,
        state=_STATES[facts.state],
        checkpoint_digest=facts.checkpoint_digest,
        config_digest=facts.config_digest,
        num_passages=facts.num_passages,
        dim=facts.dim,
        mix=facts.mix,
        mix_weight=facts.weight,
        damping=facts.damping,
        code_kind=facts.spec.kind if facts.spec else "",
        code_size=facts.spec.size if facts.spec else 0,
    )
