"""Every setting of the toolkit: its default, unit, range and the rules between settings.

Defaults live here and nowhere else. Presets are TOML files in `configs/`; the command line goes
over them (`--section.key VALUE`).
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import build, flatten, read_toml, setting, to_table

# The matrices of a block: four of attention, three of the MLP.
ALL_PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
# What the numbers of a run can be sent to.
LOGGERS = ("tensorboard", "wandb", "swanlab", "trackio")


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


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens. The vocabulary size is `model.vocab_size`."""

    kind: str = setting(
        "sentencepiece",
        "sentencepiece: BPE with byte fallback; bytelevel: byte-level BPE with NFKC",
        choices=("sentencepiece", "bytelevel"),
    )
    path: str = setting(
        "", "a tokenizer to use as it is (tokenizer.model or tokenizer.json) instead of training"
    )
    retrain: bool = setting(
        False,
        "train the tokenizer again although one for this data exists",
        flag="--retrain-tokenizer",
    )
    character_coverage: float = setting(
        0.9995,
        "sentencepiece: share of characters that get a token of their own; the rest fall back to "
        "bytes",
        minimum=0.98,
        maximum=1.0,
    )
    max_sentences: int = setting(
        10_000_000, "sentencepiece: lines sampled for training", unit="lines", minimum=1
    )
    min_frequency: int = setting(
        2, "bytelevel: a pair is merged when seen this often", unit="times", minimum=1
    )
    max_sample_bytes: int = setting(
        200_000_000,
        "text to train on; larger corpora are sampled evenly by document; sentencepiece needs about "
        "three times as much memory",
        unit="bytes",
        minimum=1000,
    )


@dataclass(frozen=True)
class DataConfig:
    """Which text, how it is split, and how it becomes rows of tokens."""

    paths: tuple[str, ...] = setting(
        ("toy",),
        "toy (built-in stories), tinystories (downloaded), or files, folders and globs of "
        "parquet, JSONL or text, each also .gz or .zst",
        flag="--data",
    )
    validation_paths: tuple[str, ...] = setting(
        (), "validation text from files of its own; else train-*/validation-* names, else a split"
    )
    validation_fraction: float = setting(
        0.01,
        "share of documents held out, by a hash of their text, where no validation files exist",
        above=0.0,
        maximum=0.5,
    )
    text_field: str = setting("text", "parquet column or JSONL field that holds the document")
    document_separator: str = setting(
        "<|endoftext|>", "what stands between documents of a plain text file"
    )
    min_document_characters: int = setting(
        11,
        "documents whose stripped text is shorter are left out and counted",
        unit="characters",
        minimum=1,
    )
    on_bad_record: str = setting(
        "error",
        "a broken record stops with its line number (error) or is left out and counted (skip)",
        choices=("error", "skip"),
    )
    packing: str = setting(
        "auto",
        "stream: one token stream cut at random windows; padded: one document a row; packed: "
        "whole documents share a row and never attend to each other; auto: stream for pretraining, "
        "packed for conversations",
        choices=("auto", "stream", "padded", "packed"),
    )
    sequence_length: int = setting(
        256, "tokens of one row that the model reads", unit="tokens", minimum=1
    )
    long_documents: str = setting(
        "split",
        "padded and packed rows: a document longer than a row goes on in the next row (split) or "
        "is cut there and the cut tokens counted (truncate)",
        choices=("split", "truncate"),
    )
    toy_documents: int = setting(
        30_000, "toy: stories to make", unit="documents", minimum=100, maximum=100_000_000
    )
    toy_seed: int = setting(0, "toy: seed of the stories", minimum=0)
    download_source: str = setting(
        "huggingface",
        "tinystories: from roneneldan/TinyStories on Hugging Face or AI-ModelScope/TinyStories on "
        "ModelScope",
        choices=("huggingface", "modelscope"),
    )
    workers: int = setting(
        0, "processes that prepare text; 0 is one for each core", unit="processes", minimum=0
    )
    runner: str = setting(
        "local",
        "where text is prepared: on this machine's cores (local), or on the machines of a Ray "
        "cluster that share its disk (ray)",
        choices=("local", "ray"),
    )
    ray_address: str = setting(
        "auto",
        "runner ray: HOST:PORT of the cluster, the one that this machine belongs to (auto), or one of "
        "this machine's own cores for as long as it takes (local)",
    )


