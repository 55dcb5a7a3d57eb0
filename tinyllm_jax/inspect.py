"""See what training sees: `python -m tinyllm_jax.inspect --config tiny --prompt "Once upon a time"`.

Prints the device, the first batch as text and numbers, every weight, one optimizer step layer by
layer, and a continuation of the prompt; trains nothing and writes no run.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm_jax.cli import run
from tinyllm_jax.config import Config, config_to_table, preset_names
from tinyllm_jax.settings import Parser, add_flags, build, flatten, parse_flags
from tinyllm_jax.tasks import open_task
from tinyllm_jax.train import make_sampler, say, set_up_jax

if TYPE_CHECKING:
    import numpy as np

    from tinyllm_jax.data.tokenizer import Tokenizer
    from tinyllm_jax.training.loop import Objective
    from tinyllm_jax.training.start import Start

# Tokens of a row that are shown one by one.
SHOWN_TOKENS = 24


def main(words: Sequence[str] | None = None) -> int:
    """Look at what the command line describes; the report goes to stdout."""
    start = read_command(words)
    config = start.config
    set_up_jax(config)
    import jax
    import jax.numpy as jnp

    from tinyllm_jax.model.weights import initial_weights
    from tinyllm_jax.training.step import new_state

    show_device(config)
    task = open_task(config, start)
    objective = task.make_objective()
    weights = initial_weights(config.model, seed=config.train.seed)
    if start.source:
        weights = jax.tree.map(jnp.asarray, start.source.weights)
    if objective.rollouts:
        batch, _ = objective.rollouts.batch(weights, 0)
    else:
        batch = objective.train_batch(0, None)
    show_batch(batch, task.tokenizer)
    show_parameters(config, weights)
    trained, frozen = trained_and_frozen(config, weights)
    show_step(config, objective, new_state(config, trained), frozen, batch)
    heading(f"Continuation of {config.sampling.prompt!r}")
    if not start.source:
        print("(untrained, it knows no words yet; --checkpoint RUN shows a trained model)")
    print(make_sampler(config, task.asked, tokens=task.tokenizer.vocab_size)(weights))
    return 0


def read_command(words: Sequence[str] | None) -> "Start":
    """Read the command line as settings and the checkpoint that gives the weights, if any."""
    from tinyllm_jax.training.start import Start, find_start

    parser = Parser(
        prog="python -m tinyllm_jax.inspect",
        description="Show the first batch, the weights, one optimizer step and a continuation.",
        epilog=f"Presets: {', '.join(preset_names())}. Takes the flags of tinyllm_jax.train.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="NAME|FILE.toml", help="preset or file (default tiny)")
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="run or step folder whose weights and settings to show"
    )
    add_flags(parser, Config)
    arguments, overrides, problems = parse_flags(parser, Config, words)
    problems += [
        f"--{key} does nothing here. Name a run with --checkpoint to look at it."
        for key in ("run.resume", "run.auto_resume")
        if key in overrides
    ]
    # A continuation is written here whatever the mode, though not every mode's runs read how.
    sampling = {key: overrides.pop(key) for key in [*overrides] if key.startswith("sampling.")}
    if not arguments.checkpoint:
        start = find_start(arguments.config, overrides, problems, Path(), say=say)
        return replace(start, config=with_settings(start.config, sampling))
    if arguments.config:
        problems.append("--checkpoint and --config are both given. Leave one of them out.")
    from tinyllm_jax.training.checkpoint import open_checkpoint
    from tinyllm_jax.training.start_rules import check_model, settings_of

    path = Path(arguments.checkpoint)
    checkpoint = open_checkpoint(path, on_damaged=say)
    config = settings_of(checkpoint, overrides, problems)
    check_model(checkpoint, config, goes_on=False)
    return Start(with_settings(config, sampling), path, resumed=None, initial=checkpoint)


def with_settings(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Put flags over settings.

    Raises:
        InputError: every problem of theirs.
    """
    return build(Config, [("", flatten(config_to_table(config))), ("", overrides)])


def heading(text: str) -> None:
    """Begin a part of the report."""
    print(f"\n== {text}")


def show_device(config: Config) -> None:
    """Show where it runs and in which precision."""
    import jax

    from tinyllm_jax.model.attention import choose_implementation
    from tinyllm_jax.model.layers import compute_dtype, parameter_dtype
    from tinyllm_jax.training.devices import peak_flops

    heading("Device")
    for device in jax.devices():
        print(f"{device.platform}: {device.device_kind}, number {device.id}")
    dtype = compute_dtype(config.model)
    kernel = choose_implementation(
        config.model.attention, dtype, dropout_rate=config.model.attention_dropout
    )
    print(f"activations {dtype.name}, weights {parameter_dtype(config.model).name}, "
          f"attention {kernel}, peak {peak_flops(devices=1) / 1e12:.3g} TFLOP/s")  # fmt: skip


