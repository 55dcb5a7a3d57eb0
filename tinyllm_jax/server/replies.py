"""Answers in OpenAI's shapes, whole and in chunks."""

import codecs
import itertools
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from tinyllm_jax.inference.service import Alternative, Piece, ToldToken

REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
# JSON has no infinity; OpenAI writes this for tokens that cannot come.
LOWEST_LOG_PROB = -9999.0

# Only ASCII comes out, so no reader can take a character for the end of a line.
encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def event(content: Any) -> bytes:
    """Write one server-sent event."""
    return f"data: {encode_json(content)}\n\n".encode()


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Count the tokens of a request, each prompt once."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def log_prob(token: Alternative) -> float:
    """Give a log-probability that JSON can hold."""
    return token.log_prob if token.log_prob > LOWEST_LOG_PROB else LOWEST_LOG_PROB


class Reply:
    """One request's answer, as it grows: `chunk` for a stream, `whole` at the end.

    Args:
        model_name: Name of the model.
        spaceless: Of each answer, whether its text begins without the space of its first word.
        told: Log-probabilities were asked for.
        include_usage: A stream ends with the counts of tokens.
    """

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(
        self, model_name: str, *, spaceless: Sequence[bool], told: bool, include_usage: bool
    ):
        choices = len(spaceless)
        self.told = told
        self._include_usage = include_usage
        self._base = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.chunk_kind,
            "created": int(time.time()),
            "model": model_name,
        }
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._tokens: list[list[ToldToken]] = [[] for _ in range(choices)]
        self._ended = [""] * choices

    def add(self, number: int, piece: Piece) -> None:
        """Take a piece of an answer that is told at once."""
        self._texts[number].append(piece.text)
        self._tokens[number] += piece.tokens
        self._ended[number] = piece.ended

    def whole(self, *, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """Give all of it."""
        choices = [
            {
                "index": number,
                **self.content("".join(texts)),
                "logprobs": self.log_probs(number, tokens) if self.told else None,
                "finish_reason": REASONS[ended],
            }
            for number, (texts, tokens, ended) in enumerate(
                zip(self._texts, self._tokens, self._ended, strict=True)
            )
        ]
        counts = usage(prompt_tokens, new_tokens)
        return {**self._base, "object": self.kind, "choices": choices, "usage": counts}

    def first(self) -> bytes:
        """Give the events that a stream begins with."""
        return b""

    def chunk(self, number: int, piece: Piece) -> bytes:
        """Give the events of one piece; those without text and end say nothing."""
        if not (piece.text or piece.tokens or piece.ended):
            return b""
        return self._event(
            {
                "index": number,
                **self.delta(piece.text),
                "logprobs": self.log_probs(number, piece.tokens) if self.told else None,
                "finish_reason": REASONS[piece.ended] if piece.ended else None,
            }
        )

    def last(self, *, prompt_tokens: int, new_tokens: int) -> bytes:
        """Give the events that a stream ends with."""
        counted = b""
        if self._include_usage:
            counts = usage(prompt_tokens, new_tokens)
            counted = event({**self._base, "choices": [], "usage": counts})
        return counted + b"data: [DONE]\n\n"

    def _event(self, choice: dict[str, Any]) -> bytes:
        beside = {"usage": None} if self._include_usage else {}
        return event({**self._base, "choices": [choice], **beside})

    def content(self, text: str) -> dict[str, Any]:
        """Shape the text of a whole answer."""
        raise NotImplementedError

    def delta(self, text: str) -> dict[str, Any]:
        """Shape the text of a chunk."""
        raise NotImplementedError

    def log_probs(self, number: int, tokens: Sequence[ToldToken]) -> dict[str, Any]:
        """Shape the log-probabilities of some tokens."""
        raise NotImplementedError


class ChatReply(Reply):
    """What `/v1/chat/completions` answers."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first(self) -> bytes:
        """Say who speaks."""
        return b"".join(
            self._event(
                {
                    "index": number,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                }
            )
            for number in range(len(self._texts))
        )

    def content(self, text: str) -> dict[str, Any]:
        """Shape the text of a whole answer."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        """Shape the text of a chunk."""
        return {"delta": {"content": text} if text else {}}

    def log_probs(self, _: int, tokens: Sequence[ToldToken]) -> dict[str, Any]:
        """Shape the log-probabilities of some tokens."""

        def shown(token: Alternative) -> dict[str, Any]:
            return {"token": token.text, "logprob": log_prob(token), "bytes": [*token.bytes]}

        content = [
            {**shown(each.token), "top_logprobs": [shown(other) for other in each.alternatives]}
            for each in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionReply(Reply):
    """What `/v1/completions` answers."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(
        self, model_name: str, *, spaceless: Sequence[bool], told: bool, include_usage: bool
    ):
        super().__init__(model_name, spaceless=spaceless, told=told, include_usage=include_usage)
        choices = len(spaceless)
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = [decoder(errors="replace") for _ in range(choices)]
        self._offsets = [0] * choices
        self._loses_space = [*spaceless]  # and the word has not come yet

    def content(self, text: str) -> dict[str, Any]:
        """Shape the text of a whole answer."""
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        """Shape the text of a chunk."""
        return {"text": text}

    def log_probs(self, number: int, tokens: Sequence[ToldToken]) -> dict[str, Any]:
        """Shape the log-probabilities of some tokens, which follow those of the last call."""
        lengths = []
        for each in tokens:
            text = self._decoders[number].decode(each.token.bytes)
            if text and self._loses_space[number]:
                self._loses_space[number] = False
                text = text.removeprefix(" ")
            lengths.append(len(text))
        *offsets, self._offsets[number] = itertools.accumulate(
            lengths, initial=self._offsets[number]
        )
        return {
            "tokens": [each.token.text for each in tokens],
            "token_logprobs": [log_prob(each.token) for each in tokens],
            "top_logprobs": [
                {other.text: log_prob(other) for other in each.alternatives} for each in tokens
            ],
            "text_offset": offsets,
        }
