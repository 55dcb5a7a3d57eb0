"""How fast text becomes token shards, and how fast shards become batches.

    python -m benchmarks.data_speed --data 'stories/*.parquet'

The peers do the same by the usual loops: documents out of parquet by pyarrow, ids by the same
tokenizer's library, a flat array of 16-bit numbers (llama2.c's and nanoGPT's way), and batches from
it by PyTorch's DataLoader or by slicing. A model's step must never wait for batches, so what counts
there is the distance to the tokens that a step takes. Measurements alternate, and every figure is a
median.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import alternate, ratio, report
from tinyllm_jax.config import Config
from tinyllm_jax.data import prepare as room
from tinyllm_jax.data.batches import Batches
from tinyllm_jax.data.corpus import find_parts
from tinyllm_jax.data.prepare import prepare
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.host import available_cores
from tinyllm_jax.settings import build

COLUMNS = ("what", "ours", "peer", "the peer", "unit", "ours / peer")
SHAPES = [(32, 256), (512, 256), (64, 512)]
STEPS = {32: 300, 512: 20, 64: 100}


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


def trained_tokenizer(config: Config) -> Tokenizer:
    """Train the tokenizer beforehand, so that it is not timed."""
    parts = find_parts(config.data, part_bytes=room.GROUP_BYTES)
    sources = room.describe_sources(parts, config.data)
    return room.get_tokenizer(config, parts, sources, progress=False)


def parquet_texts(paths: list[str], *, size: int) -> Iterator[list[str]]:
    """Read documents as most scripts do."""
    import pyarrow.parquet

    for path in paths:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(size, columns=["text"]):
            yield batch.column("text").to_pylist()


def usual_loop(kind: str, tokenizer: Tokenizer, paths: list[str], folder: Path) -> Path:
    """Turn text into one flat file of ids, by the tokenizer's own library."""
    file = tokenizer.save(folder)
    if kind == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        encode: Callable[[list[str]], Any] = lambda texts: processor.encode(texts)  # noqa: E731
    else:
        import tokenizers

        library = tokenizers.Tokenizer.from_file(str(file))
        encode = lambda texts: [found.ids for found in library.encode_batch(texts)]  # noqa: E731
    flat = folder / "flat.bin"
    with open(flat, "wb") as output:
        for texts in parquet_texts(paths, size=1000):
            lines = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in encode(texts)]
            output.write(np.concatenate(lines).astype(np.uint16).tobytes())
    return flat


