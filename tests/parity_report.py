"""Measure how far the twins are apart: `PYTHONPATH=. python tests/parity_report.py`.

Prints the table of docs/parity.md and draws docs/parity_by_layer.svg. A few minutes on 2 cores.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from conftest import ROOT
from llama_oracle import random_weights
from matplotlib import rc_context
from matplotlib.figure import Figure
from parity import (
    PACKINGS,
    both_numbers,
    errors,
    jax_numbers,
    precision,
    real_batch,
    relative_error,
    scaled_down,
    torch_model,
    torch_numbers,
)
from test_parity_model import HEADS, skewed_batch, variant
from test_parity_training import both_runs, recipe

from tinyllm_jax.config import ModelConfig, load_config, preset_names
from tinyllm_jax.model import weights as jax_weights
from tinyllm_jax.model.layers import compute_dtype as jax_compute_dtype
from tinyllm_jax.model.rope import rope_tables as jax_rope_tables

DTYPES = ("float64", "float32", "bfloat16")
FULL_SIZE = ("tiny", "tinystories_7m", "minimind_26m")
LAYERS = 12


def largest(found: dict[str, float]) -> str:
    """Show the largest error and where it is."""
    name = max(found, key=lambda key: found[key])
    where = "" if name in ("logits", "loss") else f" `{name}`"
    return f"{found[name]:.1e}{where}"


def numbers_by_form(dtype: str, folder: Path) -> dict[str, dict[str, float]]:
    """Compare every preset's form and every form of heads, tying and packing."""
    worst: dict[str, dict[str, float]] = {"logits": {}, "loss": {}, "gradients": {}}

    def add(config: ModelConfig, batch: Any) -> None:
        config = dataclasses.replace(config, compute_dtype=dtype, attention="reference")
        for name, error in errors(*both_numbers(config, batch)).items():
            group = worst[name if name in worst else "gradients"]
            group[name] = max(error, group.get(name, 0.0))

    for preset in preset_names():
        add(scaled_down(preset), real_batch(load_config(preset).data.packing, folder))
    for heads, packing in zip(HEADS, PACKINGS, strict=True):
        for tied in (True, False):
            add(variant(heads, tied=tied, dtype=dtype), real_batch(packing, folder))
    return worst


def full_size(preset: str, dtype: str) -> float:
    """Compare the logits of a preset at its own size, with initial weights."""
    config = dataclasses.replace(
        load_config(preset).model, compute_dtype=dtype, attention="reference"
    )
    with precision(config):
        structure, _ = jax_weights.model_structure(config)
        weights = jax_weights.initial_weights(config, seed=0)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 128))
        forward = jax.jit(lambda w, t: jax_weights.merge_weights(structure, w)(t))
        expected = np.asarray(forward(weights, jnp.asarray(tokens)))
    with torch.no_grad():
        actual = torch_model(config, weights)(torch.from_numpy(tokens))
    return relative_error(actual, expected)


def after_training(dtype: str, folder: Path) -> dict[str, float]:
    """Compare losses, gradient norms and weights over 50 steps."""
    ours, theirs, curves = both_runs(recipe("packed", model__compute_dtype=dtype), folder)
    shown = ("loss", "grad_norm", "learning_rate")
    found = {f"{name} of every step": errors(*curves)[name] for name in shown}
    arrays = errors(ours.arrays(), theirs.arrays())
    found["weights at the end"] = max(e for name, e in arrays.items() if name[0] == "w")
    return found


def hidden_by_layer(config: ModelConfig, weights: Any, tokens: np.ndarray) -> Any:
    """Give the residual stream after each layer in (the twin, JAX)."""
    model, ours = torch_model(config, weights), []
    for layer in model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: ours.append(output[0]))
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    with precision(config):
        structure, _ = jax_weights.model_structure(config)

        def run(weights: Any, tokens: Any) -> list[Any]:
            whole, dtype = jax_weights.merge_weights(structure, weights), jax_compute_dtype(config)
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
            rope = jax_rope_tables(positions, config, dtype=dtype)
            at: Any = {"positions": positions, "counted": jnp.ones(tokens.shape, bool)}
            x, theirs = whole.embed_tokens(tokens, dtype=dtype), []
            for layer in whole.layers:
                x, _, _ = layer(x, rope, None, cache=None, dropout_key=None, **at)
                theirs.append(x)
            return theirs

        theirs = [np.asarray(x) for x in jax.jit(run)(dict(weights), jnp.asarray(tokens))]
    return [x.double().numpy() for x in ours], theirs


