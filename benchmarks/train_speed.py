"""Training speed beside transformers' Llama in PyTorch: tokens a second of the whole train step.

    python -m benchmarks.train_speed [--config tinystories_7m] [--forms 16x1 4x4] [--rounds 7]

A form is ROWSxPASSES: rows of one pass, and passes of one step. Everyone takes the same rows through
forward, backward, clipping by norm and AdamW, each in a process of its own, and the best form of each
counts. On a CPU the processes take turns, so that whatever else the machine does falls on all of
them; on a GPU each has the device to itself, and computes in bfloat16 with float32 weights (PyTorch:
autocast, torch.compile, its own attention kernel, fused AdamW).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import gpu_names, ratio, report
from benchmarks.workers import median_seconds, serve
from tinyllm_jax.config import Config, load_config
from tinyllm_jax.host import available_cores

COLUMNS = ("what", "rows x passes", "tokens/s", "MFU", "ours / it")
CONTENDERS = {
    "ours": "tinyllm_jax",
    "eager": "transformers Llama, eager",
    "compiled": "transformers Llama, torch.compile",
}
CPU_FORMS = ("16x1", "4x4")
GPU_FORMS = ("16x1", "32x1", "64x1", "128x1", "256x1")


def settings_of(config: str, form: str) -> Config:
    """Read a preset with the rows and passes of a form."""
    rows, passes = map(int, form.split("x"))
    return load_config(
        config, {"train.batch_size": rows, "train.gradient_accumulation_steps": passes}
    )


def made_up_rows(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Draw tokens and targets of one step."""
    shape = (config.rows_per_step, config.data.sequence_length)
    rng = np.random.default_rng(0)
    tokens, targets = (
        rng.integers(0, config.model.vocab_size, shape, dtype=np.int32) for _ in range(2)
    )
    return tokens, targets


def our_step(config: Config) -> Callable[[], Any]:
    """Compile the train step of this project."""
    from tinyllm_jax.host import keep_freed_memory

    keep_freed_memory()  # as the command does
    import jax

    from tinyllm_jax.model.compiled import compiled
    from tinyllm_jax.model.weights import initial_weights, model_structure
    from tinyllm_jax.objectives.pretrain import count_targets, next_token_loss
    from tinyllm_jax.training.step import make_train_step, new_state

    tokens, targets = made_up_rows(config)
    batch = {"tokens": tokens, "targets": targets, "loss_mask": np.ones(tokens.shape, bool)}
    structure, _ = model_structure(config.model)
    step = make_train_step(config, structure, next_token_loss, count_targets)
    train_step = compiled(step, donate_argnums=0)
    held = {"state": new_state(config, initial_weights(config.model, seed=0))}

    def run() -> None:
        held["state"], numbers = train_step(held["state"], batch)
        jax.block_until_ready(numbers)

    return run


def torch_step(config: Config, *, compiled: bool) -> Callable[[], Any]:
    """Make the same step of transformers' Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(available_cores())
    torch.set_float32_matmul_precision("high")
    device, shape = "cuda" if torch.cuda.is_available() else "cpu", config.model
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads max_position_embeddings tie_word_embeddings"
    sizes: dict[str, Any] = {name: getattr(shape, name) for name in names.split()}
    sizes |= {"attn_implementation": "sdpa", "use_cache": False}
    shaped: Any = LlamaConfig(**sizes)
    llama: Any = LlamaForCausalLM(shaped)
    llama.to(device)
    model: Any = torch.compile(llama) if compiled else llama
    settings, passes = config.optimizer, config.train.gradient_accumulation_steps
    optimizer = torch.optim.AdamW(
        llama.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    tokens, targets = (torch.from_numpy(rows).long().to(device) for rows in made_up_rows(config))
    pairs = list(zip(tokens.chunk(passes), targets.chunk(passes), strict=True))

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        for inputs, wanted in pairs:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits = model(input_ids=inputs).logits
            rows = logits.reshape(-1, logits.shape[-1]).float()
            loss = torch.nn.functional.cross_entropy(rows, wanted.reshape(-1)) / passes
            loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), settings.max_grad_norm)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def work(contender: str, config: Config, *, steps: int) -> None:
    """Be the process of one contender: time `steps` steps at a time."""
    if contender == "ours":
        run = our_step(config)
    else:
        run = torch_step(config, compiled=contender == "compiled")

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            run()
        return (time.perf_counter() - start) / steps

    run()
    run()
    serve(measure)


def measure(arguments: argparse.Namespace) -> dict[tuple[str, str], float]:
    """Give the median seconds of a step by contender and form."""
    common = ["--config", arguments.config, "--steps", str(arguments.steps)]
    jobs = {
        f"{who} {form}": ["benchmarks.train_speed", "--worker", who, "--forms", form, *common]
        for who in arguments.contenders
        for form in arguments.forms
    }
    seconds = median_seconds(jobs, rounds=arguments.rounds)
    return {(name.split()[0], name.split()[1]): value for name, value in seconds.items()}


def device_peak() -> float:
    """Ask a process of its own for the peak of the device, in FLOP/s."""
    program = "from tinyllm_jax.training.devices import peak_flops; print(peak_flops(devices=1))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return float(told.stdout.split()[-1])


def make_rows(
    seconds: dict[tuple[str, str], float], arguments: argparse.Namespace, *, peak: float
) -> list[dict[str, Any]]:
    """Make the table: the best form of each contender."""
    from tinyllm_jax.model.weights import flops_per_token

    speeds = {}
    for (who, form), time_of_step in seconds.items():
        config = settings_of(arguments.config, form)
        speed = config.rows_per_step * config.data.sequence_length / time_of_step
        speeds[who] = max(speeds.get(who, (0.0, "")), (speed, form))
    config = load_config(arguments.config, {})
    length = config.data.sequence_length
    per_token = flops_per_token(config.model, sequence_length=length)
    ours, rows = speeds.get("ours", (None, ""))[0], []
    for who in arguments.contenders:
        speed, form = speeds.get(who, (None, None))
        rows.append(
            {
                "what": f"{CONTENDERS[who]}, {'bfloat16, GPU' if gpu_names() else 'float32'}",
                "rows x passes": form and f"{form.replace('x', ' x ')} x {length} tokens",
                "tokens/s": speed,
                "MFU": speed and f"{speed * per_token / peak:.0%}",
                "ours / it": ratio(ours, speed),
            }
        )
    if not gpu_names():
        rows.append({"what": "all of them in bfloat16", "rows x passes": "needs a GPU"})
    return rows


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="tinystories_7m", help="preset or TOML file")
    parser.add_argument("--forms", nargs="+", help="ROWSxPASSES, one or more")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=[*CONTENDERS])
    parser.add_argument("--steps", type=int, default=1, help="steps of one turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file to write the table to")
    parser.add_argument("--worker", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.forms = arguments.forms or list(GPU_FORMS if gpu_names() else CPU_FORMS)
    if arguments.worker:
        config = settings_of(arguments.config, arguments.forms[0])
        work(arguments.worker, config, steps=arguments.steps)
        return
    seconds = measure(arguments)
    settings = {key: value for key, value in vars(arguments).items() if key != "worker"}
    settings["seconds of a step"] = {" ".join(key): value for key, value in seconds.items()}
    report(
        "Training speed",
        COLUMNS,
        make_rows(seconds, arguments, peak=device_peak()),
        settings=json.loads(json.dumps(settings, default=str)),
        packages=("jax", "torch", "transformers"),
        json_path=arguments.json,
    )


if __name__ == "__main__":
    main()
