"""How both clients make a call: their channels, and tries until one succeeds or the time is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar, Unpack

import grpc

from trackstar.client_connection import OPTIONS, Connection, ConnectionOptions

Response = TypeVar("Response")


class BlockingCalls(Connection):
    """Calls that block; may be made from several threads. See `Connection`."""

    def __init__(self, address: str, **options: Unpack[ConnectionOptions]) -> None:
        super().__init__(address, **options)
        self._channel = (
            grpc.insecure_channel(address, options=OPTIONS)
            if self._credentials is None
            else grpc.secure_channel(address, self._credentials, options=OPTIONS)
        )

    def close(self) -> None:
        """Close the connection; calls that run fail."""
        self._channel.close()

    def _call(self, method: Callable[..., Response], request: object, timeout_seconds: float | None) -> Response:
        attempts = self._attempts(timeout_seconds)
        while True:
            try:
                return method(request, timeout=attempts.seconds_left(), metadata=self._metadata)
            except grpc.RpcError as error:
                time.sleep(attempts.pause_after(error))


class AsyncCalls(Connection):
    """Calls for asyncio, made in one event loop. See `Connection`."""

    def __init__(self, address: str, **options: Unpack[ConnectionOptions]) -> None:
        super().__init__(address, **options)
        self._opened: grpc.aio.Channel | None = None

    async def close(self) -> None:
        """Close the connection; calls that run fail."""
        if self._opened is not None:
            await self._opened.close()

    @property
    def _channel(self) -> grpc.aio.Channel:
        # Made at first use, because it belongs to the event loop that runs then.
        if self._opened is None:
            self._opened = (
                grpc.aio.insecure_channel(self.address, options=OPTIONS)
                if self._credentials is None
                else grpc.aio.secure_channel(self.address, self._credentials, options=OPTIONS)
            )
        return self._opened

    async def _call(self, method: Any, request: object, timeout_seconds: float | None) -> Any:
        attempts = self._attempts(timeout_seconds)
        while True:
            try:
                return await method(request, timeout=attempts.seconds_left(), metadata=self._metadata)
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.pause_after(error))
