"""What a request may hold: OpenAI's parameters as far as they mean something here, and no others."""

import dataclasses
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationError,
)
from pydantic.json_schema import WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from tinyllm_jax.config import SamplingConfig
from tinyllm_jax.server.errors import ApiError

# Change no answer, whatever they say.
HARMLESS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
)
# Would change the answer, and are not done here: each with the values that say "nothing of that".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# Below these, float32 makes 0 of them or infinity of what they divide.
SMALLEST_TEMPERATURE = 1e-3
SMALLEST_TOP_P = 1e-6

# Of problems told at once, of parameters, and of characters of their names.
MOST_PROBLEMS = 8
MOST_PARAMETERS = 100
LONGEST_NAME = 64
MOST_STOPS = 16
LONGEST_STOP = 256  # characters


def _stops(value: Any) -> list[str] | None:
    texts = [value] if isinstance(value, str) else value
    if texts is None:
        return None
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise PydanticCustomError("stop", "Give a text or a list of texts")
    if len(texts) > MOST_STOPS or not all(1 <= len(text) <= LONGEST_STOP for text in texts):
        raise PydanticCustomError(
            "stop",
            "Give up to {most} texts, each of 1 to {longest} characters",
            {"most": MOST_STOPS, "longest": LONGEST_STOP},
        )
    return texts


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """Bring the four shapes of a prompt to two; pydantic would try each on every item."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, list) and all(type(id) is int for id in item) for item in value):
            return value
    raise PydanticCustomError(
        "prompt", "Give a text, a list of texts, a list of token ids, or a list of such lists"
    )


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Strict(BaseModel):
    """Takes no unknown names, turns no text into numbers, and knows no infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """How a stream is told."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextPart(Strict):
    """A piece of what somebody says."""

    type: Literal["text"]
    text: str


_STOP_TEXT = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
STOP = {
    "anyOf": [
        _STOP_TEXT,
        {"type": "array", "items": _STOP_TEXT, "maxItems": MOST_STOPS},
        {"type": "null"},
    ]
}
CONTENT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
                "additionalProperties": False,
            },
        },
    ]
}
PROMPT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        },
    ]
}


class Turn(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[TextPart], FailFast(), BeforeValidator(_as_parts), WithJsonSchema(CONTENT)
    ]
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: None = None
    refusal: None = None
    audio: None = None

    @property
    def text(self) -> str:
        """Give all of it."""
        return "".join(part.text for part in self.content)


class Asking(Strict):
    """What both kinds of request have; None takes the server's own default."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    n: int | None = Field(None, ge=1, le=128)
    stop: Annotated[list[str] | None, PlainValidator(_stops), WithJsonSchema(STOP)] = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Tell whether a stream ends with the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, defaults: SamplingConfig, *, context: int, seed: int) -> SamplingConfig:
        """Put what is asked for over the server's defaults.

        Args:
            context: Tokens that fit the model.
            seed: Taken where the request names none.
        """
        named = {
            name: getattr(self, name)
            for name in ("temperature", "top_p", "top_k", "repetition_penalty")
            if getattr(self, name) is not None
        }
        sampling = dataclasses.replace(defaults, **named)
        greedy = sampling.greedy if self.temperature is None else self.temperature == 0
        return dataclasses.replace(
            sampling,
            greedy=greedy or sampling.top_p == 0 or sampling.temperature < SMALLEST_TEMPERATURE,
            temperature=max(sampling.temperature, SMALLEST_TEMPERATURE),
            top_p=max(sampling.top_p, SMALLEST_TOP_P),
            top_k=min(sampling.top_k, 10**9),
            max_new_tokens=min(self.longest(defaults.max_new_tokens), context),
            seed=seed if self.seed is None else self.seed % 2**32,
        )

    def longest(self, default: int) -> int:
        """Give the most new tokens."""
        return self.max_tokens or default

    def problem(self) -> tuple[str, str] | None:
        """Name a parameter that contradicts another, and say how."""
        if self.stream_options is not None and not self.stream:
            return "stream_options", "'stream_options' goes only with 'stream': true."
        return None


