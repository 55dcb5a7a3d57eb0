"""Conversations as tokens: ChatML, what of it is learnt, and the Jinja that renders the same text.

    <|im_start|>user
    Tell me a story.<|im_end|>
    <|im_start|>assistant
    Once upon a time ...<|im_end|>

The two control tokens come from ids alone: a text that names them is plain text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Int32

from tinyllm_jax.data.chat import ASSISTANT, Message
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.errors import InputError

BEGIN = "<|im_start|>"
END = "<|im_end|>"
CONTROL_TOKENS = (BEGIN, END)
HEADER = f"{ASSISTANT}\n"


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens."""

    ids: Int32[np.ndarray, " tokens"]
    learn: Bool[np.ndarray, " tokens"]  # answers and the <|im_end|> that closes each
    ends: tuple[int, ...]  # tokens up to the end of each turn
    learnt_bytes: tuple[int, ...]  # UTF-8 bytes of each turn, 0 for those that are not learnt

    def first_turns(self, count: int) -> "Encoded":
        """Keep so many turns, at least one."""
        end = self.ends[count - 1]
        return Encoded(
            self.ids[:end], self.learn[:end], self.ends[:count], self.learnt_bytes[:count]
        )


class ChatTemplate:
    """ChatML for one tokenizer.

    A conversation begins with bos, as every document does that the model was pretrained on; only
    where bos is `<|im_start|>` itself, which each turn begins with anyway, it stands there once.
    There is no eos: `<|im_end|>` is what ends an answer.

    A turn is tokenised as one text from its role to its last character, as others tokenise the
    rendered text. An answer whose first characters would join the line's end before them (blanks,
    with some tokenizers) is tokenised by itself, since that is what a model does that answers.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Look the control tokens up.

        Raises:
            InputError: the tokenizer has none.
        """
        begin, end = (tokenizer.control_id(text) for text in CONTROL_TOKENS)
        if begin is None or end is None:
            raise InputError(
                f"This tokenizer has no control tokens {BEGIN} and {END}, so there are no turns in "
                "what its model has read. Train the model on conversations first (--mode sft)."
            )
        self.tokenizer = tokenizer
        self.begin_id: int = begin
        self.end_id: int = end
        self._first = [] if tokenizer.bos_id == begin else [tokenizer.bos_id]
        self._newline, self.header = tokenizer.encode_batch(["\n", HEADER])

    @property
    def jinja(self) -> str:
        """Give the template as `chat_template` of a Hugging Face tokenizer."""
        return (
            ("{{ bos_token }}" if self._first else "")
            + "{% for message in messages %}"
            + f"{{{{ '{BEGIN}' + message['role'] + '\\n' + message['content'] + '{END}\\n' }}}}"
            + "{% endfor %}"
            + f"{{% if add_generation_prompt %}}{{{{ '{BEGIN}{ASSISTANT}\\n' }}}}{{% endif %}}"
        )

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """Write a conversation as text, for people to see; tokens are never made of it.

        Args:
            prompt: Begin an answer behind the last turn.
        """
        first = "".join(self.tokenizer.token_text(id) for id in self._first)
        turns = [f"{BEGIN}{message.role}\n{message.content}{END}\n" for message in messages]
        return first + "".join(turns) + (f"{BEGIN}{HEADER}" if prompt else "")

    def encode(
        self, messages: Sequence[Message]
    ) -> tuple[Int32[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
        """Turn a conversation into ids, and tell for each whether it is learnt."""
        encoded = self.encode_many([(messages, 0)])[0]
        return encoded.ids, encoded.learn

    def encode_prompt(self, messages: Sequence[Message]) -> Int32[np.ndarray, " tokens"]:
        """Turn what stands before an answer into ids, the head of the answer included."""
        ids, _ = self.encode(messages)
        return np.concatenate([ids, np.array([self.begin_id, *self.header], np.int32)])

    def encode_many(self, conversations: Sequence[tuple[Sequence[Message], int]]) -> list[Encoded]:
        """Turn conversations into ids in one library call.

        Args:
            conversations: Messages, and how many of them only lead to what is learnt.
        """
        turns = [message for messages, _ in conversations for message in messages]
        tokens = iter(self._encode_turns(turns))
        return [
            self._join([(message, next(tokens)) for message in messages], given=given)
            for messages, given in conversations
        ]

    def _encode_turns(self, turns: Sequence[Message]) -> list[tuple[list[int], list[int]]]:
        """Encode what stands between the control tokens of each turn, as (head, answer)."""
        whole = self.tokenizer.encode_batch([f"{turn.role}\n{turn.content}" for turn in turns])
        size, found = len(self.header), []
        for turn, ids in zip(turns, whole, strict=True):
            if turn.role != ASSISTANT:
                found.append((ids, []))
            elif ids[:size] == self.header:
                found.append((self.header, ids[size:]))
            else:
                found.append((self.header, self.tokenizer.encode(turn.content)))
        return found

    def _join(
        self, turns: Sequence[tuple[Message, tuple[list[int], list[int]]]], *, given: int
    ) -> Encoded:
        """Put the control tokens round the turns of one conversation."""
        ids, learn = [*self._first], [False] * len(self._first)
        ends, learnt_bytes = [], []
        for number, (message, (head, answer)) in enumerate(turns):
            learnt = message.role == ASSISTANT and number >= given
            ids += [self.begin_id, *head, *answer, self.end_id, *self._newline]
            learn += [False] * (1 + len(head)) + [learnt] * (len(answer) + 1)
            learn += [False] * len(self._newline)
            ends.append(len(ids))
            learnt_bytes.append(len(message.content.encode()) * learnt)
        return Encoded(
            np.array(ids, np.int32), np.array(learn, bool), tuple(ends), tuple(learnt_bytes)
        )

    def decode_answer(self, ids: Iterable[SupportsIndex]) -> str:
        """Turn what a model answered behind `encode_prompt` into text, up to what ends it."""
        kept = []
        for id in map(int, ids):
            if id in (self.end_id, self.tokenizer.eos_id):
                break
            kept.append(id)
        # Behind its head, since the first word of a text by itself would lose a space before it.
        head = self.tokenizer.decode(self.header)
        return self.tokenizer.decode([*self.header, *kept]).removeprefix(head)
