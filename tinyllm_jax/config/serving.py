"""Settings of text that a model writes: how it is drawn, and how it is served."""

from dataclasses import dataclass

from tinyllm_jax.settings import setting


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
    replicas: int = setting(
        0,
        "engines that share the slots, each on a device of its own; 0 is one for each core of a CPU, "
        "with four slots at least, and one elsewhere",
        minimum=0,
        maximum=4096,
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
