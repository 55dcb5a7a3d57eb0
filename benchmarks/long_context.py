"""Loss by position beyond the trained context, with rotary positions stretched in several ways.

    python benchmarks/long_context.py --run checkpoints/RUN --data 'stories/*.parquet' --out DIR

Takes a run as it is, gives it a context four times as long without training, and draws the mean
loss of the validation text by position.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from tinyllm_jax.config import Config
from tinyllm_jax.data.batches import EvaluationBatches
from tinyllm_jax.data.prepare import prepare
from tinyllm_jax.model.compiled import compiled
from tinyllm_jax.model.weights import merge_weights, model_structure
from tinyllm_jax.training.checkpoint import open_checkpoint

FACTOR = 4
BUCKET = 32
ROWS = 8
WAYS: dict[str, dict[str, Any]] = {
    "as trained": {},
    "linear": {"rope_type": "linear", "rope_factor": float(FACTOR)},
    "llama3": {"rope_type": "llama3", "rope_factor": float(FACTOR)},
    "yarn": {"rope_type": "yarn", "rope_factor": float(FACTOR)},
}
COLORS = ("#888888", "#6ea8dc", "#3f9b5f", "#e07b39")


def stretched(config: Config, way: dict[str, Any]) -> Config:
    """Give a run's settings a longer context."""
    length = FACTOR * config.data.sequence_length
    model = dataclasses.replace(config.model, max_position_embeddings=length, **way)
    data = dataclasses.replace(config.data, packing="stream", sequence_length=length)
    return dataclasses.replace(config, model=model, data=data)


def loss_by_position(config: Config, weights: Any, rows: EvaluationBatches) -> np.ndarray:
    """Average the loss of each bucket of positions over all rows."""
    structure, _ = model_structure(config.model)

    @compiled
    def losses(weights: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        logits = merge_weights(structure, weights)(tokens)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen, axis=0)

    sums, count = np.zeros(config.data.sequence_length), 0
    for batch in rows:
        # Rows of padding fill the last batch up.
        real: np.ndarray = np.all(batch.loss_mask, axis=1)
        if bool(np.all(real)):
            sums += np.asarray(losses(weights, batch.tokens, batch.targets))
            count += len(real)
    return (sums / count).reshape(-1, BUCKET).mean(axis=1)


def main() -> None:
    """Measure every way, print a table and draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.run, on_damaged=print)
    trained = checkpoint.config.data.sequence_length
    data = dataclasses.replace(checkpoint.config.data, paths=tuple(arguments.data))
    config = dataclasses.replace(checkpoint.config, data=data)
    prepared = prepare(stretched(config, {}), progress=True, tokenizer=checkpoint.tokenizer)
    rows = EvaluationBatches(prepared.validation, batch_size=ROWS, count=0)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    print(f"| rotary positions | to {trained} | {trained} to {2 * trained} | "
          f"{2 * trained} to {FACTOR * trained} | all |\n" + "| --- " * 5 + "|")  # fmt: skip
    for (name, way), color in zip(WAYS.items(), COLORS, strict=True):
        losses = loss_by_position(stretched(config, way), checkpoint.weights, rows)
        cut = trained // BUCKET
        parts = (losses[:cut], losses[cut : 2 * cut], losses[2 * cut :], losses)
        print(f"| {name} | " + " | ".join(f"{part.mean():.3f}" for part in parts) + " |")
        axes.plot((np.arange(len(losses)) + 0.5) * BUCKET, losses, color=color, label=name)
    axes.axvline(trained, color="#888888", linestyle=":", linewidth=1)
    axes.set_xlabel(f"position (trained on {trained})")
    axes.set_ylabel("validation loss, nats per token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out / "long_context.svg")


if __name__ == "__main__":
    main()
