"""The optimizer: schedules against their formulas, AdamW and Muon against PyTorch's and an SVD.

What stands for one framework is held to the other: the same updates in float64.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from parity import relative_error

from tinyllm_jax import train as jax_train
from tinyllm_jax.config import Config, OptimizerConfig
from tinyllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.model import weights as jax_weights
from tinyllm_jax.objectives import pretrain as jax_pretrain
from tinyllm_jax.settings import build
from tinyllm_jax.training import checkpoint as jax_checkpoint
from tinyllm_jax.training import optim as jax_optim
from tinyllm_jax.training import start as jax_start
from tinyllm_jax.training import step as jax_step
from tinyllm_jax.training.optim import (
    learning_rate_schedule,
    make_optimizer,
    read_moments,
    write_moments,
)
from tinyllm_jax.training.parallel import make_parallel
from tinyllm_torch import train as torch_train
from tinyllm_torch.model import weights as torch_weights
from tinyllm_torch.objectives import pretrain as torch_pretrain
from tinyllm_torch.training import checkpoint as torch_checkpoint
from tinyllm_torch.training import optim as torch_optim
from tinyllm_torch.training import start as torch_start
from tinyllm_torch.training import step as torch_step

OPTIMIZED = True

SHAPE = {
    "model.vocab_size": 64,
    "model.hidden_size": 16,
    "model.intermediate_size": 24,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 1,
    "model.max_position_embeddings": 16,
    "model.tie_word_embeddings": False,
    "data.sequence_length": 16,
    "train.batch_size": 4,
    "train.max_steps": 20,
    "optimizer.warmup_steps": 5,
    "optimizer.learning_rate": 1e-2,
    "optimizer.min_learning_rate": 1e-3,
}
MUON: dict[str, Any] = {"optimizer__name": "muon", "optimizer__weight_decay": 0.3}


def small_config(**changes: Any) -> Config:
    return build(Config, [("", SHAPE), ("", {k.replace("__", "."): v for k, v in changes.items()})])


def random_batch(seed: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, 64, (4, 17), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.arange(16) < np.array([16, 9, 3, 12])[:, None],
    }


# Schedules ----------------------------------------------------------------------------------------

SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {},
    "cosine without warm-up": {"warmup_steps": 0},
    "wsd": {"schedule": "wsd"},
    "wsd that begins inside a step": {"schedule": "wsd", "wsd_decay_share": 0.333},
    "wsd that goes down from the end of warm-up": {"schedule": "wsd", "wsd_decay_share": 1.0},
    "wsd without warm-up": {"schedule": "wsd", "warmup_steps": 0},
    "wsd that only warms up": {"schedule": "wsd", "warmup_steps": 90},
    "minimind_cosine": {"schedule": "minimind_cosine", "warmup_steps": 0},
    "minimind_cosine with warm-up": {"schedule": "minimind_cosine"},
}


def rates(config: Config, updates: Any) -> tuple[np.ndarray, np.ndarray]:
    """Give the learning rates of (JAX, the twin) in float64."""
    with jax.enable_x64(True):
        schedule = jax.jit(learning_rate_schedule(config))
        ours = np.array([schedule(jnp.asarray(update, jnp.int32)) for update in updates])
    twin = torch_optim.learning_rate_schedule(config)
    return ours, np.array([twin(update) for update in updates])


def formula(optimizer: OptimizerConfig, *, decay_steps: int, updates: np.ndarray) -> np.ndarray:
    peak, floor, warm = optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_steps
    climbed = np.ones(len(updates)) if warm == 0 else np.minimum(updates / warm, 1)
    last = max(decay_steps, warm + 1)
    if optimizer.schedule == "minimind_cosine":
        phase = np.minimum(updates - 1, decay_steps) / decay_steps
        return climbed * (peak / 10 + 0.5 * peak * (1 + np.cos(np.pi * phase)))
    if optimizer.schedule == "wsd":
        begin = max(last * (1 - optimizer.wsd_decay_share), warm)
        return climbed * np.interp(updates, [begin, last], [peak, floor])
    phase = np.clip((updates - warm) / (last - warm), 0, 1)
    after = floor + (peak - floor) * 0.5 * (1 + np.cos(np.pi * phase))
    return np.where(updates < warm, climbed * peak, after)


@pytest.mark.parametrize("name", SCHEDULES)
def test_both_frameworks_follow_the_formula_of_a_schedule(name: str) -> None:
    changes = {"warmup_steps": 7, "decay_steps": 50, **SCHEDULES[name]}
    config = small_config(**{f"optimizer__{key}": value for key, value in changes.items()})
    updates = np.arange(1, 81)
    ours, twin = rates(config, updates.tolist())
    expected = formula(config.optimizer, decay_steps=50, updates=updates)
    assert relative_error(ours, expected) < 1e-12
    assert relative_error(twin, ours) < 1e-12
    assert (ours > 0).all()


def test_the_cosine_is_the_one_of_optax_bit_for_bit() -> None:
    config = small_config(optimizer__warmup_steps=10, optimizer__decay_steps=30)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 30, 1e-3)
    schedule = learning_rate_schedule(config)
    for update in range(1, 41):
        assert schedule(jnp.asarray(update)) == theirs(jnp.asarray(update, float))


def test_the_schedule_climbs_falls_along_a_cosine_and_stays() -> None:
    config = small_config(
        optimizer__warmup_steps=10, optimizer__decay_steps=30, train__max_steps=100
    )
    ours, twin = rates(config, [1, 5, 10, 20, 30, 31, 100])
    expected = [1e-3, 5e-3, 1e-2, 5.5e-3, 1e-3, 1e-3, 1e-3]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    np.testing.assert_allclose(twin, expected, rtol=1e-12)


def test_wsd_stays_at_the_peak_and_goes_down_linearly_at_the_end_as_joined_in_optax() -> None:
    config = small_config(
        optimizer__schedule="wsd", optimizer__wsd_decay_share=0.25, train__max_steps=40
    )
    ours, _ = rates(config, [1, 5, 17, 30, 35, 40, 41, 90])
    np.testing.assert_allclose(ours, [2e-3, 1e-2, 1e-2, 1e-2, 5.5e-3, 1e-3, 1e-3, 1e-3], rtol=1e-12)
    pieces = [
        optax.linear_schedule(0.0, 1e-2, 5),
        optax.constant_schedule(1e-2),
        optax.linear_schedule(1e-2, 1e-3, 10),
    ]
    theirs: Any = optax.join_schedules(pieces, [5, 30])
    schedule = learning_rate_schedule(config)
    for update in range(1, 60):
        assert float(schedule(update)) == pytest.approx(float(theirs(update)), rel=1e-6)


def test_minimind_cosine_begins_above_the_peak_and_has_a_floor_of_its_own() -> None:
    config = small_config(
        optimizer__schedule="minimind_cosine",
        optimizer__warmup_steps=0,
        optimizer__min_learning_rate=1.0,
        train__max_steps=40,
    )
    ours, _ = rates(config, [1, 21, 41, 42, 1000])
    np.testing.assert_allclose(ours, [1.1e-2, 6e-3, 1e-3, 1e-3, 1e-3], rtol=1e-12)


# AdamW --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05, 1e6])
def test_the_optimizer_equals_torch_adamw_over_several_steps(max_grad_norm: float) -> None:
    config = small_config(optimizer__max_grad_norm=max_grad_norm, optimizer__weight_decay=0.3)
    schedule = learning_rate_schedule(config)
    numbers = np.random.default_rng(1)
    start = {"matrix": numbers.normal(size=(4, 3)), "norm": numbers.normal(size=3)}
    twins = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    theirs = torch.optim.AdamW(
        [
            {"params": [twins["matrix"]], "weight_decay": 0.3},
            {"params": [twins["norm"]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    with jax.enable_x64(True):
        optimizer = make_optimizer(config)
        weights = jax.tree.map(jnp.asarray, start)
        state = optimizer.init(weights)
        for update in range(1, 9):
            gradients = {name: numbers.normal(size=value.shape) for name, value in start.items()}
            updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradients), state, weights)
            weights = jax.tree.map(lambda weight, change: weight + change, weights, updates)
            for name, twin in twins.items():
                twin.grad = torch.tensor(gradients[name])
            if max_grad_norm:
                torch.nn.utils.clip_grad_norm_(list(twins.values()), max_grad_norm)
            for group in theirs.param_groups:
                group["lr"] = float(schedule(jnp.asarray(update)))
            theirs.step()
        for name, twin in twins.items():
            # optax divides by the norm, torch by the norm + 1e-6.
            tolerance = 1e-10 if max_grad_norm != 0.05 else 1e-5
            np.testing.assert_allclose(weights[name], twin.detach().numpy(), rtol=tolerance)


# Muon: which weights ------------------------------------------------------------------------------

ATTENTION = {f"self_attn.{letter}_proj" for letter in "qkvo"}
DENSE = {f"mlp.{part}_proj" for part in ("gate", "up", "down")}
MIXTURES: dict[str, dict[str, Any]] = {
    "dense": {},
    "mixture": {"model__num_experts": 4, "model__num_shared_experts": 1, "model__qk_norm": True},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_muon_takes_the_matrices_inside_the_blocks_and_nothing_else(kind: str) -> None:
    config = small_config(**MUON, **MIXTURES[kind])
    homes = [""] if kind == "dense" else ["experts.", "shared_experts."]
    inside = ATTENTION | {part.replace("mlp.", f"mlp.{home}") for part in DENSE for home in homes}
    expected = {f"layers.{layer}.{part}.kernel" for layer in (0, 1) for part in inside}
    _, weights = jax_weights.model_structure(config.model)
    assert {name for name in weights if jax_optim.is_hidden_matrix(name)} == expected
    moments = read_moments(jax.eval_shape(make_optimizer(config).init, weights))
    assert moments.first.keys() == weights.keys()
    assert moments.second.keys() == weights.keys() - expected
    if kind == "mixture":
        left = {"layers.0.mlp.gate.kernel", "layers.0.self_attn.q_norm.weight"}
        assert left <= moments.second.keys()

    _, twin = torch_weights.model_structure(config.model)
    expected = {name.replace(".kernel", ".weight") for name in expected}
    stacked = {name for name in expected if ".experts." in name}
    expected -= stacked
    for name in stacked:
        expected |= {name.replace(".experts.", f".experts.{expert}.") for expert in range(4)}
    assert {name for name in twin if torch_optim.is_hidden_matrix(name)} == expected
    moments = torch_optim.make_optimizer(config).init(twin)
    assert moments.first.keys() == twin.keys()
    assert moments.second.keys() == twin.keys() - expected


# Muon: what it does with one matrix ---------------------------------------------------------------

HIDDEN = "layers.0.mlp.up_proj"


class JaxMatrices:
    """Applies the JAX optimizer to matrices by name, in float64."""

    def __init__(self, config: Config, weights: Mapping[str, np.ndarray]):
        with jax.enable_x64(True):
            optimizer = make_optimizer(config)
            self.weights = jax.tree.map(jnp.asarray, dict(weights))
            self.state = optimizer.init(self.weights)

            def update(gradients: Any, state: Any, weights: Any) -> Any:
                changes, state = optimizer.update(gradients, state, weights)
                return optax.apply_updates(weights, changes), state

            self._update = jax.jit(update)

    def step(self, gradients: Mapping[str, np.ndarray]) -> None:
        with jax.enable_x64(True):
            self.weights, self.state = self._update(dict(gradients), self.state, self.weights)


class TorchMatrices:
    """Applies the twin's optimizer to the same matrices, transposed and a stack taken apart."""

    def __init__(self, config: Config, weights: Mapping[str, np.ndarray]):
        self._optimizer = torch_optim.make_optimizer(config)
        self.weights = as_twin(weights)
        self.moments = self._optimizer.init(self.weights)

    def step(self, gradients: Mapping[str, np.ndarray]) -> None:
        changes, self.moments = self._optimizer.update(
            as_twin(gradients), self.moments, self.weights
        )
        self.weights = {name: weight + changes[name] for name, weight in self.weights.items()}


