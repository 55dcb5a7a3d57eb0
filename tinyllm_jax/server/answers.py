"""From the engine's thread to the event loop: the pieces of all answers to one request."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tinyllm_jax.config import SamplingConfig, ServerConfig
from tinyllm_jax.data.asking import Asked
from tinyllm_jax.inference.service import Piece, Service, Ticket
from tinyllm_jax.server.errors import ApiError

Receive = Callable[[], Awaitable[Any]]


class ClientGoneError(Exception):
    """Nobody is there any more to answer."""


class Answers:
    """The answers to one request: each prompt's samples side by side, as `(number, piece)`.

    The engine never waits for a client: what a client has not taken yet is kept here, up to
    `server.buffer_pieces`. Leaving the context cancels what is not finished.

    Args:
        service: Makes the answers.
        settings: Limits.
    """

    def __init__(self, service: Service, settings: ServerConfig):
        self.started = time.perf_counter()
        self.first_token_seconds: float | None = None
        self.open = 0  # answers that have not ended
        self.prompt_tokens = 0
        self.new_tokens = 0
        self._service, self._settings = service, settings
        self._loop = asyncio.get_running_loop()
        self._pieces: list[tuple[int, Piece]] = []
        self._wake = asyncio.Event()
        self._tickets: list[Ticket] = []
        self._problem: Exception | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._clock = self._loop.call_later(settings.answer_seconds, self._out_of_time)

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_: object) -> None:
        self._clock.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self.open:
            for ticket in self._tickets:
                ticket.cancel()

    def ask(
        self,
        asked: Sequence[Asked],
        *,
        sampling: SamplingConfig,
        samples: int,
        stop: Sequence[str],
        alternatives: int | None,
    ) -> None:
        """Ask for so many samples of each prompt; all are taken, or none is.

        Raises:
            InputError: a prompt leaves no room for an answer.
            QueueFullError: as many wait as may.
            DrainingError: the service takes no more questions.
        """
        for prompt, each in enumerate(asked):
            for sample in range(samples):
                ticket = self._service.ask(
                    each,
                    sampling=sampling,
                    sample_number=sample,
                    stop=stop,
                    alternatives=alternatives,
                    on_piece=self._taker(prompt * samples + sample),
                )
                self._tickets.append(ticket)
                self.open += 1
            self.prompt_tokens += self._tickets[-1].prompt_tokens

    def watch(self, receive: Receive) -> None:
        """Notice it when the client leaves; its request must have been read to the end."""
        self._watcher = asyncio.create_task(self._wait_for_end(receive))

    async def wait_until_gone(self) -> None:
        """Wait until the connection that was just ended is known to be."""
        assert self._watcher is not None
        await asyncio.wait([self._watcher], timeout=1)

    async def next(self) -> list[tuple[int, Piece]]:
        """Wait for what has come since the last call.

        Raises:
            ClientGoneError: nobody waits for it.
            ApiError: it takes too long, the service fails or stops.
        """
        await self._wake.wait()
        self._wake.clear()
        if self._problem is not None:
            raise self._problem
        found, self._pieces = self._pieces, []
        for _, piece in found:
            self.new_tokens += piece.new_tokens
            self.open -= bool(piece.ended)
            if piece.ended == "failed":
                raise ApiError(500, "The server failed while it made this answer. Ask again.")
            if piece.ended == "cancelled":
                raise ApiError(503, "The server is stopping. Ask again in a moment.")
        if self.first_token_seconds is None and self.new_tokens:
            self.first_token_seconds = time.perf_counter() - self.started
        return found

    def _taker(self, number: int) -> Callable[[Piece], None]:
        call, take = self._loop.call_soon_threadsafe, self._take

        def on_piece(piece: Piece) -> None:
            # The loop ends only after the service; what comes later has nobody to read it.
            with contextlib.suppress(RuntimeError):
                call(take, number, piece)

        return on_piece

    def _take(self, number: int, piece: Piece) -> None:
        self._pieces.append((number, piece))
        if len(self._pieces) > self._settings.buffer_pieces:
            self._end(ClientGoneError("it reads too slowly"))
        self._wake.set()

    def _out_of_time(self) -> None:
        seconds = self._settings.answer_seconds
        # The client library would repeat it, and it would take as long again.
        self._end(
            ApiError(
                504,
                f"The answer took longer than the {seconds:g} seconds that this server gives it. Ask "
                "for fewer tokens.",
                code="timeout",
                headers={"x-should-retry": "false"},
            )
        )

    async def _wait_for_end(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._end(ClientGoneError("it has left"))

    def _end(self, problem: Exception) -> None:
        self._problem = problem
        self._pieces = []
        for ticket in self._tickets:
            ticket.cancel()
        self._wake.set()
