"""Settings of the model: its shape and its arithmetic."""

from dataclasses import dataclass

from tinyllm_jax.settings import setting


@dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of the decoder, in Hugging Face's words, and how it is executed."""

    vocab_size: int = setting(1024, "entries of the embedding table", unit="tokens", minimum=8)
    hidden_size: int = setting(128, "width of the residual stream", minimum=2)
    intermediate_size: int = setting(384, "width of the SwiGLU hidden layer", minimum=1)
    num_hidden_layers: int = setting(4, "decoder blocks", minimum=1)
    num_attention_heads: int = setting(4, "query heads", minimum=1)
    num_key_value_heads: int = setting(
        4, "key and value heads; fewer than query heads is GQA, one is MQA", minimum=1
    )
    head_dim: int = setting(
        0, "width of one head; 0 is hidden_size / num_attention_heads", minimum=0
    )
    max_position_embeddings: int = setting(
        256, "longest context the model is made for", unit="tokens", minimum=2
    )
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", above=1.0)
    rope_type: str = setting(
        "default",
        "how rotary frequencies are stretched for contexts longer than the trained one: not at all "
        "(default), all alike (linear), or low ones more than high ones (llama3, yarn)",
        choices=("default", "linear", "llama3", "yarn"),
    )
    rope_factor: float = setting(
        1.0,
        "how many times longer the context becomes; for every rope_type but default",
        minimum=1.0,
    )
    rope_original_max_position_embeddings: int = setting(
        0,
        "llama3, yarn: context that the frequencies were trained on; 0 is max_position_embeddings / "
        "rope_factor",
        unit="tokens",
        minimum=0,
    )
    rope_low_freq_factor: float = setting(
        1.0,
        "llama3: frequencies that turn less often than this within the original context are divided "
        "by rope_factor",
        unit="turns",
        above=0.0,
    )
    rope_high_freq_factor: float = setting(
        4.0,
        "llama3: frequencies that turn more often than this within the original context stay",
        unit="turns",
        above=0.0,
    )
    rope_beta_fast: float = setting(
        32.0,
        "yarn: frequencies that turn more often than this within the original context stay",
        unit="turns",
        above=0.0,
    )
    rope_beta_slow: float = setting(
        1.0,
        "yarn: frequencies that turn less often than this within the original context are divided "
        "by rope_factor",
        unit="turns",
        above=0.0,
    )
    rope_attention_factor: float = setting(
        0.0,
        "yarn: queries and keys are both multiplied by this; 0 is 0.1 ln(rope_factor) + 1",
        minimum=0.0,
    )
    rms_norm_eps: float = setting(1e-5, "added to the mean square in RMSNorm", above=0.0)
    qk_norm: bool = setting(
        False, "queries and keys of every head pass an RMSNorm before they are turned (as in Qwen3)"
    )
    tie_word_embeddings: bool = setting(True, "the head reuses the embedding table")
    score_head: bool = setting(
        False,
        "a head beside the other that gives one number a position: reward models, and the value "
        "function of PPO",
    )
    num_experts: int = setting(
        0, "routed experts in place of each MLP; 0 is one dense MLP", unit="experts", minimum=0
    )
    num_experts_per_tok: int = setting(
        2, "routed experts that each token passes", unit="experts", minimum=1
    )
    num_shared_experts: int = setting(
        0, "experts that every token passes besides, as one wide MLP", unit="experts", minimum=0
    )
    moe_intermediate_size: int = setting(
        0, "width of the hidden layer of one expert; 0 is intermediate_size", minimum=0
    )
    norm_topk_prob: bool = setting(
        True, "the probabilities of the chosen experts are scaled to sum to 1"
    )
    router_aux_loss_coef: float = setting(
        0.01,
        "weight of the loss that is 1 for every layer where the experts are loaded alike, and more "
        "where not; 0 leaves it out",
        minimum=0.0,
    )
    router_aux_loss_level: str = setting(
        "batch",
        "experts shall be loaded alike over all tokens of a pass (batch) or within each row "
        "(sequence)",
        choices=("batch", "sequence"),
    )
    router_z_loss_coef: float = setting(
        0.0,
        "weight of the mean square of log-sum-exp of the router's logits, for every layer",
        minimum=0.0,
    )
    initializer_range: float = setting(
        0.02,
        "standard deviation of initial weights; projections into the residual stream get this "
        "divided by sqrt(2 x layers)",
        above=0.0,
    )
    embedding_dropout: float = setting(
        0.0, "dropout after the embedding", minimum=0.0, maximum=0.95
    )
    attention_dropout: float = setting(
        0.0, "dropout on attention weights", minimum=0.0, maximum=0.95
    )
    residual_dropout: float = setting(
        0.0, "dropout on what each attention or MLP adds to the stream", minimum=0.0, maximum=0.95
    )
    mlp_dropout: float = setting(
        0.0, "dropout inside the MLP, before its last projection", minimum=0.0, maximum=0.95
    )
    compute_dtype: str = setting(
        "auto",
        "type of activations; weights stay float32 (float64 with float64); auto is bfloat16 on "
        "GPU and TPU, float32 on CPU",
        choices=("auto", "float32", "bfloat16", "float64"),
    )
    attention: str = setting(
        "auto",
        "attention kernel; auto is cudnn where it can run (GPU, bfloat16), xla for bfloat16 "
        "elsewhere, reference for float32, float64 and attention dropout",
        choices=("auto", "xla", "cudnn", "reference"),
    )
    activation_checkpointing: str = setting(
        "none",
        "what the backward pass computes again to save memory: nothing (none), all but the products "
        "with weights (dots), or whole blocks (full)",
        choices=("none", "dots", "full"),
    )
    scan_layers: bool = setting(
        False,
        "compile one block and loop over it: a smaller program, and with activation_checkpointing the "
        "least memory, for a copy of the blocks' weights at each step",
    )

    def __post_init__(self):
        if self.moe_intermediate_size == 0 and self.num_experts > 0:
            object.__setattr__(self, "moe_intermediate_size", self.intermediate_size)
        if self.rope_original_max_position_embeddings == 0 and self.rope_type in ("llama3", "yarn"):
            original = int(self.max_position_embeddings / max(self.rope_factor, 1.0))
            object.__setattr__(self, "rope_original_max_position_embeddings", max(original, 1))
        heads = self.num_attention_heads
        if self.head_dim == 0 and heads > 0 and self.hidden_size % heads == 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    def problems(self) -> list[str]:
        """List the rules between these settings that are broken."""
        found = []
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim == 0:
            found.append(
                f"model.num_attention_heads={heads} does not divide model.hidden_size="
                f"{self.hidden_size}. Use one of {divisors(self.hidden_size)}, or set "
                "model.head_dim."
            )
        if heads % kv_heads:
            found.append(
                f"model.num_key_value_heads={kv_heads} does not divide model.num_attention_heads="
                f"{heads}. Use one of {divisors(heads)}."
            )
        if self.head_dim % 2:
            found.append(
                f"model.head_dim={self.head_dim} is odd, and rotary positions turn pairs. "
                f"Use model.head_dim={self.head_dim + 1} or another even number."
            )
        if self.attention in ("xla", "cudnn") and self.attention_dropout > 0:
            found.append(
                f"model.attention={self.attention} has no dropout on attention weights, and "
                f"model.attention_dropout={self.attention_dropout}. Use model.attention=auto or "
                "reference."
            )
        if self.attention == "cudnn" and self.compute_dtype not in ("auto", "bfloat16"):
            found.append(
                f"model.attention=cudnn takes no {self.compute_dtype}. Use "
                "model.compute_dtype=bfloat16 or model.attention=xla."
            )
        if self.rope_type == "default" and self.rope_factor != 1.0:
            found.append(
                f"model.rope_factor={self.rope_factor:g} stretches nothing with "
                "model.rope_type=default. Use model.rope_type=linear, llama3 or yarn."
            )
        if self.rope_type in ("default", "linear") and self.rope_original_max_position_embeddings:
            found.append(
                "model.rope_original_max_position_embeddings="
                f"{self.rope_original_max_position_embeddings} says nothing to model.rope_type="
                f"{self.rope_type}. Use model.rope_type=llama3 or yarn, or leave it out."
            )
        if self.rope_type != "yarn" and self.rope_attention_factor != 0.0:
            found.append(
                f"model.rope_attention_factor={self.rope_attention_factor:g} says nothing to "
                f"model.rope_type={self.rope_type}. Use model.rope_type=yarn, or leave it out."
            )
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            found.append(
                f"model.rope_high_freq_factor={self.rope_high_freq_factor:g} is not above "
                f"model.rope_low_freq_factor={self.rope_low_freq_factor:g}. Use 4 and 1."
            )
        if self.rope_beta_fast <= self.rope_beta_slow:
            found.append(
                f"model.rope_beta_fast={self.rope_beta_fast:g} is not above "
                f"model.rope_beta_slow={self.rope_beta_slow:g}. Use 32 and 1."
            )
        if 0 < self.num_experts < self.num_experts_per_tok:
            found.append(
                f"model.num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"model.num_experts={self.num_experts}. Use {self.num_experts} or less."
            )
        if self.num_experts == 0 and self.moe_intermediate_size > 0:
            found.append(
                f"model.moe_intermediate_size={self.moe_intermediate_size} without experts. Use "
                "model.num_experts=4 or more, or model.intermediate_size."
            )
        if self.num_experts == 0 and self.num_shared_experts > 0:
            found.append(
                f"model.num_shared_experts={self.num_shared_experts} without routed experts. Use "
                "model.num_experts=4 or more, or a wider model.intermediate_size."
            )
        return found


def divisors(number: int) -> list[int]:
    """List the whole numbers that divide `number`, up to a million: nobody would wait for more."""
    return [d for d in range(1, min(number, 10**6) + 1) if number % d == 0]