def as_twin(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    named: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        array = np.asarray(array)
        twin = name.replace(".kernel", ".weight")
        if array.ndim == 3:
            named |= {
                twin.replace(".experts.", f".experts.{expert}."): matrix.T
                for expert, matrix in enumerate(array)
            }
        else:
            named[twin] = array.T if name.endswith(".kernel") else array
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in named.items()}


def assert_twins(actual: Mapping[str, torch.Tensor], expected: Mapping[str, Any]) -> None:
    twin = as_twin(expected)
    assert actual.keys() == twin.keys()
    wrong = {name: relative_error(actual[name], twin[name]) for name in twin}
    assert max(wrong.values()) < 1e-10, wrong


def polynomial(values: np.ndarray) -> np.ndarray:
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8), (3, 8, 20), (9, 6, 4)])
def test_the_first_update_has_the_gradients_directions_and_singular_values_near_one(
    shape: tuple[int, ...],
) -> None:
    config = small_config(
        optimizer__name="muon", optimizer__weight_decay=0.0, optimizer__max_grad_norm=0.0
    )
    name = "layers.0.mlp.experts.up_proj.kernel" if len(shape) == 3 else f"{HIDDEN}.kernel"
    gradient = np.random.default_rng(0).normal(size=shape)
    if len(shape) == 3:  # experts of very different size, so that one norm for all would show
        gradient *= np.geomspace(1e-3, 1e3, shape[0])[:, None, None]
    ours = JaxMatrices(config, {name: np.zeros(shape)})
    ours.step({name: gradient})
    actual = np.asarray(ours.weights[name])
    mean = gradient * (1 + 0.95 * 0.05 / (1 - 0.95**2))  # Nesterov's, of the first update
    left, values, right = np.linalg.svd(mean, full_matrices=False)
    values = polynomial(values / (np.sqrt((values**2).sum(-1, keepdims=True)) + 1e-8))
    assert 0.5 < values.min() < values.max() < 1.5
    rate = 1e-2 / 5  # the first of five updates of warm-up
    expected = -rate * 0.2 * np.sqrt(max(shape[-2:])) * (left * values[..., None, :]) @ right
    assert relative_error(actual, expected) < 1e-10
    twin = TorchMatrices(config, {name: np.zeros(shape)})
    twin.step({name: gradient})
    assert_twins(twin.weights, ours.weights)


