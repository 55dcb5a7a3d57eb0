"""Reinforcement learning: answers sampled with the weights in training, and batches made of them.

Prompts are a function of (seed, number of the rollout), answers one of prompts and weights. So a
checkpoint between two rollouts says everything about what comes next.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tinyllm_jax.config import Config, SamplingConfig
from tinyllm_jax.data.batches import epoch_rows
from tinyllm_jax.data.chat_template import ChatTemplate
from tinyllm_jax.data.prepare_prompts import Prompt, PromptData, PromptSplit
from tinyllm_jax.inference.generate import Generator
from tinyllm_jax.model.compiled import compiled
from tinyllm_jax.model.weights import Weights, merge_weights, model_structure
from tinyllm_jax.objectives.advantages import (
    adapted_kl_coef,
    generalised_advantages,
    group_advantages,
    normalised_advantages,
    token_rewards,
)
from tinyllm_jax.objectives.head_blocks import measure_logits
from tinyllm_jax.objectives.log_probs import target_log_probs
from tinyllm_jax.objectives.policy import kl_k3
from tinyllm_jax.objectives.rewards import Answers, Reward

HostBatch = dict[str, np.ndarray]
# Seeds of held-out answers, which no rollout has.
EVALUATION = 2**32 - 1


class Rollouts:
    """Samples answers, has them judged, and makes the batches of the next steps of them.

    Args:
        config: All settings.
        data: The prompts.
        template: Of the model's tokenizer.
        reward: What answers are worth.
        reference: The weights that the policy is held to; None where nothing is.
        past: Rows that earlier rollouts of this run told, oldest first; an adapted
            `rlhf.kl_coef` comes from them.
    """

    def __init__(
        self,
        config: Config,
        data: PromptData,
        *,
        template: ChatTemplate,
        reward: Reward,
        reference: Weights | None,
        past: Sequence[Mapping[str, Any]],
    ):
        self.steps = config.rlhf.updates_per_rollout
        self._config, self._data, self._template = config, data, template
        self._reward, self._reference = reward, reference
        prompts = [*data.train.prompts, *data.validation.prompts]
        self._generator = Generator(
            config.model,
            tokens=template.tokenizer.vocab_size,
            longest_prompt=max(len(prompt.ids) for prompt in prompts),
        )
        structure, _ = model_structure(config.model)
        self._judge = compiled(_Judge(config, structure))
        self._kl_coef = config.rlhf.kl_coef
        if past and config.rlhf.kl_target > 0:
            self._kl_coef = float(past[-1]["kl_coef"])
            self._adapt(past[-1]["answer_kl"])

    def batch(self, weights: Weights, number: int) -> tuple[HostBatch, dict[str, Any]]:
        """Make the batch of the steps after `number` steps, and tell of it."""
        settings, rows = self._config.rlhf, self._config.rows_per_step
        count = rows // settings.group_size
        rollout = number // self.steps
        chosen = epoch_rows(
            rollout * count,
            size=count,
            count=self._data.train.count,
            seed=self._config.train.seed,
        )
        prompts = self._data.train.read(chosen)
        answers = self.sample(
            weights, prompts, samples=settings.group_size, seed=self._seed(rollout), first=0
        )
        rewards = self._reward(answers)
        made, told = jax.device_get(
            self._judge(
                weights,
                self._reference,
                {name: getattr(answers, name) for name in ("tokens", "targets", "loss_mask")},
                rewards,
                np.float32(self._kl_coef),
            )
        )
        told = {name: float(value) for name, value in told.items()}
        told |= summary(loss_mask=answers.loss_mask, ended=answers.ended, rewards=rewards)
        told["kl_coef"] = float(self._kl_coef)
        self._adapt(told["answer_kl"])
        return made, told | {"text": show(answers, rewards)}

    def evaluate(self, weights: Weights) -> tuple[dict[str, Any], str]:
        """Answer held-out prompts, always the same with the same seeds; also give one to read.

        Returns:
            `reward`, the mean over answers, and `loss`, which is -reward, the lower the better.
        """
        found: list[tuple[Answers, np.ndarray]] = []
        size = self._config.rows_per_step // self._config.rlhf.group_size
        split = self._data.validation
        for numbers in self._evaluation_numbers(split, size=size):
            # Other prompts fill the last batch up, so that no other program is compiled.
            prompts = split.read(np.arange(numbers[0], numbers[0] + size) % split.count)
            answers = self.sample(
                weights, prompts, samples=1, seed=EVALUATION, first=int(numbers[0])
            )
            found.append((answers.first(len(numbers)), self._reward(answers)[: len(numbers)]))
        told = summary(
            loss_mask=np.concatenate([answers.loss_mask for answers, _ in found]),
            ended=np.concatenate([answers.ended for answers, _ in found]),
            rewards=np.concatenate([rewards for _, rewards in found]),
        )
        return {"loss": 0.0 - told["reward"], **told}, show(*found[0])

    def sample(
        self, weights: Weights, prompts: Sequence[Prompt], *, samples: int, seed: int, first: int
    ) -> Answers:
        """Answer each prompt `samples` times, as the model has it: at temperature 1.

        Args:
            samples: Answers for each prompt.
            seed: With the number of an answer, all that its noise depends on.
            first: Number of the first answer; the others are counted on from it.
        """
        config, template = self._config, self._template
        width = config.data.sequence_length
        rows = len(prompts) * samples
        sampling = SamplingConfig(
            max_new_tokens=config.sampling.max_new_tokens,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_samples=samples,
            seed=seed,
        )
        found = self._generator.generate(
            weights,
            [prompt.ids.tolist() for prompt in prompts],
            sampling=sampling,
            eos_id=template.end_id,
            # Noise of its own for each answer: two prompts that are alike, or the same one twice
            # where an epoch ends, would get the same answers otherwise.
            sample_numbers=first + np.arange(rows),
        )
        written = [each.token_ids for group in found for each in group]
        whole = np.full((rows, width + 1), template.tokenizer.pad_id, np.int32)
        mask = np.zeros((rows, width + 1), bool)
        texts, ended = [], np.zeros(rows, bool)
        for row in range(rows):
            prompt = prompts[row // samples].ids
            answer = written[row][: width + 1 - len(prompt)]
            end = len(prompt) + len(answer)
            whole[row, :end] = [*prompt, *answer]
            mask[row, len(prompt) : end] = True
            texts.append(template.decode_answer(answer.tolist()))
            ended[row] = len(answer) > 0 and answer[-1] == template.end_id
        return Answers(
            prompts=[prompt for prompt in prompts for _ in range(samples)],
            texts=texts,
            ended=ended,
            tokens=whole[:, :-1],
            targets=whole[:, 1:],
            loss_mask=mask[:, 1:],
        )

    def _seed(self, rollout: int) -> int:
        key = np.array([self._config.train.seed, rollout], np.uint64)
        return int(np.random.Philox(key=key).random_raw(1)[0] % EVALUATION)

    def _adapt(self, kl: float | str) -> None:
        """Take what a rollout told; a metrics file writes infinity as text."""
        settings = self._config.rlhf
        if settings.kl_target > 0:
            coef = jnp.float32(self._kl_coef)
            coef = adapted_kl_coef(coef, jnp.float32(float(kl)), target=settings.kl_target)
            self._kl_coef = float(coef)

    def _evaluation_numbers(self, split: PromptSplit, *, size: int) -> list[np.ndarray]:
        batches = -(-split.count // size)
        batches = min(batches, self._config.train.eval_batches or batches)
        every = np.arange(split.count)
        return [every[place * size : (place + 1) * size] for place in range(batches)]


class _Judge:
    """Makes a batch of answers and their rewards: log-probabilities, values and advantages."""

    def __init__(self, config: Config, structure: nnx.GraphDef):
        self._settings, self._structure = config.rlhf, structure
        self._passes = config.train.gradient_accumulation_steps

    def __call__(
        self,
        weights: Weights,
        reference: Weights | None,
        rows: dict[str, Array],
        rewards: Float[Array, " answers"],
        kl_coef: Float[Array, ""],
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        settings, mask = self._settings, rows["loss_mask"]
        old, values = self._read(weights, rows)
        held_to = old if reference is None else self._read(reference, rows)[0]
        old, held_to = (jnp.where(mask, each, 0.0) for each in (old, held_to))
        made = {**rows, "old_log_probs": old, "reference_log_probs": held_to}
        if settings.algorithm == "grpo":
            by_answer = group_advantages(
                rewards, settings.group_size, normalised=settings.normalised_advantages
            )
            made["advantages"] = jnp.where(mask, by_answer[:, None], 0.0)
        else:
            assert values is not None
            values = jnp.where(mask, values, 0.0)
            paid = token_rewards(rewards, old, held_to, mask, kl_coef=kl_coef)
            advantages = generalised_advantages(
                paid, values, mask, discount=settings.discount, trace=settings.trace
            )
            made |= {"old_values": values, "returns": advantages + values}
            if settings.normalised_advantages:
                advantages = normalised_advantages(advantages, mask)
            made["advantages"] = advantages
        divergence = jnp.where(mask, kl_k3(old, held_to), 0.0)
        return made, {"answer_kl": jnp.mean(jnp.sum(divergence, axis=1))}

    def _read(self, weights: Weights, rows: dict[str, Array]) -> tuple[Array, Array | None]:
        """Give log-probabilities of the targets, and values where there is a value function.

        In as many passes as the train step makes, so that only the rows of one are in memory at once.
        """
        model: Any = merge_weights(self._structure, weights)

        def read(rows: dict[str, Array]) -> tuple[Array, Array | None]:
            hidden = model.hidden(rows["tokens"], counted=rows["loss_mask"]).states
            log_probs = measure_logits(model, hidden, target_log_probs, rows["targets"])
            return log_probs, model.scores(hidden) if self._settings.algorithm == "ppo" else None

        if self._passes == 1:
            return read(rows)
        cut = jax.tree.map(lambda x: x.reshape(self._passes, -1, *x.shape[1:]), rows)
        return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), jax.lax.map(read, cut))


def summary(*, loss_mask: np.ndarray, ended: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
    """Give means over answers, in float64 so that they do not depend on how many there are."""
    return {
        "reward": float(rewards.mean(dtype=np.float64)),
        "reward_deviation": float(rewards.std(dtype=np.float64)),
        "answer_tokens": float(loss_mask.sum(axis=1).mean()),
        "ended_share": float(ended.mean()),
    }


def show(answers: Answers, rewards: np.ndarray) -> str:
    """Write the first answer out, with its prompt and its reward."""
    asked = answers.prompts[0].messages[-1].content
    return f"{asked}\n-> {answers.texts[0]}\n(reward {rewards[0]:.3g})"
