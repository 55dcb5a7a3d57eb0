"""Tokens to text as they come: whole characters only, and nothing of what ends a text."""

import re
from collections.abc import Sequence

from tinyllm_jax.data.tokenizer import Tokenizer

# A character has four bytes at most, so more tokens without one are no beginning of any.
LONGEST_HELD = 16
# What a decoder writes for bytes that are no character, or not yet one.
NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
BYTES = re.compile("(?:<0x[0-9A-F]{2}>)+")


class TextStream:
    """The text of one answer, piece by piece; all pieces together are the text decoded at once.

    Text that may still become part of something else is held back: bytes of an unfinished
    character, and the beginning of a stop string.

    Args:
        tokenizer: Turns ids into text.
        lead: Tokens before the answer, whose text is not told; only the last few are looked at.
        stop: Texts that end the answer; they are not told either.
    """

    def __init__(self, tokenizer: Tokenizer, *, lead: Sequence[int], stop: Sequence[str]):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        # Only the newest tokens are decoded again, behind some whose text is settled.
        self._settled = [id for id in lead[-LONGEST_HELD:] if id != tokenizer.eos_id]
        self._new: list[int] = []
        self._held = ""

    def push(self, id: int) -> str:
        """Take one token, and give the text that can be told now."""
        assert not self.stopped
        if not token_bytes(self._tokenizer, id):
            return ""  # a control token; behind an eos a decoder would write nothing more
        self._new.append(id)
        text = self._decode_new()
        if text.endswith(NO_CHARACTER) and len(self._new) < LONGEST_HELD:
            return ""
        if text:
            # A token without text of its own stays among the new ones: a decoder that drops the
            # first space of what it is given must see a word before it.
            self._settled, self._new = self._new, []
        return self._tell(text)

    def finish(self) -> str:
        """Give what was held back, at the end of the answer."""
        text = self._tell(self._decode_new())
        self._new = []
        if self.stopped:
            return text
        rest, self._held = self._held, ""
        return text + rest

    def _decode_new(self) -> str:
        before = self._tokenizer.decode(self._settled)
        return self._tokenizer.decode([*self._settled, *self._new])[len(before) :]

    def _tell(self, text: str) -> str:
        """Let text out up to a stop string, or up to what may be the beginning of one."""
        self._held += text
        ends = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            told, self._held = self._held[: min(ends)], ""
            return told
        kept = max((beginning_at_end(self._held, stop) for stop in self._stop), default=0)
        told, self._held = (
            self._held[: len(self._held) - kept],
            self._held[len(self._held) - kept :],
        )
        return told


def beginning_at_end(text: str, stop: str) -> int:
    """Count the last characters of `text` that are the first of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def token_bytes(tokenizer: Tokenizer, id: int) -> bytes:
    """Give the bytes that a token adds to a text; a control token adds none."""
    text = tokenizer.token_text(id)
    if tokenizer.control_id(text) == id:
        return b""
    if BYTES.fullmatch(text):
        return bytes.fromhex(text.replace("<0x", "").replace(">", ""))
    return text.encode()
