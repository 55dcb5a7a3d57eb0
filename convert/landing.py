"""Put a finished file or folder in its place: whole, or not there at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tinyllm_jax.data.files import free_name
from tinyllm_jax.errors import InputError


@contextlib.contextmanager
def landing(path: Path, *, folder: bool, replace: bool) -> Iterator[Path]:
    """Give a hidden place beside `path` whose content moves there when the block ends well.

    A format that is a file may write others beside it; one of these that is there already must
    have the same bytes.

    Args:
        folder: The format is a folder.
        replace: What is at `path` gives way: a file to the new one, a folder by being renamed to
            `path.1`, `path.2`, ...

    Raises:
        InputError: something else is in the way.
    """
    hidden = path.with_name(f".{path.name}.{os.getpid()}.partial")
    made = _make_parents(path.parent)
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        yield hidden / path.name
        _flush(hidden)
        if folder:
            _move(hidden / path.name, path, replace=replace)
        else:
            _check_beside(hidden, path)
            for file in sorted(hidden.iterdir(), key=lambda file: file.name == path.name):
                _move(file, path.with_name(file.name), replace=replace or file.name != path.name)
        made = []
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _make_parents(folder: Path) -> list[Path]:
    """Make missing folders, and list them, innermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _check_beside(hidden: Path, path: Path) -> None:
    for file in hidden.iterdir():
        there = path.with_name(file.name)
        if file.name != path.name and there.exists() and there.read_bytes() != file.read_bytes():
            raise InputError(
                f"{there}: already there, of another model. Name a file in another folder."
            )


def _move(source: Path, path: Path, *, replace: bool) -> None:
    if replace and os.path.lexists(path) and (path.is_dir() or source.is_dir()):
        # A folder may hold more than a checkpoint: nothing in it is ever removed.
        path.rename(free_name(path))
        source.rename(path)
    elif source.is_dir() or replace:
        source.replace(path)
    else:
        os.link(source, path)  # unlike a rename, fails where something has come in between
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
