"""The objective of reinforcement learning, put together of rollouts, rewards and the policy's loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllm_jax.config import Config
from tinyllm_jax.data.chat_template import ChatTemplate
from tinyllm_jax.data.prepare_prompts import PromptData
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.model.weights import Weights
from tinyllm_jax.objectives.policy import (
    explained_variance,
    make_policy_loss,
    make_policy_weight,
)
from tinyllm_jax.objectives.rewards import Reward, load_reward_function, make_reward_model
from tinyllm_jax.objectives.rollouts import Rollouts
from tinyllm_jax.training.checkpoint import open_checkpoint
from tinyllm_jax.training.figures import REWARD
from tinyllm_jax.training.loop import HostBatch, Objective


def make_policy_objective(
    config: Config,
    data: PromptData,
    *,
    template: ChatTemplate,
    reward: Reward,
    reference: Weights | None,
    past: Sequence[Mapping[str, Any]],
) -> Objective:
    """Give `fit` batches of sampled answers and the loss of `rlhf.algorithm`; see `Rollouts`."""
    return Objective(
        loss_sums=make_policy_loss(config.rlhf),
        loss_weight=make_policy_weight(config.rlhf),
        train_batch=_depends_on_weights,
        evaluation_batches=_no_batches,
        describe_loss=lambda _: {},
        shown=("ended_share", "answer_tokens"),
        rollouts=Rollouts(
            config, data, template=template, reward=reward, reference=reference, past=past
        ),
        figure=REWARD,
        describe_step=describe_values,
    )


def describe_values(told: Mapping[str, Any]) -> dict[str, float]:
    """Say how well a step's value function knows its returns; where all are equal, nothing."""
    if "value_error" not in told:
        return {}
    # Sums of float32 know nothing of a variance below this share.
    if told["return_square"] - told["return"] ** 2 <= 1e-5 * told["return_square"]:
        return {}
    return {"explained_variance": explained_variance(told)}


def _depends_on_weights(number: int) -> HostBatch:
    raise AssertionError(f"batch {number} is made by rollouts, of the weights in training")


def _no_batches() -> Iterable[HostBatch]:
    raise AssertionError("rollouts evaluate by themselves")


def open_reward(config: Config, tokenizer: Tokenizer, *, say: Callable[[str], None]) -> Reward:
    """Find what judges answers: a reward model where `rlhf.reward` is a path, else a function.

    Raises:
        InputError: there is neither, or the reward model reads other tokens.
    """
    name = config.rlhf.reward
    if not Path(name).exists():
        return load_reward_function(name)
    checkpoint = open_checkpoint(Path(name), on_damaged=say)
    if checkpoint.tokenizer_hash != tokenizer.hash:
        raise InputError(
            f"rlhf.reward={name}: its tokenizer is another than the policy's. Train the reward model "
            "from the same checkpoint."
        )
    return make_reward_model(checkpoint)
