"""The files that conversations are read from, their items with a split, and what became of them."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from tinyllm_jax.config import Config, DataConfig
from tinyllm_jax.data.chat import USER, ChatCounts, Conversation, Preference, Question
from tinyllm_jax.data.corpus import split_of, text_hash
from tinyllm_jax.data.sources import TINYSTORIES, TOY, Source, find_left_out, find_sources
from tinyllm_jax.errors import InputError

SPLITS = ("train", "validation")

Item = Conversation | Preference | Question
# Reads the items of one file and counts them.
Reader = Callable[..., Iterator[Any]]


def chat_sources(data: DataConfig) -> list[Source]:
    """List the files, as a corpus has them; the built-in and downloaded stories are none.

    Raises:
        InputError: as `find_sources`, or the data is stories.
    """
    for name in (TOY, TINYSTORIES):
        if name in (*data.paths, *data.validation_paths):
            raise InputError(
                f"--data {name}: stories, not conversations. Give --data FILE with one "
                '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]} '
                "a line."
            )
    sources = find_sources(data)
    for source in sources:
        if not os.path.isfile(source.path):
            raise InputError(
                f"{source.path}: a broken link, or no regular file. Bring the file or remove it."
            )
    return sources


def split_by_hash(data: DataConfig) -> bool:
    """Tell whether there are no validation files."""
    return any(source.split == "" for source in chat_sources(data))


def read_sources(
    config: Config, read: Reader, *, progress: bool
) -> Iterator[tuple[Source, ChatCounts, Iterator[tuple[Any, str]]]]:
    """Read every file as (file, counts to fill, items with their split).

    Validation files come first, so that what they hold is known and not trained on. Without such files
    the first user turn chooses: other answers to what validation asks would give those of validation away.
    """
    data = config.data
    held_out: set[int] = set()
    asked: set[int] = set()  # by validation files
    sources = sorted(chat_sources(data), key=lambda source: source.split != "validation")
    with tqdm(desc="preparing data", unit=" records", disable=not progress) as bar:
        for source in sources:
            counts = ChatCounts()

            def items(source: Source = source, counts: ChatCounts = counts) -> Iterator[Any]:
                for item in read(source.path, data=data, chat=config.chat, counts=counts):
                    bar.update()
                    prompt = first_question(item)
                    split = source.split or split_of(prompt, data)
                    if source.split == "validation":
                        held_out.add(text_hash(identity(item), "split"))
                        asked.add(text_hash(prompt, "split"))
                    elif held_out:
                        if text_hash(identity(item), "split") in held_out:
                            counts.also_in_validation += 1
                            continue
                        counts.asked_in_validation += text_hash(prompt, "split") in asked
                    yield item, split

            yield source, counts, items()


def identity(item: Item) -> str:
    """Write all turns of an item, so that copies are told wherever they stand."""
    parts = [item.prompt, item.chosen, item.rejected] if isinstance(item, Preference) else []
    parts = parts or [item.messages]  # type: ignore[union-attr]
    rows = [[[message.role, message.content] for message in part] for part in parts]
    return json.dumps(rows, ensure_ascii=False)


def first_question(item: Item) -> str:
    """Give the first user turn, by which items that ask the same fall on the same side.

    The system prompt is none of it, since the same question may stand under several.
    """
    messages = item.prompt if isinstance(item, Preference) else item.messages
    return next(message.content for message in messages if message.role == USER)


def say_left_out(files: Sequence[dict[str, Any]], data: DataConfig) -> None:
    """Tell the person what of the data is not learnt, if anything."""
    if unread := find_left_out(data):
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        print(f"Not read, by their names: {', '.join(unread[:5])}{more}", file=sys.stderr)
    total = total_of(files)
    row = f"a row of data.sequence_length={data.sequence_length}"
    said = {
        "bad_records": "broken records left out",
        "also_in_validation": "left out of training, since validation has them too",
        "asked_in_validation": "ask what validation asks, too",
        "too_long": f"left out, too long for {row} (the longest needs {total['longest_tokens']})",
        "cut": f"cut at a turn to fit {row} ({total['cut_turns']} turns left out)",
    }
    parts = [f"{total[name]:,} {text}" for name, text in said.items() if total[name]]
    if parts:
        print(f"Of {total['records_read']:,} records: {'; '.join(parts)}.", file=sys.stderr)


def total_of(files: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Add up the counts of all files."""
    names = ChatCounts().to_table()
    total = {name: sum(file[name] for file in files) for name in names}
    return total | {"longest_tokens": max((file["longest_tokens"] for file in files), default=0)}


def check_found(
    found: dict[str, int],
    *,
    files: Sequence[dict[str, Any]],
    by_hash: bool,
    data: DataConfig,
    what: str,
) -> None:
    """Refuse a split without items.

    Raises:
        InputError: says which setting to change, and to what.
    """
    total = total_of(files)
    for name, count in found.items():
        if count:
            continue
        if by_hash and sum(found.values()) > 1:
            fraction = min(0.5, max(2 * data.validation_fraction, 10 / sum(found.values())))
            if name == "train":
                fraction = data.validation_fraction / 2
            other = f" With many that differ, --data.validation_fraction {fraction:.2g} gives some."
            raise InputError(
                f"data.validation_fraction={data.validation_fraction} of {sum(found.values())} {what}s "
                f"leaves none for the {name} split, since those with the same first user turn stay "
                f"together. Give --data.validation_paths, or more {what}s."
                f"{other if fraction != data.validation_fraction else ''}"
            )
        fits = f"; --data.sequence_length {total['longest_tokens']} takes the longest"
        raise InputError(
            f"The {'' if by_hash else f'{name} '}files hold too few of what is needed, a {what} for "
            f"each split: of {total['records_read']} records, {total['bad_records']} are broken, "
            f"{total['too_long']} are longer than data.sequence_length={data.sequence_length} and "
            f"{total['also_in_validation']} stand in validation files too. Give more files"
            f"{fits if total['too_long'] else ''}."
        )
