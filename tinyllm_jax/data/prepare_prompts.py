"""Prompts to token rows in memory: what learning from own answers begins with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from tinyllm_jax.config import Config
from tinyllm_jax.data.chat import Message, read_questions
from tinyllm_jax.data.chat_sources import (
    SPLITS,
    check_found,
    read_sources,
    say_left_out,
    split_by_hash,
)
from tinyllm_jax.data.chat_template import ChatTemplate
from tinyllm_jax.data.prepare import hash_of
from tinyllm_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """What an answer comes after, and what may help to judge it."""

    ids: Int32[np.ndarray, " tokens"]  # ends with the head of the answer
    messages: tuple[Message, ...]
    answer: str  # of the record; "" where it has none
    metadata: dict[str, Any]  # the record's other fields


@dataclass(frozen=True)
class PromptSplit:
    """The prompts of one split, numbered in the order of the files."""

    prompts: tuple[Prompt, ...]

    @property
    def count(self) -> int:
        """Count the prompts."""
        return len(self.prompts)

    def read(self, numbers: Sequence[int] | np.ndarray) -> list[Prompt]:
        """Read prompts by number."""
        return [self.prompts[int(number)] for number in numbers]


@dataclass(frozen=True)
class PromptData:
    """Both splits of prompts, and what they came from."""

    train: PromptSplit
    validation: PromptSplit
    dataset_hash: str
    stats: dict[str, Any]


def prepare_prompts(config: Config, *, tokenizer: Tokenizer, progress: bool) -> PromptData:
    """Read prompts into memory; those that leave a row no room for an answer are left out.

    Arguments and errors are those of `prepare_conversations`.
    """
    template = ChatTemplate(tokenizer)
    found: dict[str, list[Prompt]] = {name: [] for name in SPLITS}
    files = []
    for source, counts, items in read_sources(config, read_questions, progress=progress):
        for item, split in items:
            ids = template.encode_prompt(item.messages)
            if len(ids) >= config.data.sequence_length:
                counts.leave_out_long(len(ids) + 1)
                continue
            counts.records_kept += 1
            found[split].append(Prompt(ids, item.messages, item.answer, item.metadata))
        files.append({"path": source.path, **counts.to_table()})
    facts = [
        [split, prompt.ids.tolist(), prompt.answer, prompt.metadata]
        for split, prompts in found.items()
        for prompt in prompts
    ]
    dataset_hash = hash_of([tokenizer.hash, facts])
    splits = {
        name: {"prompts": len(rows), "tokens": sum(len(row.ids) for row in rows)}
        for name, rows in found.items()
    }
    stats = {"files": files, "splits": splits, "dataset_hash": dataset_hash}
    say_left_out(files, config.data)
    check_found(
        {name: len(rows) for name, rows in found.items()},
        files=files,
        by_hash=split_by_hash(config.data),
        data=config.data,
        what="prompt",
    )
    train, validation = (PromptSplit(tuple(found[name])) for name in SPLITS)
    return PromptData(train, validation, dataset_hash, stats)
