"""One optimizer step and one evaluation, as functions of tensors that change none of them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tinyllm_jax.config import Config
from tinyllm_jax.data.batches import mix
from tinyllm_torch.model.transformer import Transformer
from tinyllm_torch.model.weights import Weights, merge_weights
from tinyllm_torch.training.optim import (
    Moments,
    global_norm,
    learning_rate_schedule,
    make_optimizer,
)

DeviceBatch = dict[str, Tensor]
# What is minimised and what is told of it ("loss" and more), each summed over a batch's targets, given
# the model; the generator turns dropout on.
LossSums = Callable[
    [Any, DeviceBatch, torch.Generator | None], tuple[Float[Tensor, ""], dict[str, Tensor]]
]
# How many targets those sums are over.
LossWeight = Callable[[DeviceBatch], Float[Tensor, ""]]


class TrainState(NamedTuple):
    """All that changes while a run trains."""

    step: int  # batches taken; "step s" everywhere is the s-th of them, from 1
    weights: Weights
    optimizer_state: Moments
    nonfinite_streak: int  # steps in a row whose update was not applied


def new_state(config: Config, weights: Weights) -> TrainState:
    """Start a run from these weights, with empty moments."""
    return TrainState(
        step=0,
        weights=weights,
        optimizer_state=make_optimizer(config).init(weights),
        nonfinite_streak=0,
    )


def make_train_step(
    config: Config, structure: Transformer, loss_sums: LossSums, loss_weight: LossWeight
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, dict[str, Any]]]:
    """Build the step: gradients over all passes, clip, update, unless a number is not finite.

    With gradient accumulation the batch is cut into passes. Each pass divides its loss sum by the
    targets of the whole batch, so the gradients add up to those of the exact mean over targets,
    however unevenly the passes are filled.

    A loss or gradient that is not finite leaves weights, moments and their count as they were.
    """
    optimizer, schedule = make_optimizer(config), learning_rate_schedule(config)
    passes = config.train.gradient_accumulation_steps

    def pass_loss(
        model: Transformer,
        batch: DeviceBatch,
        generator: torch.Generator,
        total: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        minimised, sums = loss_sums(model, batch, generator)
        return minimised / total, {name: x.detach() / total for name, x in sums.items()}

    def train_step(
        state: TrainState, batch: Mapping[str, Any]
    ) -> tuple[TrainState, dict[str, Any]]:
        device = next(iter(state.weights.values())).device
        batch = as_device_batch(batch, device=device)
        generator = step_generator(config.train.seed, state.step, device=device)
        total = loss_weight(batch).clamp(min=1.0)
        model = merge_weights(structure, state.weights)
        names, parameters = zip(*model.named_parameters(), strict=True)
        pieces = {name: rows.reshape(passes, -1, *rows.shape[1:]) for name, rows in batch.items()}
        minimised, means = torch.zeros((), device=device), {}
        sums = [torch.zeros_like(p) for p in parameters]
        for index in range(passes):
            piece = {name: rows[index] for name, rows in pieces.items()}
            one_loss, one_means = pass_loss(model, piece, generator, total)
            # A head that the loss does not use has a gradient of zero, as in JAX.
            one_pass = torch.autograd.grad(one_loss, parameters, materialize_grads=True)
            minimised = minimised + one_loss.detach()
            means = {name: means.get(name, 0.0) + mean for name, mean in one_means.items()}
            sums = [so_far + new for so_far, new in zip(sums, one_pass, strict=True)]
        gradients = dict(zip(names, sums, strict=True))

        gradient_norm = global_norm(gradients)
        finite = bool(torch.isfinite(minimised) & torch.isfinite(gradient_norm))
        weights, optimizer_state = state.weights, state.optimizer_state
        if finite:
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, weights)
            weights = {name: weight + updates[name] for name, weight in weights.items()}
        new = TrainState(
            step=state.step + 1,
            weights=weights,
            optimizer_state=optimizer_state,
            nonfinite_streak=0 if finite else state.nonfinite_streak + 1,
        )
        metrics = {
            **means,
            "grad_norm": gradient_norm,
            "learning_rate": schedule(state.optimizer_state.count + 1),
            "targets": total,
            "nonfinite_streak": new.nonfinite_streak,
        }
        return new, metrics

    return train_step


def make_evaluation_step(
    structure: Transformer, loss_sums: LossSums, loss_weight: LossWeight
) -> Callable[[Weights, Mapping[str, Any]], tuple[dict[str, Tensor], Float[Tensor, ""]]]:
    """Build the function that gives what is told of a batch and how many targets it sums over."""

    @torch.no_grad()
    def evaluation_step(
        weights: Weights, batch: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Float[Tensor, ""]]:
        batch = as_device_batch(batch, device=next(iter(weights.values())).device)
        _, sums = loss_sums(merge_weights(structure, weights), batch, None)
        return sums, loss_weight(batch)

    return evaluation_step


def as_device_batch(batch: Mapping[str, Any], *, device: torch.device) -> DeviceBatch:
    """Put the arrays of a batch on a device."""
    return {name: torch.as_tensor(rows).to(device) for name, rows in batch.items()}


def step_generator(seed: int, step: int, *, device: torch.device) -> torch.Generator:
    """Make the source of a step's dropout, a function of (seed, step) alone.

    torch's generator of the CPU looks at the low 32 bits of its seed only, so both are mixed in.
    """
    mixed = mix(mix(np.array([seed], np.uint64)) + np.uint64(step))
    return torch.Generator(device).manual_seed(int(mixed[0]) & 0xFFFF_FFFF)
