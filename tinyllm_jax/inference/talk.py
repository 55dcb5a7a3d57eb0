"""A conversation with one model, or a text that grows, over a `Service`."""

import queue
from collections.abc import Callable, Iterator, Sequence

from tinyllm_jax.config import SamplingConfig
from tinyllm_jax.data.asking import Asked, as_conversation, as_text
from tinyllm_jax.data.chat import ASSISTANT, SYSTEM, USER, Message
from tinyllm_jax.inference.service import Piece, Service, Ticket

# What of the context an answer may count on, before the oldest turns are left out.
ROOM_FOR_ANSWER = 1 / 4


class Answer:
    """An answer as it is made: iterate over its text; `cancel` ends it early.

    Attributes:
        text: What came so far.
        ended: "" while it goes on, then as in `Piece`.
        new_tokens: Tokens made so far.
        left_out: Oldest turns of the conversation that the model did not read for it.
    """

    def __init__(self, *, left_out: int, keep: Callable[["Answer"], None]):
        self.text, self.ended = "", ""
        self.new_tokens = 0
        self.left_out = left_out
        self._keep = keep
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._ticket: Ticket | None = None

    def begin(self, ask: Callable[[Callable[[Piece], None]], Ticket]) -> None:
        """Ask the service for it."""
        self._ticket = ask(self._pieces.put)

    def cancel(self) -> None:
        """End it early; what came until then stays."""
        assert self._ticket is not None
        self._ticket.cancel()

    def __iter__(self) -> Iterator[str]:
        """Give its text as it comes."""
        while not self.ended:
            piece = self._pieces.get()
            self.text += piece.text
            self.ended = piece.ended
            self.new_tokens += piece.new_tokens
            if self.ended:
                self._keep(self)
            if piece.text:
                yield piece.text


class Talk:
    """What was said so far, and what is said next.

    A model that knows turns answers at the end of a conversation. Any other goes on with a text,
    and each text stands by itself.

    Args:
        service: Makes the answers.
        system: System prompt of the conversation; "" is none.
        sampling: How tokens are picked; may be exchanged between answers.

    Attributes:
        turns: The conversation without its system prompt; of a text, the text and what followed.
    """

    def __init__(self, service: Service, *, system: str, sampling: SamplingConfig):
        self.service = service
        self.system = system
        self.sampling = sampling
        self.turns: list[Message] = []
        self._last: tuple[str, list[Message]] | None = None  # asked, and what stood before it
        self._asked = 0  # answers so far, so that each is drawn anew

    @property
    def is_chat(self) -> bool:
        """Tell a conversation from texts to go on with."""
        return self.service.can_chat

    def reset(self) -> None:
        """Forget what was said; settings and system prompt stay."""
        self.turns, self._last = [], None

    @property
    def can_retry(self) -> bool:
        """Tell whether something was asked since the last reset."""
        return self._last is not None

    @property
    def last_text(self) -> str:
        """Give what was asked last."""
        return self._last[0] if self._last else ""

    def ask(self, text: str) -> Answer:
        """Say something, and get the answer to it.

        Raises:
            InputError: it leaves no room for an answer.
        """
        question = Message(USER, text)
        if self.is_chat:
            turns = [*self.turns, question]
            asked, left_out = self._fitting(turns)
        else:
            turns, left_out = [question], 0
            asked = as_text(text, self.service.tokenizer)
        answer = self._begin(asked, turns, left_out=left_out)
        self._last = text, self.turns
        return answer

    def go_on(self) -> Answer:
        """Go on where the last text ended.

        Raises:
            InputError: the context has no room for more.
        """
        assert self.turns
        return self.ask("".join(turn.content for turn in self.turns))

    def retry(self) -> Answer:
        """Draw the last answer again.

        Raises:
            InputError: there is no room for an answer any more; what was said stays.
        """
        assert self._last is not None
        said = self.turns
        text, self.turns = self._last
        try:
            return self.ask(text)
        except BaseException:
            self.turns = said
            raise

    def used_tokens(self) -> int:
        """Count the tokens of what was said, a system prompt included."""
        tokenizer = self.service.tokenizer
        if not self.is_chat:
            return len(as_text("".join(turn.content for turn in self.turns), tokenizer).ids)
        return len(as_conversation([*self._system(), *self.turns], tokenizer).ids)

    def messages(self) -> list[Message]:
        """Give the whole conversation."""
        return [*self._system(), *self.turns]

    def _system(self) -> list[Message]:
        return [Message(SYSTEM, self.system)] if self.system and self.is_chat else []

    def _fitting(self, turns: Sequence[Message]) -> tuple[Asked, int]:
        """Leave out as many of the oldest turns as there is no room for, but never the last."""
        context = self.service.context
        room = context - min(self.sampling.max_new_tokens, int(context * ROOM_FOR_ANSWER))
        for left_out in range(0, len(turns), 2):
            asked = as_conversation([*self._system(), *turns[left_out:]], self.service.tokenizer)
            if len(asked.ids) <= room or left_out + 1 == len(turns):
                return asked, left_out
        raise AssertionError("the last turn is a question, so their number is odd")

    def _begin(self, asked: Asked, turns: Sequence[Message], *, left_out: int) -> Answer:
        def keep(answer: Answer) -> None:
            # An answer without a word cannot be followed by a question, nor be learnt from.
            if answer.text.strip() or not self.is_chat:
                self.turns = [*turns, Message(ASSISTANT, answer.text)]

        answer = Answer(left_out=left_out, keep=keep)
        number, self._asked = self._asked, self._asked + 1
        answer.begin(
            lambda on_piece: self.service.ask(
                asked,
                sampling=self.sampling,
                sample_number=number,
                stop=(),
                alternatives=None,
                on_piece=on_piece,
            )
        )
        return answer
