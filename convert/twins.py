"""One model in JAX and in the PyTorch twin, behind the same methods, so that numbers can be compared.

All that is given back is NumPy, under the names and in the layout of a bundle.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch

from convert.bundle import Arrays, Bundle, from_jax, run_config, to_jax
from tinyllm_jax.config import Config, ModelConfig, SamplingConfig
from tinyllm_jax.inference import generate as jax_generate
from tinyllm_jax.inference import sampling as jax_sampling
from tinyllm_jax.model import kv_cache as jax_cache
from tinyllm_jax.model import weights as jax_weights
from tinyllm_jax.model.layers import compute_dtype as jax_dtype
from tinyllm_jax.model.rope import rope_tables as jax_rope_tables
from tinyllm_jax.objectives import pretrain as jax_pretrain
from tinyllm_jax.training import optim as jax_optim
from tinyllm_jax.training import step as jax_step
from tinyllm_torch.inference import generate as torch_generate
from tinyllm_torch.inference import sampling as torch_sampling
from tinyllm_torch.model import kv_cache as torch_cache
from tinyllm_torch.model import weights as torch_weights
from tinyllm_torch.model.layers import compute_dtype as torch_dtype
from tinyllm_torch.objectives import pretrain as torch_pretrain
from tinyllm_torch.training import optim as torch_optim
from tinyllm_torch.training import step as torch_step

# Of one row each: temperature, top-k, top-p, repetition penalty.
FILTERS = (
    (0.8, 0, 1.0, 1.0),
    (0.8, 5, 1.0, 1.3),
    (1.0, 0, 0.9, 1.0),
    (1.7, 40, 0.5, 0.7),
    (0.3, 1, 0.95, 1.0),
    (0.0, 3, 0.5, 1.1),
)


@dataclasses.dataclass(frozen=True)
class Start:
    """From where one optimizer step is taken."""

    config: Config
    step: int
    count: int
    first: Arrays
    second: Arrays


def start_of(bundle: Bundle, model: ModelConfig) -> Start:
    """Take moments and counters from a bundle, or zeros where it has none."""
    config = run_config(bundle)
    config = dataclasses.replace(
        config, model=model, train=dataclasses.replace(config.train, gradient_accumulation_steps=1)
    )
    training, wide = bundle.training, np.dtype(model.compute_dtype)
    if training is None:
        first, second = (
            {name: np.zeros(array.shape, wide) for name, array in bundle.weights.items()}
            for _ in range(2)
        )
        return Start(config, 0, 0, first, second)
    first, second = (widened(arrays, wide) for arrays in (training.first, training.second))
    return Start(config, training.step, training.count, first, second)


def widened(arrays: Mapping[str, np.ndarray], dtype: np.dtype) -> Arrays:
    """Bring arrays to one type."""
    return {name: np.asarray(array, dtype) for name, array in arrays.items()}


class Side(Protocol):
    """What either framework computes."""

    def numbers(self, batch: Mapping[str, np.ndarray]) -> Arrays:
        """Compute `logits`, `loss` and the gradient of every weight.

        With experts, also what their routers did, under the names that training tells
        (`router_balance_loss`, `router_z_loss`, `expert_load`); their losses are in the gradient.
        """
        ...

    def step(self, start: Start, batch: Mapping[str, np.ndarray]) -> Arrays:
        """Take one step of the run's optimizer: norm, learning rate, new weights and moments."""
        ...

    def by_layer(self, tokens: np.ndarray) -> list[np.ndarray]:
        """Give the residual stream after each block, then the logits."""
        ...

    def decode(self, tokens: np.ndarray, *, prompt: int) -> np.ndarray:
        """Score tokens from the cache: the first `prompt` at once, then one at a time."""
        ...

    def greedy(self, prompt: Sequence[int], *, count: int) -> list[int]:
        """Continue a prompt with the likeliest tokens."""
        ...

    def filters(self, logits: np.ndarray, present: np.ndarray) -> Arrays:
        """Filter logits, a row for each of `FILTERS`."""
        ...


