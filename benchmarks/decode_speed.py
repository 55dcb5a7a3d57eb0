"""Decoding speed beside llama2.c and transformers: new tokens a second, random weights.

    gcc -Ofast -march=native -fopenmp -o run run.c -lm     # github.com/karpathy/llama2.c
    python -m benchmarks.decode_speed [--config stories_15m] [--llama2c PATH/run] [--rounds 5]

Everyone decodes greedily from bos. llama2.c reads the same weights, exported as `python -m convert`
does, knows one row only, and has as many threads as there are cores. transformers' generate has a
static cache. Each is measured in a process of its own.
"""

import argparse
import os
import re
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import gpu_names, ratio, report
from benchmarks.workers import median_seconds, serve
from tinyllm_jax.config import ModelConfig, SamplingConfig, load_config
from tinyllm_jax.host import available_cores

COLUMNS = ("what", "rows", "tokens/s", "ours / it")
NAMES = {
    "ours": "tinyllm_jax",
    "llama2c": "llama2.c run",
    "transformers": "transformers generate, static cache",
}


def our_decoder(shape: ModelConfig, *, rows: int, tokens: int) -> Callable[[], int]:
    """Compile generation; what runs it gives the number of new tokens."""
    from tinyllm_jax.inference.generate import Generator
    from tinyllm_jax.model.weights import initial_weights

    generator, weights = Generator(shape), initial_weights(shape, seed=0)
    sampling = SamplingConfig(max_new_tokens=tokens, greedy=True)

    def run() -> int:
        found = generator.generate(weights, [[1]] * rows, sampling=sampling, eos_id=-1)
        return sum(len(row[0].token_ids) for row in found)

    return run


def transformers_decoder(shape: ModelConfig, *, rows: int, tokens: int) -> Callable[[], int]:
    """Make transformers' own generation with a static cache."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(available_cores())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads max_position_embeddings tie_word_embeddings"
    settings = LlamaConfig(**{name: getattr(shape, name) for name in names.split()})
    model: Any = LlamaForCausalLM(settings)
    model.to(device).eval()
    model = model.to(torch.bfloat16) if device == "cuda" else model
    prompt = torch.ones((rows, 1), dtype=torch.long, device=device)

    def run() -> int:
        with torch.inference_mode():
            found = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
            )
        return int(found[:, 1:].numel())

    return run


def export(shape: ModelConfig, folder: Path) -> None:
    """Write the same weights for llama2.c, and a vocabulary of one letter a token."""
    from convert.bundle import Bundle, from_jax, make_layout
    from convert.formats.llama2c import write
    from tinyllm_jax.model.weights import initial_weights

    arrays = {name: np.asarray(w) for name, w in initial_weights(shape, seed=0).items()}
    weights = from_jax(arrays)
    layout = make_layout(
        format="random",
        rope="half-split",
        tied=shape.tie_word_embeddings,
        transposed=False,
        weights=weights,
    )
    write(Bundle(shape, weights, None, None, layout), folder / "model.bin", version=0)
    piece = struct.pack("<fi", 0.0, 1) + b"x"
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", 1) + piece * shape.vocab_size)


def llama2c_speed(program: Path, folder: Path, *, tokens: int) -> float:
    """Let run.c tell its tokens a second, which leave the first token out."""
    command = [
        str(program.resolve()),
        str(folder / "model.bin"),
        "-z",
        str(folder / "tokenizer.bin"),
    ]
    command += ["-t", "0", "-n", str(tokens)]
    threads = {"OMP_NUM_THREADS": str(available_cores())}
    told = subprocess.run(command, capture_output=True, env=os.environ | threads, check=True)
    found = re.search(rb"achieved tok/s: ([0-9.]+)", told.stderr)
    assert found is not None
    return float(found[1])


def work(arguments: argparse.Namespace, shape: ModelConfig) -> None:
    """Be one worker: seconds of one new token of all rows."""
    rows, tokens = arguments.rows[0], arguments.tokens
    if arguments.worker == "llama2c":
        with tempfile.TemporaryDirectory() as folder:
            export(shape, Path(folder))
            serve(lambda: 1 / llama2c_speed(arguments.llama2c, Path(folder), tokens=tokens))
        return
    make = our_decoder if arguments.worker == "ours" else transformers_decoder
    run = make(shape, rows=rows, tokens=tokens)
    run()

    def measure() -> float:
        start = time.perf_counter()
        made = run()
        return (time.perf_counter() - start) / made * rows

    serve(measure)


def measure(arguments: argparse.Namespace) -> dict[tuple[str, int], float]:
    """Give the tokens a second by who decodes and rows."""
    common = ["--config", arguments.config, "--tokens", str(arguments.tokens)]
    pairs = [(who, rows) for rows in arguments.rows for who in arguments.contenders]
    if arguments.llama2c:
        pairs.append(("llama2c", 1))
        common += ["--llama2c", str(arguments.llama2c)]
    jobs = {
        f"{who} {rows}": [
            "benchmarks.decode_speed", "--worker", who, "--rows", str(rows), *common
        ]
        for who, rows in pairs
    }  # fmt: skip
    seconds = median_seconds(jobs, rounds=arguments.rounds)
    return {
        (who, rows): rows / seconds[f"{who} {rows}"]
        for who, rows in pairs
        if f"{who} {rows}" in seconds
    }


def make_rows(
    speeds: dict[tuple[str, int], float], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Make the table: at every number of rows, ours beside the peers; llama2.c's is that of one row."""
    table, place = [], "GPU" if gpu_names() else "CPU"
    for rows in arguments.rows:
        ours = speeds.get(("ours", rows))
        for who in [*arguments.contenders, "llama2c"]:
            theirs = speeds.get((who, 1 if who == "llama2c" else rows))
            table.append(
                {
                    "what": f"{NAMES[who]}, {'CPU' if who == 'llama2c' else place}",
                    "rows": 1 if who == "llama2c" else rows,
                    "tokens/s": theirs,
                    "ours / it": ratio(ours, theirs),
                }
            )
    if not gpu_names():
        table.append({"what": "all but llama2.c in bfloat16", "rows": "needs a GPU"})
    return table


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="stories_15m", help="preset or TOML file")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="rows decoded at once")
    parser.add_argument("--tokens", type=int, default=200, help="new tokens of each row")
    parser.add_argument("--llama2c", type=Path, help="the program that you built from run.c")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=["ours", "transformers"],
        default=["ours", "transformers"],
        help="who decodes beside llama2.c",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the table to")
    parser.add_argument("--worker", choices=list(NAMES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments, load_config(arguments.config, {}).model)
        return
    speeds = measure(arguments)
    settings = {k: str(v) for k, v in vars(arguments).items() if k not in ("worker", "llama2c")}
    report(
        "Decoding speed",
        COLUMNS,
        make_rows(speeds, arguments),
        settings=settings,
        packages=("jax", "torch", "transformers"),
        json_path=arguments.json,
    )


if __name__ == "__main__":
    main()
