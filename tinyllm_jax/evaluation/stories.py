"""What can be counted in stories that a model wrote."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinyllm_jax.data.toy_stories import grammar, sentence_is_grammatical, split_sentences
from tinyllm_jax.evaluation.measures import Measured, mean, named, ratio

WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
DISTINCT_SIZES = (1, 2, 3)
# Words in a row that a story should not say twice.
REPEATED_SIZE = 4


@dataclass(frozen=True)
class Story:
    """A text that a model wrote."""

    prompt: str  # what it was given, as far as it stands in the text
    text: str  # the whole, prompt included
    ended: str  # "eos", "length" or "context"


def measure_stories(stories: Sequence[Story]) -> dict[str, Any]:
    """Measure stories.

    - `words`: of what the model wrote, without the prompt.
    - `ended_share`: stories that the model ended itself.
    - `distinct_N`: different runs of N words, by all of them, over all stories together. It falls
      with their number and length, so compare as many stories of the same settings.
    - `self_repetition`: runs of four words that stand earlier in the same story, by all of them.
    - `grammatical_sentences`: sentences that the grammar of the built-in stories can make, of those
      that are whole; `grammatical_stories`: whole stories, the same. They mean something for models
      of these stories only.

    Source:
        Li et al. 2016, arXiv:1510.03055, section 5.3 (distinct-n).
    """
    written = [words_of(story.text[len(story.prompt) :]) for story in stories]
    results: dict[str, Any] = {
        "stories": len(stories),
        **named("words", mean([len(words) for words in written])),
        **named("ended_share", mean([story.ended == "eos" for story in stories])),
    }
    for size in DISTINCT_SIZES:
        runs = [run for words in written for run in runs_of(words, size)]
        results[f"distinct_{size}"] = len(set(runs)) / max(len(runs), 1)
    counted = [runs_of(words, REPEATED_SIZE) for words in written]
    repeated = [len(runs) - len(set(runs)) for runs in counted]
    results |= named("self_repetition", share(repeated, [len(runs) for runs in counted]))
    judged = [judge(story) for story in stories]
    good, sentences = ([pair[place] for pair in judged] for place in (0, 1))
    results |= named("grammatical_sentences", share(good, sentences))
    whole = [story.ended == "eos" and is_toy_story(story.text) for story in stories]
    return results | named("grammatical_stories", mean(whole))


def share(parts: Sequence[int], wholes: Sequence[int]) -> Measured:
    """Divide sums over stories; of nothing, it is 0."""
    return ratio(parts, wholes) if sum(wholes) else Measured(0.0, None)


def words_of(text: str) -> list[str]:
    """Cut a text into words, in small letters."""
    return WORD.findall(text.lower())


def runs_of(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """List every run of so many words."""
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def judge(story: Story) -> tuple[int, int]:
    """Count the sentences that the built-in grammar can make, and all that are whole."""
    sentences = split_sentences(story.text)
    if story.ended != "eos":  # the last one was cut off
        sentences = sentences[:-1]
    return sum(map(sentence_is_grammatical, sentences)), len(sentences)


def is_toy_story(text: str) -> bool:
    """Say whether the built-in grammar can make this whole story."""
    return grammar().read_story(text)[0] > 0
