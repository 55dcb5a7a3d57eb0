"""What a model is asked: a text to go on with, or a question to answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinyllm_jax.data.chat import SYSTEM, USER, Message
from tinyllm_jax.data.chat_template import ChatTemplate
from tinyllm_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Asked:
    """A prompt as tokens, and what is made of those that follow."""

    ids: list[int]
    end_id: int  # the token that ends what follows
    text: Callable[[list[int]], str]  # turns what followed into text
    lead: list[int]  # what must be decoded before what followed, so that it keeps its first space


def as_text(prompt: str, tokenizer: Tokenizer) -> Asked:
    """Let a model go on with a text; the text stands before what it writes."""
    ids = tokenizer.encode(prompt, bos=True)
    return Asked(ids, tokenizer.eos_id, lambda found: tokenizer.decode([*ids, *found]), ids)


def as_question(prompt: str, tokenizer: Tokenizer, *, system: str) -> Asked:
    """Let a model answer what a user says.

    Args:
        system: System prompt; "" is none.

    Raises:
        InputError: the tokenizer knows no turns.
    """
    first = [Message(SYSTEM, system)] if system else []
    return as_conversation([*first, Message(USER, prompt)], tokenizer)


def as_conversation(messages: Sequence[Message], tokenizer: Tokenizer) -> Asked:
    """Let a model answer at the end of a conversation.

    Raises:
        InputError: the tokenizer knows no turns.
    """
    template = ChatTemplate(tokenizer)
    ids = template.encode_prompt(messages).tolist()
    return Asked(ids, template.end_id, template.decode_answer, template.header)
