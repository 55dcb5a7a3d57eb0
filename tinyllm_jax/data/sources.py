"""Which files a corpus is read from: names, files, folders and globs, told apart into splits."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllm_jax.config import DataConfig, data_dir
from tinyllm_jax.errors import InputError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
}
KNOWN = ".parquet, .jsonl, .ndjson, .json, .txt or .text, all but the first also with .gz or .zst"
# What is written without a path, and is no file.
TOY = "toy"
TINYSTORIES = "tinystories"

_KINDS = {
    "train": "training",
    "training": "training",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_WORD = "|".join(_KINDS)
# train-00000-of-00004, validation.jsonl.
_BEGINS = re.compile(rf"({_WORD})(?=[-_.]|$)", re.IGNORECASE)
# TinyStories-valid.txt, c4-train.00000-of-01024.
_ENDS = re.compile(rf"(.+?)[-_.]({_WORD})(?=$|[-_.]\d|\.)", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One file of the corpus, or the built-in stories."""

    path: str
    split: str  # "train", "validation", or "" = every document is split by hash


@dataclass(frozen=True)
class Found:
    """A file that a path on the command line stands for."""

    path: str
    names: tuple[str, ...]  # of the file, then of the folders round it below the given one
    explicit: bool  # the path is this file, rather than a folder or glob that holds it


def file_format(path: str) -> tuple[str, str] | None:
    """Tell (format, compression) by the name, or None where the name is not known."""
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix, "")
    if compression:
        suffix = os.path.splitext(stem)[1]
    format = FORMATS.get(suffix)
    if format is None or (format == "parquet" and compression):
        return None
    return format, compression


def is_json(path: str) -> bool:
    """Tell `.json` files, which hold lines of JSON or one array."""
    return path.lower().removesuffix(".gz").removesuffix(".zst").endswith(".json")


def find_sources(data: DataConfig) -> list[Source]:
    """List the files of `data.paths` and `data.validation_paths`, each once, sorted by path.

    File names (or the folders inside a given folder) that begin with `train`, `validation`,
    `valid`, `val`, `dev` or `test` tell files apart; one that ends so does where another has the
    same beginning, as `stories.txt` and `stories-dev.txt`. Where all files are of one kind, their
    names say nothing. Files of `data.validation_paths`, else those with validation names, are the
    validation split and everything else is trained on. Where there are neither, every document is
    split by its hash. Files of a test kind, and validation names beside `data.validation_paths`,
    are never read: left out of folders and globs, refused when named themselves.

    Raises:
        InputError: a path stands for nothing that can be read, or nothing is left to train on.
    """
    training, held_out, _ = choose_files(data)
    sources = [Source(found.path, "train" if held_out else "") for found in training]
    sources += [Source(found.path, "validation") for found in held_out]
    return sorted(sources, key=lambda source: source.path)


def find_left_out(data: DataConfig) -> list[str]:
    """List the files that folders and globs of `data.paths` hold and `find_sources` leaves out."""
    return sorted(found.path for found in choose_files(data)[2])


def choose_files(data: DataConfig) -> tuple[list[Found], list[Found], list[Found]]:
    """Tell the files to train on, to validate on and not to read.

    Raises:
        InputError: as `find_sources`.
    """
    held_out = find_files(data.validation_paths, data, flag="--data.validation_paths")
    taken = {os.path.realpath(found.path) for found in held_out}
    given = [
        found
        for found in find_files(data.paths, data, flag="--data")
        if os.path.realpath(found.path) not in taken
    ]
    kinds = kinds_of(given)
    if len(set(kinds.values())) == 1:
        kinds = dict.fromkeys(kinds, "training")
    training = [found for found in given if kinds[found] == "training"]
    if not held_out:
        held_out = [found for found in given if kinds[found] == "validation"]
    read = {*training, *held_out}
    left_out = [found for found in given if found not in read]
    for found in left_out:
        if found.explicit:
            raise InputError(
                f"{found.path}: {kinds[found]} text by its name, which is never trained on. "
                "Leave it out of --data, add it to --data.validation_paths, or rename it."
            )
    if not training:
        raise InputError(
            f"--data {' '.join(data.paths)}: no training text; all files are validation or test "
            "text, by --data.validation_paths or by their names. Give training files too."
        )
    return training, held_out, left_out


