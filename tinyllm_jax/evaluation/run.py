"""An evaluation from settings to one table of results; the model comes as what scores and writes."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol

from tinyllm_jax.config import EvaluateConfig, ModelConfig, SamplingConfig
from tinyllm_jax.data.chat_template import ChatTemplate
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.evaluation.files import find_data_sets
from tinyllm_jax.evaluation.stories import Story, measure_stories
from tinyllm_jax.evaluation.tasks import Job, measure, open_job
from tinyllm_jax.evaluation.windows import Reader, Scorer
from tinyllm_jax.settings import to_table

# Stories that are written together; each such group draws with a seed of its own.
STORIES_AT_ONCE = 32


class Writer(Protocol):
    """A model with its tokenizer, as far as writing goes."""

    config: ModelConfig
    tokenizer: Tokenizer

    def continue_texts(
        self, prompts: Sequence[str], *, sampling: SamplingConfig, chat: bool
    ) -> list[tuple[str, str]]:
        """Continue each prompt, and say why each text ended."""
        ...


class Teller(Protocol):
    """Who tells a person how far it is."""

    def note(self, text: str) -> None:
        """Print a line."""
        ...

    def show(
        self,
        name: str,
        done: int,
        size: int | None,
        *,
        tokens_read: float,
        seconds: float,
        tokens_per_second: float,
    ) -> None:
        """Show how much of a data set is done; its size may not be known."""
        ...


def evaluate(
    model: Writer, scorer: Scorer, config: EvaluateConfig, *, teller: Teller
) -> dict[str, Any]:
    """Measure a model on all that the settings name.

    Returns:
        `results`, one table for each data set in order, `stories` where some were asked for, `model`
        and `settings`.

    Raises:
        InputError: a file or setting does not fit.
    """
    context, overlap = window_of(config, model.config)
    if config.evaluate.chat:
        ChatTemplate(model.tokenizer)  # says what is missing before anything is computed
    jobs = [open_job(each, config) for each in find_data_sets(config, say=teller.note)]
    reader = Reader(scorer, context=context, overlap=overlap, batch_size=config.evaluate.batch_size)
    if jobs:
        started = time.monotonic()
        reader.warm_up()
        teller.note(f"Compiled in {time.monotonic() - started:.1f} s.")
    results = [measure_in_time(job, reader, model.tokenizer, teller=teller) for job in jobs]
    table: dict[str, Any] = {
        "results": results,
        "model": {
            "vocab_size": model.config.vocab_size,
            "tokenizer": model.tokenizer.hash,
            "context": context,
            "overlap": overlap,
        },
        "settings": to_table(config),
    }
    if config.evaluate.stories:
        table["stories"] = measure_stories(write_stories(model, config, teller=teller))
    return table


def measure_in_time(
    job: Job, reader: Reader, tokenizer: Tokenizer, *, teller: Teller
) -> dict[str, Any]:
    """Measure one data set, and how fast that was."""
    started, tokens, batches = time.monotonic(), reader.tokens, reader.batches

    def speed() -> dict[str, float]:
        seconds = time.monotonic() - started
        read = reader.tokens - tokens
        return {"tokens_read": read, "seconds": seconds, "tokens_per_second": read / seconds}

    def on_progress(done: int) -> None:
        teller.show(job.data_set.name, done, job.size, **speed())

    found = measure(job, reader=reader, tokenizer=tokenizer, on_progress=on_progress)
    return {**found, "batches": reader.batches - batches, **speed()}


def window_of(config: EvaluateConfig, model: ModelConfig) -> tuple[int, int]:
    """Choose (tokens of a window, tokens that a later one reads again).

    Raises:
        InputError: the model cannot read so many, or nothing would be left to predict.
    """
    context = config.evaluate.context or model.max_position_embeddings
    if context > model.max_position_embeddings:
        raise InputError(
            f"evaluate.context={context} is more than model.max_position_embeddings="
            f"{model.max_position_embeddings}. Use {model.max_position_embeddings} or less."
        )
    overlap = config.evaluate.overlap if config.evaluate.overlap >= 0 else context // 2
    if overlap >= context:
        raise InputError(
            f"evaluate.overlap={overlap} leaves nothing to predict in windows of {context} tokens. "
            f"Use {context - 1} or less."
        )
    return context, overlap


def with_compute_dtype(config: ModelConfig, compute_dtype: str) -> ModelConfig:
    """Let a model compute in float32 unless its own settings are asked for; float64 stays."""
    if compute_dtype == "model" or config.compute_dtype == "float64":
        return config
    # A kernel that was chosen by name may not know float32.
    attention = "reference" if config.attention == "reference" else "auto"
    return dataclasses.replace(config, compute_dtype=compute_dtype, attention=attention)


def write_stories(model: Writer, config: EvaluateConfig, *, teller: Teller) -> list[Story]:
    """Let the model write `evaluate.stories` stories that begin with `sampling.prompt`."""
    stories: list[Story] = []
    sampling, chat = config.sampling, config.evaluate.chat
    started = time.monotonic()
    while (missing := config.evaluate.stories - len(stories)) > 0:
        group = dataclasses.replace(
            sampling,
            num_samples=min(missing, STORIES_AT_ONCE),
            seed=(sampling.seed + len(stories) // STORIES_AT_ONCE) % 2**32,
        )
        found = model.continue_texts([sampling.prompt], sampling=group, chat=chat)
        prompt = "" if chat else sampling.prompt
        stories += [Story(prompt, text, ended) for text, ended in found]
    seconds = time.monotonic() - started
    teller.note(f"{len(stories)} stories written in {seconds:.1f} s.")
    return stories