@dataclass(frozen=True)
class ChatConfig:
    """Which shape conversations have in their files, and what is put into them."""

    format: str = setting(
        "auto",
        "shape of conversations: messages (role, content), sharegpt (`conversations` of from, value), "
        "alpaca (instruction, input, output), or the one that the fields of each record show (auto)",
        choices=("auto", "messages", "sharegpt", "alpaca"),
    )
    system: str = setting(
        "", "system prompt of conversations that have none of their own; empty leaves them without"
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with linear warm-up, then a way down to a floor, constant after."""

    name: str = setting(
        "adamw",
        "adamw: for every weight; muon: for the matrices inside the blocks, adamw for embedding, "
        "head, routers and norms, at the same learning rate",
        choices=("adamw", "muon"),
    )
    learning_rate: float = setting(5e-4, "peak of the schedule", above=0.0, flag="--learning-rate")
    min_learning_rate: float = setting(
        5e-5, "floor of the schedule; minimind_cosine has its own", minimum=0.0
    )
    schedule: str = setting(
        "cosine",
        "after warm-up: cosine to the floor; wsd: the peak, then linearly to the floor over the last "
        "wsd_decay_share; minimind_cosine: a tenth of the peak more than a cosine to 0, so without "
        "warm-up it starts at 1.1 of the peak, and it ends at 0.1",
        choices=("cosine", "wsd", "minimind_cosine"),
    )
    wsd_decay_share: float = setting(
        0.2,
        "wsd: share of decay_steps that goes down, or all that warm-up leaves",
        above=0.0,
        maximum=1.0,
    )
    warmup_steps: int = setting(
        100,
        "steps from 0 to the peak; the first step already has peak / warmup_steps; a run shorter "
        "than this only warms up",
        unit="steps",
        minimum=0,
        flag="--warmup-steps",
    )
    decay_steps: int = setting(
        0,
        "step at which the floor is reached, warm-up included; 0 is train.max_steps",
        unit="steps",
        minimum=0,
    )
    weight_decay: float = setting(0.1, "decay of matrices; norms have none", minimum=0.0)
    beta1: float = setting(0.9, "adamw: decay of the first moment", minimum=0.0, maximum=0.9999)
    beta2: float = setting(0.95, "adamw: decay of the second moment", minimum=0.0, maximum=0.999999)
    epsilon: float = setting(1e-8, "adamw: added to the root of the second moment", above=0.0)
    muon_momentum: float = setting(
        0.95, "muon: decay of its first moment", minimum=0.0, maximum=0.9999
    )
    max_grad_norm: float = setting(
        1.0, "gradients are scaled down to this global norm; 0 leaves them", minimum=0.0
    )


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how many rows a step, when to look."""

    max_steps: int = setting(
        300, "optimizer steps of the whole run", unit="steps", minimum=1, flag="--max-steps"
    )
    batch_size: int = setting(
        32, "rows of one forward and backward pass", unit="rows", minimum=1, flag="--batch-size"
    )
    gradient_accumulation_steps: int = setting(
        1, "passes whose gradients make one step", unit="passes", minimum=1
    )
    seed: int = setting(
        42, "seed of weights, batches and dropout", minimum=0, maximum=2**32 - 1, flag="--seed"
    )
    eval_interval_steps: int = setting(
        500, "steps between looks at the validation set", unit="steps", minimum=1
    )
    eval_batches: int = setting(
        100,
        "batches of one look, always the same rows; 0 is the whole validation set",
        unit="batches",
        minimum=0,
    )
    steps_per_dispatch: int = setting(
        1,
        "steps that a device takes without the host between evaluations and checkpoints; more hide "
        "the host's work behind small models",
        unit="steps",
        minimum=1,
    )
    corpus_on_device: str = setting(
        "auto",
        "token shards lie in the memory of each device, which reads its rows there; auto is always "
        "on a GPU or TPU where they take an eighth of its memory at most, and never elsewhere",
        choices=("auto", "always", "never"),
    )
    log_interval_steps: int = setting(
        10, "steps between writes of the metrics file", unit="steps", minimum=1
    )
    max_nonfinite_steps: int = setting(
        10,
        "steps in a row with a loss or gradient that is no number before the run stops; their "
        "updates are never applied",
        unit="steps",
        minimum=1,
    )
    compilation_cache: bool = setting(True, "keep compiled programs on disk between runs")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved and what is kept."""

    interval_steps: int = setting(500, "steps between checkpoints", unit="steps", minimum=1)
    keep: int = setting(
        3, "newest checkpoints kept; the best one is kept besides", unit="checkpoints", minimum=1
    )


@dataclass(frozen=True)
class SamplingConfig:
    """How a next token is picked: penalty, then temperature, then top-k, then top-p."""

    prompt: str = setting("Once upon a time", "text that the model goes on with", flag="--prompt")
    max_new_tokens: int = setting(
        200, "longest continuation", unit="tokens", minimum=1, flag="--max-new-tokens"
    )
    temperature: float = setting(
        0.8, "divides the logits; 0 is greedy", minimum=0.0, flag="--temperature"
    )
    top_k: int = setting(
        0,
        "only the k likeliest tokens; 0 is all",
        unit="tokens",
        minimum=0,
        maximum=1_000_000_000,
        flag="--top-k",
    )
    top_p: float = setting(
        0.95,
        "only the likeliest tokens that together reach this probability; 1 is all",
        above=0.0,
        maximum=1.0,
        flag="--top-p",
    )
    repetition_penalty: float = setting(
        1.0,
        "divides positive and multiplies negative logits of tokens already present; 1 is none",
        above=0.0,
        flag="--repetition-penalty",
    )
    greedy: bool = setting(
        False, "always the likeliest token, whatever the temperature", flag="--greedy"
    )
    seed: int = setting(0, "seed of what is drawn", minimum=0, maximum=2**32 - 1)
    num_samples: int = setting(
        1, "continuations of each prompt", unit="samples", minimum=1, flag="--num-samples"
    )
    slide: bool = setting(
        False,
        "go on when the context is full: its older half is forgotten and the newer half read "
        "again, as often as needed",
        flag="--slide",
    )


@dataclass(frozen=True)
class EngineConfig:
    """How many answers are made at the same time, and in what form the weights are kept."""

    slots: int = setting(
        16, "answers that are made at the same time", minimum=1, maximum=4096, unit="answers"
    )
    queue: int = setting(
        256, "questions that may wait for a slot; more are turned away", minimum=0, unit="questions"
    )
    context: int = setting(
        0,
        "room of each slot for question and answer; 0 is model.max_position_embeddings",
        unit="tokens",
        minimum=0,
    )
    prefill_tokens: int = setting(
        32, "tokens of a prompt that are read between two dispatches", unit="tokens", minimum=1
    )
    tokens_per_dispatch: int = setting(
        4, "tokens of each answer that one dispatch makes", unit="tokens", minimum=1
    )
    weights: str = setting(
        "auto",
        "form in which weights are kept; auto is the type that the model computes in",
        choices=("auto", "float32", "bfloat16", "int8"),
    )


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens, whom it lets in, and how long and how large anything may be."""

    host: str = setting(
        "127.0.0.1",
        "address to listen on; the default is reached from this machine only, 0.0.0.0 from everywhere",
        flag="--host",
    )
    port: int = setting(
        8000, "port to listen on; 0 takes a free one", minimum=0, maximum=65535, flag="--port"
    )
    model_name: str = setting(
        "", "name of the model in requests; empty is the name of the checkpoint's folder"
    )
    api_key_file: str = setting(
        "",
        "file of keys, one a line, one of which each request must bring; TINYLLM_API_KEY in the "
        "environment is one, too. Keys are no flags, since everybody on a machine sees those",
    )
    allowed_hosts: tuple[str, ...] = setting(
        (), "names that requests may call this server by, besides localhost, where host is loopback"
    )
    max_body_bytes: int = setting(1_048_576, "longest request", unit="bytes", minimum=1)
    max_choices: int = setting(
        16, "most answers to one request (prompts x n)", unit="answers", minimum=1
    )
    max_connections: int = setting(
        512, "clients connected at the same time", unit="connections", minimum=1
    )
    buffer_pieces: int = setting(
        4096,
        "pieces kept for a client that does not read them; with more it is let go",
        unit="pieces",
        minimum=16,
    )
    request_seconds: float = setting(
        30.0, "time in which a request must have come", unit="seconds", above=0.0
    )
    answer_seconds: float = setting(
        600.0, "time from a request to the end of its answer", unit="seconds", above=0.0
    )
    stall_seconds: float = setting(
        20.0, "a client that takes nothing for so long is let go", unit="seconds", above=0.0
    )
    drain_seconds: float = setting(
        30.0, "time that answers in work have after SIGTERM", unit="seconds", minimum=0.0
    )


@dataclass(frozen=True)
class ParallelConfig:
    """How one run is divided among several devices; numbers are those of one device, but rounding.

    docs/parallel.md says how to choose.
    """

    strategy: str = setting(
        "mesh",
        "mesh: one program for a grid of devices, of the four sizes here; pmap: the older way, with "
        "whole weights on each device, for comparison",
        choices=("mesh", "pmap"),
    )
    data: int = setting(
        -1,
        "groups of devices that divide the rows, each with whole weights; -1 is as many as are left "
        "and can divide the rows of a pass",
        unit="groups",
        minimum=-1,
    )
    fsdp: int = setting(
        1,
        "devices that divide the rows, and the weights and moments besides; -1 is all that are left",
        unit="devices",
        minimum=-1,
    )
    tensor: int = setting(
        1,
        "devices that divide heads, hidden layers and vocabulary of the same rows; -1 is all that "
        "are left",
        unit="devices",
        minimum=-1,
    )
    expert: int = setting(
        1,
        "devices that divide the rows, and the experts besides; -1 is all that are left",
        unit="devices",
        minimum=-1,
    )

    def problems(self) -> list[str]:
        """List the rules between these settings that are broken."""
        found = [
            f"parallel.{axis}=0 leaves no device. Use 1, or -1 for all that are left."
            for axis, size in self.sizes().items()
            if size == 0
        ]
        filling = [axis for axis, size in self.sizes().items() if size == -1]
        if len(filling) > 1:
            flags = " ".join(f"--parallel.{axis} 1" for axis in filling[:-1])
            found.append(
                f"{', '.join(f'parallel.{axis}=-1' for axis in filling)}: only one size can be all "
                f"that are left. Add {flags}, or other numbers."
            )
        divided = [axis for axis in ("fsdp", "tensor", "expert") if self.sizes()[axis] != 1]
        if self.strategy == "pmap" and divided:
            flags = " ".join(f"--parallel.{axis} 1" for axis in divided)
            found.append(
                "parallel.strategy=pmap only divides rows, and parallel."
                f"{divided[0]}={self.sizes()[divided[0]]}. Use --parallel.strategy mesh, or {flags}."
            )
        return found

    def sizes(self) -> dict[str, int]:
        """Give the size of each axis of the grid, in the order of the grid."""
        return {name: getattr(self, name) for name in ("data", "fsdp", "expert", "tensor")}


@dataclass(frozen=True)
class DistributedConfig:
    """How several processes, on one host or many, make one run; docs/parallel.md says more."""

    coordinator: str = setting(
        "",
        "HOST:PORT of process 0, where all processes meet; auto asks Slurm, Open MPI, Kubernetes or "
        "Cloud TPU for it; empty is a run of one process",
    )
    num_processes: int = setting(
        0, "processes of the run; 0 asks the cluster", unit="processes", minimum=0
    )
    process_id: int = setting(-1, "number of this process, from 0; -1 asks the cluster", minimum=-1)
    start_timeout_seconds: int = setting(
        300, "how long processes wait for each other at the start", unit="seconds", minimum=1
    )
    heartbeat_timeout_seconds: int = setting(
        30,
        "a process that was not heard of for so long is gone, and the others stop",
        unit="seconds",
        minimum=5,
    )

    def problems(self) -> list[str]:
        """List the rules between these settings that are broken."""
        found = []
        host, _, port = self.coordinator.rpartition(":")
        is_address = bool(host) and port.isdecimal() and 0 < int(port) < 65536
        if self.coordinator not in ("", "auto") and not is_address:
            found.append(
                f"distributed.coordinator={self.coordinator} is no HOST:PORT. Use the host of process "
                "0 and a free port of it, such as 10.0.0.1:12321, or auto."
            )
        if not self.coordinator and (self.num_processes or self.process_id >= 0):
            found.append(
                "distributed.num_processes and process_id say nothing without an address to meet at. "
                "Add --distributed.coordinator HOST:PORT, or auto."
            )
        if 0 < self.num_processes <= self.process_id:
            found.append(
                f"distributed.process_id={self.process_id} is not below distributed.num_processes="
                f"{self.num_processes}. Use 0 to {self.num_processes - 1}."
            )
        return found


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


@dataclass(frozen=True)
class MonitorConfig:
    """What is watched while a run trains, and what it does by itself when its loss jumps.

    docs/monitoring.md says more.
    """

    interval_steps: int = setting(
        0,
        "steps between looks at each layer: norms of gradient, weights and update, size of activations, "
        "largest attention logit; a look costs about as much as a step; 0 is never",
        unit="steps",
        minimum=0,
    )
    spike_z: float = setting(
        8.0,
        "a loss so many robust standard deviations above the median of the steps before is a spike; "
        "0 looks for none",
        minimum=0.0,
    )
    spike_window: int = setting(
        100,
        "steps before it that a loss is compared with; until there are half as many, none is",
        unit="steps",
        minimum=10,
    )
    rewinds: int = setting(
        0,
        "times that a run goes back to an earlier checkpoint by itself, after a spike or where losses "
        "are no numbers, and leaves those batches out; then it stops; 0 is never",
        unit="times",
        minimum=0,
    )
    rewind_batches: int = setting(
        10,
        "batches that a rewind leaves out: the one of the spike, and those before it",
        unit="batches",
        minimum=1,
    )
    skip_batches: tuple[str, ...] = setting(
        (),
        "batches that are not trained on, counted from 0: numbers, or spans such as 410-419; rewinds "
        "add theirs",
    )

    def problems(self, mode: str) -> list[str]:
        """List the rules between these settings, or with the mode, that are broken."""
        found = [
            f"monitor.skip_batches={span} is no number or span of batches. Use such as 419 or 410-419."
            for span in self.skip_batches
            if not is_span(span)
        ]
        if self.rewinds > 0 and mode == "rlhf":
            found.append(
                f"monitor.rewinds={self.rewinds}: a rewind leaves batches out, and --mode rlhf makes "
                "each of what the model has just written. Use --monitor.rewinds 0."
            )
        if self.skip_batches and mode == "rlhf":
            found.append(
                f"monitor.skip_batches={' '.join(self.skip_batches)}: --mode rlhf has no batches to "
                "leave out. Leave it out."
            )
        return found


@dataclass(frozen=True)
class LoggingConfig:
    """Where the numbers of a run go besides its metrics.jsonl; docs/monitoring.md says more."""

    to: tuple[str, ...] = setting(
        (), f"loggers, each an extra to install: some of {' '.join(LOGGERS)}"
    )
    project: str = setting("tinyllm", "wandb, swanlab, trackio: project that the run belongs to")
    name: str = setting("", "name of the run there; empty is that of the run folder")
    offline: bool = setting(
        False,
        "wandb, swanlab: send nothing, and keep what `wandb sync` or `swanlab sync` sends later",
    )

    def problems(self) -> list[str]:
        """List the rules between these settings that are broken."""
        unknown = [name for name in self.to if name not in LOGGERS]
        if unknown or len(set(self.to)) < len(self.to):
            return [
                f"logging.to={' '.join(self.to)} is no list of loggers. Use some of "
                f"{' '.join(LOGGERS)}, each once."
            ]
        return []


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and what it starts from."""

    mode: str = setting(
        "pretrain",
        "what is learnt: all text (pretrain), the answers of conversations (sft), to prefer one of "
        "two answers (dpo), to score answers (reward), or what brings rewards (rlhf); all but the "
        "first begin with --init-from",
        choices=("pretrain", "sft", "dpo", "reward", "rlhf"),
        flag="--mode",
    )
    out: str = setting(
        "",
        "run folder; default checkpoints/<mode>_<config>, or the name of the run in --init-from in "
        "place of <config>",
        flag="--out",
    )
    resume: str = setting(
        "", "go on from this run or step folder, exactly; none starts afresh", flag="--resume"
    )
    auto_resume: bool = setting(
        False, "go on from the run folder's newest checkpoint if it has one", flag="--auto-resume"
    )
    dry_run: bool = setting(
        False,
        "compile the step, print its memory and speed on made-up rows, and stop before any data is "
        "read or anything written",
        flag="--dry-run",
    )
    profile: int = setting(
        0,
        "steps, after those that compile, of which a trace for Perfetto and XProf is written to the "
        "run folder's profile/; 0 is none",
        unit="steps",
        minimum=0,
        flag="--profile",
    )
    init_from: str = setting(
        "", "start from the weights (only) of this run or step folder", flag="--init-from"
    )


@dataclass(frozen=True)
class Config:
    """All settings of one run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    chat: ChatConfig = dataclasses.field(default_factory=ChatConfig)
    dpo: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    rlhf: RlhfConfig = dataclasses.field(default_factory=RlhfConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self):
        if self.data.packing == "auto":
            packing = "stream" if self.run.mode == "pretrain" else "packed"
            object.__setattr__(self, "data", dataclasses.replace(self.data, packing=packing))

    def problems(self) -> list[str]:
        """List every rule between settings that is broken."""
        found = self.model.problems() + self.parallel.problems() + self.distributed.problems()
        found += self.division_problems(
            {axis: max(size, 1) for axis, size in self.parallel.sizes().items()}
        )
        if self.run.dry_run and self.run.mode not in ("pretrain", "sft"):
            found.append(
                f"run.dry_run compiles the step of next tokens, and --mode {self.run.mode} has another. "
                "Leave it out, or look at --mode sft."
            )
        if self.data.runner == "ray" and self.run.mode != "pretrain":
            found.append(
                f"data.runner=ray prepares text, and what --mode {self.run.mode} reads is prepared on this "
                "machine. Use --data.runner local."
            )
        if self.run.mode == "dpo":
            found += self.dpo.problems()
        if self.run.mode == "rlhf":
            found += self.rlhf.problems() + self.rollout_problems()
        optimizer = self.optimizer
        found += self.lora.problems(self.model, optimizer.name)
        found += self.monitor.problems(self.run.mode) + self.logging.problems()
        if self.data.sequence_length > self.model.max_position_embeddings:
            found.append(
                f"data.sequence_length={self.data.sequence_length} is longer than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}. Use "
                f"{self.model.max_position_embeddings} or less, or raise the other."
            )
        floored = optimizer.schedule != "minimind_cosine"
        if floored and optimizer.min_learning_rate > optimizer.learning_rate:
            found.append(
                f"optimizer.min_learning_rate={optimizer.min_learning_rate} is above "
                f"optimizer.learning_rate={optimizer.learning_rate}. Use "
                f"{optimizer.learning_rate / 10:g} or another number below it."
            )
        if not self.data.paths:
            found.append("data.paths is empty. Give --data NAME or PATH.")
        if self.run.resume not in ("", "none") and self.run.init_from:
            found.append(
                "run.resume and run.init_from are both set. Keep --resume to go on with a run, or "
                "--init-from to start a new one from its weights."
            )
        return found

    def rollout_problems(self) -> list[str]:
        """List what does not divide into rollouts."""
        found, size, rows = [], self.rlhf.group_size, self.rows_per_step
        if rows % size:
            found.append(
                f"rlhf.group_size={size} does not divide the {rows} answers of a step (train.batch_size "
                f"x gradient_accumulation_steps). Use one of {divisors(rows)}."
            )
        steps = self.rlhf.updates_per_rollout
        for name, number in (
            ("train.max_steps", self.train.max_steps),
            ("train.eval_interval_steps", self.train.eval_interval_steps),
            ("checkpoint.interval_steps", self.checkpoint.interval_steps),
        ):
            if number % steps:
                found.append(
                    f"{name}={number} falls between the rlhf.updates_per_rollout={steps} steps that "
                    f"learn from the same answers. Use {max(number // steps, 1) * steps}."
                )
        if steps % self.train.steps_per_dispatch:
            found.append(
                f"train.steps_per_dispatch={self.train.steps_per_dispatch} does not divide "
                f"rlhf.updates_per_rollout={steps}. Use one of {divisors(steps)}."
            )
        return found

    def division_problems(self, sizes: Mapping[str, int]) -> list[str]:
        """List what a grid of devices cannot divide evenly, each with the numbers that it could.

        Args:
            sizes: Devices along each axis, at least 1.
        """
        model, found = self.model, []
        inner = "moe_intermediate_size" if model.num_experts > 0 else "intermediate_size"
        divided = {
            "fsdp": ("hidden_size",),
            "tensor": ("num_attention_heads", "num_key_value_heads", inner, "vocab_size"),
            "expert": ("num_experts",),
        }
        for axis, names in divided.items():
            whole = [getattr(model, name) for name in names]
            for name, number in zip(names, whole, strict=True):
                if sizes[axis] > 1 and (number % sizes[axis] or number == 0):
                    fitting = divisors(math.gcd(*whole)) or [1]
                    found.append(
                        f"parallel.{axis}={sizes[axis]} does not divide model.{name}={number}. Use "
                        f"one of {fitting}."
                    )
                    break
        rows, devices = self.train.batch_size, sizes["data"] * sizes["fsdp"] * sizes["expert"]
        if rows % devices:
            below, above = rows // devices * devices, -(-rows // devices) * devices
            found.append(
                f"parallel.data x fsdp x expert = {devices} does not divide train.batch_size={rows} "
                f"(rows of a pass). Use --batch-size {f'{below} or ' if below else ''}{above}, or "
                f"sizes with a product of {divisors(rows)}."
            )
        if self.parallel.strategy == "pmap" and model.num_experts > 0:
            found.append(
                f"parallel.strategy=pmap trains no experts, and model.num_experts="
                f"{model.num_experts}: their load must be known over all rows. Use "
                "--parallel.strategy mesh."
            )
        return found

    @property
    def decay_steps(self) -> int:
        """Step at which the learning rate reaches its floor, warm-up included."""
        return self.optimizer.decay_steps or self.train.max_steps

    @property
    def rows_per_step(self) -> int:
        """Rows of tokens that one optimizer step sees."""
        return self.train.batch_size * self.train.gradient_accumulation_steps


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of `generate`: those of sampling, by themselves."""

    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)

    def problems(self) -> list[str]:
        """List every rule between settings that is broken: there are none."""
        return []


@dataclass(frozen=True)
class ServeConfig:
    """Settings of `serve`."""

    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)

    def problems(self) -> list[str]:
        """List every rule between settings that is broken."""
        found = [
            f"sampling.{name} says nothing to a server: {why}. Leave it out."
            for name, why in (
                ("prompt", "each request brings its own"),
                ("slide", "an answer ends where the context is full"),
            )
            if getattr(self.sampling, name) != getattr(SamplingConfig, name)
        ]
        if self.sampling.num_samples > self.server.max_choices:
            found.append(
                f"sampling.num_samples={self.sampling.num_samples} is more than server.max_choices="
                f"{self.server.max_choices}. Use {self.server.max_choices} or less, or raise the other."
            )
        return found


def same_setting(section: type, name: str, **changed: Any) -> Any:
    """Declare a setting of another section once more, with another default or help."""
    field = section.__dataclass_fields__[name]
    default = changed.pop("default", field.default)
    return dataclasses.field(default=default, metadata={**field.metadata, **changed})


@dataclass(frozen=True)
class TerminalConfig:
    """A talk in a terminal."""

    system: str = setting("", "system prompt of the conversation; empty is none", flag="--system")
    history: str = setting(
        "",
        "file that keeps what was typed, for the next time; empty keeps it until the end alone",
        flag="--history",
    )
    weights: str = same_setting(EngineConfig, "weights")


@dataclass(frozen=True)
class TalkSamplingConfig:
    """What of `SamplingConfig` can be set in a talk."""

    max_new_tokens: int = same_setting(SamplingConfig, "max_new_tokens", help="longest answer")
    temperature: float = same_setting(SamplingConfig, "temperature")
    top_k: int = same_setting(SamplingConfig, "top_k")
    top_p: float = same_setting(SamplingConfig, "top_p")
    repetition_penalty: float = same_setting(SamplingConfig, "repetition_penalty")
    greedy: bool = same_setting(SamplingConfig, "greedy")
    seed: int = same_setting(SamplingConfig, "seed", flag="--seed")


@dataclass(frozen=True)
class TalkConfig:
    """Settings of `chat`."""

    terminal: TerminalConfig = dataclasses.field(default_factory=TerminalConfig)
    sampling: TalkSamplingConfig = dataclasses.field(default_factory=TalkSamplingConfig)

    def problems(self) -> list[str]:
        """List every rule between settings that is broken: there are none."""
        return []

    @property
    def for_service(self) -> SamplingConfig:
        """Give the settings of sampling in the form that a model takes."""
        return SamplingConfig(**vars(self.sampling))


@dataclass(frozen=True)
class EvaluationDataConfig:
    """Which text is looked at; a part of `DataConfig`, since nothing is split or stored."""

    paths: tuple[str, ...] = setting(
        (),
        "what to score: toy (built-in stories), tinystories (downloaded), or files, folders and globs "
        "of parquet, JSONL or text, each also .gz or .zst",
        flag="--data",
    )
    text_field: str = same_setting(DataConfig, "text_field")
    document_separator: str = same_setting(DataConfig, "document_separator")
    min_document_characters: int = same_setting(DataConfig, "min_document_characters", default=1)
    on_bad_record: str = same_setting(DataConfig, "on_bad_record")
    toy_documents: int = same_setting(DataConfig, "toy_documents", default=300, minimum=1)
    toy_seed: int = same_setting(
        DataConfig,
        "toy_seed",
        default=1,
        help="toy: seed of the stories; that of training is 0, unless it was set",
    )
    download_source: str = same_setting(DataConfig, "download_source")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and how texts become windows."""

    kind: str = setting(
        "auto",
        "what the files hold: documents (corpus), conversations, questions with answers to choose "
        "from (choices), good and bad sentences (pairs), or what the first record shows (auto)",
        choices=("auto", "corpus", "conversations", "choices", "pairs"),
    )
    prompt: str = setting(
        "",
        "choices: what stands before each answer, with {question} for the question and \\n for a new "
        "line; empty is what is usual for the fields of the record",
    )
    chat: bool = setting(
        False,
        "choices and stories: ask as a user, and score or write what the assistant says; for models "
        "of --mode sft and on",
        flag="--chat",
    )
    max_documents: int = setting(
        0,
        "documents, questions or pairs taken of each corpus or file, from its beginning; 0 is all",
        minimum=0,
        flag="--max-documents",
    )
    stories: int = setting(
        0, "stories to let the model write and measure", minimum=0, flag="--stories"
    )
    context: int = setting(
        0, "tokens that are read at once; 0 is the model's whole context", unit="tokens", minimum=0
    )
    overlap: int = setting(
        -1,
        "tokens that a later window of a long document reads again; -1 is half the context",
        unit="tokens",
        minimum=-1,
    )
    compute_dtype: str = setting(
        "float32",
        "arithmetic: float32, whatever the model was trained in, or what its settings say (model)",
        choices=("float32", "model"),
    )
    batch_size: int = setting(8, "rows of a context that are read together", minimum=1)
    out: str = setting("", "file for every number, as JSON", flag="--out")


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of `evaluate`."""

    evaluate: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    data: EvaluationDataConfig = dataclasses.field(default_factory=EvaluationDataConfig)
    chat: ChatConfig = dataclasses.field(default_factory=ChatConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)

    def problems(self) -> list[str]:
        """List every rule between settings that is broken."""
        found, evaluate = [], self.evaluate
        if not self.data.paths and not evaluate.stories:
            found.append(
                "--data is missing. Name files or folders to score (--data toy is the built-in "
                "stories), or let the model write with --stories 20."
            )
        if evaluate.prompt and "{question}" not in evaluate.prompt:
            found.append(
                f"evaluate.prompt={evaluate.prompt!r} has no {{question}}. Use, for example, "
                "--evaluate.prompt 'Question: {question}\\nAnswer:'."
            )
        if evaluate.prompt and evaluate.chat:
            found.append(
                "evaluate.prompt does nothing with --chat, where the question is the user's turn. "
                "Leave one of them out."
            )
        if self.sampling.num_samples != 1:
            found.append(
                f"sampling.num_samples={self.sampling.num_samples} does nothing here. Use --stories "
                f"{self.sampling.num_samples}."
            )
        if 0 < evaluate.context <= evaluate.overlap:
            found.append(
                f"evaluate.overlap={evaluate.overlap} leaves nothing to predict with "
                f"evaluate.context={evaluate.context}. Use {evaluate.context - 1} or less."
            )
        return found

    @property
    def documents(self) -> DataConfig:
        """Give the settings of reading text, in the form that `data` reads them in."""
        return DataConfig(**vars(self.data))


def is_span(text: str) -> bool:
    """Tell a number from 0, or a span of two such as 410-419, from any other text."""
    first, dash, last = text.partition("-")
    if len(text) > 40:  # no batch has such a number, and Python reads no number of any length
        return False
    if not (first.isdecimal() and first.isascii()):
        return False
    return not dash or (last.isdecimal() and last.isascii() and int(first) <= int(last))


def divisors(number: int) -> list[int]:
    """List the whole numbers that divide `number`, up to a million: nobody would wait for more."""
    return [d for d in range(1, min(number, 10**6) + 1) if number % d == 0]


def presets_dir() -> Path:
    """Find the folder of preset files: inside an installed package, beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def preset_names() -> list[str]:
    """List the presets by name."""
    return sorted(path.stem for path in presets_dir().glob("*.toml"))


def mode_names() -> list[str]:
    """List the ways to learn that have settings of their own, for any model."""
    return sorted(path.stem for path in (presets_dir() / "modes").glob("*.toml"))


def data_dir() -> Path:
    """Name the folder that relative data paths and downloads live in (`TINYLLM_DATA_DIR`)."""
    return Path(os.environ.get("TINYLLM_DATA_DIR") or "data")


def read_preset(name: str) -> tuple[str, dict[str, Any]]:
    """Read `--config NAME|FILE.toml` as (where it stands, dotted keys).

    Raises:
        InputError: there is no such preset or file, or it is not TOML.
    """
    path = Path(name)
    if name in preset_names():
        path = presets_dir() / f"{name}.toml"
        return f"configs/{name}.toml", read_toml(path)
    if name in mode_names():
        return f"configs/modes/{name}.toml", read_toml(presets_dir() / "modes" / f"{name}.toml")
    if path.is_file():
        return str(path), read_toml(path)
    raise InputError(
        f"--config {name!r}: no such preset or file. Presets: {', '.join(preset_names())}."
    )


def load_config(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    problems: Sequence[str] = (),
    below: tuple[str, Mapping[str, Any]] = ("", {}),
) -> Config:
    """Read a preset or file and put dotted overrides over it.

    Args:
        below: Settings that the preset, too, goes over, and where they come from.

    Raises:
        InputError: every problem found, one a line.
    """
    return build(Config, [below, read_preset(name), ("", overrides or {})], problems)


def config_from_table(table: Mapping[str, Any], *, origin: str) -> Config:
    """Rebuild a config from the nested table of a snapshot; `origin` names it in messages."""
    return build(Config, [(origin, flatten(table))])


def config_to_table(config: Config) -> dict[str, Any]:
    """Write a config as nested plain tables, the form of `training_config_snapshot.json`."""
    return to_table(config)