class ChatRequest(Asking):
    """What `/v1/chat/completions` takes."""

    messages: Annotated[list[Turn], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def longest(self, default: int) -> int:
        """Give the most new tokens."""
        return self.max_completion_tokens or self.max_tokens or default

    @property
    def alternatives(self) -> int | None:
        """Give how many likeliest tokens are told, None where no log-probabilities are."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def problem(self) -> tuple[str, str] | None:
        """Name a parameter that contradicts another, and say how."""
        if self.top_logprobs is not None and not self.logprobs:
            return "top_logprobs", "'top_logprobs' goes only with 'logprobs': true."
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            return (
                "max_tokens",
                "'max_tokens' is the old name of 'max_completion_tokens': send one.",
            )
        return super().problem()


class CompletionRequest(Asking):
    """What `/v1/completions` takes."""

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts), WithJsonSchema(PROMPT)]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def alternatives(self) -> int | None:
        """Give how many likeliest tokens are told, None where no log-probabilities are."""
        return self.logprobs


R = TypeVar("R", bound=Asking)


def read_request(body: bytes | bytearray, kind: type[R]) -> R:
    """Read and check a request.

    Raises:
        ApiError: it is no JSON, or something in it is wrong; each problem stands in the message.
    """
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON ({error}). Send a JSON object.") from None
    if not isinstance(found, dict):
        raise ApiError(400, 'The body is no JSON object. Send one, such as {"prompt": "Once"}.')
    asked = {name: value for name, value in found.items() if name not in HARMLESS}
    if len(asked) > MOST_PARAMETERS:
        raise ApiError(400, f"The request has {len(asked)} parameters, most of them unknown.")
    refuse_unsupported(asked, kind)
    try:
        request = kind.model_validate(asked)
    except ValidationError as error:
        raise api_error(error.errors(include_url=False, include_context=False)) from None
    problem = request.problem()
    if problem:
        raise ApiError(400, problem[1], param=problem[0], code="invalid_value")
    return request


def refuse_unsupported(asked: dict[str, Any], kind: type[Asking]) -> None:
    """Take out the parameters that ask for nothing, and refuse those that ask for what is not done."""
    for name, nothing in UNSUPPORTED.items():
        if name not in asked or name in kind.model_fields:
            continue
        value = asked.pop(name)
        # To Python, False is 0 and True is 1.
        is_bool = type(value) is bool
        if value is None or any(
            value == each and is_bool == (type(each) is bool) for each in nothing
        ):
            continue
        raise ApiError(
            400,
            f"'{name}' is not supported by this server. Leave it out.",
            param=name,
            code="unsupported_parameter",
        )


def api_error(problems: list[ErrorDetails]) -> ApiError:
    """Say what pydantic found: the first few problems, one parameter once."""
    told: dict[str, str] = {}
    for problem in problems[:MOST_PROBLEMS]:
        # Names come from the client, who would get as much back as it sends.
        place = [str(part)[:LONGEST_NAME] for part in problem["loc"]]
        name = place[0] if place else "body"
        if problem["type"] == "extra_forbidden":
            told.setdefault(name, f"'{'.'.join(place)}' is no parameter that this server knows.")
        elif problem["type"] == "missing":
            told.setdefault(name, f"'{'.'.join(place)}' is missing.")
        elif problem["type"] == "model_type":
            told.setdefault(name, f"'{'.'.join(place)}' is no JSON object. Send one.")
        else:
            told.setdefault(name, f"'{'.'.join(place)}': {problem['msg']}.")
    first = problems[0]
    codes = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}
    return ApiError(
        400,
        " ".join(told.values()),
        param=next(iter(told)),
        code=codes.get(first["type"], "invalid_value"),
    )