def draw_error_by_layer(path: Path) -> None:
    """Draw how far each side is from float64 after each layer, and the sides from each other.

    One more line shows what an error of the code looks like beside those of rounding.
    """
    base = dataclasses.replace(
        variant("grouped", tied=True, dtype="float64"),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        head_dim=24,
        attention="reference",
    )
    tokens = np.random.default_rng(0).integers(0, base.vocab_size, (4, 64))
    exact_weights = random_weights(base)
    exact, exact_jax = hidden_by_layer(base, exact_weights, tokens)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    places = range(1, LAYERS + 1)
    colours = {"bfloat16": "#e07b39", "float32": "#6ea8dc", "float64": "#3f9b5f"}
    for dtype, colour in colours.items():
        ours, theirs = exact, exact_jax
        if dtype != "float64":
            config = dataclasses.replace(base, compute_dtype=dtype)
            weights = {name: w.astype(np.float32) for name, w in exact_weights.items()}
            ours, theirs = hidden_by_layer(config, weights, tokens)
        pairs = list(zip(ours, theirs, exact, strict=True))
        lines = {f"{dtype}: JAX to PyTorch": ("-o", [relative_error(a, b) for a, b, _ in pairs])}
        if dtype != "float64":
            far = [relative_error(a, truth) for a, _, truth in pairs]
            lines[f"{dtype}: PyTorch to float64"] = ("--", far)
            far = [relative_error(b, truth) for _, b, truth in pairs]
            lines[f"{dtype}: JAX to float64"] = (":", far)
        for label, (style, values) in lines.items():
            axes.plot(places, values, style, color=colour, label=label, markersize=3)
    wrong = dataclasses.replace(base, rope_theta=10000.0)
    broken, _ = hidden_by_layer(wrong, exact_weights, tokens)
    values = [relative_error(a, truth) for a, truth in zip(broken, exact, strict=True)]
    axes.plot(places, values, "-x", color="#c0392b", label="float64, rope_theta 10,000 for 12,346")
    axes.set(
        yscale="log",
        xlabel="layer",
        ylabel="largest difference / largest magnitude",
        title="Residual stream after each layer",
        xticks=list(places),
    )
    axes.legend(fontsize=7, ncols=2, loc="center", bbox_to_anchor=(0.5, 0.36))
    with rc_context({"svg.hashsalt": "tinyllm", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the table, a column for each type, and draw the picture."""
    rows: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in DTYPES:
            for what, found in numbers_by_form(dtype, folder).items():
                rows.setdefault(f"{what}, every form", []).append(largest(found))
            for preset in FULL_SIZE:
                cell = f"{full_size(preset, dtype):.1e}"
                rows.setdefault(f"logits, `{preset}` at full size", []).append(cell)
            for what, error in after_training(dtype, folder).items():
                rows.setdefault(f"50 steps: {what}", []).append(f"{error:.1e}")
        skewed = dataclasses.replace(
            variant("grouped", tied=False, dtype="float32"),
            max_position_embeddings=128,
            attention="reference",
        )
        weights, batch = random_weights(skewed), skewed_batch()
        exact = torch_numbers(skewed, weights, batch)
        low = dataclasses.replace(skewed, compute_dtype="bfloat16")
        for side, compute in (("JAX", jax_numbers), ("PyTorch", torch_numbers)):
            cells = ["", "", largest(errors(compute(low, weights, batch), exact))]
            rows[f"4,096 tokens, {side} to float32"] = cells
    print(f"| what | {' | '.join(DTYPES)} |\n|---|---|---|---|")
    for what, cells in rows.items():
        print(f"| {what} | {' | '.join(cells)} |")
    draw_error_by_layer(ROOT / "docs" / "parity_by_layer.svg")


if __name__ == "__main__":
    main()
