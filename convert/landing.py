"""Put a finished file or folder in its place: whole, or not there at all."""

import contextlib
import errno
import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

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
    _refuse_inside_checkpoint(path)
    made = [parent for parent in path.parents if not parent.exists()]
    hidden, landed = None, []
    with _stopped_in_order():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The name may be as long as the disk allows; this one is longer.
            prefix = f".{path.name[:40]}.{os.getpid()}."
            hidden = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=path.parent))
            yield hidden / path.name
            _flush(hidden)
            if folder:
                _move(hidden / path.name, path, replace=replace)
            else:
                for file in _beside(hidden, path):
                    _move(file, path.with_name(file.name), replace=False)
                    landed.append(path.with_name(file.name))
                _move(hidden / path.name, path, replace=replace)
            made, landed = [], []
        finally:
            for file in landed:
                file.unlink(missing_ok=True)
            if hidden:
                shutil.rmtree(hidden, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()


@contextlib.contextmanager
def _stopped_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as an exception does, so that it cleans up.

    Only where they would end the process: a caller that has use for a signal keeps it.
    """

    def stop(number: int, _: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the cleaning
        sys.exit(128 + number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        numbers = [getattr(signal, name) for name in names]
        taken = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _refuse_inside_checkpoint(path: Path) -> None:
    """Refuse a place whose file would make a checkpoint's checksums wrong."""
    for parent in Path(os.path.realpath(path.parent), path.name).parents:
        if (parent / "checksums.json").is_file() and (parent / "meta.json").is_file():
            raise InputError(
                f"{path}: inside the checkpoint {parent}, which another file in it would damage. "
                "Name a place outside it."
            )


def _beside(hidden: Path, path: Path) -> list[Path]:
    """List the files that go beside `path` and are not there yet."""
    found = []
    for file in hidden.iterdir():
        there = path.with_name(file.name)
        if file.name == path.name:
            continue
        if not os.path.lexists(there):
            found.append(file)
        elif not there.is_file() or there.read_bytes() != file.read_bytes():
            raise InputError(
                f"{there}: already there, of another model. Name a file in another folder."
            )
    return found


def _move(source: Path, path: Path, *, replace: bool) -> None:
    """Give what is hidden its name; a link that has this name gives way, never what it points to."""
    taken = os.path.lexists(path)
    # An empty folder has nothing to lose.
    if taken and not replace and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: already there. Name another, or add --overwrite to replace it.")
    if replace and taken and (path.is_dir() or source.is_dir()):
        # A folder may hold more than a checkpoint: nothing in it is ever removed.
        path.rename(_free_name(path))
    if source.is_dir() or replace:
        source.replace(path)
    else:
        _link(source, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(source: Path, path: Path) -> None:
    """Name a file, which unlike a rename fails where something has come in between."""
    try:
        os.link(source, path)
    except FileExistsError:
        raise InputError(
            f"{path}: already there. Name another, or add --overwrite to replace it."
        ) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        source.rename(path)  # some disks have no second names


def _free_name(path: Path) -> Path:
    """Give the first of `path.1`, `path.2`, ... that is not there, not even as a broken link."""
    names = (Path(f"{path}.{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def _flush(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
