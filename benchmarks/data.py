"""How fast text becomes tokens and tokens become batches, on this machine.

    python benchmarks/data.py --data 'data/*.parquet'

Every figure is the median of several rounds, and rounds of different things alternate, so that
what else the machine does falls on all of them.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tinyllm_jax.config import Config
from tinyllm_jax.data.batches import Batches
from tinyllm_jax.data.groups import available_cores
from tinyllm_jax.data.prepare import prepare
from tinyllm_jax.settings import build

ROUNDS = 5
SHAPES = [(32, 256), (512, 256), (64, 512)]
STEPS = {32: 400, 512: 30, 64: 150}


def timed(function: Callable[[], object]) -> float:
    """Give the seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def config_for(paths: list[str], packing: str, length: int, workers: int, kind: str) -> Config:
    """Describe one preparation."""
    settings = {
        "data.paths": paths,
        "data.packing": packing,
        "data.sequence_length": length,
        "data.workers": workers,
        "model.max_position_embeddings": length,
        "model.vocab_size": 4096,
        "tokenizer.kind": kind,
    }
    return build(Config, [("", settings)])


def measure_preparing(paths: list[str]) -> None:
    """Time reading, tokenising and writing, the tokenizer being there already."""
    print("\n| tokenizer | processes | MB/s |\n| --- | --- | --- |")
    cores = available_cores()
    for kind in ("sentencepiece", "bytelevel"):
        seconds: dict[int, list[float]] = {workers: [] for workers in sorted({1, cores})}
        text_bytes = 0
        for number in range(3):
            for workers in seconds:
                # The length is part of the key of padded rows: another one is prepared anew.
                config = config_for(paths, "padded", 256 + number * 10 + workers, workers, kind)
                get_tokenizer(config)
                start = time.perf_counter()
                prepared = prepare(config, progress=False)
                seconds[workers].append(time.perf_counter() - start)
                text_bytes = prepared.train.text_bytes + prepared.validation.text_bytes
        for workers, times in seconds.items():
            print(f"| {kind} | {workers} | {text_bytes / 1e6 / statistics.median(times):.1f} |")


def get_tokenizer(config: Config) -> None:
    """Train the tokenizer beforehand, so that it is not timed."""
    from tinyllm_jax.data import prepare as room
    from tinyllm_jax.data.corpus import find_parts

    parts = find_parts(config.data, part_bytes=room.GROUP_BYTES)
    sources = room.describe_sources(parts, config.data)
    room.get_tokenizer(config, parts, sources, progress=False)


def measure_loading(paths: list[str]) -> None:
    """Time batches alone, without a model that reads them."""
    print("\n| packing | rows x tokens | M tokens/s |\n| --- | --- | --- |")
    loaders = {}
    for packing in ("stream", "padded", "packed"):
        for rows, length in SHAPES:
            split = prepare(
                config_for(paths, packing, length, 0, "sentencepiece"), progress=False
            ).train
            loaders[packing, rows, length] = Batches(split, rows_per_step=rows, seed=0)
    rates: dict[tuple, list[float]] = {key: [] for key in loaders}
    for number in range(ROUNDS):
        for (packing, rows, length), batches in loaders.items():
            steps = range(number * STEPS[rows], (number + 1) * STEPS[rows])
            seconds = timed(lambda b=batches, s=steps: [b.batch(step) for step in s])
            rates[packing, rows, length].append(rows * length * len(steps) / seconds / 1e6)
    for (packing, rows, length), found in rates.items():
        print(f"| {packing} | {rows} x {length} | {statistics.median(found):.0f} |")


def main() -> None:
    """Measure both and print tables."""
    parser = argparse.ArgumentParser(description="Time preparing and loading of text.")
    parser.add_argument("--data", nargs="+", required=True, help="files of text")
    paths = [os.path.abspath(path) for path in parser.parse_args().data]
    print(f"{platform.processor() or platform.machine()}, {available_cores()} cores")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TINYLLM_DATA_DIR"] = str(Path(folder))
        measure_preparing(paths)
        measure_loading(paths)


if __name__ == "__main__":
    main()
