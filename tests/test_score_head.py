"""The head that gives one number a position: its weight in both packages, and in every format."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from convert_cases import GROUPED, assert_same_weights, random_bundle, with_training
from llama_oracle import changed, random_weights
from objective_cases import WIDE
from parity import assert_equal_in, relative_error, torch_model

import convert
from convert import conversion
from convert.bundle import expected_shapes
from tinyllm_jax.config import Config, OptimizerConfig, TokenizerConfig, TrainConfig
from tinyllm_jax.data.tokenizer import train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError
from tinyllm_jax.model import weights as jax_weights
from tinyllm_jax.objectives import pretrain as jax_pretrain
from tinyllm_jax.training import step as jax_step
from tinyllm_torch.model import weights as torch_weights
from tinyllm_torch.objectives import pretrain as torch_pretrain
from tinyllm_torch.training import step as torch_step

SCORED = dataclasses.replace(GROUPED, score_head=True)
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 12}
TOKENS = np.random.default_rng(0).integers(0, SCORED.vocab_size, (2, 7)).astype(np.int32)


def scores_of(config: Any, weights: Any) -> np.ndarray:
    structure, _ = jax_weights.model_structure(config)

    @jax.jit
    def run(weights: Any, tokens: Any) -> Any:
        model = jax_weights.merge_weights(structure, weights)
        return model.scores(model.hidden(tokens).states)

    arrays = {name: jnp.asarray(weight) for name, weight in weights.items()}
    return np.asarray(run(arrays, jnp.asarray(TOKENS)))


# The model ------------------------------------------------------------------------------------------


def test_both_packages_give_the_same_scores_in_float64() -> None:
    weights = random_weights(WIDE)
    with jax.enable_x64(True):
        expected = scores_of(WIDE, weights)
    model = torch_model(WIDE, weights)
    actual = model.scores(model.hidden(torch.from_numpy(TOKENS)).states)
    assert expected.dtype == np.float64
    assert relative_error(actual, expected) < 1e-10


def test_scores_of_half_precision_states_are_summed_in_float32() -> None:
    half = dataclasses.replace(SCORED, compute_dtype="bfloat16")
    weights = random_weights(half)
    expected = scores_of(half, weights)
    assert expected.dtype == np.float32
    model = torch_model(half, weights)
    actual = model.scores(model.hidden(torch.from_numpy(TOKENS)).states)
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) < 0.02
    assert relative_error(expected, scores_of(SCORED, weights)) < 0.05


def test_the_head_is_counted_named_and_begins_small_and_nothing_else_changes() -> None:
    without = dataclasses.replace(SCORED, score_head=False)
    for package in (jax_weights, torch_weights):
        counts = [package.count_parameters(each) for each in (SCORED, without)]
        assert [one - other for one, other in zip(*counts, strict=True)] == [SCORED.hidden_size] * 2
        first, other = (package.initial_weights(each, seed=3) for each in (SCORED, without))
        name = (set(first) - set(other)).pop()
        assert name == ("score.kernel" if package is jax_weights else "score.weight")
        for key, weight in other.items():
            np.testing.assert_array_equal(np.asarray(weight), np.asarray(first[key]))
        spread = float(np.std(np.asarray(first[name])))
        usual = SCORED.initializer_range / SCORED.hidden_size**0.5
        assert usual / 2 < spread < usual * 2
    shapes = {
        name: weight.shape for name, weight in torch_weights.model_structure(SCORED)[1].items()
    }
    assert shapes == expected_shapes(SCORED)
    assert shapes["score.weight"] == (1, SCORED.hidden_size)


def test_pretraining_leaves_the_head_to_its_decay_alike_in_both_packages() -> None:
    config = Config(
        model=WIDE,
        train=TrainConfig(batch_size=2, max_steps=3),
        optimizer=OptimizerConfig(warmup_steps=0),
    )
    weights = random_weights(WIDE)
    batch = {"tokens": TOKENS, "targets": TOKENS, "loss_mask": np.ones(TOKENS.shape, bool)}
    with jax.enable_x64(True):
        structure: Any = jax_weights.model_structure(WIDE)[0]
        take: Any = jax.jit(
            jax_step.make_train_step(
                config, structure, jax_pretrain.next_token_loss, jax_pretrain.count_targets
            )
        )
        start: Any = {name: jnp.asarray(weight) for name, weight in weights.items()}
        expected, told = take(jax_step.new_state(config, start), batch)
        named = torch_weights.from_jax_weights(expected.weights)
    structure = torch_weights.model_structure(WIDE)[0]
    take = torch_step.make_train_step(
        config, structure, torch_pretrain.next_token_loss, torch_pretrain.count_targets
    )
    start = torch_weights.as_tensors(torch_weights.from_jax_weights(weights), WIDE, device="cpu")
    actual, _ = take(torch_step.new_state(config, start), batch)
    assert_equal_in("float64", actual.weights, named)
    shrunk = 1 - float(told["learning_rate"]) * config.optimizer.weight_decay
    np.testing.assert_allclose(
        named["score.weight"].T, shrunk * weights["score.kernel"], rtol=1e-12
    )


def test_names_and_layout_survive_the_way_between_the_packages() -> None:
    weights = random_weights(SCORED)
    there = torch_weights.from_jax_weights(weights)
    back = torch_weights.to_jax_weights(there)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(back[name], weight)


# Formats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "class_name"),
    [
        (SCORED, "LlamaForSequenceClassification"),
        (changed(SCORED, num_attention_heads=5, num_key_value_heads=5, head_dim=6),
         "MistralForSequenceClassification"),
        (changed(SCORED, qk_norm=True), "Qwen3ForSequenceClassification"),
        (changed(SCORED, qk_norm=True, **EXPERTS), "Qwen3MoeForSequenceClassification"),
        (changed(SCORED, **EXPERTS), "MixtralForSequenceClassification"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_transformers_reads_a_reward_model_and_gives_the_same_scores(
    config: Any, class_name: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    bundle = random_bundle(config)
    convert.write(bundle, tmp_path / "hf", to="hf")
    theirs: Any = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "hf", local_files_only=True, attn_implementation="eager"
    ).eval()
    assert type(theirs).__name__ == class_name
    assert theirs.config.num_labels == 1
    expected = scores_of(config, random_weights(config))
    with torch.no_grad():
        for row in range(len(TOKENS)):  # without a token of padding it takes one row at a time
            for length in (3, TOKENS.shape[1]):
                score = theirs(torch.from_numpy(TOKENS[row : row + 1, :length]).long()).logits
                assert score.shape == (1, 1)
                assert abs(float(score) - expected[row, length - 1]) < 1e-5
    back = convert.read(tmp_path / "hf")
    assert back.model.score_head
    assert_same_weights(back.weights, bundle.weights)


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_that_transformers_made_is_read(tied: bool, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    def save(labels: int) -> Path:
        more: dict[str, Any] = {"num_labels": labels}
        theirs = LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=67, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                tie_word_embeddings=tied, **more,
            )
        )  # fmt: skip
        torch.nn.init.normal_(theirs.score.weight)
        theirs.save_pretrained(tmp_path / f"{labels} labels")
        found = theirs.eval()(torch.from_numpy(TOKENS[:1]).long()).logits[0, -1]
        expected[labels] = float(found.detach())
        return tmp_path / f"{labels} labels"

    expected: dict[int, float] = {}
    bundle = convert.read(save(1))
    assert bundle.model.score_head
    assert bundle.model.tie_word_embeddings
    found = scores_of(bundle.model, convert.bundle.to_jax(bundle.weights))
    assert abs(found[0, -1] - expected[1]) < 1e-5
    with pytest.raises(InputError, match=r"score.weight has shape \[2, 24\] instead of \[1, 24\]"):
        convert.read(save(2))


def test_a_head_over_the_vocabulary_is_left_out_of_a_folder_of_hugging_face_and_that_is_said(
    tmp_path: Path,
) -> None:
    untied = dataclasses.replace(SCORED, tie_word_embeddings=False)
    bundle = random_bundle(untied)
    convert.write(bundle, tmp_path / "run.safetensors")
    report = conversion.convert(
        tmp_path / "run.safetensors",
        tmp_path / "hf",
        to="hf",
        tokenizer=None,
        settings=None,
        dtype=None,
        llama2c_version=0,
        verify=True,
        overwrite=False,
        say=pytest.fail,
    )
    assert any("lm_head was left out" in note for note in report.notes)
    back = convert.read(tmp_path / "hf")
    assert back.model.score_head
    assert back.model.tie_word_embeddings
    expected = {name: w for name, w in bundle.weights.items() if name != "lm_head.weight"}
    assert_same_weights(back.weights, expected)
    assert "lm_head.weight" in bundle.weights
    table = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert table["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("name", ["run", "run.pt", "run.safetensors"])
def test_formats_of_runs_keep_the_head_and_its_moments(name: str, tmp_path: Path) -> None:
    stories = list(generate_stories(seed=1, start=0, stop=200))
    tokenizer = train_tokenizer(stories, config=TokenizerConfig(kind="bytelevel"), vocab_size=300)
    config = dataclasses.replace(SCORED, tie_word_embeddings=False, vocab_size=300)
    bundle = with_training(random_bundle(config, tokenizer=tokenizer))
    assert bundle.training is not None
    convert.write(bundle, tmp_path / name, to="orbax" if name == "run" else None)
    back = convert.read(tmp_path / name)
    assert back.model == bundle.model
    assert_same_weights(back.weights, bundle.weights)
    assert back.training is not None
    assert_same_weights(back.training.first, bundle.training.first)
    assert_same_weights(back.training.second, bundle.training.second)


@pytest.mark.parametrize(
    ("to", "fields", "message"),
    [
        ("gguf", {}, "gguf: score_head=True is not held"),
        ("llama2c", {}, "llama2c: score_head=True is not held"),
        ("hf", {**EXPERTS, "num_shared_experts": 1}, "score_head=True with num_shared_experts=1"),
    ],
)
def test_formats_that_cannot_hold_the_head_refuse_it_by_name(
    to: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    bundle = random_bundle(changed(SCORED, **fields))
    with pytest.raises(InputError, match=message):
        convert.write(bundle, tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_with_another_score_is_noticed() -> None:
    from convert.verify import Comparer

    bundle = random_bundle(SCORED)
    comparer = Comparer(SCORED, double=False)
    before = comparer.logits(bundle)
    bundle.weights["score.weight"] = bundle.weights["score.weight"] * 1.01
    after = comparer.logits(bundle)
    np.testing.assert_array_equal(before[..., :-1], after[..., :-1])
    assert (before[..., -1] != after[..., -1]).all()