def test_a_gradient_of_zero_moves_a_matrix_by_its_decay_alone() -> None:
    config, name = small_config(**MUON), f"{HIDDEN}.kernel"
    start = {name: np.random.default_rng(0).normal(size=(4, 6))}
    for side in (JaxMatrices(config, start), TorchMatrices(config, start)):
        side.step({name: np.zeros((4, 6))})
        (actual,) = side.weights.values()
        actual = np.asarray(actual)
        actual = actual.T if actual.shape == (6, 4) else actual
        np.testing.assert_allclose(actual, start[name] * (1 - 2e-3 * 0.3), rtol=1e-12)


@pytest.mark.parametrize(("momentum", "count"), [(0.0, 0), (0.95, 5000)])
def test_muon_equals_torchs_own_where_no_bias_is_left_to_correct(
    momentum: float, count: int
) -> None:
    config = small_config(
        **MUON,
        optimizer__muon_momentum=momentum,
        optimizer__max_grad_norm=0.0,
        optimizer__schedule="wsd",
        optimizer__warmup_steps=0,
        train__max_steps=100_000,
    )
    numbers = np.random.default_rng(3)
    name = f"{HIDDEN}.weight"
    start, moment = (torch.from_numpy(numbers.normal(size=(20, 12))) for _ in range(2))
    parameter = torch.nn.Parameter(start.clone())
    theirs = torch.optim.Muon(
        [parameter], lr=1e-2, weight_decay=0.3, momentum=momentum, adjust_lr_fn="match_rms_adamw"
    )
    theirs.state[parameter]["momentum_buffer"] = moment.clone()
    optimizer = torch_optim.make_optimizer(config)
    moments, weight = torch_optim.Moments(count, {name: moment}, {}), start
    for _ in range(3):
        gradient = torch.from_numpy(numbers.normal(size=(20, 12)))
        changes, moments = optimizer.update({name: gradient}, moments, {name: weight})
        weight = weight + changes[name]
        parameter.grad = gradient
        theirs.step()
    # Theirs is rounded to bfloat16, 3 significant digits; decay and mean are not.
    assert relative_error(weight - start, parameter.detach() - start) < 2e-2
    assert relative_error(moments.first[name], theirs.state[parameter]["momentum_buffer"]) < 1e-12