class JaxSide:
    """The model in JAX."""

    def __init__(self, config: ModelConfig, weights: Arrays):
        self._config = config
        with self._precision():
            self._structure, _ = jax_weights.model_structure(config)
            wide = widened(to_jax(weights), np.dtype(config.compute_dtype))
            self._weights = {name: jnp.asarray(array) for name, array in wide.items()}

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return jax.enable_x64(self._config.compute_dtype == "float64")

    def numbers(self, batch: Mapping[str, np.ndarray]) -> Arrays:
        def loss_and_logits(weights: Any, batch: Any) -> Any:
            model = jax_weights.merge_weights(self._structure, weights)
            logits = model(batch["tokens"], batch["positions"], batch["segment_ids"])
            minimised, told = jax_pretrain.next_token_loss(model, batch, None)
            count = jax_pretrain.count_targets(batch)
            return minimised / count, {"logits": logits} | {n: x / count for n, x in told.items()}

        with self._precision():
            run = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))
            (_, found), gradients = jax.device_get(run(self._weights, dict(batch)))
            return found | from_jax(gradients)

    def step(self, start: Start, batch: Mapping[str, np.ndarray]) -> Arrays:
        with self._precision():
            state = jax_step.new_state(start.config, self._weights)
            moments = jax_optim.Moments(
                jnp.asarray(start.count, jnp.int32),
                *({n: jnp.asarray(a) for n, a in to_jax(m).items()} for m in _both(start)),
            )
            state = state._replace(
                step=jnp.asarray(start.step, jnp.int32),
                optimizer_state=jax_optim.write_moments(state.optimizer_state, moments),
            )
            train_step = jax_step.make_train_step(
                start.config,
                self._structure,
                jax_pretrain.next_token_loss,
                jax_pretrain.count_targets,
            )
            state, metrics = jax.device_get(jax.jit(train_step)(state, dict(batch)))
        moments = jax_optim.read_moments(state.optimizer_state)
        groups: tuple[Any, ...] = (state.weights, moments.first, moments.second)
        return _named(metrics, *(from_jax(group) for group in groups))

    def by_layer(self, tokens: np.ndarray) -> list[np.ndarray]:
        config, dtype = self._config, jax_dtype(self._config)

        def run(weights: Any, tokens: Any) -> list[Any]:
            model = jax_weights.merge_weights(self._structure, weights)
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
            rope = jax_rope_tables(positions, config, dtype=dtype)
            at: Any = {"positions": positions, "counted": jnp.ones(tokens.shape, bool)}
            x, found = model.embed_tokens(tokens, dtype=dtype), []
            for layer in model.layers:
                x, _, _ = layer(x, rope, None, cache=None, dropout_key=None, **at)
                found.append(x)
            return [*found, model.logits(model.norm(x))]

        with self._precision():
            return [np.asarray(x) for x in jax.jit(run)(self._weights, jnp.asarray(tokens))]

    def decode(self, tokens: np.ndarray, *, prompt: int) -> np.ndarray:
        @jax.jit
        def read(weights: Any, tokens: Any, positions: Any, cache: Any) -> Any:
            model = jax_weights.merge_weights(self._structure, weights)
            hidden = model.hidden(tokens, positions, cache=cache)
            return model.logits(hidden.states), hidden.cache

        rows, slots = tokens.shape
        with self._precision():
            cache = jax_cache.empty_cache(
                self._config, batch=rows, slots=slots, dtype=jax_dtype(self._config)
            )
            pieces = []
            for piece, positions in _pieces(tokens, prompt):
                logits, cache = read(self._weights, piece, positions, cache)
                pieces.append(np.asarray(logits))
        return np.concatenate(pieces, axis=1)

    def greedy(self, prompt: Sequence[int], *, count: int) -> list[int]:
        with self._precision():
            ((found,),) = jax_generate.Generator(self._config).generate(
                self._weights, [prompt], sampling=_greedy(count), eos_id=-1
            )
        return found.token_ids.tolist()

    def filters(self, logits: np.ndarray, present: np.ndarray) -> Arrays:
        with self._precision():
            settings = jax_sampling.RowSettings(*map(jnp.asarray, _filter_columns()))
            run = jax.jit(lambda *inputs: _stages(jax_sampling, *inputs))
            return jax.device_get(run(jnp.asarray(logits), jnp.asarray(present), settings))


