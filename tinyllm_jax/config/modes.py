"""Settings of what is learnt beyond the next token, and of adapters."""

import dataclasses
from dataclasses import dataclass

from tinyllm_jax.config.model import ModelConfig
from tinyllm_jax.settings import setting

# The matrices of a block: four of attention, three of the MLP.
ALL_PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)


@dataclass(frozen=True)
class PreferenceConfig:
    """What is made small over pairs of a chosen and a rejected answer."""

    loss: str = setting(
        "sigmoid",
        "sigmoid: DPO; ipo: the square of how far the margin is from its goal; simpo: without a "
        "reference model",
        choices=("sigmoid", "ipo", "simpo"),
    )
    beta: float = setting(
        0.1,
        "how strongly answers are held to the reference; simpo: what scales its rewards, usually 2 "
        "to 10",
        above=0.0,
    )
    label_smoothing: float = setting(
        0.0, "sigmoid, simpo: share of pairs taken to be labelled the wrong way", minimum=0.0
    )
    length_normalised: bool = setting(
        False,
        "sigmoid, ipo: log-probabilities are means over the tokens of an answer instead of sums, as "
        "the authors of IPO and TRL compute it; simpo always does",
    )
    simpo_margin: float = setting(
        0.0, "simpo: how much more the chosen answer shall be worth", unit="reward", minimum=0.0
    )

    def problems(self) -> list[str]:
        """List the rules between these settings that are broken."""
        found = []
        if self.label_smoothing >= 0.5:
            found.append(
                f"dpo.label_smoothing={self.label_smoothing:g} says that labels tell nothing. Use a "
                "number below 0.5."
            )
        if self.loss == "ipo" and self.label_smoothing > 0:
            found.append(
                f"dpo.label_smoothing={self.label_smoothing:g} says nothing to dpo.loss=ipo. Use "
                "dpo.loss=sigmoid or simpo, or leave it out."
            )
        if self.loss == "simpo" and self.length_normalised:
            found.append(
                "dpo.length_normalised=true says nothing to dpo.loss=simpo, which always is. Leave it "
                "out."
            )
        if self.loss != "simpo" and self.simpo_margin > 0:
            found.append(
                f"dpo.simpo_margin={self.simpo_margin:g} says nothing to dpo.loss={self.loss}. Use "
                "dpo.loss=simpo, or leave it out."
            )
        return found