# Both optimizers, both frameworks -----------------------------------------------------------------

# Two weights for each optimizer, and a stack of experts.
MATRICES = {
    f"{HIDDEN}.kernel": (6, 10),
    "layers.1.self_attn.o_proj.kernel": (8, 8),
    "layers.1.mlp.experts.down_proj.kernel": (3, 10, 6),
    "layers.1.mlp.gate.kernel": (6, 3),
    "embed_tokens.weight": (12, 6),
    "norm.weight": (6,),
}
# Each setting, what it is changed to, and the settings under which that shows.
OPTIMIZER_CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "name": ("muon", {}),
    "learning_rate": (2e-2, {}),
    "min_learning_rate": (5e-3, {}),
    "schedule": ("wsd", {}),
    "wsd_decay_share": (0.9, {"schedule": "wsd"}),
    "warmup_steps": (3, {}),
    "decay_steps": (7, {}),
    "weight_decay": (0.5, {}),
    "beta1": (0.5, {}),
    "beta2": (0.5, {}),
    "epsilon": (1e-2, {}),
    "muon_momentum": (0.5, {"name": "muon"}),
    "max_grad_norm": (0.01, {}),
}


def matrices_after(config: Config, steps: int) -> dict[str, np.ndarray]:
    """Update `MATRICES` from the same gradients in both, and give what JAX made of them."""
    numbers = np.random.default_rng(5)
    start = {name: numbers.normal(size=shape) for name, shape in MATRICES.items()}
    ours, twin = JaxMatrices(config, start), TorchMatrices(config, start)
    for number in range(steps):
        # Every other step is clipped, and not by as much as the one before.
        size = (0.01, 1.0, 0.01, 3.0)[number % 4]
        gradients = {name: size * numbers.normal(size=shape) for name, shape in MATRICES.items()}
        ours.step(gradients)
        twin.step(gradients)
    moments = read_moments(ours.state)
    assert twin.moments.count == int(moments.count) == steps
    assert_twins(twin.weights, ours.weights)
    assert_twins(twin.moments.first, moments.first)
    assert_twins(twin.moments.second, moments.second)
    return {name: np.asarray(weight) for name, weight in ours.weights.items()}


