"""The server's process: a socket, connections with limits, and an orderly end."""

import asyncio
import errno
import os
import socket
import time
from collections.abc import Callable

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tinyllm_jax.cli import say
from tinyllm_jax.config import ServerConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.server.app import Api
from tinyllm_jax.server.streaming import ABORT

# Of one request.
MAX_HEAD_BYTES = 65_536
# What the system may keep for a client that does not read, besides what uvicorn keeps.
SEND_BUFFER_BYTES = 262_144
# Least time for the last bytes to go out, once every answer is made.
CLOSING_SECONDS = 5


def open_socket(host: str, port: int) -> socket.socket:
    """Take an address, before anything slow is done.

    Raises:
        InputError: it cannot be taken.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise InputError(
            f"server.host={host} is no address of this machine. Use 127.0.0.1, or 0.0.0.0 for all."
        ) from None
    found = socket.socket(family, kind)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        found.bind(address)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"server.port={port} is in use by another program. Use --port {port + 1}, or --port 0 "
                "for any that is free."
            ) from None
        raise InputError(
            f"{host}:{port} cannot be taken ({os.strerror(error.errno or 0)}). Use --host 127.0.0.1 "
            "and a --port above 1023."
        ) from None
    return found


def protocol(settings: ServerConfig) -> type[HttpToolsProtocol]:
    """Make the kind of connection, which ends when a request's head is too long or too slow, or
    when its client takes nothing of what is sent."""

    class Connection(HttpToolsProtocol):
        """One client's connection."""

        _head_bytes = 0
        _head_clock: asyncio.TimerHandle | None = None
        _stall_clock: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # So that writing is paused as long as anything waits for the client.
            transport.set_write_buffer_limits(high=0)
            self._head_clock = self.loop.call_later(settings.request_seconds, transport.abort)

        def data_received(self, data: bytes) -> None:
            if self._head_bytes == 0 and self._head_clock is None:
                self._head_clock = self.loop.call_later(
                    settings.request_seconds, self.transport.abort
                )
            self._head_bytes += len(data)
            super().data_received(data)
            if self._head_clock is not None and self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("The head of the request is too long.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]

        def on_headers_complete(self) -> None:
            self._stop_clock()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._head_bytes = 0
            super().on_message_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            self._stop_watching()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_clock()
            self._stop_watching()
            super().connection_lost(exc)

        def _watch(self, unsent: int) -> None:
            self._stall_clock = self.loop.call_later(settings.stall_seconds, self._look, unsent)

        def _look(self, before: int) -> None:
            unsent = self.transport.get_write_buffer_size()
            if unsent < before:
                self._watch(unsent)
            else:
                # Closing would wait for what the client does not take.
                self.transport.abort()

        def _stop_watching(self) -> None:
            if self._stall_clock is not None:
                self._stall_clock.cancel()
                self._stall_clock = None

        def _stop_clock(self) -> None:
            if self._head_clock is not None:
                self._head_clock.cancel()
                self._head_clock = None

    return Connection


class Server(uvicorn.Server):
    """Ends in order: at the first signal new questions are refused, and those in work are answered."""

    def __init__(self, config: uvicorn.Config, api: Api, *, on_start: Callable[[], None]):
        super().__init__(config)
        self.was_drained = True  # every answer in work was finished, and was sent to its end
        self._api, self._on_start = api, on_start
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ends: list[asyncio.Task[None]] = []
        self._delivery_seconds: float = CLOSING_SECONDS

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, *_: object) -> None:
        """Begin to end; a second signal ends at once."""
        assert self._loop is not None
        end = self._stop_now if self._api.is_draining else self._drain
        self._api.is_draining = True
        self._loop.call_soon_threadsafe(lambda: self._ends.append(asyncio.create_task(end())))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the last bytes go out, but not for ever."""
        assert self._loop is not None
        clock = self._loop.call_later(self._delivery_seconds, self._cut)
        await super().shutdown(sockets)
        clock.cancel()

    def _cut(self) -> None:
        for connection in [*self.server_state.connections]:
            assert isinstance(connection, HttpToolsProtocol)
            cycle = connection.cycle
            # Where no answer has begun, the request has not come to its end.
            if cycle is not None and cycle.response_started:
                self.was_drained = False
            connection.transport.abort()

    async def _drain(self) -> None:
        seconds = self._api.settings.drain_seconds
        end = time.monotonic() + seconds
        say(f"Stopping: answers in work have {seconds:g} seconds. Another signal stops at once.")
        if await asyncio.to_thread(self._api.service.drain, seconds=seconds):
            self._delivery_seconds = max(end - time.monotonic(), CLOSING_SECONDS)
            self.should_exit = True
        else:
            await self._stop_now()

    async def _stop_now(self) -> None:
        if self.should_exit:
            self._cut()
            return
        self.was_drained = False
        await asyncio.to_thread(self._api.service.stop)
        self.should_exit = True


def make_server(api: Api, *, on_start: Callable[[], None]) -> Server:
    """Make the server of some endpoints; its `run([socket])` answers until a signal ends it.

    Args:
        api: The endpoints.
        on_start: Called when requests can come.
    """
    settings = api.settings
    config = uvicorn.Config(
        api.app(),
        http=protocol(settings),
        # uvloop, where it is installed, is no faster here.
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # uvicorn turns away who makes their number so many.
        limit_concurrency=settings.max_connections + 1,
    )
    return Server(config, api, on_start=on_start)
