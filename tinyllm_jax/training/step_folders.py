"""The folders `checkpoints/<step>/` of a run, whatever framework wrote what is in them.

Both packages finish, check, mark and remove them here; this module imports neither framework.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tinyllm_jax.data.files import free_name, sha256_of_file, write_file
from tinyllm_jax.errors import InputError

# How long a save that failed may take to end all the writes that it began.
LATE_WRITES_SECONDS = 5.0
# Characters of what is told of a damaged checkpoint.
LONGEST_PROBLEM = 300
# Where a run folder keeps the model that the run began with.
REFERENCE = "reference"


def step_folders(run: Path) -> list[tuple[int, Path]]:
    """List the finished checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    paths = folder.iterdir() if folder.is_dir() else []
    steps = [path for path in paths if re.fullmatch("[0-9]+", path.name) and path.is_dir()]
    return sorted((int(path.name), path) for path in steps)


def run_of(checkpoint: Path) -> Path | None:
    """Give the run folder that a checkpoint lies in as one of its steps; None where it lies elsewhere."""
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else None


def finish_step_folder(partial: Path, folder: Path) -> None:
    """Give a step folder its checksums and its name, once every byte of it is on the disk.

    A folder of the same name is replaced.
    """
    sums = {name: sha256_of_file(partial / name) for name in _files_below(partial)}
    write_file(partial / "checksums.json", json.dumps(sums, indent=1).encode())
    _flush_to_disk(partial)
    replaced = folder.with_name(f".{folder.name}.removed")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    partial.rename(folder)
    _flush_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_while_written(folder: Path) -> None:
    """Remove a folder into which writes that were under way when a save failed may still put files."""
    end = time.monotonic() + LATE_WRITES_SECONDS
    while time.monotonic() < end:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)  # a late write makes its folder again
        if not folder.exists():
            return


def mark_best(run: Path, step: int) -> None:
    """Let `best` point at `checkpoints/<step>`, without a moment in which there is none."""
    pointer = run / ".best.new"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(Path("checkpoints") / str(step), target_is_directory=True)
    best = run / "best"
    if best.is_dir() and not best.is_symlink():  # some ways to copy a run make it a folder
        best.rename(free_name(best))
    pointer.replace(best)


def prune_checkpoints(run: Path, *, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one, and leftovers of crashes."""
    for step, folder in step_folders(run)[:-keep]:
        if step != best_step:
            _remove(folder)
    for pattern in (".*.partial", ".*.removed"):
        for leftover in (run / "checkpoints").glob(pattern):
            shutil.rmtree(leftover)


def damage(folder: Path) -> str | None:
    """Say in one line what is wrong with a step folder's files, or None when every checksum holds."""
    problem = _find_damage(folder)
    if problem is None:
        return None
    # Others may have named the files.
    problem = problem if problem.isprintable() else ascii(problem)[1:-1]
    if len(problem) <= LONGEST_PROBLEM:
        return problem
    half = LONGEST_PROBLEM // 2
    return f"{problem[:half]} ... {problem[-half:]}"


def _find_damage(folder: Path) -> str | None:
    try:
        if not (folder / "checksums.json").is_file():
            return "checksums.json is missing"
        sums = dict(json.loads((folder / "checksums.json").read_text()))
        for name, expected in sums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256_of_file(folder / name) != expected:
                return f"{name} does not have its checksum"
        unknown = set(_files_below(folder)) - set(sums) - {"checksums.json"}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"its files cannot be read and compared with checksums.json ({error})"
    if unknown:
        return f"{sorted(unknown)[0]} was not there when it was written"
    return None


def find_checkpoint(
    path: Path, *, on_damaged: Callable[[str], None], prefer_best: bool = False
) -> Path:
    """Turn a run or step folder into a step folder whose checksums hold.

    Of a run the newest good checkpoint is taken, or `best` where that is preferred and good; each
    damaged one before it is named through `on_damaged`.

    Raises:
        InputError: the path is no run or step folder, or everything in it is damaged.
    """
    if (path / "meta.json").is_file() or (path / "checksums.json").is_file():
        problem = damage(path)
        if problem:
            raise InputError(
                f"{path}: damaged checkpoint ({problem}). Name the run folder to take the newest "
                "good one."
            )
        return path.resolve()  # `best` is another name for a step
    if not path.exists():
        raise InputError(f"{path}: no such folder. Name a run folder or one of its checkpoints.")
    best = path / "best"
    if prefer_best and os.path.lexists(best):
        problem = damage(best)
        if problem is None:
            return best.resolve()
        on_damaged(f"{best}: damaged checkpoint ({problem}); the newest good one is used.")
    folders = step_folders(path)
    for _, folder in reversed(folders):
        problem = damage(folder)
        if problem is None:
            return folder
        on_damaged(f"{folder}: damaged checkpoint ({problem}); the one before it is used.")
    if folders:
        raise InputError(
            f"{path}: every checkpoint in it is damaged. Name another run, or train again with --out "
            "NEW."
        )
    if (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir():
        raise InputError(
            f"{path}: this run has no checkpoint yet. Name another run, or train this one without "
            "--resume."
        )
    raise InputError(
        f"{path}: neither a run folder nor a checkpoint. Name a folder that holds checkpoints/."
    )


def _files_below(folder: Path) -> list[str]:
    """List the files of a step folder, but hidden ones, which file managers leave behind."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(p.relative_to(folder).as_posix() for p in paths if not p.name.startswith("."))


def _flush_to_disk(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_folder(path)


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Take a checkpoint's name away first, so that a half-removed one never looks whole."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
