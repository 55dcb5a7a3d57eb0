"""What the settings say of names and shapes is what the models have."""

import dataclasses

import pytest

from tinyllm_jax.config import Config, LoraConfig, ModelConfig
from tinyllm_jax.model.lora import adapted_structure, trained_names
from tinyllm_jax.model.weights import model_structure
from tinyllm_jax.training.weight_shapes import kernel_shapes, trained_shapes, weight_shapes

# Every number another, so that no two can be taken for each other.
PLAIN = ModelConfig(
    vocab_size=29,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
)
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
MODELS = {
    "plain": PLAIN,
    "untied, with norms of queries and keys": dataclasses.replace(
        PLAIN, tie_word_embeddings=False, qk_norm=True
    ),
    "scores": dataclasses.replace(PLAIN, score_head=True),
    "experts": dataclasses.replace(PLAIN, **EXPERTS),
    "shared experts": dataclasses.replace(PLAIN, **EXPERTS, num_shared_experts=3),
    "stacked in memory": dataclasses.replace(PLAIN, scan_layers=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_model(name):
    model = MODELS[name]
    found = {name: each.shape for name, each in model_structure(model)[1].items()}
    assert dict(kernel_shapes(model)) == dict(trained_shapes(Config(model=model))) == found


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_twin(name):
    pytest.importorskip("torch")
    from tinyllm_torch.model import weights as twin

    _, found = twin.model_structure(MODELS[name])
    assert dict(weight_shapes(MODELS[name])) == {key: each.shape for key, each in found.items()}


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_shapes_of_adapters_are_those_that_are_trained(name, embeddings):
    model = MODELS[name]
    lora = LoraConfig(rank=3, targets=("q_proj", "o_proj"), embeddings=embeddings)
    if model.num_experts == 0:
        lora = dataclasses.replace(lora, targets=("k_proj", "gate_proj", "down_proj"))
    _, shapes = adapted_structure(model, lora)
    expected = {name: shapes[name].shape for name in trained_names(model, lora)}
    assert dict(trained_shapes(Config(model=model, lora=lora))) == expected
