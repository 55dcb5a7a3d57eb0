"""Checks that both kinds of tokenizer make on texts and on ids."""

from collections.abc import Iterable
from typing import SupportsIndex

from tinyllm_jax.errors import InputError


def require_unicode(text: str) -> None:
    """Refuse text that UTF-8 cannot hold, which Python allows in a `str`.

    Raises:
        InputError: the text has half of a surrogate pair; its place stands in the message.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"Character {error.start} of the text is half of a surrogate pair "
            f"({text[error.start]!r}), which is no character. Write the whole character, or leave "
            "it out."
        ) from None


def text_ids(
    ids: Iterable[SupportsIndex], *, vocab_size: int, bos_id: int, eos_id: int, left_out: set[int]
) -> list[int]:
    """Pick the ids that stand for text: up to the first eos, without those in `left_out`.

    A bos at the very start never ends the text, although GPT-2 has one token for bos and eos.

    Raises:
        InputError: an id is outside the vocabulary.
    """
    kept = []
    for place, id in enumerate(map(int, ids)):
        if not 0 <= id < vocab_size:
            raise InputError(
                f"Token id {id} is outside this tokenizer's 0 to {vocab_size - 1}. Use "
                "the tokenizer that the ids were made with."
            )
        if id == eos_id and not (place == 0 and id == bos_id):
            break
        if id not in left_out:
            kept.append(id)
    return kept
