"""Documents to token shards with a manifest: made once, reused until its input changes.

`data_dir()/tokenizers/KEY/` holds a trained tokenizer, `data_dir()/prepared/KEY/` a set of shards.
A key is a hash of all that the content depends on, so nothing is ever stale.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinyllm_jax.config import Config, DataConfig, data_dir
from tinyllm_jax.data import toy_stories
from tinyllm_jax.data.corpus import Part, find_parts, sample_documents
from tinyllm_jax.data.files import locked, sha256_of_file, write_file
from tinyllm_jax.data.groups import GroupRecord, is_toy, plan_groups, tokenise_groups
from tinyllm_jax.data.shards import (
    ShardRecord,
    Split,
    check_checksums,
    open_split,
    prepare_again,
)
from tinyllm_jax.data.sources import find_left_out
from tinyllm_jax.data.tokenizer import FILE_NAMES, Tokenizer, load_tokenizer, train_tokenizer
from tinyllm_jax.errors import InputError

# Source bytes of one restartable piece of work: seconds of one core.
GROUP_BYTES = 32 << 20
# Part of every key: raise it when the same input gives other shards than before.
FORMAT = 2
# Beside a trained tokenizer, as `sha256sum --check` reads it.
TOKENIZER_SUMS = "SHA256SUMS"
# What is read of a manifest.
MANIFEST = {
    "dataset_hash": str,
    "tokenizer_file": str,
    "tokenizer_hash": str,
    "sources": [{"split": str, "path": str}],
    "shards": [
        {
            "name": str,
            "split": str,
            "files": {"*": {"bytes": int, "sha256": str}},
            **{field.name: int for field in dataclasses.fields(ShardRecord) if field.type is int},
        }
    ],
    "stats": {"files": [{"path": str}], "splits": {"train": {}, "validation": {}}},
}
# Of this, what sets that were prepared earlier do not say.
ADDED_LATER = ("learnt_tokens",)


@dataclass(frozen=True)
class PreparedData:
    """Both splits as token shards, and what they came from."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: Split
    validation: Split
    left_out_files: list[str]  # never read, by their names

    @property
    def dataset_hash(self) -> str:
        """Identity of the rows, whatever their files are called and wherever they lie."""
        return self.manifest["dataset_hash"]

    @property
    def stats(self) -> dict[str, Any]:
        """What was read, left out and kept: the content of `dataset_stats.json`.

        What one set cannot know is added here: a stream serves every sequence length.
        """
        stats = self.manifest["stats"]
        splits = {name: dict(split) for name, split in stats["splits"].items()}
        splits["train"]["unreachable_tokens"] = self.train.unreachable_tokens
        return stats | {"splits": splits, "left_out_files": self.left_out_files}

    def verify(self) -> None:
        """Read every shard and compare its checksum.

        Raises:
            InputError: a file is not what was written; the message says what to delete.
        """
        for record in shard_records(self.manifest):
            check_checksums(self.folder, record)


def prepare(config: Config, *, progress: bool, tokenizer: Tokenizer | None = None) -> PreparedData:
    """Make, or find, the token shards of a configuration.

    Args:
        progress: Show bars on stderr.
        tokenizer: Instead of the one that the settings ask for, such as a checkpoint's own.

    Raises:
        InputError: the text, the tokenizer or a setting does not fit; the message says what to do.
    """
    parts = find_parts(config.data, part_bytes=GROUP_BYTES)
    sources = describe_sources(parts, config.data)
    tokenizer = tokenizer or get_tokenizer(config, parts, sources, progress=progress)
    settings = [document_settings(config.data), row_settings(config.data)]
    key = hash_of([FORMAT, GROUP_BYTES, sources, tokenizer.hash, settings])[:16]
    folder = data_dir() / "prepared" / key
    if not is_finished(folder):  # a finished one is never written to, so its disk may be read-only
        with locked(folder.with_suffix(".lock"), on_wait=lambda: say_waiting(folder)):
            if not is_finished(folder):
                write_set(config, parts, sources, tokenizer, folder=folder, progress=progress)
    left_out = find_left_out(config.data)
    if left_out:
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        print(f"Not read, by their names: {', '.join(left_out[:5])}{more}", file=sys.stderr)
    return open_prepared(folder, config.data, left_out_files=left_out)


def is_finished(folder: Path) -> bool:
    """Tell a set whose manifest, which is written last, is there."""
    return (folder / "manifest.json").is_file()


