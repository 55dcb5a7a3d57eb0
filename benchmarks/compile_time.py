"""Time from the command to the first training step, cold and with the compilation cache.

    python -m benchmarks.compile_time [--config tiny] [--rounds 3]

Starts `python -m tinyllm_jax.train` as a person would, waits for the first `train` row of its
metrics, and stops it. Processor seconds stand beside the clock's, since on a busy machine only they
say what the start itself costs. The peer is the same command of the PyTorch twin, which runs
without a compiler.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import ratio, report
from tinyllm_jax.training.metrics import read_metrics

COLUMNS = ("start", "seconds", "processor seconds", "best seconds", "twin / ours")
# What is there when the command starts: (prepared data, compiled programs), and who is started.
STARTS = {
    "ours, nothing on disk": (False, False, "tinyllm_jax"),
    "ours, data prepared, cache empty": (True, False, "tinyllm_jax"),
    "ours, data prepared, cache filled": (True, True, "tinyllm_jax"),
    "PyTorch twin, data prepared": (True, False, "tinyllm_torch"),
}
TIMEOUT_SECONDS = 600.0


def processor_seconds(process: int) -> float:
    """Add up what a process and those it has waited for have computed."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def has_stepped(folder: Path) -> bool:
    """Tell whether a run has written the row of a training step."""
    path = folder / "metrics.jsonl"
    return path.is_file() and any(row["kind"] == "train" for row in read_metrics(path))


def first_step(package: str, config: str, folder: Path, settings: Mapping[str, str]) -> list[float]:
    """Start a training command, and give the seconds and processor seconds to its first step."""
    command = [sys.executable, "-m", f"{package}.train", "--config", config, "--out", str(folder)]
    command += ["--train.log_interval_steps", "1"]
    log = folder.with_suffix(".log")
    with open(log, "wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env=os.environ | settings, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while not has_stepped(folder):
                if process.poll() is not None or time.perf_counter() - start > TIMEOUT_SECONDS:
                    raise RuntimeError(f"no step was taken:\n{log.read_text()}")
                time.sleep(0.01)
            return [time.perf_counter() - start, processor_seconds(process.pid)]
        finally:
            process.kill()
            process.wait()


def measure(config: str, rounds: int, folder: Path) -> dict[str, list[list[float]]]:
    """Start everything in turns: what comes later finds what an earlier start left."""
    found: dict[str, list[list[float]]] = {name: [] for name in STARTS}
    for number in range(rounds):
        data, caches = folder / f"data{number}", folder / f"cache{number}"
        settings = {"TINYLLM_DATA_DIR": str(data), "JAX_COMPILATION_CACHE_DIR": str(caches)}
        for name, (_, is_filled, package) in STARTS.items():
            if not is_filled:
                shutil.rmtree(caches, ignore_errors=True)
            run = folder / f"run{number}-{len(found[name])}-{list(STARTS).index(name)}"
            found[name].append(first_step(package, config, run, settings))
            print(f"{name}: {found[name][-1][0]:.1f} s", file=sys.stderr)
    return found


def main() -> None:
    """Measure every start and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="tiny", help="preset or TOML file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.config, arguments.rounds, Path(folder))
    medians = {
        name: [statistics.median(column) for column in zip(*times, strict=True)]
        for name, times in found.items()
    }
    twin = medians["PyTorch twin, data prepared"][0]
    rows: list[dict[str, Any]] = [
        {
            "start": name,
            "seconds": seconds,
            "processor seconds": computed,
            "best seconds": min(wall for wall, _ in found[name]),
            "twin / ours": ratio(twin, seconds) if STARTS[name][0] else "",
        }
        for name, (seconds, computed) in medians.items()
    ]
    report(
        "compile time",
        COLUMNS,
        rows,
        settings={"config": arguments.config, "rounds": arguments.rounds},
        packages=["jax", "flax", "torch"],
        json_path=arguments.json,
    )


if __name__ == "__main__":
    main()
