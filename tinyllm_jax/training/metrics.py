"""The metrics file: one JSON object a line, every step once, also over resumed runs."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tinyllm_jax.data.files import for_json, write_file
from tinyllm_jax.errors import InputError
from tinyllm_jax.training.loggers import NO_LOGGERS, Loggers

# Levels of lists and tables.
DEEPEST = 20


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all whole lines; a last line cut off by a crash is left out.

    Raises:
        InputError: a line before that is no row.
    """
    if not path.exists():
        return []
    rows = []
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{number}: not UTF-8 text. Remove that line.") from None
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n") or not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON ({error}). Remove that line.") from None
        if not _is_row(rows[-1]):
            raise InputError(
                f"{path}:{number}: no row of metrics, which has a kind and a step. Remove that line."
            )
    return rows


def write_metrics(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole file of rows."""
    write_file(path, "".join(map(_line, rows)).encode())


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("kind"), str)
        and type(row.get("step")) is int
        and abs(row["step"]) < 2**53
        and not is_deep(row)
    )


def is_deep(value: Any, levels: int = DEEPEST) -> bool:
    """Tell lists and tables that lie in each other deeper than anything that a run writes."""
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deep(each, levels - 1) for each in inner)


class MetricsFile:
    """Appends to `metrics.jsonl`.

    Args:
        path: The file.
        resume_step: Lines of later steps are dropped first, since those steps come again; but what
            was left out stays left out, and rewinds count.
    """

    def __init__(self, path: Path, *, resume_step: int):
        self._path, self._loggers = path, NO_LOGGERS
        self._keep_until(resume_step)

    def _keep_until(self, step: int) -> None:
        rows = [
            # Of the step that it is cut to, so that steps never fall from row to row.
            {**row, "step": min(row["step"], step)} if row["kind"] == "rewind" else row
            for row in read_metrics(self._path)
            if row["step"] <= step or row["kind"] == "rewind"
        ]
        write_metrics(self._path, rows)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (lives as long as the run)

    def rows(self) -> list[dict[str, Any]]:
        """Read all rows so far; numbers that are none are text in them."""
        return read_metrics(self._path)

    def send_to(self, loggers: Loggers) -> None:
        """Hand all that is written from now on to loggers, too."""
        self._loggers = loggers

    def go_back(self, step: int, row: Mapping[str, Any]) -> None:
        """Drop the rows after a step, whose numbers come again, and write one that says why."""
        with self._named():
            self._file.close()
        self._keep_until(step)
        self.write([row])
        self.flush_to_disk()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, each with `kind` and `step`, and hand them to the operating system."""
        rows = [*rows]
        with self._named():
            self._file.write("".join(map(_line, rows)))
            self._file.flush()
        self._loggers.write(rows)

    def flush_to_disk(self) -> None:
        """Wait until all rows are on the disk; a checkpoint is written only after that."""
        with self._named():
            self._file.flush()
            os.fsync(self._file.fileno())
        self._loggers.flush()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Name the file in errors: those of an open file do not."""
        try:
            yield
        except OSError as error:
            error.filename = str(self._path)
            raise

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        # What a full disk did not take is tried again.
        with self._named():
            self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(for_json(dict(row)), allow_nan=False) + "\n"
