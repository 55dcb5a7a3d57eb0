"""Runs of the whole family, Muon's among them, MiniMind's experts, and every preset, converted."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from convert_cases import GROUPED, assert_same_weights, changed, random_bundle, save_torch
from llama_oracle import SMALL
from parity import scaled_down

import convert
from convert import parity
from convert.__main__ import main
from convert.bundle import Bundle, Training, check_moments, default_run, from_jax
from convert.setting_values import computed_settings
from tinyllm_jax.config import Config, ModelConfig, TokenizerConfig, preset_names
from tinyllm_jax.data.tokenizer import Tokenizer, train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError
from tinyllm_jax.model.weights import model_structure
from tinyllm_jax.training.optim import has_second_moment

pytestmark = pytest.mark.slow  # the file as a whole

FAMILY = dataclasses.replace(
    changed(SMALL, qk_norm=True), vocab_size=300, num_experts=4, num_experts_per_tok=2,
    num_shared_experts=2, moe_intermediate_size=10, norm_topk_prob=False, rope_type="yarn",
    rope_factor=2.0, rope_original_max_position_embeddings=32, router_z_loss_coef=0.01,
)  # fmt: skip
FORMATS = {
    "x.pt": "torch",
    "folder": "safetensors",
    "one.safetensors": "safetensors",
    "run": "orbax",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    stories = list(generate_stories(seed=1, start=0, stop=200))
    return train_tokenizer(stories, config=TokenizerConfig(kind="bytelevel"), vocab_size=300)


def run_of(model: ModelConfig, *, optimizer: str, tokenizer: Tokenizer | None) -> Bundle:
    """Make a run of this optimizer in the middle of its training, with positive second moments."""
    bundle = random_bundle(model, tokenizer=tokenizer)
    config = default_run(dataclasses.asdict(model), origin="test")
    settings = dataclasses.replace(config.optimizer, name=optimizer, warmup_steps=2)
    config = dataclasses.replace(
        config,
        optimizer=settings,
        tokenizer=dataclasses.replace(config.tokenizer, kind="bytelevel"),
    )
    numbers = np.random.default_rng(5)
    first, second = (
        {n: 0.01 * numbers.random(a.shape).astype(np.float32) for n, a in bundle.weights.items()}
        for _ in range(2)
    )
    if optimizer == "muon":
        second = {n: a for n, a in second.items() if "norm" in n or "_proj" not in n}
    bundle.training = Training(
        config=config, step=11, count=9, first=first, second=second, nonfinite_streak=0,
        seed=config.train.seed, rows_per_step=config.rows_per_step, dataset_hash="d" * 64, best=None,
    )  # fmt: skip
    return bundle


def assert_same_run(found: Bundle, expected: Bundle) -> None:
    assert found.model == expected.model
    assert_same_weights(found.weights, expected.weights)
    assert found.training is not None
    assert expected.training is not None
    assert_same_weights(found.training.first, expected.training.first)
    assert_same_weights(found.training.second, expected.training.second)
    for name in ("step", "count", "dataset_hash", "seed"):
        assert getattr(found.training, name) == getattr(expected.training, name)
    assert found.training.config.optimizer == expected.training.config.optimizer


# Moments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_of_the_whole_family_comes_back_bitwise_from_every_format(
    optimizer, tokenizer, tmp_path, capsys
):
    expected = run_of(FAMILY, optimizer=optimizer, tokenizer=tokenizer)
    source = tmp_path / "start.pt"
    convert.write(expected, source)
    flags = ["--no-verify"] if optimizer == "adamw" else []
    for name, to in FORMATS.items():
        assert main([str(source), str(tmp_path / name), "--to", to, *flags]) == 0
        source = tmp_path / name
        assert_same_run(convert.read(source), expected)
    assert expected.training is not None
    tensors, second = len(expected.weights), len(expected.training.second)
    words = "and both moments of each" if optimizer == "adamw" else (
        f"a first moment of each and {second} second ones"
    )  # fmt: skip
    assert capsys.readouterr().out.count(f"Tensors  {tensors}, {words}, step 11") == 4
    assert (second < tensors) == (optimizer == "muon")


def test_the_optimizers_and_convert_agree_on_which_weights_have_a_second_moment():
    for name in ("adamw", "muon"):
        config = dataclasses.replace(
            Config(), model=FAMILY, optimizer=dataclasses.replace(Config().optimizer, name=name)
        )
        first = {n: np.zeros(s.shape, np.float32) for n, s in model_structure(FAMILY)[1].items()}
        second = {n: a for n, a in first.items() if has_second_moment(n, config)}
        check_moments(from_jax(first), from_jax(second), config, origin="test")
        lacking = from_jax(dict(list(second.items())[1:]))
        with pytest.raises(InputError, match="second moments.*missing: embed_tokens"):
            check_moments(from_jax(first), lacking, config, origin="test")
    with pytest.raises(InputError, match=r"Muon keeps none of layers\.0"):
        check_moments(from_jax(first), from_jax(first), config, origin="test")


def test_both_packages_and_transformers_compute_the_same_with_a_run_of_muon(
    tokenizer, tmp_path, capsys
):
    model = dataclasses.replace(FAMILY, num_shared_experts=0)
    convert.write(run_of(model, optimizer="muon", tokenizer=tokenizer), tmp_path / "x.pt")
    code = parity.main([str(tmp_path / "x.pt"), "--tokens", "6"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    rows = {line[:27].strip() for line in printed.splitlines()}
    assert {"routing", "gradients", "Muon, update 10", "transformers: logits"} < rows


def test_parity_says_why_transformers_is_left_out():
    side, why = parity.transformers_side(random_bundle(FAMILY), "float64")
    assert side is None
    assert "left out, since the model is not exported: hf: num_shared_experts=2 with" in why


# Presets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_comes_back_bitwise_from_every_format(preset, tokenizer, tmp_path):
    model = dataclasses.replace(scaled_down(preset), compute_dtype="auto", vocab_size=300)
    source = tmp_path / "start.pt"
    expected = run_of(model, optimizer="adamw", tokenizer=tokenizer)
    convert.write(expected, source)
    for name, to in (("run", "orbax"), ("folder", "safetensors"), ("x.pt", "torch")):
        assert main([str(source), str(tmp_path / name), "--to", to, "--no-verify"]) == 0
        source = tmp_path / name
        assert_same_run(convert.read(source), expected)
    assert main([str(source), str(tmp_path / "hf"), "--to", "hf", "--no-verify"]) == 0
    assert main([str(tmp_path / "hf"), str(tmp_path / "back"), "--to", "orbax"]) == 0
    back = convert.read(tmp_path / "back")
    assert_same_weights(back.weights, expected.weights)
    assert computed_settings(back.model) == computed_settings(model)
    assert back.tokenizer is not None
    assert back.tokenizer.to_bytes() == tokenizer.to_bytes()


# MiniMind -----------------------------------------------------------------------------------------

EXPERTS = changed(GROUPED, num_experts=4, num_experts_per_tok=2, rope_theta=1e6)
FIRST_GENERATION = dataclasses.replace(
    EXPERTS, num_shared_experts=2, router_aux_loss_coef=0.0, router_aux_loss_level="sequence"
)
SECOND_GENERATION = dataclasses.replace(
    EXPERTS, qk_norm=True, num_experts_per_tok=1, moe_intermediate_size=12
)


def minimind_words(model: ModelConfig) -> dict[str, Any]:
    """Say a model's settings as MiniMind's config.json does."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps",
             "num_experts_per_tok", "norm_topk_prob")  # fmt: skip
    words = {name: getattr(model, name) for name in names}
    words |= {"model_type": "minimind", "use_moe": True, "dropout": 0.0, "hidden_act": "silu"}
    if model.qk_norm:
        return words | {
            "num_experts": model.num_experts,
            "head_dim": model.head_dim,
            "moe_intermediate_size": model.moe_intermediate_size,
            "intermediate_size": model.intermediate_size,
            "router_aux_loss_coef": 5e-4,
            "rope_scaling": None,
        }
    return words | {
        "n_routed_experts": model.num_experts,
        "n_shared_experts": model.num_shared_experts,
        "intermediate_size": None,
        "scoring_func": "softmax",
        "aux_loss_alpha": model.router_aux_loss_coef,
        "seq_aux": model.router_aux_loss_level == "sequence",
    }


