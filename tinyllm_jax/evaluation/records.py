"""Questions with answers to choose from, and minimal pairs, out of records of any usual shape.

The shapes are those of ARC, OpenBookQA, PIQA, COPA, HellaSwag, SciQ, MMLU and BLiMP, as their authors
or the Hugging Face hub give them, of llm-foundry (query, choices, gold), and any other with usual
names. What stands before an answer is what lm-evaluation-harness writes there.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinyllm_jax.data.chat import FIELDS, checked_text, fields_of
from tinyllm_jax.data.chat_records import BadRecord

QUESTION = "{question}"
# What is written round a question where nothing else is usual.
CUE = f"Question: {QUESTION}\nAnswer:"
QUESTION_NAMES = ("query", "question", "question_stem", "prompt", "context", "ctx")
CHOICES_NAMES = ("choices", "options", "endings")
# Of these a text of digits is a place, counted from 0; of the others it may be an answer's own text.
PLACE_NAMES = ("gold", "label")
ANSWER_NAMES = (*PLACE_NAMES, "answerKey", "answer", "answer_idx", "target")
PAIR_NAMES = (("good", "bad"), ("sentence_good", "sentence_bad"))
# Digits of a place among the answers; Python reads no number of any length.
LONGEST_PLACE = 10
PHENOMENON_NAMES = ("phenomenon", "UID", "category", "linguistics_term")


@dataclass(frozen=True)
class Question:
    """A question, and answers of which one is right."""

    text: str
    cue: str  # what is written round the question, before an answer: has {question}
    choices: tuple[str, ...]
    gold: int  # place of the right one, from 0
    support: str = ""  # what is read before the question

    @property
    def asked(self) -> str:
        """Write the question with what is read before it."""
        return self.support + self.text

    def prompt(self, cue: str) -> str:
        """Write what stands before an answer.

        Args:
            cue: Written instead of the usual one; "" is the usual one.
        """
        return self.support + (cue or self.cue).replace(QUESTION, self.text)


@dataclass(frozen=True)
class Pair:
    """Two sentences that differ in little, of which one is good."""

    good: str
    bad: str
    phenomenon: str  # "" where the record names none


def kind_of(record: Mapping[str, Any], *, text_field: str) -> str:
    """Tell by its fields what a record is: corpus, conversations, choices or pairs.

    Raises:
        BadRecord: it is none of them.
    """
    if any(good in record and bad in record for good, bad in PAIR_NAMES):
        return "pairs"
    if any(names <= record.keys() for names in ({"goal", "sol1"}, {"premise", "choice1"})):
        return "choices"
    nested = isinstance(record.get("question"), Mapping) and "choices" in record["question"]
    if nested or "distractor1" in record or any(name in record for name in CHOICES_NAMES):
        return "choices"
    if isinstance(record.get(text_field), str):
        return "corpus"
    if any(name in record for name in FIELDS.values()):
        return "conversations"
    raise BadRecord(
        f"no text, conversation, question with choices, or pair of sentences; {fields_of(record)}. "
        "Name the field of a text with --data.text_field FIELD, or what the file holds with "
        "--evaluate.kind"
    )


def pair_of(record: Mapping[str, Any]) -> Pair:
    """Make a pair of a record.

    Raises:
        BadRecord: it holds none.
    """
    for names in PAIR_NAMES:
        if all(name in record for name in names):
            good, bad = (filled_text(record[name], name) for name in names)
            named = (record[name] for name in PHENOMENON_NAMES if name in record)
            return Pair(good, bad, str(next(named, "")))
    raise BadRecord(f"no fields 'good' and 'bad'; {fields_of(record)}. Write both")


def question_of(record: Mapping[str, Any]) -> Question:
    """Make a question of a record.

    Raises:
        BadRecord: it holds none, or does not say which answer is right.
    """
    if {"goal", "sol1", "sol2"} <= record.keys():  # PIQA
        return _question(record, filled_text(record["goal"], "goal"), CUE, ("sol1", "sol2"))
    if {"premise", "choice1", "choice2"} <= record.keys():
        return copa_question(record)
    if {"distractor1", "correct_answer"} <= record.keys():
        return sciq_question(record)
    inner: Mapping[str, Any] = record
    if isinstance(record.get("question"), Mapping):  # ARC, OpenBookQA, as their authors give them
        inner = {"question": record["question"].get("stem"), **record["question"]}
    name = first_name(inner, QUESTION_NAMES, "a question")
    text, cue = filled_text(inner[name], name), CUE
    if name == "query":
        text = text.rstrip("\n")
        # llm-foundry writes the cue's beginning into the query, and its end elsewhere.
        cue = f"{QUESTION}\nAnswer:" if text.startswith("Question:") else QUESTION
    elif "endings" in record:
        text, cue = hellaswag_text(record, text), QUESTION
    elif name not in ("question", "query"):  # a beginning that goes on
        cue = QUESTION
    choices, labels = choices_of(inner)
    if "endings" in record:
        choices = tuple(map(without_brackets, choices))
    return Question(text, cue, choices, gold_of(record, choices, labels))


def _question(record: Mapping[str, Any], text: str, cue: str, names: tuple[str, ...]) -> Question:
    choices = tuple(filled_text(record[name], name) for name in names)
    return Question(text, cue, choices, gold_of(record, choices, ()))


def copa_question(record: Mapping[str, Any]) -> Question:
    """Join premise and alternatives to one sentence, as lm-evaluation-harness does."""
    premise = filled_text(record["premise"], "premise").strip()
    words = {"cause": "because", "effect": "therefore"}
    word = words.get(str(record.get("question")))
    if word is None:
        raise BadRecord(f"'question' is {record.get('question')!r}. Use 'cause' or 'effect'")
    lowered = {
        name: text[0].lower() + text[1:]
        for name in ("choice1", "choice2")
        if (text := filled_text(record[name], name))
    }
    return _question({**record, **lowered}, f"{premise[:-1]} {word}", QUESTION, (*lowered,))


def sciq_question(record: Mapping[str, Any]) -> Question:
    """Put what supports the answer before the question, and the right answer last."""
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    choices = tuple(filled_text(record.get(name), name) for name in names)
    support = str(record.get("support") or "").lstrip()
    text = filled_text(record.get("question"), "question")
    return Question(text, CUE, choices, len(choices) - 1, f"{support}\n" if support else "")


def hellaswag_text(record: Mapping[str, Any], text: str) -> str:
    """Write the beginning that endings go on with, as lm-evaluation-harness does."""
    if {"activity_label", "ctx_a", "ctx_b"} <= record.keys():
        activity, first, second = (str(record[n]) for n in ("activity_label", "ctx_a", "ctx_b"))
        text = f"{activity}: {first} {second.capitalize()}"
    return without_brackets(text)


def without_brackets(text: str) -> str:
    """Take out what is left of WikiHow's layout in HellaSwag.

    Source:
        lm-evaluation-harness, tasks/hellaswag/utils.py.
    """
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def choices_of(record: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Take (texts, labels) of the answers; labels are () where they have none.

    They are a list of texts, a list of {text, label}, or {text: [...], label: [...]}.

    Raises:
        BadRecord: they are something else, or fewer than two.
    """
    name = first_name(record, CHOICES_NAMES, "answers to choose from")
    value, labels = record[name], []
    if isinstance(value, Mapping):
        labels, value = value.get("label") or [], value.get("text")
    elif isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        labels = [each["label"] for each in value if "label" in each]
        value = [each.get("text") for each in value]
    if not isinstance(value, list) or len(value) < 2:
        raise BadRecord(f"{name!r} is no list of two answers or more. Fix the record")
    if labels and not isinstance(labels, list):
        raise BadRecord(f"the labels of {name!r} are no list. Fix the record")
    if labels and len(labels) != len(value):
        raise BadRecord(
            f"{name!r} has {len(value)} answers and {len(labels)} labels. Fix the record"
        )
    texts = tuple(filled_text(text, f"answer {n} of {name!r}") for n, text in enumerate(value, 1))
    return texts, tuple(map(str, labels))