def open_prepared(folder: Path, data: DataConfig, *, left_out_files: list[str]) -> PreparedData:
    """Open a finished set, checking that its files have their sizes.

    Raises:
        InputError: a shard is damaged, or a split is too small to train on or to evaluate.
    """
    manifest = read_manifest(folder)
    tokenizer = load_set_tokenizer(folder, manifest)
    records = shard_records(manifest)
    train, validation = (
        open_split(folder, records, name=name, data=data, pad_id=tokenizer.pad_id)
        for name in ("train", "validation")
    )
    check_not_empty(train, validation, data, manifest)
    return PreparedData(folder, manifest, tokenizer, train, validation, left_out_files)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a finished set.

    Raises:
        InputError: it is damaged.
    """
    path = folder / "manifest.json"
    try:
        manifest = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}). {prepare_again(folder)}") from None
    # Sets that were prepared before manifests had one are still good.
    if manifest.pop("checksum", None) not in (None, hash_of(manifest)):
        raise InputError(f"{path}: does not have its checksum. {prepare_again(folder)}")
    if not is_like(manifest, MANIFEST):
        raise InputError(f"{path}: no account of a set of shards. {prepare_again(folder)}")
    return manifest


def is_like(value: Any, shape: Any) -> bool:
    """Tell a value that has the parts of a shape; it may have others besides.

    Args:
        shape: A type; a list of one shape, that of all items; or a table of shapes, of which "*" is
            that of all values.
    """
    if isinstance(shape, type):
        return type(value) is shape
    if isinstance(shape, list):
        return isinstance(value, list) and all(is_like(each, shape[0]) for each in value)
    if not isinstance(value, dict):
        return False
    if "*" in shape:
        return all(is_like(each, shape["*"]) for each in value.values())
    return all(
        is_like(value[name], inner) if name in value else name in ADDED_LATER
        for name, inner in shape.items()
    )


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Finish a set with the account of it, and a checksum of that, since all else hangs on it."""
    content = manifest | {"checksum": hash_of(manifest)}
    write_file(folder / "manifest.json", json.dumps(content, indent=1).encode())


def load_set_tokenizer(folder: Path, manifest: dict[str, Any]) -> Tokenizer:
    """Load the tokenizer that the shards of a set were made with.

    Raises:
        InputError: it is missing, damaged or another one.
    """
    path = folder / manifest["tokenizer_file"]
    if not path.is_file():
        raise InputError(f"{path}: the tokenizer of this set is missing. {prepare_again(folder)}")
    if (found := sha256_of_file(path)) != manifest["tokenizer_hash"]:
        raise InputError(
            f"{path}: has sha256 {found}, and the shards beside it were made with "
            f"{manifest['tokenizer_hash']}. {prepare_again(folder)}"
        )
    return load_tokenizer(path)


def get_tokenizer(
    config: Config, parts: Sequence[Part], sources: list[dict[str, Any]], *, progress: bool
) -> Tokenizer:
    """Load the tokenizer that is asked for, or train one on training documents, once.

    Raises:
        InputError: its vocabulary is not the model's.
    """
    wanted = config.model.vocab_size
    if config.tokenizer.path:
        tokenizer = load_tokenizer(config.tokenizer.path)
        if tokenizer.vocab_size != wanted:
            raise InputError(
                f"tokenizer.path={config.tokenizer.path} has {tokenizer.vocab_size} tokens, and "
                f"model.vocab_size={wanted}. Use --model.vocab_size {tokenizer.vocab_size}."
            )
        return tokenizer
    settings = dataclasses.asdict(config.tokenizer) | {"retrain": None, "vocab_size": wanted}
    key = hash_of([FORMAT, sources, document_settings(config.data), settings])[:16]
    folder = data_dir() / "tokenizers" / key
    if not config.tokenizer.retrain and is_trained(folder):
        # Another process may be writing it again; then it is read once more behind the lock.
        with contextlib.suppress(InputError, FileNotFoundError):
            return load_trained(folder)
    with locked(folder.with_suffix(".lock"), on_wait=lambda: say_waiting(folder)):
        if config.tokenizer.retrain or not is_trained(folder):
            documents = sample_documents(
                parts, config.data, max_bytes=config.tokenizer.max_sample_bytes
            )
            shown = tqdm(
                documents, desc="training tokenizer", unit=" documents", disable=not progress
            )
            tokenizer = train_tokenizer(iter(shown), config=config.tokenizer, vocab_size=wanted)
            save_trained(tokenizer, folder)
        return load_trained(folder)


