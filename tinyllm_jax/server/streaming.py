"""An answer as server-sent events."""

from collections.abc import Callable
from typing import Any

from starlette.responses import Response

from tinyllm_jax.server.answers import Answers, ClientGoneError
from tinyllm_jax.server.errors import ApiError
from tinyllm_jax.server.replies import Reply, event

# Under this key the connection's protocol leaves what ends the connection at once.
ABORT = "tinyllm.abort"


class EventStream(Response):
    """Sends pieces as they come; a client that reads too slowly is let go.

    Args:
        answers: Where the pieces come from.
        reply: Their shape.
        on_end: Called when all was sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        answers: Answers,
        reply: Reply,
        *,
        on_end: Callable[[Answers], None],
    ):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answers, self._reply, self._on_end = answers, reply, on_end

    async def __call__(self, scope: Any, _: Any, send: Any) -> None:
        """Send all of it."""
        answers, reply = self._answers, self._reply

        async def put(body: bytes, *, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": body, "more_body": more}
            # Ends with the connection, too, which ends itself when its client takes nothing.
            await send(message)

        with answers:
            try:
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
                await put(reply.first())
                body = b""
                try:
                    while answers.open:
                        # What came while the last was sent goes out together.
                        news = await answers.next()
                        body = b"".join(reply.chunk(number, piece) for number, piece in news)
                        if body and answers.open:
                            await put(body)
                    self._on_end(answers)
                    counts = {"prompt_tokens": answers.prompt_tokens}
                    body += reply.last(**counts, new_tokens=answers.new_tokens)
                except ApiError as error:
                    body = event(error.content)
                await put(body, more=False)
            except ClientGoneError:
                # Closing would wait for what the client does not take.
                abort = scope.get(ABORT)
                if abort is not None:
                    abort()
                    await answers.wait_until_gone()
