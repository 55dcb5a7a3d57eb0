"""Measure time and peak memory of `python -m convert` on a 215 M-parameter model.

`python benchmarks/conversion.py [--moments] [--targets torch hf ...]` writes random weights of the
preset `tiny_k_215m` as a run folder, converts it with logits compared, and prints a table. Peak
memory is the largest resident set of the converting process, mapped files counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# The checkout that this file is in, whether it is installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from convert import Bundle, Training, write
from convert.bundle import default_run, expected_shapes, make_layout
from tinyllm_jax.config import ModelConfig, load_config
from tinyllm_jax.data.bytelevel import BYTE_OF, CONTROL_TOKENS, ByteLevelTokenizer

TARGETS = {
    "torch": "model.pt",
    "safetensors": "folder",
    "hf": "hf",
    "orbax": "run",
    "gguf": "model.gguf",
    "llama2c": "model.bin",
}


def main() -> None:
    """Write the model, convert it to each target, and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny_k_215m")
    parser.add_argument("--moments", action="store_true", help="both moments as well: 3x the size")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(
            random_model(arguments.preset, moments=arguments.moments), folder / "source", to="orbax"
        )
        size = stored_bytes(arguments.preset, moments=arguments.moments)
        print(f"{arguments.preset}: {size / 1e9:.2f} GB of arrays, moments {arguments.moments}")
        print(f"{'from':12} {'to':12} {'seconds':>8} {'CPU s':>6} {'peak GB':>8} {'x size':>7}")
        for target in arguments.targets:
            measure("orbax", folder / "source", target, folder / TARGETS[target], size)
        if "torch" in arguments.targets:
            measure("torch", folder / TARGETS["torch"], "orbax", folder / "back", size)


def measure(kind: str, source: Path, target: str, path: Path, size: int) -> None:
    """Convert once in a process of its own and print a row."""
    words = [sys.executable, "-m", "convert", str(source), str(path), "--to", target]
    root = Path(__file__).parents[1]
    start = time.perf_counter()
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, cwd=root, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    assert os.waitstatus_to_exitcode(status) == 0
    peak = usage.ru_maxrss * 1024
    busy = usage.ru_utime + usage.ru_stime
    row = f"{kind:12} {target:12} {seconds:8.1f} {busy:6.1f} {peak / 1e9:8.2f} {peak / size:7.2f}"
    print(row, flush=True)


def stored_bytes(preset: str, *, moments: bool) -> int:
    """Add up the float32 arrays."""
    shapes = expected_shapes(load_config(preset).model).values()
    return sum(int(np.prod(shape)) for shape in shapes) * 4 * (3 if moments else 1)


def random_model(preset: str, *, moments: bool) -> Bundle:
    """Draw weights, and moments where asked."""
    model = load_config(preset).model
    weights, *both = (draw(model, seed) for seed in range(3 if moments else 1))
    layout = make_layout(
        format="random", rope="half-split", tied=True, transposed=False, weights=weights
    )
    training = None
    if moments:
        config = default_run({"vocab_size": model.vocab_size} | vars(model), origin=preset)
        training = Training(config, 10, 10, both[0], both[1], 0, 42, 32, "d" * 64, None)
    return Bundle(model, weights, byte_tokenizer(model.vocab_size), training, layout)


def draw(model: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Draw one array for each weight; they do not compress, as trained ones do not."""
    numbers = np.random.default_rng(seed)
    return {
        name: 0.02 * numbers.standard_normal(shape, dtype=np.float32)
        for name, shape in expected_shapes(model).items()
    }


def byte_tokenizer(size: int) -> ByteLevelTokenizer:
    """Make a tokenizer.json of bytes and names that no text has."""
    names = [*CONTROL_TOKENS, *BYTE_OF]
    names += [f"unused{number}" for number in range(size - len(names))]
    table = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": {n: id for id, n in enumerate(names)}, "merges": []},
    }
    return ByteLevelTokenizer(json.dumps(table).encode(), origin="benchmark")


if __name__ == "__main__":
    main()
