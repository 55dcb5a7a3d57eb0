"""Every preset, scaled down, trains: its loss falls, its run loads, and the twin computes the same."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_parity_training import JaxSide, TorchSide

import tinyllm_jax
from tinyllm_jax import train
from tinyllm_jax.config import load_config, preset_names
from tinyllm_jax.data.prepare import prepare
from tinyllm_jax.inference.language_model import LanguageModel
from tinyllm_jax.model.weights import initial_weights
from tinyllm_jax.training.metrics import read_metrics
from tinyllm_torch.objectives.pretrain import make_pretraining

pytestmark = pytest.mark.slow  # the file as a whole

STEPS = 20
# Largest relative difference of a loss between the packages over the 20 steps, in float32.
LOSS_TOLERANCE = 1e-4
DROPOUTS = ["embedding_dropout", "attention_dropout", "residual_dropout", "mlp_dropout"]


def scaled_down(preset: str) -> list[str]:
    """Give the flags that make a preset small: its groups, proportions and recipe stay."""
    config = load_config(preset)
    model, steps = config.model, config.train
    kv_heads = min(model.num_key_value_heads, 2)
    heads = kv_heads * (model.num_attention_heads // model.num_key_value_heads)
    hidden = heads * 8
    settings = {
        "model.vocab_size": 512,
        "model.hidden_size": hidden,
        "model.intermediate_size": round(hidden * model.intermediate_size / model.hidden_size),
        "model.num_hidden_layers": 2,
        "model.num_attention_heads": heads,
        "model.num_key_value_heads": kv_heads,
        "model.head_dim": 0,
        "model.max_position_embeddings": 32,
        "data.paths": "toy",
        "data.toy_documents": 400,
        "data.validation_fraction": 0.1,
        "data.sequence_length": 32,
        "optimizer.warmup_steps": min(config.optimizer.warmup_steps, 4),
        "train.max_steps": STEPS,
        "train.batch_size": 2,
        "train.gradient_accumulation_steps": min(steps.gradient_accumulation_steps, 2),
        "train.eval_interval_steps": 10,
        "train.eval_batches": 50,
        "checkpoint.interval_steps": 100,
        "sampling.max_new_tokens": 4,
    }
    if model.num_experts:
        width = round(hidden * model.moe_intermediate_size / model.hidden_size)
        settings["model.moe_intermediate_size"] = width
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return ["--config", preset, *flags]


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_trains_and_the_twin_agrees(
    preset: str, tmp_path: Path, prepared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    words, folder = scaled_down(preset), tmp_path / "run"
    assert train.main([*words, "--out", str(folder)]) == 0

    rows = read_metrics(folder / "metrics.jsonl")
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    looks = [row["loss"] for row in rows if row["kind"] == "eval"]
    assert len(losses) == STEPS
    assert np.isfinite([*losses, *looks]).all()
    # A new model gives every token about the same chance.
    assert losses[0] == pytest.approx(math.log(512), abs=0.15)
    assert math.log(512) > looks[0] > looks[1]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert (folder / "checkpoints" / str(STEPS)).is_dir()
    model = tinyllm_jax.load(folder)
    assert isinstance(model, LanguageModel)
    (text,) = model.generate("Once upon a time", max_new_tokens=4)
    assert text.startswith("Once upon a time")

    if any(getattr(load_config(preset).model, rate) for rate in DROPOUTS):
        # Each framework draws its own places to drop.
        words += [word for rate in DROPOUTS for word in (f"--model.{rate}", "0")]
        losses = losses_of(JaxSide, words)
    np.testing.assert_allclose(losses, losses_of(TorchSide, words), rtol=LOSS_TOLERANCE)


def losses_of(side: type[JaxSide] | type[TorchSide], words: list[str]) -> list[float]:
    """Train from JAX's first weights, on the batches that the twin reads itself."""
    preset, overrides, _ = train.read_command(words)
    config = load_config(preset or "", overrides)
    batches = make_pretraining(config, prepare(config, progress=False)).train_batch
    weights = initial_weights(config.model, seed=config.train.seed)
    trained = side(config, weights)
    return [step_loss(trained, batches(number)) for number in range(config.train.max_steps)]


def step_loss(side: JaxSide | TorchSide, batch: Any) -> float:
    # Not `side.step`, which makes a plain number of all that a step tells: experts tell lists.
    side.state, numbers = side._step(side.state, batch)  # type: ignore[assignment]
    return float(numbers["loss"])