def minimind_state(bundle: Bundle) -> dict[str, np.ndarray]:
    """Hold a model as MiniMind does: a module for each shared expert, and the table twice."""
    inner, count = bundle.model.moe_intermediate_size, bundle.model.num_shared_experts
    state = {}
    for name, array in bundle.weights.items():
        if "shared_experts" not in name:
            state[f"model.{name}"] = array
            continue
        for number in range(count):
            rows = slice(number * inner, (number + 1) * inner)
            part = array[:, rows] if "down_proj" in name else array[rows]
            home, stem = name.split("shared_experts.")
            state[f"model.{home}shared_experts.{number}.{stem}"] = part
    state["lm_head.weight"] = bundle.weights["embed_tokens.weight"]
    return state


def minimind_folder(folder: Path, bundle: Bundle, **fields: Any) -> Path:
    """Write `x.pth` and its config.json, which together are a Hugging Face folder as well."""
    folder.mkdir(exist_ok=True)
    words = minimind_words(bundle.model) | fields
    (folder / "config.json").write_text(json.dumps(words))
    save_torch(folder / "pytorch_model.bin", minimind_state(bundle))
    return save_torch(folder / "x.pth", minimind_state(bundle))


@pytest.mark.parametrize("model", [FIRST_GENERATION, SECOND_GENERATION], ids=["first", "second"])
def test_experts_of_minimind_are_read_from_a_file_and_from_a_folder(model, tmp_path):
    expected = random_bundle(model)
    file = minimind_folder(tmp_path / "x", expected)
    for path in (file, tmp_path / "x"):
        found = convert.read(path)
        assert_same_weights(found.weights, expected.weights)
        assert computed_settings(found.model) == computed_settings(model)
    if not model.qk_norm:
        assert found.model.router_aux_loss_coef == 0.0
        assert found.model.router_aux_loss_level == "sequence"


