"""What a model is asked: a text to go on with, or a question to answer."""

from collections.abc import Callable
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


def as_text(prompt: str, tokenizer: Tokenizer) -> Asked:
    """Let a model go on with a text; the text stands before what it writes."""
    ids = tokenizer.encode(prompt, bos=True)
    return Asked(ids, tokenizer.eos_id, lambda found: tokenizer.decode([*ids, *found]))


def as_question(prompt: str, tokenizer: Tokenizer, *, system: str) -> Asked:
    """Let a model answer what a user says.

    Args:
        system: System prompt; "" is none.

    Raises:
        InputError: the tokenizer knows no turns.
    """
    template = ChatTemplate(tokenizer)
    first = [Message(SYSTEM, system)] if system else []
    ids = template.encode_prompt([*first, Message(USER, prompt)]).tolist()
    return Asked(ids, template.end_id, template.decode_answer)
