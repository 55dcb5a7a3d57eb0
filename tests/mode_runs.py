"""Tiny runs of every mode after pretraining: their data, their settings, and what is compared."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm_jax.training.checkpoint import read_checkpoint
from tinyllm_jax.training.metrics import read_metrics

ANIMALS = ("cat", "dog", "cow", "hen", "pig", "fox")
PLACES = ("barn", "tree", "house", "pond")
# Prompts of different lengths.
QUESTIONS = ("Who is it?", "What do you see there?", "Tell me.", "Who is in the big old house?")
REWARDS = '''
def length(prompt, answer, metadata):
    """Longer answers are worth more; what is worth something besides differs between prompts."""
    return len(answer) / 10 + metadata["n"] % 3 + len(prompt[-1]["content"]) / 100

def of_words(prompt, answer, metadata):
    return len(answer.split()) + len(answer) % 3

def broken(prompt, answer, metadata):
    raise RuntimeError("no such judge")

CONSTANT = 1
'''
# Over the presets of the modes, so that a run is a matter of seconds.
SHORT = {
    "train.max_steps": 8,
    "train.batch_size": 8,
    "train.eval_interval_steps": 4,
    "train.eval_batches": 2,
    "checkpoint.interval_steps": 4,
    "sampling.max_new_tokens": 12,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 2,
}
CHAT = {"data.paths": "chat.jsonl", "data.validation_paths": "chat_held.jsonl"}
PAIRS = {"data.paths": "pairs.jsonl", "data.validation_paths": "pairs_held.jsonl"}
RLHF = {**CHAT, "run.mode": "rlhf", "rlhf.reward": "mode_rewards:length"}
MODES: dict[str, dict[str, Any]] = {
    "sft": {"run.mode": "sft", **CHAT},
    "dpo": {"run.mode": "dpo", **PAIRS},
    "reward": {"run.mode": "reward", **PAIRS},
    "grpo": {**RLHF, "rlhf.updates_per_rollout": 2},
    "ppo": {
        **RLHF,
        "rlhf.algorithm": "ppo",
        "rlhf.updates_per_rollout": 2,
        "rlhf.kl_target": 0.01,
    },
}


def write_data(folder: Path) -> None:
    """Write conversations, pairs of answers and functions that judge answers."""
    for kind, first, count in (("", 0, 50), ("_held", 50, 7)):
        chats, pairs = [], []
        for n in range(first, first + count):
            asked = {"role": "user", "content": f"{QUESTIONS[n % 4]} {n}"}
            animal, place = ANIMALS[n % 6], PLACES[n % 3]
            good = {"role": "assistant", "content": f"A {animal} in the {place}."}
            bad = {"role": "assistant", "content": f"No {'one ' * (n % 3)}is there."}
            chats.append({"messages": [asked, good], "n": n})
            pairs.append({"prompt": [asked], "chosen": [good], "rejected": [bad]})
        for name, rows in (("chat", chats), ("pairs", pairs)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}{kind}.jsonl").write_text(lines)
    (folder / "mode_rewards.py").write_text(REWARDS)


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def reproducible(run: Path) -> list[dict[str, Any]]:
    """Read the metrics that hold no clock."""
    return [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] != "speed"]


def rows_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == kind]


def assert_same_run(actual: Path, expected: Path, *, step: int, best: bool = True) -> None:
    """Compare weights, moments, counters and metrics bit by bit."""
    left, right = (read_checkpoint(run / "checkpoints" / str(step)) for run in (actual, expected))
    assert (left.step, int(left.moments.count)) == (right.step, int(right.moments.count))
    assert left.best == right.best or not best
    for one, other in (
        (left.weights, right.weights),
        (left.moments.first, right.moments.first),
        (left.moments.second, right.moments.second),
    ):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert reproducible(actual) == reproducible(expected)