def save_trained(tokenizer: Tokenizer, folder: Path) -> None:
    """Keep a tokenizer and, before it, its checksum, so that a kill leaves none without its own."""
    for name in FILE_NAMES:
        (folder / name).unlink(missing_ok=True)
    line = f"{tokenizer.hash}  {tokenizer.file_name}\n"
    write_file(folder / TOKENIZER_SUMS, line.encode())
    tokenizer.save(folder)


def load_trained(folder: Path) -> Tokenizer:
    """Load a trained tokenizer.

    Raises:
        InputError: it is not byte for byte what was written.
    """
    path = folder / TOKENIZER_SUMS
    if not path.is_file():  # trained before there were checksums
        return load_tokenizer(folder)
    known, _, name = path.read_text(errors="replace").strip().partition("  ")
    if name in FILE_NAMES:  # else the line itself is damaged
        path = folder / name
    if not path.is_file() or sha256_of_file(path) != known:
        raise InputError(
            f"{path}: is not what was written. Delete {folder} and run again: the tokenizer is then "
            "trained afresh."
        )
    return load_tokenizer(path)


def is_trained(folder: Path) -> bool:
    """Tell a folder that holds a tokenizer, which is always a whole one."""
    return bool(list(folder.glob("tokenizer.*")))


def write_set(
    config: Config,
    parts: Sequence[Part],
    sources: list[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    folder: Path,
    progress: bool,
) -> None:
    """Tokenise what no earlier run finished, and write the manifest last."""
    for leftover in folder.glob(".*.tmp"):  # of a run that was killed
        leftover.unlink()
    groups = plan_groups(parts, group_bytes=GROUP_BYTES)
    tokenizer_path = tokenizer.save(folder)
    total = sum(group.bytes for group in groups)
    with tqdm(
        total=total, desc="preparing data", unit="B", unit_scale=True, disable=not progress
    ) as bar:
        records = tokenise_groups(
            groups,
            data=config.data,
            tokenizer=tokenizer,
            tokenizer_path=tokenizer_path,
            folder=folder,
            on_progress=bar.update,
        )
    manifest = make_manifest(records, sources=sources, tokenizer=tokenizer, data=config.data)
    write_manifest(folder, manifest)


def make_manifest(
    records: Sequence[GroupRecord],
    *,
    sources: list[dict[str, Any]],
    tokenizer: Tokenizer,
    data: DataConfig,
) -> dict[str, Any]:
    """Gather the records of all groups into one account."""
    shards = [shard for record in records for shard in record.shards]
    settings = {"documents": document_settings(data), "rows": row_settings(data)}
    contents = [[shard.split, *shard.files.values()] for shard in shards]
    dataset_hash = hash_of([contents, settings["rows"]])
    stats = {
        "files": count_files(records),
        "splits": {name: count_split(shards, name, data) for name in ("train", "validation")},
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


def shard_records(manifest: dict[str, Any]) -> list[ShardRecord]:
    """Read the shards that a manifest lists."""
    names = {field.name for field in dataclasses.fields(ShardRecord)}
    return [
        ShardRecord(**{name: value for name, value in shard.items() if name in names})
        for shard in manifest["shards"]
    ]


def count_files(records: Sequence[GroupRecord]) -> list[dict[str, Any]]:
    """Add up what each source file gave."""
    files: dict[str, dict[str, Any]] = {}
    for source in (source for record in records for source in record.sources):
        path = "toy" if is_toy(source.path) else source.path
        total = files.setdefault(path, {"path": path})
        found = source.counts | {"tokens": source.tokens, "text_bytes": source.text_bytes}
        for name, number in found.items():
            total[name] = total.get(name, 0) + number
    return list(files.values())


def count_split(shards: Sequence[ShardRecord], name: str, data: DataConfig) -> dict[str, Any]:
    """Add up one split."""
    own = [shard for shard in shards if shard.split == name]

    def total(field: str) -> int:
        return sum(getattr(shard, field) for shard in own)

    tokens, rows = total("tokens"), total("rows")
    room = rows * (data.sequence_length + 1) if rows else total("filled_tokens")
    return {
        "documents": total("documents"),
        "text_bytes": total("text_bytes"),
        "tokens": tokens,
        "rows": rows,
        "bytes_per_token": total("text_bytes") / tokens if tokens else 0.0,
        "fill_rate": total("filled_tokens") / room if room else 0.0,
        "long_documents": total("long_documents"),
        "truncated_tokens": total("truncated_tokens"),
    }


def describe_sources(parts: Sequence[Part], data: DataConfig) -> list[dict[str, Any]]:
    """List the files that the corpus is read from, so that a change of any of them shows."""
    sources: dict[tuple[str, str], dict[str, Any]] = {}
    for part in parts:
        if is_toy(part.path):
            facts = {
                "path": "toy",
                "seed": data.toy_seed,
                "documents": data.toy_documents,
                "generator": toy_stories.corpus_hash(),
            }
        else:
            status = os.stat(part.path)
            facts = {
                "path": os.path.abspath(part.path),
                "bytes": status.st_size,
                "mtime_ns": status.st_mtime_ns,
            }
        sources[part.split, facts["path"]] = {"split": part.split, **facts}
    return list(sources.values())


def document_settings(data: DataConfig) -> dict[str, Any]:
    """Pick the settings that decide which documents the files hold and how they are split."""
    names = [
        "text_field",
        "document_separator",
        "min_document_characters",
        "on_bad_record",
        "validation_fraction",
    ]
    return {name: getattr(data, name) for name in names}


def row_settings(data: DataConfig) -> dict[str, Any]:
    """Pick the settings that decide which rows the documents become.

    A stream is cut into windows when it is read, so it serves every sequence length.
    """
    names = ["packing", "sequence_length", "long_documents"]
    return {name: getattr(data, name) for name in names[: 1 if data.packing == "stream" else 3]}


def check_not_empty(
    train: Split, validation: Split, data: DataConfig, manifest: dict[str, Any]
) -> None:
    """Refuse a split without documents, or a stream shorter than one window.

    Raises:
        InputError: says which setting to change, and to what.
    """
    documents = train.documents + validation.documents
    by_hash = any(source["split"] == "" for source in manifest["sources"])
    for split in (train, validation):
        if not split.documents and not (by_hash and documents):
            files = "" if by_hash else f" {split.name}"
            raise InputError(
                f"The{files} files hold no document to use: of "
                f"{left_out_counts(manifest, '' if by_hash else split.name, data)}. Give other "
                "files with --data or --data.validation_paths."
            )
        if not split.documents and documents < 2:
            raise InputError(
                f"All text together is {documents} document, and one is needed for each split. "
                "Give --data.document_separator TEXT with what stands between documents, such as "
                "$'\\n\\n' for blank lines, give --data.validation_paths, or give more text."
            )
        if not split.documents:
            fraction = min(0.5, max(2 * data.validation_fraction, 10 / documents))
            if split is train:
                fraction = data.validation_fraction / 2
            raise InputError(
                f"data.validation_fraction={data.validation_fraction} of {documents} documents "
                f"leaves none for the {split.name} split. Use --data.validation_fraction "
                f"{fraction:.2g}, give --data.validation_paths, or give more text."
            )
        if data.packing != "stream":
            continue
        longest = max(len(shard.tokens) for shard in split.shards)
        if longest <= data.sequence_length:
            raise InputError(
                f"data.sequence_length={data.sequence_length} needs windows of "
                f"{data.sequence_length + 1} tokens, and the {split.name} split has at most "
                f"{longest} in a line. Use --data.sequence_length {longest - 1} or less, or give "
                f"it more text{' with --data.validation_fraction' if by_hash else ''}."
            )


def left_out_counts(manifest: dict[str, Any], split: str, data: DataConfig) -> str:
    """Say why the files of a split gave nothing."""
    own = {source["path"] for source in manifest["sources"] if source["split"] == split}
    files = [
        file
        for file in manifest["stats"]["files"]
        if file["path"] == "toy" or os.path.abspath(file["path"]) in own
    ]
    read, bad, short, copies = (
        sum(file[name] for file in files)
        for name in ("documents_read", "bad_records", "too_short", "also_in_validation")
    )
    return (
        f"{read} read, {bad} are broken records, {short} are shorter than "
        f"data.min_document_characters={data.min_document_characters} and {copies} are validation "
        "text too"
    )


def hash_of(facts: Any) -> str:
    """Hash plain values by their JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def say_waiting(folder: Path) -> None:
    """Tell the person why nothing happens."""
    print(f"Another process is preparing {folder}; waiting for it.", file=sys.stderr)
