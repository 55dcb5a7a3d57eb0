"""Names and shapes of a model's weights as its settings say them, without making a model.

Both packages and `convert` hold what they read against them; this module imports no framework.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tinyllm_jax.config import Config, ModelConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import as_text

Shape = tuple[int, ...]
EMBEDDING, HEAD, SCORES = "embed_tokens.weight", "lm_head.weight", "score.weight"
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(.+)\.weight")


def weight_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Give every weight in the order of the forward pass, as the twin has them: matrices [out, in].

    One at a time, since settings that are another's may ask for any number of layers.
    """
    return _all_weights(config, experts=config.num_experts)


def _all_weights(config: ModelConfig, *, experts: int) -> Iterator[tuple[str, Shape]]:
    hidden = config.hidden_size
    yield EMBEDDING, (config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        for name, shape in _layer_weights(config, experts=experts):
            yield f"layers.{index}.{name}.weight", shape
    yield "norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield HEAD, (config.vocab_size, hidden)
    if config.score_head:
        yield SCORES, (1, hidden)


def _layer_weights(config: ModelConfig, *, experts: int) -> Iterator[tuple[str, Shape]]:
    hidden, query = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    yield "input_layernorm", (hidden,)
    yield "self_attn.q_proj", (query, hidden)
    yield "self_attn.k_proj", (kv, hidden)
    yield "self_attn.v_proj", (kv, hidden)
    yield "self_attn.o_proj", (hidden, query)
    yield "post_attention_layernorm", (hidden,)
    if config.qk_norm:
        yield "self_attn.q_norm", (config.head_dim,)
        yield "self_attn.k_norm", (config.head_dim,)
    if config.num_experts == 0:
        yield from _mlp_weights("mlp", hidden, config.intermediate_size)
        return
    yield "mlp.gate", (config.num_experts, hidden)
    inner = config.moe_intermediate_size
    for expert in range(experts):
        yield from _mlp_weights(f"mlp.experts.{expert}", hidden, inner)
    if config.num_shared_experts > 0:
        shared = config.num_shared_experts * inner
        yield from _mlp_weights("mlp.shared_experts", hidden, shared)


def _mlp_weights(home: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{home}.gate_proj", (inner, hidden)
    yield f"{home}.up_proj", (inner, hidden)
    yield f"{home}.down_proj", (hidden, inner)


def kernel_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Give the same as `tinyllm_jax` has them: matrices [in, out], those of all experts in one array."""
    for name, shape in _all_weights(config, experts=min(config.num_experts, 1)):
        if found := _EXPERT.fullmatch(name):
            yield f"{found[1]}.{found[2]}.kernel", (config.num_experts, *shape[::-1])
        elif len(shape) == 2 and name != EMBEDDING:
            yield _as_kernel(name), shape[::-1]
        else:
            yield name, shape


def trained_shapes(config: Config) -> Iterator[tuple[str, Shape]]:
    """Give what a checkpoint of a run in JAX holds: of one with adapters these, and what else it trains."""
    lora = config.lora
    others = {_as_kernel(SCORES), *((EMBEDDING, _as_kernel(HEAD)) if lora.embeddings else ())}
    for name, shape in kernel_shapes(config.model):
        stem = name.removesuffix(".kernel")
        if lora.rank == 0 or name in others:
            yield name, shape
        elif stem.rsplit(".", 1)[-1] in lora.targets:
            yield f"{stem}.lora_A.kernel", (shape[0], lora.rank)
            yield f"{stem}.lora_B.kernel", (lora.rank, shape[1])


def check_weights(
    weights: Mapping[str, Any], expected: Iterable[tuple[str, Shape]], *, folder: Path
) -> None:
    """Refuse weights of a step folder that are not those of the model that its settings describe.

    Checksums tell damage; they do not tell settings that were written for another model, with which
    these weights may even compute something.

    Raises:
        InputError: names the first weight that differs.
    """
    problem, known = None, set()
    for name, shape in expected:
        known.add(name)
        if name not in weights:
            problem = f"has no {name}, which is {list(shape)} by the settings in its meta.json"
        elif (found := tuple(getattr(weights[name], "shape", ()))) != shape:
            problem = (
                f"{name} is {as_text(list(found))}, and {list(shape)} by the settings in its "
                "meta.json"
            )
        if problem:
            break
    else:
        if unknown := [name for name in weights if name not in known]:
            problem = f"has {as_text(unknown[0], repr)}, which is not in the model of its meta.json"
    if problem:
        raise InputError(f"{folder}: {problem}. These are two models; give another checkpoint.")


def _as_kernel(name: str) -> str:
    return f"{name.removesuffix('.weight')}.kernel"
