"""Show runs: `python -m tinyllm_jax.report RUN` writes the report of one, RUN RUN... compares several.

A page is one file that loads nothing from elsewhere.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from tinyllm_jax.cli import run
from tinyllm_jax.data.files import locked, write_file
from tinyllm_jax.settings import Parser
from tinyllm_jax.training.report import report_of
from tinyllm_jax.training.reports.compare import comparison_of
from tinyllm_jax.training.reports.run import read_run


def main(words: Sequence[str] | None = None) -> int:
    """Write a page as the command line says, and its name to stdout; 0 when done."""
    parser = Parser(
        prog="python -m tinyllm_jax.report",
        description="Write the report of a run anew, or compare runs: overlaid curves, final numbers "
        "side by side, and the settings, data and environments in which they differ.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folder")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the page; default report.html in the folder of one run, comparison.html in the current "
        "folder for several",
    )
    arguments = parser.parse_args(words)
    folders, now = arguments.runs, time.time()
    found = [read_run(folder) for folder in folders]
    if len(found) == 1:
        path = arguments.out or folders[0] / "report.html"
        goes_on = arguments.out is None and is_in_training(folders[0])
        content = report_of(found[0], goes_on=goes_on, now=now)
    else:
        path = arguments.out or Path("comparison.html")
        content = comparison_of(folders, found, now=now)
    write_file(path, content.encode(errors="backslashreplace"))
    print(path)
    return 0


class _InTraining(Exception):  # noqa: N818 (no error)
    pass


def is_in_training(folder: Path) -> bool:
    """Tell whether a process that trains holds the lock of a run folder."""
    folder = folder.resolve()
    lock = folder.parent / f".{folder.name}.lock"

    def say() -> None:
        raise _InTraining

    if not lock.is_file():
        return False
    try:
        with locked(lock, on_wait=say):
            return False
    except _InTraining:
        return True


if __name__ == "__main__":
    run(main)
