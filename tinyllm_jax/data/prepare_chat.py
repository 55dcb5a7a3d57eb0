"""Conversations and preferences to token shards with a loss mask.

Shards lie in `data_dir()/prepared/KEY/` as those of documents do, and are read by the same batches.
A conversation that is longer than a row keeps the turns that fit, up to an answer. A pair of which
either side is longer than a row is left out: both must be whole to be compared.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm_jax.config import Config, DataConfig, data_dir
from tinyllm_jax.data.batches import Batch, RowReader
from tinyllm_jax.data.chat import (
    ASSISTANT,
    ChatCounts,
    Conversation,
    Preference,
    read_conversations,
    read_preferences,
)
from tinyllm_jax.data.chat_sources import (
    SPLITS,
    Reader,
    chat_sources,
    check_found,
    identity,
    read_sources,
    say_left_out,
    split_by_hash,
)
from tinyllm_jax.data.chat_template import ChatTemplate, Encoded
from tinyllm_jax.data.corpus import Part
from tinyllm_jax.data.files import locked
from tinyllm_jax.data.groups import BATCH_BYTES
from tinyllm_jax.data.prepare import (
    PreparedData,
    count_split,
    describe_sources,
    hash_of,
    is_finished,
    load_set_tokenizer,
    read_manifest,
    say_waiting,
    shard_records,
    write_manifest,
)
from tinyllm_jax.data.shards import ShardRecord, ShardWriter, Split, open_split, shard_writer
from tinyllm_jax.data.sources import find_left_out
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.errors import InputError

# Part of every key: raise it when the same input gives other rows than before.
FORMAT = 2
PairRows = dict[str, np.ndarray]


@dataclass(frozen=True)
class PreferenceSplit:
    """The pairs of one split, numbered in the order of the files."""

    split: Split

    @property
    def pairs(self) -> int:
        """Count the pairs."""
        return self.split.documents // 2

    def read(self, numbers: Sequence[int] | np.ndarray) -> PairRows:
        """Read pairs by number; -1 gives rows of padding.

        Returns:
            `chosen_tokens`, `chosen_targets` and `chosen_mask`, and the same of `rejected`, all
            [rows, seq]; a mask is True on the tokens of the answer, its <|im_end|> included.
        """
        chosen = np.asarray(numbers, np.int64)
        # The two sides of pair n are the rows 2n and 2n + 1.
        places = {"chosen": 2 * chosen, "rejected": 2 * chosen + 1}
        reader = RowReader(self.split, stride=1, whole_windows=True)
        rows: PairRows = {}
        for side, place in places.items():
            batch: Batch = reader.read(np.where(chosen < 0, -1, place))
            rows |= {
                f"{side}_tokens": batch.tokens,
                f"{side}_targets": batch.targets,
                f"{side}_mask": batch.loss_mask,
            }
        return rows


@dataclass(frozen=True)
class PreferenceData:
    """Both splits of pairs, and what they came from."""

    prepared: PreparedData
    train: PreferenceSplit
    validation: PreferenceSplit

    @property
    def dataset_hash(self) -> str:
        """Identity of the pairs, whatever their files are called and wherever they lie."""
        return self.prepared.dataset_hash

    @property
    def stats(self) -> dict[str, Any]:
        """What was read, left out and kept: the content of `dataset_stats.json`."""
        return self.prepared.stats


def prepare_conversations(config: Config, *, tokenizer: Tokenizer, progress: bool) -> PreparedData:
    """Make, or find, rows of conversations of which only the answers are learnt.

    Args:
        tokenizer: One with the control tokens of `chat_template`; see `extend_tokenizer`.
        progress: Show a bar on stderr.

    Raises:
        InputError: a record or a setting does not fit; the message says what to do.
    """
    packing = "packed" if config.data.packing == "auto" else config.data.packing
    if packing == "stream":
        raise InputError(
            "data.packing=stream cuts text anywhere, and a conversation is learnt whole. Use "
            "--data.packing packed, or padded."
        )
    data = dataclasses.replace(config.data, packing=packing)

    def rows_of(items: Sequence[Any], counts: ChatCounts) -> list[list[Encoded] | None]:
        return conversation_rows(items, template, data.sequence_length + 1, counts)

    template = ChatTemplate(tokenizer)
    made = PreparedKind("conversations", read_conversations, 1, rows_of)
    return prepare_rows(config, data, made, tokenizer=tokenizer, progress=progress)


def prepare_preferences(config: Config, *, tokenizer: Tokenizer, progress: bool) -> PreferenceData:
    """Make, or find, rows of pairs; arguments and errors as of `prepare_conversations`."""
    data = dataclasses.replace(config.data, packing="padded")

    def rows_of(items: Sequence[Any], counts: ChatCounts) -> list[list[Encoded] | None]:
        return preference_rows(items, template, data.sequence_length + 1, counts)

    template = ChatTemplate(tokenizer)
    made = PreparedKind("preferences", read_preferences, 2, rows_of)
    prepared = prepare_rows(config, data, made, tokenizer=tokenizer, progress=progress)
    train, validation = map(PreferenceSplit, (prepared.train, prepared.validation))
    return PreferenceData(prepared, train, validation)


@dataclass(frozen=True)
class PreparedKind:
    """What differs between the kinds of data that become shards."""

    name: str
    read: Reader
    rows_each: int  # of an item
    # Gives the rows of each item, or None for one that is left out, and counts why.
    rows_of: Callable[[Sequence[Any], ChatCounts], list[list[Encoded] | None]]


def conversation_rows(
    items: Sequence[Conversation], template: ChatTemplate, width: int, counts: ChatCounts
) -> list[list[Encoded] | None]:
    """Encode each conversation and keep the turns that fit a row, up to an answer."""
    rows: list[list[Encoded] | None] = []
    encoded = template.encode_many([(item.messages, 0) for item in items])
    for item, row in zip(items, encoded, strict=True):
        roles = [message.role for message in item.messages]
        fitting = [n for n, end in enumerate(row.ends) if end <= width and roles[n] == ASSISTANT]
        if not fitting:
            counts.leave_out_long(row.ends[roles.index(ASSISTANT)] - 1)
            rows.append(None)
            continue
        cut = len(roles) - 1 - fitting[-1]
        counts.cut += cut > 0
        counts.cut_turns += cut
        rows.append([row.first_turns(fitting[-1] + 1)])
    return rows


def preference_rows(
    items: Sequence[Preference], template: ChatTemplate, width: int, counts: ChatCounts
) -> list[list[Encoded] | None]:
    """Encode both sides of each pair; one that does not fit takes the other with it."""
    sides = [(item.prompt, side) for item in items for side in (item.chosen, item.rejected)]
    encoded = iter(template.encode_many([((*first, *then), len(first)) for first, then in sides]))
    rows: list[list[Encoded] | None] = []
    for _ in items:
        pair = [next(encoded), next(encoded)]
        longest = max(len(side.ids) for side in pair)
        if longest > width:
            counts.leave_out_long(longest - 1)
        rows.append(pair if longest <= width else None)
    return rows


def prepare_rows(
    config: Config, data: DataConfig, kind: PreparedKind, *, tokenizer: Tokenizer, progress: bool
) -> PreparedData:
    """Make, or find, the shards of one kind of data.

    Args:
        data: The settings of `config` with a packing for this kind.
    """
    sources = chat_sources(data)
    facts = describe_sources([Part(each.split, each.path, 0, -1, 0) for each in sources], data)
    settings = {
        "kind": kind.name,
        "chat": dataclasses.asdict(config.chat),
        "records": {name: getattr(data, name) for name in ("on_bad_record", "validation_fraction")},
        "rows": {name: getattr(data, name) for name in ("packing", "sequence_length")},
    }
    key = hash_of([FORMAT, facts, tokenizer.hash, settings])[:16]
    folder = data_dir() / "prepared" / key
    if not is_finished(folder):
        with locked(folder.with_suffix(".lock"), on_wait=lambda: say_waiting(folder)):
            if not is_finished(folder):
                for leftover in folder.glob(".*.tmp"):  # of a run that was killed
                    leftover.unlink()
                shards, files = write_shards(
                    dataclasses.replace(config, data=data),
                    kind,
                    tokenizer=tokenizer,
                    folder=folder,
                    progress=progress,
                )
                tokenizer.save(folder)
                manifest = chat_manifest(shards, files, facts, settings, tokenizer, data)
                write_manifest(folder, manifest)
    return open_rows(folder, data, kind)


def write_shards(
    config: Config, kind: PreparedKind, *, tokenizer: Tokenizer, folder: Path, progress: bool
) -> tuple[list[ShardRecord], list[dict[str, Any]]]:
    """Write a shard for each split that has rows, and account for each file."""
    files = []
    with contextlib.ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for source, counts, items in read_sources(config, kind.read, progress=progress):
            for batch in batches_of(items):
                found = kind.rows_of([item for item, _ in batch], counts)
                for (_, split), rows in zip(batch, found, strict=True):
                    if rows is None:
                        continue
                    counts.records_kept += 1
                    if split not in writers:
                        opened = shard_writer(
                            folder,
                            split,
                            split=split,
                            data=config.data,
                            tokenizer=tokenizer,
                            masked=True,
                        )
                        writers[split] = stack.enter_context(opened)
                    for row in rows:
                        size = sum(row.learnt_bytes)
                        writers[split].add_masked(row.ids, row.learn, text_bytes=size)
            files.append({"path": source.path, **counts.to_table()})
    return [writers[split].record for split in SPLITS if split in writers], files


def batches_of(items: Iterable[tuple[Any, str]]) -> Iterator[list[tuple[Any, str]]]:
    """Gather items up to `BATCH_BYTES` characters, so that memory stays flat."""
    batch: list[tuple[Any, str]] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(identity(item[0]))
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def chat_manifest(
    shards: Sequence[ShardRecord],
    files: list[dict[str, Any]],
    sources: list[dict[str, Any]],
    settings: dict[str, Any],
    tokenizer: Tokenizer,
    data: DataConfig,
) -> dict[str, Any]:
    """Write the account of a set, in the form that sets of documents have."""
    contents = [[shard.split, *shard.files.values()] for shard in shards]
    dataset_hash = hash_of([contents, settings["rows"], tokenizer.hash])
    splits = {}
    for name in SPLITS:
        learnt = sum(shard.learnt_tokens for shard in shards if shard.split == name)
        split = count_split(shards, name, data) | {"learnt_tokens": learnt}
        split["bytes_per_token"] = split["text_bytes"] / learnt if learnt else 0.0
        splits[name] = split
    stats = {
        "files": files,
        "splits": splits,
        "settings": settings,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.hash,
        "dataset_hash": dataset_hash,
    }
    return {
        "format": FORMAT,
        "dataset_hash": dataset_hash,
        "tokenizer_file": tokenizer.file_name,
        "tokenizer_hash": tokenizer.hash,
        "sources": sources,
        "settings": settings,
        "shards": [dataclasses.asdict(shard) for shard in shards],
        "stats": stats,
    }


def open_rows(folder: Path, data: DataConfig, kind: PreparedKind) -> PreparedData:
    """Open a finished set and say what was left out of it.

    Raises:
        InputError: a shard is damaged, or a split is empty.
    """
    manifest = read_manifest(folder)
    tokenizer = load_set_tokenizer(folder, manifest)
    records = shard_records(manifest)
    train, validation = (
        open_split(folder, records, name=name, data=data, pad_id=tokenizer.pad_id)
        for name in SPLITS
    )
    files = manifest["stats"]["files"]
    say_left_out(files, data)
    check_found(
        {split.name: split.documents // kind.rows_each for split in (train, validation)},
        files=files,
        by_hash=split_by_hash(data),
        data=data,
        what=kind.name.removesuffix("s"),
    )
    return PreparedData(folder, manifest, tokenizer, train, validation, find_left_out(data))
