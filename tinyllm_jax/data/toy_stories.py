"""Built-in corpus: short stories from a probabilistic grammar whose entropy is known exactly.

The words and plots stand in `toy_stories_words`, the engine in `toy_stories_grammar`. No two
derivations give the same text (the tests prove it), so the probability of a text is that of its one
derivation, and a model's loss can be held against the best possible one.
"""

import functools
import hashlib
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tinyllm_jax.data import toy_stories_words
from tinyllm_jax.data.toy_stories_grammar import Grammar
from tinyllm_jax.errors import InputError

SENTENCE_END = re.compile(r'[.!?]"?(?=\s+["A-Z]|\s*$)')


class HashedDraws:
    """Exactly uniform draws that are a function of (seed, index) in every version of everything.

    BLAKE2b of seed, index and a block number gives 16-bit words; a word that would make some
    results likelier than others is left out.
    """

    __slots__ = ("_block", "_key", "_words")

    def __init__(self, seed: int, index: int):
        self._key = f"{seed}:{index}:"
        self._block = 0
        self._words: list[int] = []

    def __call__(self, options: int) -> int:
        limit = 65536 - 65536 % options
        while True:
            if not self._words:
                block = hashlib.blake2b(f"{self._key}{self._block}".encode())
                self._words.extend(struct.unpack("<32H", block.digest()))
                self._block += 1
            word = self._words.pop()
            if word < limit:
                return word % options


@functools.cache
def grammar() -> Grammar:
    """Compile the grammar of the built-in stories, once."""
    return Grammar(
        variables=toy_stories_words.VARIABLES,
        distinct=toy_stories_words.DISTINCT,
        phrases=toy_stories_words.PHRASES,
        sentences=toy_stories_words.SENTENCES,
        plots=toy_stories_words.PLOTS,
    )


def generate_story(seed: int, index: int) -> str:
    """Make story number `index` of the corpus `seed`, the same on every machine.

    Raises:
        InputError: a negative seed or index.
    """
    for name, value in (("seed", seed), ("index", index)):
        if value < 0:
            raise InputError(f"{name}={value} of a toy story is negative. Use 0 or more.")
    return grammar().generate(HashedDraws(seed, index))


def generate_stories(*, seed: int, start: int, stop: int) -> Iterator[str]:
    """Make the stories `start` up to, not including, `stop` of the corpus `seed`."""
    for index in range(start, stop):
        yield generate_story(seed, index)


def log2_probability(story: str) -> float:
    """Give the log2 of the probability that one draw is this very text (bits, negative).

    Raises:
        InputError: the grammar cannot make this text.
    """
    probability, _, furthest = grammar().read_story(story)
    if not probability:
        raise InputError(
            "The text is no story of the toy grammar, which cannot go on as the text does after "
            f"character {furthest} ({story[max(0, furthest - 30) : furthest]!r}). Pass a story "
            "that generate_story made, unchanged."
        )
    return math.log2(probability)


def count_derivations(story: str) -> int:
    """Count the ways the grammar makes this text: 1 for every story, 0 for any other text."""
    return grammar().read_story(story)[1]


@dataclass(frozen=True)
class Floor:
    """The lowest loss that any model can expect on a set of stories: their own -log2 p."""

    documents: int
    bits: float
    text_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the text; that the story ends is part of its bits."""
        return self.bits / self.text_bytes


def floor_bits(stories: Iterable[str]) -> Floor:
    """Add up the exact information in these stories.

    Raises:
        InputError: a text that is no story of the grammar, or no text at all.
    """
    documents, bits, text_bytes = 0, 0.0, 0
    for story in stories:
        bits -= log2_probability(story)
        documents += 1
        text_bytes += len(story)  # the grammar is ASCII
    if not documents:
        raise InputError("The floor of no stories is undefined. Pass at least one story.")
    return Floor(documents=documents, bits=bits, text_bytes=text_bytes)


@functools.cache
def entropy_bits() -> float:
    """Give the exact entropy of one story in bits; in nats it is the best loss per document."""
    return grammar().entropy_bits()


@functools.cache
def expected_bytes() -> float:
    """Give the exact mean length of a story in bytes."""
    return grammar().expected_bytes()


def entropy_bits_per_byte() -> float:
    """Give entropy over mean length: the best bits per byte on an endless corpus."""
    return entropy_bits() / expected_bytes()


def sentence_is_grammatical(sentence: str) -> bool:
    """Say whether the grammar can make this one sentence, whatever the story round it says."""
    return grammar().is_sentence(sentence)


def split_sentences(text: str) -> list[str]:
    """Cut text into sentences, those inside a quotation staying with the sentence that quotes.

    A sentence ends at `.`, `!` or `?` and a closing quote if one follows, outside quotation marks,
    where a capital or a quotation mark comes next. Text after the last end is one more sentence.
    """
    sentences, start, counted, quotes = [], 0, 0, 0
    for end in (match.end() for match in SENTENCE_END.finditer(text)):
        quotes += text.count('"', counted, end)
        counted = end
        if quotes % 2 == 0:
            sentences.append(text[start:end].strip())
            start = end
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


@functools.cache
def corpus_hash() -> str:
    """Give the sha256 (hex) of the whole definition: another one means other stories."""
    words = toy_stories_words
    parts = (words.VARIABLES, words.DISTINCT, words.PHRASES, words.SENTENCES, words.PLOTS)
    sampled = list(generate_stories(seed=0, start=0, stop=100))
    return hashlib.sha256(repr((parts, sampled)).encode()).hexdigest()