def measure_preparing(paths: list[str], folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Time reading, tokenising and writing, the tokenizer being there already."""
    rows = []
    one_kind = all(path.endswith(".parquet") for path in paths)
    for kind in ("sentencepiece", "bytelevel"):
        tokenizer = trained_tokenizer(config_for(paths, "stream", 256, 1, kind))
        text_bytes, turn = [0], iter(range(10**6))
        found: dict[str, Callable[[], Any]] = {}

        def ours(workers: int, kind: str, turn: Iterator[int], text_bytes: list[int]) -> None:
            # The length is part of the key of padded rows: another one is prepared anew.
            config = config_for(paths, "padded", 256 + next(turn), workers, kind)
            prepared = prepare(config, progress=False)
            text_bytes[0] = prepared.train.text_bytes + prepared.validation.text_bytes

        counts = sorted({1, available_cores()})
        for workers in counts:
            found[f"ours {workers}"] = lambda w=workers, k=kind, t=turn, b=text_bytes: ours(
                w, k, t, b
            )
        if one_kind:
            found["peer"] = lambda k=kind, t=tokenizer: usual_loop(k, t, paths, folder)
        seconds = alternate(found, rounds=rounds)
        rates = {name: text_bytes[0] / 1e6 / time for name, time in seconds.items()}
        library = "sentencepiece" if kind == "sentencepiece" else "tokenizers, threads of its own"
        for workers in counts:
            mine, peer = rates[f"ours {workers}"], rates.get("peer")
            rows.append(
                {
                    "what": f"text to shards, {kind}, {workers} process{'es' * (workers > 1)}",
                    "ours": mine,
                    "peer": peer,
                    "the peer": f"pyarrow + {library}, one process",
                    "unit": "MB/s of text",
                    "ours / peer": ratio(mine, peer),
                }
            )
    return rows


def torch_loader(flat: Path, rows: int, length: int) -> Callable[[int], None] | None:
    """Give what takes a number of batches from PyTorch's DataLoader, or None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    ids = np.memmap(flat, np.uint16, "r")

    class Windows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return (len(ids) - 1) // length

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            window = torch.from_numpy(
                ids[index * length : index * length + length + 1].astype(np.int64)
            )
            return window[:-1], window[1:]

    loader = torch.utils.data.DataLoader(
        Windows(), batch_size=rows, shuffle=True, drop_last=True, num_workers=0
    )
    held: dict[str, Iterator[Any]] = {"batches": iter(loader)}

    def take(steps: int) -> None:
        for _ in range(steps):
            try:
                next(held["batches"])
            except StopIteration:
                held["batches"] = iter(loader)
                next(held["batches"])

    return take


def sliced(flat: Path, rows: int, length: int) -> Callable[[int], None]:
    """Give nanoGPT's way: windows at random places of a memory map, stacked."""
    ids = np.memmap(flat, np.uint16, "r")
    draw = np.random.default_rng(0)

    def take(steps: int) -> None:
        for _ in range(steps):
            starts = draw.integers(0, len(ids) - length - 1, rows)
            np.stack([ids[start : start + length].astype(np.int64) for start in starts])
            np.stack([ids[start + 1 : start + 1 + length].astype(np.int64) for start in starts])

    return take


def measure_loading(paths: list[str], folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Time batches alone, without a model that reads them."""
    tokenizer = trained_tokenizer(config_for(paths, "stream", 256, 1, "sentencepiece"))
    flat = folder / "flat.bin"
    if not flat.is_file() and all(path.endswith(".parquet") for path in paths):
        usual_loop("sentencepiece", tokenizer, paths, folder)
    rows = []
    for size, length in SHAPES:
        jobs: dict[str, Callable[[], Any]] = {}
        for packing in ("stream", "padded", "packed"):
            config = config_for(paths, packing, length, 0, "sentencepiece")
            batches = Batches(prepare(config, progress=False).train, rows_per_step=size, seed=0)
            turn = iter(range(10**6))

            def ours(batches: Batches, turn: Iterator[int], steps: int) -> None:
                for _ in range(steps):
                    batches.batch(next(turn))

            jobs[packing] = lambda b=batches, t=turn, s=STEPS[size]: ours(b, t, s)
        if flat.is_file():
            peers = {"DataLoader": torch_loader(flat, size, length),
                     "slices": sliced(flat, size, length)}  # fmt: skip
            for name, peer in peers.items():
                if peer is not None:
                    jobs[name] = lambda p=peer, s=STEPS[size]: p(s)
        seconds = alternate(jobs, rounds=rounds)
        tokens = size * length * STEPS[size] / 1e6
        rates = {name: tokens / time for name, time in seconds.items()}
        pairs = [("stream", "slices", "NumPy slices of a memory map"),
                 ("stream", "DataLoader", "PyTorch DataLoader over a memory map"),
                 ("padded", "", ""), ("packed", "", "")]  # fmt: skip
        rows += [
            {
                "what": f"batches, {packing}, {size} x {length}",
                "ours": rates[packing],
                "peer": rates.get(peer) if peer else "",
                "the peer": described,
                "unit": "M tokens/s",
                "ours / peer": ratio(rates[packing], rates.get(peer)) if peer else "",
            }
            for packing, peer, described in pairs
        ]
    return rows


def main() -> None:
    """Measure both and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", nargs="+", required=True, help="files of text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    paths = [os.path.abspath(path) for path in arguments.data]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TINYLLM_DATA_DIR"] = folder
        parts = find_parts(
            config_for(paths, "stream", 256, 1, "sentencepiece").data, part_bytes=1 << 30
        )
        files = list(dict.fromkeys(part.path for part in parts))
        rows = measure_preparing(files, Path(folder), arguments.rounds)
        rows += measure_loading(files, Path(folder), arguments.rounds)
    report("data speed", COLUMNS, rows, settings={"rounds": arguments.rounds, "files": len(files)},
           packages=["numpy", "pyarrow", "sentencepiece", "tokenizers", "torch"],
           json_path=arguments.json)  # fmt: skip


if __name__ == "__main__":
    main()