def find_files(words: Sequence[str], data: DataConfig, *, flag: str) -> list[Found]:
    """List what the words of one setting stand for, each file once, however often it is matched.

    Raises:
        InputError: a word stands for nothing that can be read; `flag` names the setting.
    """
    files: dict[str, list[Found]] = {}
    for word in words:
        for found in expand(word, data, flag=flag):
            files.setdefault(os.path.realpath(found.path), []).append(found)
    return [
        min(same, key=lambda found: (not found.explicit, found.path)) for same in files.values()
    ]


def expand(word: str, data: DataConfig, *, flag: str) -> list[Found]:
    """List the files of one name, file, folder or glob.

    A relative path is tried as it is, then under `data_dir()`.

    Raises:
        InputError: nothing is there, or nothing that can be read.
    """
    if not word.strip():
        raise InputError(
            f"{flag} {word!r}: an empty name. Give a file or folder; `.` is the current folder."
        )
    if word == TOY:
        return [Found(TOY, (), False)]
    if word == TINYSTORIES:
        # Here, so that nothing of the network is loaded for text that lies on the disk.
        from tinyllm_jax.data.download import download_tinystories

        return [found_in(str(path), str(path.parent)) for path in download_tinystories(data)]
    for place in (Path(word).expanduser(), data_dir() / word):
        if place.is_file():
            if file_format(str(place)) is None:
                raise InputError(f"{place}: not a known type of file. Use {KNOWN}.")
            return [Found(str(place), (place.name,), True)]
        if place.is_dir():
            return readable(walk(str(place)), str(place), flag=flag)
        if glob.has_magic(str(place)):
            matches = sorted(glob.glob(str(place), recursive=True))
            if matches:
                files = (path for match in matches for path in walk(match))
                return readable(files, str(place), flag=flag)
    raise InputError(
        f"{flag} {word!r}: no such file or folder and nothing that this glob matches, neither here "
        f"nor in {data_dir()}. Names without a file: {TOY}, {TINYSTORIES}."
    )


def walk(path: str) -> Iterator[str]:
    """List a file, or the files below a folder in order; hidden ones are left out."""
    if not os.path.isdir(path):
        yield path
        return
    seen = set()  # a link may lead back to a folder above

    def fail(error: OSError) -> None:
        raise error  # `os.walk` would pass over a folder that may not be read

    for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.join(folder, name)


def readable(paths: Iterable[str], place: str, *, flag: str) -> list[Found]:
    """Keep the files of a folder or glob that can be read.

    `.json` is taken only by a glob that says so, since folders hold such files about the data.

    Raises:
        InputError: there is none; the message names what is there instead.
    """
    found, others = [], []
    wants_json = glob.has_magic(place) and ".json" in place
    for path in paths:
        format = file_format(path)
        if format is None or (is_json(path) and not wants_json):
            others.append(path)
        else:
            found.append(found_in(path, fixed_part(place)))
    if found:
        return found
    if not others:
        raise InputError(f"{flag} {place}: the folder is empty. Give one with files {KNOWN}.")
    endings = sorted({"".join(Path(path).suffixes[-2:]) or "no ending" for path in others})
    hint = f" Or name them with a glob: {place}/*.json*." if ".json" in " ".join(endings) else ""
    raise InputError(
        f"{flag} {place}: {len(others)} files, none of a known type (they have "
        f"{', '.join(endings[:5])}). Use {KNOWN}.{hint}"
    )


def fixed_part(place: str) -> str:
    """Give the folder of a glob that stands before its first wildcard."""
    while glob.has_magic(place):
        place = os.path.dirname(place)
    return place


def found_in(path: str, folder: str) -> Found:
    """Describe a file of a folder, whose name or whose folders below the given one say its kind."""
    names = Path(os.path.relpath(path, folder or ".")).parts
    return Found(path, tuple(reversed(names)), False)


def kinds_of(files: Sequence[Found]) -> dict[Found, str]:
    """Tell training, validation and test text by the first name of each file that says it."""
    # What the same beginning goes on with in other names: "" where it does not.
    endings: dict[str, set[str]] = {}
    for name in {name for found in files for name in found.names}:
        begin, word = split_name(name)
        endings.setdefault(begin, set()).add(word)

    def kind(found: Found) -> str:
        for name in found.names:
            begin, word = split_name(name)
            if match := _BEGINS.match(name):
                return _KINDS[match[1].lower()]
            if word and len(endings[begin]) > 1:
                return _KINDS[word]
        return "training"

    return {found: kind(found) for found in files}


def split_name(name: str) -> tuple[str, str]:
    """Cut a name into what stands before the word of a split, and that word; endings are left out."""
    match = _ENDS.match(name)
    return (match[1], match[2].lower()) if match else (name.split(".")[0], "")
