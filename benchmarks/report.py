"""What every benchmark prints: the hardware, one table with a ratio in each row, and JSON beside it."""

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tinyllm_jax.host import available_cores
from tinyllm_jax.training.environment import processor_name

# What a cell says where the machine lacks what it takes, such as a GPU or a package.
NOT_MEASURED = "not measured"


def gpu_names() -> list[str]:
    """List the GPUs that the driver knows, without starting a framework that would take memory."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in told.splitlines() if line.strip()]


def hardware() -> str:
    """Name processor, cores in use, and GPUs."""
    cores = available_cores()
    parts = [f"{processor_name()}, {cores} core{'s' if cores > 1 else ''}"]
    gpus = gpu_names()
    parts += [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    return ", ".join(parts)


def versions(packages: Sequence[str]) -> str:
    """Name the packages that are there with their versions, and Python's."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def alternate(jobs: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """Run every job once unmeasured, then in turns, and give the median seconds of each.

    In turns, so that whatever else the machine does falls on all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def ratio(ours: float | None, theirs: float | None) -> str:
    """Say how many times theirs ours is; both are rates, or both divided the other way round."""
    return f"{ours / theirs:.2f}x" if ours and theirs else NOT_MEASURED


def print_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as Markdown; what a row lacks, or has as None, is not measured."""
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(cell(row.get(column)) for column in columns) + " |", flush=True)


def cell(value: Any) -> str:
    """Write one value: three significant digits, and whole numbers in full."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def report(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    *,
    settings: Mapping[str, Any],
    packages: Sequence[str],
    json_path: Path | None,
) -> None:
    """Print title, hardware and table, and write the same as JSON.

    Args:
        settings: What was asked for; it stands in the JSON.
        packages: Whose versions to name.
        json_path: File to write; None writes `benchmarks/results/TITLE.json` where it runs.
    """
    named = {"date": date.today().isoformat(), "hardware": hardware(), "with": versions(packages)}
    print(f"\n{title}: {named['hardware']}; {named['with']}; {named['date']}\n")
    print_table(columns, rows)
    path = (
        json_path
        or Path("benchmarks/results") / f"{re.sub(r'[^a-z0-9]+', '_', title.lower())}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"title": title, **named, "settings": dict(settings), "rows": [dict(r) for r in rows]}
    path.write_text(json.dumps(content, indent=1, default=os.fspath) + "\n")
    print(f"\nWritten: {path}")
