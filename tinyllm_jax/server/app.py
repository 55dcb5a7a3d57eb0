"""OpenAI's endpoints over one `Service`, its health, its counts, and a page to try it on."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tinyllm_jax.config import SamplingConfig, ServerConfig
from tinyllm_jax.data.asking import Asked, as_conversation, as_text
from tinyllm_jax.data.chat import ROLES, TOOL, USER, Message, check_turns
from tinyllm_jax.data.chat_records import BadRecord
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference.service import DrainingError, QueueFullError, Service
from tinyllm_jax.inference.text_stream import LONGEST_HELD, token_bytes
from tinyllm_jax.server.answers import Answers, ClientGoneError
from tinyllm_jax.server.description import openapi
from tinyllm_jax.server.errors import ApiError
from tinyllm_jax.server.gate import Gate
from tinyllm_jax.server.json_answers import (
    JsonResponse,
    answer_api_error,
    answer_defect,
    answer_http_error,
)
from tinyllm_jax.server.metrics import Metrics
from tinyllm_jax.server.page_files import Page
from tinyllm_jax.server.replies import ChatReply, CompletionReply, Reply, encode_json
from tinyllm_jax.server.schemas import (
    LONGEST_NAME,
    Asking,
    ChatRequest,
    CompletionRequest,
    read_request,
)
from tinyllm_jax.server.streaming import EventStream

# Tokenising more text than this at once would hold up everybody else's answers.
LONG_PROMPT_BYTES = 4096


class Api:
    """The endpoints of one model.

    Args:
        service: Makes the answers.
        model_name: The model's name in requests.
        sampling: What requests do not say is taken from here.
        settings: Limits.
        keys: One of these must come with each request; none are needed where there are none.
    """

    def __init__(
        self,
        service: Service,
        *,
        model_name: str,
        sampling: SamplingConfig,
        settings: ServerConfig,
        keys: Sequence[bytes],
    ):
        self.service, self.model_name = service, model_name
        self.sampling, self.settings, self.keys = sampling, settings, tuple(keys)
        self.metrics = Metrics(service)
        self.is_draining = False
        self._created = int(time.time())
        self._unseeded = 0  # requests that brought no seed
        self._mean_seconds = 1.0  # of an answer, the newest counting most
        self._description = encode_json(openapi(model_name, version=package_version())).encode()
        self._page = Page()

    def app(self) -> Callable[..., Awaitable[None]]:
        """Make the ASGI application."""
        post, get = ["POST"], ["GET"]
        routes = [
            Route("/v1/chat/completions", self.chat, methods=post),
            Route("/v1/completions", self.completions, methods=post),
            Route("/v1/models", self.models, methods=get),
            Route("/v1/models/{name:path}", self.model, methods=get),
            Route("/health", self.health, methods=get),
            Route("/metrics", self.tell_metrics, methods=get),
            Route("/openapi.json", self.describe, methods=get),
            *(Route(name, self._page.get, methods=get) for name in self._page.names),
        ]
        handlers: dict[Any, Any] = {
            ApiError: answer_api_error,
            HTTPException: answer_http_error,
            Exception: answer_defect,
        }
        inner = Starlette(routes=routes, exception_handlers=handlers)
        return Gate(
            inner,
            self.settings,
            keys=self.keys,
            metrics=self.metrics,
            paths=[route.path.replace("{name:path}", self.model_name) for route in routes],
            open_paths=[*self._page.names, "/health", "/openapi.json"],
        )

    async def chat(self, request: Request) -> Response:
        """Answer at the end of a conversation."""
        body = await self.read_body(request)
        asked = read_request(body, ChatRequest)
        self.check_model(asked)
        if not self.service.can_chat:
            raise ApiError(
                400,
                f"The model '{self.model_name}' has read no conversations, so there are no turns that "
                "it could answer. Send a text to go on with to /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        messages = [Message(ROLES[turn.role], turn.text) for turn in asked.messages]
        try:
            check_turns(messages)
        except BadRecord as error:
            raise ApiError(400, f"messages: {error}.", param="messages") from None
        if messages[-1].role not in (USER, TOOL):
            raise ApiError(
                400, "messages: the last is no question. End with one.", param="messages"
            )
        samples = self.samples(asked, prompts=1)
        prompt = await off_the_loop(
            lambda: as_conversation(messages, self.service.tokenizer), size=len(body)
        )
        return await self.answer(request, asked, [prompt], ChatReply, samples=samples)

    async def completions(self, request: Request) -> Response:
        """Go on with texts."""
        body = await self.read_body(request)
        asked = read_request(body, CompletionRequest)
        self.check_model(asked)
        samples = self.samples(asked, prompts=len(asked.prompt))
        prompts = await off_the_loop(
            lambda: [self.prompt(each) for each in asked.prompt], size=len(body)
        )
        return await self.answer(request, asked, prompts, CompletionReply, samples=samples)

    def samples(self, asked: Asking, *, prompts: int) -> int:
        """Give the number of answers to each prompt, before anything is done for any."""
        samples = self.sampling.num_samples if asked.n is None else asked.n
        if samples * prompts > self.settings.max_choices:
            raise ApiError(
                400,
                f"{samples * prompts} answers are asked for (prompts x n), and this server gives "
                f"{self.settings.max_choices} to a request.",
                param="n",
            )
        if samples * prompts > self.service.places:
            raise ApiError(
                400,
                f"{samples * prompts} answers are asked for (prompts x n), and this server has room for "
                f"{self.service.places} at work and waiting (engine.slots + engine.queue).",
                param="n",
            )
        return samples

    def prompt(self, prompt: str | list[int]) -> Asked:
        """Make a question of a text or of token ids, which get no bos."""
        tokenizer = self.service.tokenizer
        if isinstance(prompt, str):
            return as_text(prompt, tokenizer)
        if not prompt or min(prompt) < 0 or max(prompt) >= tokenizer.vocab_size:
            raise ApiError(
                400,
                f"prompt: token ids go from 0 to {tokenizer.vocab_size - 1}, and there must be one.",
                param="prompt",
            )
        # Behind an eos a decoder writes nothing more.
        ends = [place for place, id in enumerate(prompt, start=1) if id == tokenizer.eos_id]
        lead = prompt[ends[-1] :] if ends else prompt
        return Asked(
            prompt, tokenizer.eos_id, lambda found: tokenizer.decode([*lead, *found]), lead
        )

    async def answer(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        prompts: list[Asked],
        kind: type[Reply],
        *,
        samples: int,
    ) -> Response:
        """Ask the service, and answer whole or as a stream."""
        tokenizer = self.service.tokenizer
        spaceless = [loses_space(prompt.lead, tokenizer) for prompt in prompts]
        reply = kind(
            self.model_name,
            spaceless=[each for each in spaceless for _ in range(samples)],
            told=asked.alternatives is not None,
            include_usage=asked.include_usage,
        )
        answers = Answers(self.service, self.settings)
        try:
            self.ask(answers, asked, prompts, samples=samples)
            answers.watch(request.receive)
            if asked.stream:
                return EventStream(answers, reply, on_end=self.count)
            with answers:
                while answers.open:
                    for number, piece in await answers.next():
                        reply.add(number, piece)
                self.count(answers)
        except ClientGoneError:
            return Response(status_code=499)
        except BaseException:
            answers.__exit__()
            raise
        counts = {"prompt_tokens": answers.prompt_tokens, "new_tokens": answers.new_tokens}
        return JsonResponse(reply.whole(**counts))

    def ask(
        self,
        answers: Answers,
        asked: ChatRequest | CompletionRequest,
        prompts: list[Asked],
        *,
        samples: int,
    ) -> None:
        """Put the questions to the service."""
        # The same server settings and the same order of requests give the same answers.
        seed = (self.sampling.seed + self._unseeded) % 2**32
        self._unseeded += asked.seed is None
        try:
            answers.ask(
                prompts,
                sampling=asked.sampling(self.sampling, context=self.service.context, seed=seed),
                samples=samples,
                stop=asked.stop or (),
                alternatives=asked.alternatives,
            )
        except InputError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from None
        except QueueFullError as error:
            raise ApiError(429, str(error), code="queue_full", headers=self.retry_after()) from None
        except DrainingError as error:
            raise ApiError(503, str(error), code="stopping", headers=self.retry_after()) from None

    def retry_after(self) -> dict[str, str]:
        """Guess when a slot will be free again, from how long answers took."""
        stats = self.service.stats()
        seconds = self._mean_seconds * (1 + stats.waiting / stats.slots)
        return {"Retry-After": str(min(max(math.ceil(seconds), 1), 60))}

    def count(self, answers: Answers) -> None:
        """Note how long a finished answer took."""
        seconds = time.perf_counter() - answers.started
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
        self.metrics.answer_seconds.observe(seconds)
        if answers.first_token_seconds is not None:
            self.metrics.first_token_seconds.observe(answers.first_token_seconds)

    def check_model(self, asked: Asking) -> None:
        """Refuse the name of another model."""
        if asked.model not in (None, self.model_name):
            raise ApiError(
                404,
                f"There is no model '{(asked.model or '')[:LONGEST_NAME]}' here. Use '{self.model_name}'.",
                param="model",
                code="model_not_found",
            )

    async def read_body(self, request: Request) -> bytearray:
        """Read the body of a request, as long as it is short and comes soon."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Pages of other origins can send any other type without asking the browser.
            raise ApiError(
                415,
                "The body is said to be something else than JSON. Send the header 'Content-Type: "
                "application/json'.",
            )
        limit, seconds = self.settings.max_body_bytes, self.settings.request_seconds
        body, close = bytearray(), {"Connection": "close"}
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise ApiError(
                            413, f"The body has more than {limit} bytes. Send less.", headers=close
                        )
        except TimeoutError:
            raise ApiError(
                408, f"The body has not come within {seconds:g} seconds.", headers=close
            ) from None
        except ClientDisconnect:
            raise ApiError(400, "The body has not come to its end.") from None
        return body

    async def models(self, _: Request) -> Response:
        """List the one model."""
        return JsonResponse({"object": "list", "data": [self.describe_model()]})

    async def model(self, request: Request) -> Response:
        """Tell of the model, by name."""
        name = request.path_params["name"]
        if name != self.model_name:
            raise ApiError(
                404,
                f"There is no model '{name[:LONGEST_NAME]}' here. Use '{self.model_name}'.",
                code="model_not_found",
            )
        return JsonResponse(self.describe_model())

    def describe_model(self) -> dict[str, Any]:
        """Tell what OpenAI tells of a model, its context, whether it chats, and what is taken where a
        request says nothing."""
        sampling = self.sampling
        return {
            "id": self.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "tinyllm",
            "context_tokens": self.service.context,
            "can_chat": self.service.can_chat,
            "sampling": {
                "temperature": 0 if sampling.greedy else sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "repetition_penalty": sampling.repetition_penalty,
                "max_tokens": sampling.max_new_tokens,
            },
        }

    async def health(self, _: Request) -> Response:
        """Say whether questions are taken."""
        if self.is_draining:
            return JsonResponse({"status": "stopping"}, status_code=503)
        if not self.service.is_well:
            return JsonResponse({"status": "failed"}, status_code=503)
        stats = self.service.stats()
        busy = {name: getattr(stats, name) for name in ("slots", "busy_slots", "waiting")}
        return JsonResponse({"status": "ok", "model": self.model_name, **busy})

    async def tell_metrics(self, _: Request) -> Response:
        """Tell Prometheus the counts."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def describe(self, _: Request) -> Response:
        """Give the OpenAPI description."""
        return Response(self._description, media_type="application/json")


def loses_space(lead: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Tell whether a word behind these tokens is written without the space that it begins with."""
    word = tokenizer.encode("a")
    text = b"".join(token_bytes(tokenizer, id) for id in word).decode(errors="replace")
    lead = lead[-LONGEST_HELD:]
    return text.startswith(" ") and not tokenizer.decode([*lead, *word])[
        len(tokenizer.decode(lead)) :
    ].startswith(" ")


async def off_the_loop(make: Callable[[], Any], *, size: int) -> Any:
    """Tokenise, in another thread where it takes long."""
    return make() if size <= LONG_PROMPT_BYTES else await asyncio.to_thread(make)


def package_version() -> str:
    """Give the version of this package; a checkout that was not installed has none."""
    try:
        return version("tinyllm")
    except PackageNotFoundError:
        return "0"