def test_a_change_is_named_for_every_setting() -> None:
    assert set(OPTIMIZER_CHANGES) == {field.name for field in dataclasses.fields(OptimizerConfig)}


@pytest.mark.parametrize("name", OPTIMIZER_CHANGES)
def test_every_setting_changes_the_weights_alike_in_both_frameworks(name: str) -> None:
    value, under = OPTIMIZER_CHANGES[name]
    base = {f"optimizer__{key}": setting for key, setting in under.items()}
    base["train__max_steps"] = 12
    plain = matrices_after(small_config(**base), 12)
    changed = matrices_after(small_config(**base, **{f"optimizer__{name}": value}), 12)
    moved = {key: np.abs(changed[key] - plain[key]).max() > 1e-5 for key in MATRICES}
    if name in ("name", "muon_momentum"):
        expected = {key: jax_optim.is_hidden_matrix(key) for key in MATRICES}
    elif name == "weight_decay":
        expected = {key: key != "norm.weight" for key in MATRICES}
    else:
        expected = dict.fromkeys(MATRICES, True)
    assert moved == expected


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "max_grad_norm", "beta2"])
def test_muon_shares_rate_decay_and_clipping_with_adamw_and_nothing_of_its_betas(name: str) -> None:
    value, _ = OPTIMIZER_CHANGES[name]
    plain = matrices_after(small_config(**MUON), 4)
    changed = matrices_after(small_config(**{**MUON, f"optimizer__{name}": value}), 4)
    moved = np.abs(changed[f"{HIDDEN}.kernel"] - plain[f"{HIDDEN}.kernel"]).max() > 1e-6
    assert moved == (name != "beta2")