def test_shared_experts_side_by_side_are_the_sum_of_them(tmp_path):
    bundle = random_bundle(FIRST_GENERATION)
    state = minimind_state(bundle)
    found = convert.read(minimind_folder(tmp_path / "x", bundle)).weights
    x = np.random.default_rng(0).standard_normal((5, FIRST_GENERATION.hidden_size))

    def mlp(weights: dict[str, np.ndarray], home: str) -> np.ndarray:
        gate, up, down = (weights[f"{home}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (np.asarray(jax.nn.silu(x @ gate.T)) * (x @ up.T)) @ down.T

    home = "layers.1.mlp.shared_experts"
    alone = sum(mlp(state, f"model.{home}.{number}") for number in range(2))
    np.testing.assert_allclose(mlp(found, home), alone, atol=1e-6)


def test_a_single_expert_of_the_first_generation_keeps_its_probability(tmp_path):
    bundle = random_bundle(dataclasses.replace(FIRST_GENERATION, num_experts_per_tok=1))
    assert not convert.read(minimind_folder(tmp_path / "x", bundle)).model.norm_topk_prob
    dense = random_bundle(GROUPED)
    fields = {"use_moe": False, "n_routed_experts": 4, "n_shared_experts": 1}
    found = convert.read(minimind_folder(tmp_path / "dense", dense, **fields))
    assert_same_weights(found.weights, dense.weights)
    assert found.model.num_experts == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func=sigmoid"),
        ({"num_experts_per_tok": None}, "how many experts each token passes"),
        ({"rope_scaling": {"type": "yarn", "factor": 16}}, "scaled as MiniMind does"),
        ({"n_shared_experts": 1}, "shared_experts.gate_proj.weight has shape"),
    ],
)
def test_what_minimind_does_otherwise_is_refused(fields, message, tmp_path):
    file = minimind_folder(tmp_path / "x", random_bundle(FIRST_GENERATION), **fields)
    with pytest.raises(InputError, match=message):
        convert.read(file)


def test_a_missing_or_odd_shared_expert_is_refused(tmp_path):
    bundle = random_bundle(FIRST_GENERATION)
    state = minimind_state(bundle)
    file = minimind_folder(tmp_path / "x", bundle)
    name = "model.layers.1.mlp.shared_experts.0.up_proj.weight"
    save_torch(file, {key: array for key, array in state.items() if key != name})
    with pytest.raises(InputError, match=r"up_proj.weight there are the shared experts 1\."):
        convert.read(file)
    save_torch(file, state | {name: state[name][:-1]})
    with pytest.raises(InputError, match="up_proj.weight comes in shapes"):
        convert.read(file)
    save_torch(file, state | {name.replace(".0.", "."): state[name]})
    with pytest.raises(InputError, match="up_proj.weight there are the shared experts 0, 1"):
        convert.read(file)