def gold_of(record: Mapping[str, Any], choices: tuple[str, ...], labels: tuple[str, ...]) -> int:
    """Find the right answer: a place from 0, a label, a letter, or the answer's own text.

    Raises:
        BadRecord: the record names none of the answers.
    """
    name = first_name(record, ANSWER_NAMES, "which answer is right")
    value = record[name]
    # A whole number is a place, but where the answers have such a label.
    if isinstance(value, int) and not isinstance(value, bool) and str(value) not in labels:
        place = value
    else:
        place = _place_of(str(value).strip(), name, choices, labels)
    if not 0 <= place < len(choices):
        shown = repr(value)[:40]
        hint = " Test splits often come without answers; use another" if value in ("", -1) else ""
        raise BadRecord(
            f"{name!r} is {shown}, and there are {len(choices)} answers.{hint or ' Fix the record'}"
        )
    return place


def _place_of(word: str, name: str, choices: tuple[str, ...], labels: tuple[str, ...]) -> int:
    if word in labels:
        return labels.index(word)
    is_place = word.isdecimal() and len(word) < LONGEST_PLACE
    if name in PLACE_NAMES and is_place:
        return int(word)
    stripped = [choice.strip() for choice in choices]
    if word in stripped:
        return stripped.index(word)
    if re.fullmatch("[A-Za-z]", word):
        return ord(word.upper()) - ord("A")
    return int(word) if is_place else -1


def first_name(record: Mapping[str, Any], names: tuple[str, ...], what: str) -> str:
    """Give the first of these names that the record has.

    Raises:
        BadRecord: it has none.
    """
    for name in names:
        if record.get(name) is not None:
            return name
    raise BadRecord(
        f"nothing says {what}; {fields_of(record)}. Use the name {' or '.join(map(repr, names[:3]))}"
    )


def filled_text(value: Any, name: str) -> str:
    """Refuse what is no text, or an empty one.

    Raises:
        BadRecord: it is.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # answers of sums
    text = checked_text(value, repr(name))
    if not text.strip():
        raise BadRecord(f"{name!r} is empty. Fix the record")
    return text