# A model's own gradients --------------------------------------------------------------------------


def jax_stepper(config: Config) -> Callable[[Any, Any], Any]:
    """Compile the train step as a run does: the state it is given is donated."""
    structure, _ = jax_weights.model_structure(config.model)
    train_step = jax_step.make_train_step(
        config, structure, jax_pretrain.next_token_loss, jax_pretrain.count_targets
    )
    return jax.jit(train_step, donate_argnums=0)


def torch_stepper(config: Config) -> Callable[[Any, Any], Any]:
    structure, _ = torch_weights.model_structure(config.model)
    return torch_step.make_train_step(
        config, structure, torch_pretrain.next_token_loss, torch_pretrain.count_targets
    )


@pytest.mark.slow
def test_twenty_steps_of_muon_on_a_model_are_the_same_in_both_frameworks() -> None:
    config = small_config(
        **MUON, model__compute_dtype="float64", optimizer__schedule="wsd", train__max_steps=20
    )
    with jax.enable_x64(True):
        weights = jax_weights.initial_weights(config.model, seed=0)
        tensors = torch_weights.as_tensors(
            torch_weights.from_jax_weights(weights), config.model, device="cpu"
        )
        ours, step = jax_step.new_state(config, weights), jax_stepper(config)
        twin, twin_step = torch_step.new_state(config, tensors), torch_stepper(config)
        losses = []
        for number in range(20):
            batch = random_batch(number % 3)
            ours, expected = step(ours, batch)
            twin, actual = twin_step(twin, batch)
            for key in ("loss", "grad_norm", "learning_rate"):
                assert float(actual[key]) == pytest.approx(float(expected[key]), rel=1e-10), key
            losses.append(float(expected["loss"]))
            if number in (0, 19):
                moments = read_moments(ours.optimizer_state)
                assert_twins(twin.weights, ours.weights)
                assert_twins(twin.optimizer_state.first, moments.first)
                assert_twins(twin.optimizer_state.second, moments.second)
    assert losses[-1] < losses[0] - 0.5, "a run that learns nothing shows nothing"


# Checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_survive_being_read_and_written(name: str) -> None:
    config = small_config(optimizer__name=name)
    optimizer = make_optimizer(config)
    weights = {f"{HIDDEN}.kernel": jnp.eye(2), "matrix": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    _, state = optimizer.update(weights, optimizer.init(weights), weights)
    again = write_moments(optimizer.init(weights), read_moments(state))
    expected, actual = jax.tree.leaves(state), jax.tree.leaves(again)
    assert jax.tree.structure(state) == jax.tree.structure(again)
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(one, other)
    moments = read_moments(again)
    assert int(moments.count) == 1
    assert all(isinstance(x, jax.Array) for x in (moments.first | moments.second).values())
    buffers = [leaf.unsafe_buffer_pointer() for leaf in actual]
    assert len(set(buffers)) == len(buffers), "a buffer that stands twice cannot be donated"


@pytest.fixture(scope="module")
def tokenizer(trained_run: Path) -> Tokenizer:
    return load_tokenizer(trained_run)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_run_under_muon_goes_on_bitwise_from_its_checkpoint(
    framework: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    config = small_config(**MUON)
    make_state, make_step, files, start, devices = {
        "jax": (
            *(jax_step.new_state, jax_stepper, jax_checkpoint, jax_start),
            [make_parallel(config)],
        ),
        "torch": (torch_step.new_state, torch_stepper, torch_checkpoint, torch_start, []),
    }[framework]
    weights = {"jax": jax_weights, "torch": torch_weights}[framework]
    step, state = (
        make_step(config),
        make_state(config, weights.initial_weights(config.model, seed=0)),
    )
    for number in range(3):
        state, _ = step(state, random_batch(number))
    folder = files.save_checkpoint(
        tmp_path, state, config=config, tokenizer=tokenizer, dataset_hash="d" * 64, best=None
    )
    found = files.read_checkpoint(folder)
    begun = start.Start(config, tmp_path, found, None)
    start.check_resume(found, config, tmp_path)
    resumed = start.first_state(begun, *devices)
    for number in range(3, 6):
        state, _ = step(state, random_batch(number))
        resumed, _ = step(resumed, random_batch(number))
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(resumed)) > 40
    for actual, expected in zip(jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))

    adamw = dataclasses.replace(config.optimizer, name="adamw")
    with pytest.raises(InputError, match="optimizer.name=muon, and this run has adamw") as refused:
        start.check_resume(found, dataclasses.replace(config, optimizer=adamw), tmp_path)
    assert "--optimizer.name muon" in str(refused.value)
    assert "--init-from" in str(refused.value)
    assert "\n" not in str(refused.value)
    moments = found.moments._replace(second=found.moments.first)
    with pytest.raises(InputError, match="moments are not those of optimizer.name=muon"):
        start.check_resume(dataclasses.replace(found, moments=moments), config, tmp_path)


def test_a_bad_step_under_muon_changes_no_weight_and_no_moment() -> None:
    config = small_config(**MUON)
    state = jax_step.new_state(config, jax_weights.initial_weights(config.model, seed=0))
    step = jax_stepper(config)
    state, _ = step(state, random_batch(0))
    table = state.weights["embed_tokens.weight"]
    state.weights["embed_tokens.weight"] = table.at[:].set(jnp.nan)
    before = jax.tree.map(np.array, (state.weights, state.optimizer_state))
    state, numbers = step(state, random_batch(1))
    assert int(numbers["nonfinite_streak"]) == 1
    after = (state.weights, state.optimizer_state)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("main", [jax_train.main, torch_train.main])
def test_an_adamw_run_is_not_resumed_under_muon(
    main: Callable[[list[str]], int], trained_run: Path, tmp_path: Path
) -> None:
    flags = ["--resume", str(trained_run), "--optimizer.name", "muon", "--max-steps", "22"]
    with pytest.raises(InputError, match="optimizer.name=adamw, and this run has muon"):
        main([*flags, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
def test_a_run_under_muon_begins_from_the_weights_of_an_adamw_run(
    trained_run: Path, tmp_path: Path, prepared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conftest import SMALL_RUN

    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    flags = ["--init-from", str(trained_run), "--optimizer.name", "muon", "--max-steps", "2"]
    assert jax_train.main([*SMALL_RUN, *flags, "--out", str(tmp_path / "run")]) == 0
    found = jax_checkpoint.read_checkpoint(tmp_path / "run/checkpoints/2")
    assert found.config.optimizer.name == "muon"
    assert int(found.moments.count) == 2
    hidden = {name for name in found.weights if jax_optim.is_hidden_matrix(name)}
    assert len(hidden) == 14
    assert found.moments.second.keys() == found.weights.keys() - hidden