class TorchSide:
    """The model in the PyTorch twin, on the CPU."""

    def __init__(self, config: ModelConfig, weights: Arrays):
        self._config = config
        self._structure, _ = torch_weights.model_structure(config)
        self._weights = torch_weights.as_tensors(weights, config, device="cpu")
        self._model = torch_weights.merge_weights(self._structure, self._weights)

    def numbers(self, batch: Mapping[str, np.ndarray]) -> Arrays:
        tensors = torch_step.as_device_batch(batch, device=torch.device("cpu"))
        with torch.no_grad():
            logits = self._model(tensors["tokens"], tensors["positions"], tensors["segment_ids"])
        minimised, told = torch_pretrain.next_token_loss(self._model, tensors, None)
        count = torch_pretrain.count_targets(tensors)
        names, parameters = zip(*self._model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(minimised / count, parameters, materialize_grads=True)
        found = {"logits": logits} | {name: number / count for name, number in told.items()}
        found |= dict(zip(names, gradients, strict=True))
        return {name: tensor.detach().numpy() for name, tensor in found.items()}

    def step(self, start: Start, batch: Mapping[str, np.ndarray]) -> Arrays:
        moments = torch_optim.Moments(
            start.count,
            *({n: torch.from_numpy(np.array(a)) for n, a in m.items()} for m in _both(start)),
        )
        train_step = torch_step.make_train_step(
            start.config,
            self._structure,
            torch_pretrain.next_token_loss,
            torch_pretrain.count_targets,
        )
        state, metrics = train_step(
            torch_step.TrainState(start.step, self._weights, moments, 0), batch
        )
        moments = state.optimizer_state
        groups = (state.weights, moments.first, moments.second)
        return _named(metrics, *({n: t.numpy() for n, t in group.items()} for group in groups))

    @torch.no_grad()
    def by_layer(self, tokens: np.ndarray) -> list[np.ndarray]:
        found: list[np.ndarray] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            found.append(output[0].numpy())

        hooks = [layer.register_forward_hook(keep) for layer in self._model.layers]
        logits = self._model(torch.from_numpy(tokens)).numpy()
        for hook in hooks:
            hook.remove()
        return [*found, logits]

    @torch.no_grad()
    def decode(self, tokens: np.ndarray, *, prompt: int) -> np.ndarray:
        rows, slots = tokens.shape
        cache = torch_cache.empty_cache(
            self._config,
            batch=rows,
            slots=slots,
            dtype=torch_dtype(self._config),
            device=torch.device("cpu"),
        )
        pieces = []
        for piece, positions in _pieces(tokens, prompt):
            hidden = self._model.hidden(
                torch.from_numpy(piece), torch.from_numpy(positions), cache=cache
            )
            cache = hidden.cache
            pieces.append(self._model.logits(hidden.states).numpy())
        return np.concatenate(pieces, axis=1)

    def greedy(self, prompt: Sequence[int], *, count: int) -> list[int]:
        ((found,),) = torch_generate.Generator(self._config).generate(
            self._weights, [prompt], sampling=_greedy(count), eos_id=-1
        )
        return found.token_ids.tolist()

    def filters(self, logits: np.ndarray, present: np.ndarray) -> Arrays:
        columns = _filter_columns()
        settings = torch_sampling.RowSettings(
            *map(torch.from_numpy, columns[:4]),
            *(torch.from_numpy(column.astype(np.int64)) for column in columns[4:]),
        )
        found = _stages(
            torch_sampling, torch.from_numpy(logits), torch.from_numpy(present), settings
        )
        return {name: tensor.numpy() for name, tensor in found.items()}


def _both(start: Start) -> tuple[Arrays, Arrays]:
    return start.first, start.second


def _named(
    metrics: Mapping[str, Any], weights: Arrays, first: Arrays, second: Arrays
) -> dict[str, np.ndarray]:
    """Name all that a step changes."""
    shown = {name: np.asarray(float(metrics[name])) for name in ("grad_norm", "learning_rate")}
    groups = {"weight": weights, "first moment": first, "second moment": second}
    arrays = {f"{group} {name}": a for group, found in groups.items() for name, a in found.items()}
    return shown | arrays


def _pieces(tokens: np.ndarray, prompt: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut rows into (tokens, positions): a prompt, then single tokens."""
    rows, width = tokens.shape
    cuts = [(0, prompt), *((place, place + 1) for place in range(prompt, width))]
    return [
        (
            np.ascontiguousarray(tokens[:, start:end]),
            np.repeat(np.arange(start, end)[None], rows, axis=0),
        )
        for start, end in cuts
    ]


def _greedy(count: int) -> SamplingConfig:
    return SamplingConfig(greedy=True, max_new_tokens=count)


def _filter_columns() -> list[np.ndarray]:
    """Give the fields of `RowSettings` for `FILTERS`."""
    temperature, top_k, top_p, penalty = (np.array(c) for c in zip(*FILTERS, strict=True))
    numbers = np.arange(len(FILTERS), dtype=np.int32)
    floats = [column.astype(np.float32) for column in (temperature, top_p, penalty)]
    seeds = np.zeros(len(FILTERS), np.uint32)
    return [floats[0], top_k.astype(np.int32), floats[1], floats[2], seeds, numbers]


def _stages(sampling: Any, logits: Any, present: Any, settings: Any) -> dict[str, Any]:
    """Apply each filter by itself, then all in order; both packages name them alike."""
    penalised = sampling.penalise_repetition(
        logits, present=present, penalty=settings.repetition_penalty
    )
    alone = settings._replace(top_k=settings.top_k * 0, top_p=settings.top_p * 0 + 1)
    return {
        "repetition penalty": penalised,
        "temperature": sampling.filtered(logits, settings=alone),
        "top-k": sampling.keep_top_k(logits, top_k=settings.top_k),
        "top-p": sampling.keep_top_p(logits, top_p=settings.top_p),
        "all of them": sampling.filtered(penalised, settings=settings),
    }