@dataclass(frozen=True)
class RlhfConfig:
    """Reinforcement learning: answers are sampled, rewarded, and made more or less likely."""

    algorithm: str = setting(
        "grpo",
        "ppo: a value function says what to expect of an answer so far; grpo: the other answers to "
        "the same prompt do",
        choices=("ppo", "grpo"),
    )
    reward: str = setting(
        "",
        "what answers are worth: module:function of (prompt, answer, metadata), or the folder of a "
        "reward model (--mode reward)",
    )
    group_size: int = setting(
        4, "answers sampled for each prompt", unit="answers", minimum=1, maximum=4096
    )
    updates_per_rollout: int = setting(
        1, "times that the same answers are learnt from", unit="times", minimum=1
    )
    normalised_advantages: bool = setting(
        True,
        "advantages are divided by their standard deviation: grpo: of the group; ppo: of all "
        "answers, with mean 0",
    )
    loss_level: str = setting(
        "token",
        "the loss is a mean over all tokens alike (token), or over answers, each the mean of its own "
        "tokens (sequence)",
        choices=("token", "sequence"),
    )
    clip_low: float = setting(
        0.2,
        "a token's probability is not pushed below 1 - this of what it was",
        above=0.0,
        maximum=1.0,
    )
    clip_high: float = setting(
        0.2, "a token's probability is not pushed above 1 + this of what it was", above=0.0
    )
    kl_coef: float = setting(
        0.04,
        "weight of the divergence from the reference: grpo: in the loss; ppo: in each token's reward",
        minimum=0.0,
    )
    kl_target: float = setting(
        0.0,
        "ppo: divergence of an answer from the reference to which kl_coef is adapted; 0 leaves it as "
        "it is",
        unit="nats",
        minimum=0.0,
    )
    discount: float = setting(1.0, "ppo: worth of a reward one token later", above=0.0, maximum=1.0)
    trace: float = setting(
        0.95,
        "ppo: lambda of generalised advantages; 0 trusts the value function after one token, 1 only "
        "rewards",
        minimum=0.0,
        maximum=1.0,
    )
    value_coef: float = setting(0.5, "ppo: weight of the value function's loss", minimum=0.0)
    value_clip: float = setting(
        0.2,
        "ppo: a value that moved further than this from what it was gets no credit for it; 0 leaves "
        "values free",
        unit="reward",
        minimum=0.0,
    )

    def problems(self) -> list[str]:
        """List the rules between these settings that are broken."""
        found = []
        if not self.reward:
            found.append(
                "rlhf.reward is empty. Name what answers are worth: --rlhf.reward module:function, or "
                "the folder of a reward model."
            )
        if self.algorithm == "grpo" and self.group_size < 2:
            found.append(
                f"rlhf.group_size={self.group_size} leaves nothing to compare with rlhf.algorithm="
                "grpo. Use 2 or more, or rlhf.algorithm=ppo."
            )
        if self.algorithm == "grpo" and self.kl_target > 0:
            found.append(
                f"rlhf.kl_target={self.kl_target:g} says nothing to rlhf.algorithm=grpo, whose "
                "rlhf.kl_coef stays as it is. Use rlhf.algorithm=ppo, or leave it out."
            )
        if self.kl_target > 0 and self.kl_coef == 0:
            found.append(
                f"rlhf.kl_target={self.kl_target:g} adapts rlhf.kl_coef by factors, and it is 0. Use "
                "rlhf.kl_coef=0.04 or another number above 0."
            )
        return found


@dataclass(frozen=True)
class LoraConfig:
    """Adapters that are trained in place of the model, whose weights stay as they are."""

    rank: int = setting(
        0, "width of the adapters; 0 trains the model itself", unit="numbers", minimum=0
    )
    alpha: float = setting(16.0, "adapters are scaled by alpha / rank", above=0.0)
    targets: tuple[str, ...] = setting(
        ALL_PROJECTIONS, f"matrices of each block that get one, of {' '.join(ALL_PROJECTIONS)}"
    )
    dropout: float = setting(
        0.0, "share of an adapter's inputs set to zero", minimum=0.0, maximum=0.95
    )
    embeddings: bool = setting(
        False,
        "the embedding, and a head of its own, are trained too, whole; what a model needs whose "
        "tokenizer gets new tokens",
    )

    def problems(self, model: ModelConfig, optimizer: str) -> list[str]:
        """List the rules between these settings, or with others, that are broken."""
        if self.rank == 0:
            told = [
                f"lora.{field.name}"
                for field in dataclasses.fields(self)
                if getattr(self, field.name) != field.default
            ]
            return [
                f"{name} says nothing without adapters. Add --lora.rank 8 or another number."
                for name in told
            ]
        found, of_mlp = [], [name for name in self.targets if name in ALL_PROJECTIONS[4:]]
        unknown = [name for name in self.targets if name not in ALL_PROJECTIONS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            found.append(
                f"lora.targets={' '.join(self.targets)} is no list of matrices. Use some of "
                f"{' '.join(ALL_PROJECTIONS)}, each once."
            )
        if model.num_experts > 0 and of_mlp:
            found.append(
                f"lora.targets={' '.join(self.targets)}: experts take no adapters, and model."
                f"num_experts={model.num_experts}. Use --lora.targets {' '.join(ALL_PROJECTIONS[:4])}."
            )
        if optimizer == "muon":
            found.append(
                "optimizer.name=muon is for the matrices of the blocks, and lora.rank="
                f"{self.rank} trains none of them. Use --optimizer.name adamw."
            )
        return found
