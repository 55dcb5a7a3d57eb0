"""Loss against work: dense against experts, AdamW against Muon, on stories of your own.

    python benchmarks/curves.py --data 'stories/*.parquet' --out curves

Trains a small model (four layers of 128, 4,096 tokens a step) in each form with two learning rates,
by the command that anybody types, and draws the better of the two against tokens and against
floating-point operations, those of the optimizer included. Runs that are in the folder already are
not run again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tinyllm_jax.config import Config, config_from_table
from tinyllm_jax.model.weights import (
    count_active_parameters,
    count_parameters,
    flops_per_token,
    model_structure,
)
from tinyllm_jax.training.metrics import read_metrics
from tinyllm_jax.training.optim import is_hidden_matrix

COMMON = {
    "model.vocab_size": 2048,
    "model.hidden_size": 128,
    "model.intermediate_size": 384,
    "model.num_hidden_layers": 4,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 4,
    "data.sequence_length": 256,
    "train.batch_size": 16,
    "train.eval_batches": 30,
    "optimizer.warmup_steps": 40,
    "optimizer.weight_decay": 0.1,
}
# Two of eight experts are as wide together as the dense MLP.
EXPERTS = {
    "model.num_experts": 8,
    "model.num_experts_per_tok": 2,
    "model.moe_intermediate_size": 192,
}
FORMS: dict[str, dict[str, Any]] = {
    "dense, AdamW": {},
    "dense, Muon": {"optimizer.name": "muon"},
    "2 of 8 experts, AdamW": EXPERTS,
}
RATES = (4e-3, 8e-3)
COLORS = ("#6ea8dc", "#e07b39", "#3f9b5f")


def train(folder: Path, data: list[str], settings: Mapping[str, Any]) -> None:
    """Run one training command to its end, or go on where it was stopped."""
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "tinyllm_jax.train", "--config", "tinystories_7m"]
    command += ["--data", *data, "--out", str(folder), "--auto-resume", *flags]
    print(" ".join(command), file=sys.stderr, flush=True)
    subprocess.run(command, check=True)


def optimizer_flops(config: Config) -> float:
    """Count what Muon's products cost in one step; AdamW has none.

    Of a matrix [m, n], m the smaller: each of five iterations is X X^T, its square, and a product
    with X, 4 m^2 n + 2 m^3 together.
    """
    if config.optimizer.name != "muon":
        return 0.0
    shapes = [s.shape for n, s in model_structure(config.model)[1].items() if is_hidden_matrix(n)]
    total = 0.0
    for *experts, rows, columns in shapes:
        small, large = sorted((rows, columns))
        total += 5 * (experts or [1])[0] * (4 * small**2 * large + 2 * small**3)
    return total


def read(folder: Path) -> dict[str, Any]:
    """Take what is compared out of a run folder."""
    table = json.loads((folder / "training_config_snapshot.json").read_text())
    config = config_from_table(table, origin=str(folder))
    length = config.data.sequence_length
    tokens = config.rows_per_step * length
    work = tokens * flops_per_token(config.model, sequence_length=length) + optimizer_flops(config)
    looks = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "eval"]
    return {
        "tokens": [row["step"] * tokens for row in looks],
        "work": [row["step"] * work for row in looks],
        "loss": [row["loss"] for row in looks],
        "bits_per_byte": looks[-1]["bits_per_byte"],
        "rate": config.optimizer.learning_rate,
        "parameters": count_parameters(config.model)[0],
        "active": count_active_parameters(config.model),
    }


def draw(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plot validation loss against tokens and against operations."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    by_tokens, by_work = figure.subplots(1, 2, sharey=True)
    for (name, curve), color in zip(curves.items(), COLORS, strict=True):
        millions = [tokens / 1e6 for tokens in curve["tokens"]]
        by_tokens.plot(millions, curve["loss"], "o-", markersize=3, color=color, label=name)
        by_work.plot(
            [w / 1e12 for w in curve["work"]], curve["loss"], "o-", markersize=3, color=color
        )
    by_tokens.set_xlabel("tokens, millions")
    by_work.set_xlabel("operations, TFLOP")
    by_tokens.set_ylabel("validation loss, nats per token")
    by_tokens.legend(frameon=False)
    for axes in (by_tokens, by_work):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Train what is missing, print a table and draw the curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    curves: dict[str, Any] = {}
    for name, form in FORMS.items():
        runs = []
        for rate in RATES:
            folder = arguments.out / f"{name.replace(', ', '_').replace(' ', '_')}_{rate:g}"
            own = {"optimizer.learning_rate": rate, "optimizer.min_learning_rate": rate / 10}
            length = {
                "train.max_steps": arguments.steps,
                "train.eval_interval_steps": arguments.steps // 10,
            }
            train(folder, arguments.data, {**COMMON, **own, **length, **form})
            runs.append(read(folder))
        curves[name] = min(runs, key=lambda run: run["loss"][-1])
    print(
        "| form | parameters | active | rate | tokens | TFLOP | validation loss | bits per byte |"
    )
    print("| --- " * 8 + "|")
    for name, curve in curves.items():
        print(
            f"| {name} | {curve['parameters']:,} | {curve['active']:,} | {curve['rate']:g} | "
            f"{curve['tokens'][-1] / 1e6:.2f} M | {curve['work'][-1] / 1e12:.1f} | "
            f"{curve['loss'][-1]:.4f} | {curve['bits_per_byte']:.4f} |"
        )
    draw(curves).savefig(arguments.out / "curves.svg")


if __name__ == "__main__":
    main()
