"""The metrics file: one JSON object a line, every step once, also over resumed runs."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinyllm_jax.data.files import write_file
from tinyllm_jax.errors import InputError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all whole lines; a last line cut off by a crash is left out.

    Raises:
        InputError: a line before that is not JSON.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n") or not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON ({error}). Remove that line.") from None
    return rows


class MetricsFile:
    """Appends to `metrics.jsonl`.

    Args:
        path: The file.
        resume_step: Lines of later steps are dropped first, since those steps come again.
    """

    def __init__(self, path: Path, *, resume_step: int):
        rows = [row for row in read_metrics(path) if row["step"] <= resume_step]
        write_file(path, "".join(map(_line, rows)).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (lives as long as the run)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, each with `kind` and `step`, and hand them to the operating system."""
        self._file.write("".join(map(_line, rows)))
        self._file.flush()

    def flush_to_disk(self) -> None:
        """Wait until all rows are on the disk; a checkpoint is written only after that."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({key: _plain(value) for key, value in row.items()}) + "\n"


def _plain(value: Any) -> Any:
    """Write NaN and infinities as text: JSON has no such numbers, and null would hide which."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
