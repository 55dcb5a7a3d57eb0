"""What the tests of `convert` share: random models as bundles, and how other projects hold them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from llama_oracle import SMALL, changed, random_weights

from convert.bundle import Bundle, Training, default_run, from_jax, make_layout
from tinyllm_jax.config import ModelConfig

# Four query heads share two key heads of width 6, so that a permutation over the wrong heads shows.
GROUPED = changed(SMALL, rope_theta=10000.0, rms_norm_eps=1e-5)
UNTIED = changed(GROUPED, tie_word_embeddings=False)


def random_bundle(config: ModelConfig = GROUPED, *, seed: int = 0, tokenizer: Any = None) -> Bundle:
    """Draw a model of float32 weights."""
    weights = from_jax(random_weights(config, seed=seed))
    layout = make_layout(
        format="test",
        rope="half-split",
        tied=config.tie_word_embeddings,
        transposed=False,
        weights=weights,
    )
    return Bundle(config, weights, tokenizer, None, layout)


def with_training(bundle: Bundle, *, seed: int = 7) -> Bundle:
    """Add moments and counters that all differ from one another."""
    numbers = np.random.default_rng(seed)
    first, second = (
        {
            name: numbers.standard_normal(array.shape).astype(np.float32)
            for name, array in bundle.weights.items()
        }
        for _ in range(2)
    )
    config = default_run(dataclasses.asdict(bundle.model), origin="test")
    bundle.training = Training(
        config=config,
        step=11,
        count=9,
        first=first,
        second=second,
        nonfinite_streak=2,
        seed=config.train.seed,
        rows_per_step=config.rows_per_step,
        dataset_hash="d" * 64,
        best={"step": 10, "loss": 1.5},
    )
    return bundle


def assert_same_weights(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Compare names, types and every bit."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def interleave_rows(matrix: np.ndarray, head_dim: int) -> np.ndarray:
    """Put row i of each head's first half beside row i of its second half, one row at a time."""
    rows = []
    for head in range(matrix.shape[0] // head_dim):
        for pair in range(head_dim // 2):
            rows.append(matrix[head * head_dim + pair])
            rows.append(matrix[head * head_dim + head_dim // 2 + pair])
    return np.stack(rows)


def meta_state(bundle: Bundle, *, swapped: bool = False) -> dict[str, np.ndarray]:
    """Hold a model as llama2.c and Tiny-K do, in the order of their modules."""
    model, weights = bundle.model, bundle.weights
    down, up = ("w3", "w2") if swapped else ("w2", "w3")
    state = {"tok_embeddings.weight": weights["embed_tokens.weight"]}
    for index in range(model.num_hidden_layers):
        ours, theirs = f"layers.{index}.", f"layers.{index}."
        for letter in "qkvo":
            matrix = weights[f"{ours}self_attn.{letter}_proj.weight"]
            if letter in "qk":
                matrix = interleave_rows(matrix, model.head_dim)
            state[f"{theirs}attention.w{letter}.weight"] = matrix
        mlp = {"w1": "gate", down: "down", up: "up"}
        for name in ("w1", "w2", "w3"):
            state[f"{theirs}feed_forward.{name}.weight"] = weights[
                f"{ours}mlp.{mlp[name]}_proj.weight"
            ]
        state[f"{theirs}attention_norm.weight"] = weights[f"{ours}input_layernorm.weight"]
        state[f"{theirs}ffn_norm.weight"] = weights[f"{ours}post_attention_layernorm.weight"]
    state["norm.weight"] = weights["norm.weight"]
    state["output.weight"] = weights.get("lm_head.weight", weights["embed_tokens.weight"])
    return state


def meta_arguments(config: ModelConfig) -> dict[str, Any]:
    """Say a model's settings in llama2.c's words."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": 8,
        "norm_eps": config.rms_norm_eps,
        "max_seq_len": config.max_position_embeddings,
        "dropout": 0.0,
    }


def llama2c_checkpoint(bundle: Bundle) -> dict[str, Any]:
    """Hold a run as llama2.c's train.py saves it, in tensors, with moments made of the weights."""
    import torch

    state = {name: torch.tensor(array.copy()) for name, array in meta_state(bundle).items()}
    names = [name for name in state if name != "output.weight"]
    order = sorted(names, key=lambda name: state[name].dim() < 2)
    matrices = sum(state[name].dim() >= 2 for name in names)
    rows = {
        number: {"step": torch.tensor(5.0), "exp_avg": state[name], "exp_avg_sq": state[name] ** 2}
        for number, name in enumerate(order)
    }
    groups = [{"params": list(range(matrices))}, {"params": list(range(matrices, len(order)))}]
    return {
        "model": state,
        "model_args": meta_arguments(bundle.model),
        "optimizer": {"state": rows, "param_groups": groups},
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"learning_rate": 1e-3, "max_iters": 50, "batch_size": 8, "warmup_iters": 3},
    }


def save_torch(path: Path, content: dict[str, Any]) -> Path:
    """Save a dict with every array in it as a tensor."""
    import torch

    def as_tensors(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(value).copy())
        if isinstance(value, dict):
            return {key: as_tensors(item) for key, item in value.items()}
        return value

    torch.save(as_tensors(content), path)
    return path