def show_batch(batch: "dict[str, np.ndarray]", tokenizer: "Tokenizer") -> None:
    """Show the first batch: shapes, the first row as text, and its first tokens in every array."""
    heading("First batch")
    for name, array in batch.items():
        print(f"{name:<21} {array.dtype!s:<7} {list(array.shape)}")
    for kind in ("", "chosen_", "rejected_"):  # one answer a row, or two
        rows = {
            name.removeprefix(kind): array
            for name, array in batch.items()
            if name.startswith(kind) and array.ndim == 2
        }
        if "tokens" not in rows:
            continue
        mask = rows.get("loss_mask", rows.get("mask"))
        assert mask is not None
        print(f"\n{kind}{int(mask.sum()):,} of {mask.size:,} places have a target")
        row = rows["tokens"][0]
        print(f"\n{kind}row 0 as text:\n{join_documents(row.tolist(), tokenizer)}")
        print("\n" + "  ".join(f"{name:>12}" for name in ["place", "text", *rows]))
        for place in range(min(SHOWN_TOKENS, len(row))):
            cells = [str(place), repr(tokenizer.token_text(int(row[place])))]
            cells += [str(array[0, place]) for array in rows.values()]
            print("  ".join(f"{cell:>12}" for cell in cells))


def join_documents(ids: list[int], tokenizer: "Tokenizer") -> str:
    """Decode a row document by document, with the borders between them marked."""
    texts, start = [], 0
    for place, token in enumerate([*ids, tokenizer.eos_id]):
        if token == tokenizer.eos_id:
            texts.append(tokenizer.decode(ids[start:place]))
            start = place + 1
    return "\n  -- end of document --\n".join(text for text in texts if text)


def show_parameters(config: Config, weights: dict[str, Any]) -> None:
    """List every weight with shape, size and spread."""
    import numpy as np

    from tinyllm_jax.model.weights import (
        count_active_parameters,
        count_parameters,
        flops_per_token,
    )

    heading("Weights")
    print(f"{'name':<44} {'shape':>14} {'parameters':>12} {'std':>9}")
    for name, weight in weights.items():
        shape = " x ".join(map(str, weight.shape))
        print(f"{name:<44} {shape:>14} {weight.size:>12,} {np.std(weight):>9.4f}")
    total, outside = count_parameters(config.model)
    flops = flops_per_token(config.model, sequence_length=config.data.sequence_length)
    print(f"{total:,} parameters, {outside:,} without the embedding")
    if config.model.num_experts > 0:
        print(f"{count_active_parameters(config.model):,} parameters active for each token")
    print(f"{flops / 1e6:,.2f} MFLOP to train on one token")


def trained_and_frozen(config: Config, weights: dict[str, Any]) -> tuple[Any, Any]:
    """Give the weights that a run would train, and those that it would leave as they are."""
    from tinyllm_jax.model.lora import describe_adapters, initial_adapters, trained_names

    if config.lora.rank == 0:
        return weights, {}
    print(f"Trained are {describe_adapters(config.model, config.lora)}")
    names = trained_names(config.model, config.lora)
    trained = initial_adapters(config.model, config.lora, seed=config.train.seed)
    trained |= {name: weights[name] for name in names if name in weights}
    return trained, {name: weights[name] for name in weights if name not in trained}


def show_step(
    config: Config,
    objective: "Objective",
    state: Any,
    frozen: dict[str, Any],
    batch: "dict[str, np.ndarray]",
) -> None:
    """Take one optimizer step and show the norms of gradient and change, weight by weight."""
    import jax
    import numpy as np

    from tinyllm_jax.model.compiled import compiled
    from tinyllm_jax.model.weights import merge_weights
    from tinyllm_jax.training.adapters import trained_structure
    from tinyllm_jax.training.step import Fixed, make_train_step

    structure = trained_structure(config)
    step = compiled(make_train_step(config, structure, objective.loss_sums, objective.loss_weight))
    after, numbers = step(state, batch, Fixed(frozen, {}))

    def mean_loss(weights: Any, batch: Any) -> Any:
        model = merge_weights(structure, {**frozen, **weights})
        return objective.loss_sums(model, batch, None)[0] / objective.loss_weight(batch)

    gradients = compiled(jax.grad(mean_loss))(state.weights, batch)
    heading("One optimizer step")
    print(f"loss {float(numbers['loss']):.4f} nats per token (a uniform guess has "
          f"{np.log(config.model.vocab_size):.4f}), gradient norm "
          f"{float(numbers['grad_norm']):.4f}, learning rate "
          f"{float(numbers['learning_rate']):.2e}")  # fmt: skip
    print(f"{'name':<44} {'|weight|':>10} {'|gradient|':>10} {'|change|':>10} {'ratio':>9}")
    for name, weight in state.weights.items():
        size = np.linalg.norm(weight)
        change = np.linalg.norm(np.asarray(after.weights[name]) - np.asarray(weight))
        print(f"{name:<44} {size:>10.4f} {np.linalg.norm(gradients[name]):>10.2e} "
              f"{change:>10.2e} {change / size if size else np.inf:>9.1e}")  # fmt: skip


if __name__ == "__main__":
    run(main)
