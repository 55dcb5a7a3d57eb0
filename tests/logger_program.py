"""A run as its loggers see it, without training: brings one to rows of metrics, adds more, and ends.

Arguments: the logger, the run folder, the last step that `metrics.jsonl` has, the last step to add, how it
ends (`kill` leaves everything as it stands), and flags of `tinyllm_jax.train`.
"""

import os
import sys
from pathlib import Path

from tinyllm_jax import train
from tinyllm_jax.config import load_config
from tinyllm_jax.training.loggers import open_loggers

name, folder, has, last, end, *flags = sys.argv[1:]


def rows_of(step: int) -> list[dict]:
    rows = [{"kind": "train", "step": step, "loss": 10.0 / step, "skipped": False}]
    if step % 3 == 0:
        rows.append({"kind": "eval", "step": step, "loss": 5.0 / step})
        rows.append({"kind": "sample", "step": step, "text": f"Story {step}."})
    return rows


_, overrides, problems = train.read_command([*flags, "--logging.to", name])
config = load_config("tiny", overrides, problems)
before = [row for step in range(1, int(has) + 1) for row in rows_of(step)]
with open_loggers(config, Path(folder), before, writes=True, say=print) as loggers:
    for step in range(int(has) + 1, int(last) + 1):
        loggers.write(rows_of(step))
    loggers.flush()
    if end == "kill":
        os._exit(0)
