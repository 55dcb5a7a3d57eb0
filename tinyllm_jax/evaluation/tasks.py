"""What is measured on each kind of data: texts made of records, and numbers made of their scores."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyllm_jax.config import EvaluateConfig
from tinyllm_jax.data.chat import ASSISTANT, SYSTEM, USER, Message
from tinyllm_jax.data.chat_template import ChatTemplate
from tinyllm_jax.data.corpus import Counts
from tinyllm_jax.data.sources import TOY
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.data.toy_stories import floor_bits
from tinyllm_jax.errors import InputError
from tinyllm_jax.evaluation.files import DataSet, conversation_reader, read, read_texts
from tinyllm_jax.evaluation.measures import mean, named, ratio
from tinyllm_jax.evaluation.records import Pair, Question, pair_of, question_of
from tinyllm_jax.evaluation.windows import Reader, Scored, Text, keep_end

# Documents that are tokenised in one call.
DOCUMENTS_AT_ONCE = 256
# exp of more is no float; a loss above is that of a broken model.
LARGEST_LOSS = 700.0

# Told how many documents, questions or pairs are done.
OnProgress = Callable[[int], None]


@dataclass
class Job:
    """A data set to measure, what was read of it beforehand, and what becomes of its records."""

    data_set: DataSet
    config: EvaluateConfig
    counts: Counts = field(default_factory=Counts)
    records: list[Any] = field(default_factory=list)  # of questions or pairs

    @property
    def size(self) -> int | None:
        """How many there are to do, where that is known."""
        return len(self.records) or None


def open_job(data_set: DataSet, config: EvaluateConfig) -> Job:
    """Read questions or pairs, so that a broken one is found before anything is computed.

    Raises:
        InputError: a record is broken, or there is none.
    """
    job = Job(data_set, config)
    makers = {"choices": question_of, "pairs": pair_of}
    if data_set.kind in makers:
        job.records = list(read(data_set, config, job.counts, makers[data_set.kind]))
        require(job.records, job)
    if data_set.kind == "pairs" and config.evaluate.chat:
        raise InputError(
            f"{data_set.name}: pairs of sentences, which answer no question. Leave --chat out."
        )
    return job


def measure(
    job: Job, *, reader: Reader, tokenizer: Tokenizer, on_progress: OnProgress
) -> dict[str, Any]:
    """Score one data set.

    Raises:
        InputError: a record is broken, or nothing is left to score; or turns are asked of a
            tokenizer that knows none.
    """
    kinds = {
        "corpus": measure_corpus,
        "conversations": measure_conversations,
        "choices": measure_choices,
        "pairs": measure_pairs,
    }
    results = kinds[job.data_set.kind](job, reader, tokenizer, on_progress)
    left_out = {"bad_records": job.counts.bad_records, "too_short": job.counts.too_short}
    return {"name": job.data_set.name, "kind": job.data_set.kind, **results, **left_out}


# Documents ----------------------------------------------------------------------------------------


def measure_corpus(
    job: Job, reader: Reader, tokenizer: Tokenizer, on_progress: OnProgress
) -> dict[str, Any]:
    """Measure the loss of documents, each from bos to eos."""
    stories: list[str] | None = [] if job.data_set.paths == (TOY,) else None
    text_bytes: list[int] = []

    def texts() -> Iterator[Text]:
        documents = read_texts(job.data_set, job.config, job.counts)
        while batch := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
            for document, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                text_bytes.append(len(document.encode()))
                if stories is not None:
                    stories.append(document)
                yield Text([tokenizer.bos_id, *ids, tokenizer.eos_id], 1)

    nats, tokens, ends, windowed = [], [], [], 0
    for scored in reader.score(texts(), on_progress=lambda: on_progress(len(nats))):
        nats.append(-scored.total)
        ends.append(-float(scored.log_probs[-1]))
        tokens.append(len(scored.log_probs))
        windowed += scored.windows > 1
    require(nats, job)
    without_end = np.subtract(nats, ends)
    results = {
        **losses(nats, tokens, text_bytes),
        **named("bits_per_byte_without_end", bits_per_byte(without_end, text_bytes)),
        "documents": len(nats),
        "documents_in_windows": windowed,
    }
    if stories is not None:
        results["entropy_floor_bits_per_byte"] = floor_bits(stories).bits_per_byte
    return results


def measure_conversations(
    job: Job, reader: Reader, tokenizer: Tokenizer, on_progress: OnProgress
) -> dict[str, Any]:
    """Measure the loss of what the assistant says, each answer with the token that ends it."""
    template = ChatTemplate(tokenizer)
    learnt: list[np.ndarray] = []
    text_bytes: list[int] = []

    make = conversation_reader(job.config)

    def texts() -> Iterator[Text]:
        for conversation in read(job.data_set, job.config, job.counts, make):
            (encoded,) = template.encode_many([(conversation.messages, 0)])
            learnt.append(encoded.learn[1:])
            text_bytes.append(sum(encoded.learnt_bytes))
            yield Text(encoded.ids.tolist(), 1)

    nats, tokens, windowed = [], [], 0
    for scored in reader.score(texts(), on_progress=lambda: on_progress(len(nats))):
        mask = learnt[len(nats)]
        nats.append(-float(scored.log_probs[mask].sum()))
        tokens.append(int(mask.sum()))
        windowed += scored.windows > 1
    require(nats, job)
    return {
        **losses(nats, tokens, text_bytes),
        "documents": len(nats),
        "documents_in_windows": windowed,
    }


def losses(
    nats: Sequence[float], tokens: Sequence[int], text_bytes: Sequence[int]
) -> dict[str, Any]:
    """Say the log-likelihoods of documents in every unit.

    - `loss`: nats for each token that is scored.
    - `perplexity`: exp of the loss.
    - `bits_per_byte`: bits for each UTF-8 byte of the text as it was read; comparable between
      tokenizers.
    """
    loss = ratio(nats, tokens)
    perplexity = math.exp(min(loss.value, LARGEST_LOSS))
    return {
        **named("loss", loss),
        "perplexity": perplexity,
        "perplexity_stderr": None if loss.stderr is None else perplexity * loss.stderr,
        **named("bits_per_byte", bits_per_byte(nats, text_bytes)),
        "tokens": sum(tokens),
        "bytes": sum(text_bytes),
    }


def bits_per_byte(nats: Any, text_bytes: Sequence[int]) -> Any:
    """Divide the bits of documents by their bytes."""
    return ratio(np.divide(nats, math.log(2)), text_bytes)


# Questions ----------------------------------------------------------------------------------------


def measure_choices(
    job: Job, reader: Reader, tokenizer: Tokenizer, on_progress: OnProgress
) -> dict[str, Any]:
    """Let the model choose the likeliest answer to each question.

    - `acc`: by log-likelihood.
    - `acc_norm`: by log-likelihood for each character of the answer.
    - `acc_bytes`: by log-likelihood for each UTF-8 byte of it.

    Source:
        lm-evaluation-harness 0.4.13, lm_eval/api/task.py, `process_results`; of equals the first.
    """
    questions: list[Question] = job.records
    cut = 0
    make = question_encoder(job.config, tokenizer)

    def texts() -> Iterator[Text]:
        nonlocal cut
        for question in questions:
            whole = make(question)
            shorter = [keep_end(text, context=reader.context) for text in whole]
            cut += any(a is not b for a, b in zip(whole, shorter, strict=True))
            yield from shorter

    right: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    chances, ties = [], 0
    scores = reader.score(texts(), on_progress=lambda: on_progress(len(chances)))
    for first in scores:
        question = questions[len(chances)]
        totals = [first.total]
        totals += [s.total for s in itertools.islice(scores, len(question.choices) - 1)]
        require_numbers(totals, job)
        lengths = {
            "acc": [1] * len(totals),
            "acc_norm": [len(choice) for choice in question.choices],
            "acc_bytes": [len(choice.encode()) for choice in question.choices],
        }
        for name, divisors in lengths.items():
            right[name].append(int(np.argmax(np.divide(totals, divisors))) == question.gold)
        chances.append(1 / len(totals))
        ties += sorted(totals)[-2] == max(totals)
    results: dict[str, Any] = {}
    for name, hits in right.items():
        results |= named(name, mean(hits))
    return {
        **results,
        "chance": sum(chances) / len(chances),
        "questions": len(chances),
        "questions_cut": cut,
        "ties": ties,
    }


def question_encoder(
    config: EvaluateConfig, tokenizer: Tokenizer
) -> Callable[[Question], list[Text]]:
    """Give what makes a text of each answer of a question, of which the answer is scored."""
    # A shell hands the two characters on as they are.
    cue = config.evaluate.prompt.replace("\\n", "\n")
    if not config.evaluate.chat:
        return lambda question: [
            answer_text(question.prompt(cue), f" {choice}", tokenizer)
            for choice in question.choices
        ]
    template = ChatTemplate(tokenizer)
    system = [Message(SYSTEM, config.chat.system)] if config.chat.system else []

    def as_turns(question: Question) -> list[Text]:
        asked = [*system, Message(USER, question.asked)]
        start = len(template.encode_prompt(asked))
        found = []
        for choice in question.choices:
            ids, learn = template.encode([*asked, Message(ASSISTANT, choice)])
            end = int(np.flatnonzero(learn)[-1])  # of the token that ends the answer
            found.append(Text(ids[:end].tolist(), start))
        return found

    return as_turns


def answer_text(prompt: str, answer: str, tokenizer: Tokenizer) -> Text:
    """Encode a prompt and what goes on with it, of which all is scored that is not the prompt's own.

    Blanks at the prompt's end belong to the answer: they are part of its first token.

    Source:
        lm-evaluation-harness 0.4.13, lm_eval/api/model.py, `TemplateLM._encode_pair`.
    """
    stripped = prompt.rstrip()
    answer = prompt[len(stripped) :] + answer
    read_first, whole = tokenizer.encode_batch([stripped, stripped + answer])
    same = common_length(read_first, whole)
    # Where the answer joins the prompt's last token, that token is scored with it; where it is
    # nothing, nothing is.
    return Text([tokenizer.bos_id, *whole], same + 1)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


# Pairs --------------------------------------------------------------------------------------------


def measure_pairs(
    job: Job, reader: Reader, tokenizer: Tokenizer, on_progress: OnProgress
) -> dict[str, Any]:
    """Count the pairs whose good sentence is the likelier one, in all and by phenomenon.

    Source:
        Warstadt et al. 2020, arXiv:1912.00582: whole sentences, compared as they are.
    """
    pairs: list[Pair] = job.records

    def texts() -> Iterator[Text]:
        for pair in pairs:
            for ids in tokenizer.encode_batch([pair.good, pair.bad]):
                yield Text([tokenizer.bos_id, *ids], 1)

    right, ties = [], 0
    scores = reader.score(texts(), on_progress=lambda: on_progress(len(right)))
    for good, bad in in_twos(scores):
        require_numbers([good.total, bad.total], job)
        # Two sentences that are one to the tokenizer cannot be told apart.
        right.append(good.total > bad.total)
        ties += good.total == bad.total
    by_name: dict[str, list[bool]] = {}
    for pair, hit in zip(pairs, right, strict=True):
        by_name.setdefault(pair.phenomenon, []).append(hit)
    phenomena = {
        name: {**named("acc", mean(hits)), "pairs": len(hits)}
        for name, hits in sorted(by_name.items())
    }
    return {
        **named("acc", mean(right)),
        "chance": 0.5,
        "pairs": len(right),
        "ties": ties,
        "phenomena": phenomena if set(by_name) != {""} else {},
    }


def in_twos(scores: Iterable[Scored]) -> Iterator[tuple[Scored, Scored]]:
    """Take scores two by two."""
    each = iter(scores)
    return zip(each, each, strict=True)


def require_numbers(totals: Sequence[float], job: Job) -> None:
    """Refuse a model whose likelihoods cannot be compared.

    Raises:
        InputError: one of them is no number.
    """
    if np.isnan(totals).any():
        raise InputError(
            f"{job.data_set.name}: the model's log-likelihoods are no numbers. Look at its weights, or "
            "evaluate an earlier checkpoint."
        )


def require(found: Sequence[Any], job: Job) -> None:
    """Refuse a data set of which nothing is left.

    Raises:
        InputError: says what became of it.
    """
    if not found:
        counts = job.counts
        raise InputError(
            f"{job.data_set.name}: nothing to score. Of {counts.documents_read} documents or records, "
            f"{counts.bad_records} are broken and {counts.too_short} are shorter than "
            "data.min_document_characters. Give another file."
        )
