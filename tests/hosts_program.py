"""One process of several: trains as the command does, and writes down the rows that it reads.

Arguments: a file for the rows, the number of the training batch at which it sends itself a signal (-1:
none), that signal, and the flags of `tinyllm_jax.train`.
"""

import json
import os
import sys
from typing import Any

from tinyllm_jax import train
from tinyllm_jax.cli import run
from tinyllm_jax.data import batches

path, signalled_batch, number_of_signal, *flags = sys.argv[1:]


def count_read(reads: Any, kind: str) -> Any:
    """Write down which rows each call of `batch` asks the shards for."""

    def batch(self: Any, number: int, **options: Any) -> batches.Batch:
        read = self._reader.read

        def read_and_tell(rows: Any) -> batches.Batch:
            with open(path, "a") as file:
                file.write(json.dumps([kind, number, rows.tolist()]) + "\n")
            return read(rows)

        if kind == "train" and number == int(signalled_batch):
            os.kill(os.getpid(), int(number_of_signal))
        self._reader.read = read_and_tell
        try:
            return reads(self, number, **options)
        finally:
            del self._reader.read

    return batch


batches.Batches.batch = count_read(batches.Batches.batch, "train")
batches.EvaluationBatches.batch = count_read(batches.EvaluationBatches.batch, "evaluation")
run(lambda: train.main(flags))
