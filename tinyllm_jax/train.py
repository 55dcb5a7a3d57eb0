"""Train a model: `python -m tinyllm_jax.train --config tiny`.

Text becomes a tokenizer and token shards, a run folder is opened, and `fit` does the rest.
"""

# What starts slowly is imported inside functions: the processes that prepare data import this
# module again, and `--help` need not wait.

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm_jax import cli
from tinyllm_jax.cli import run
from tinyllm_jax.config import Config, preset_names, read_preset
from tinyllm_jax.errors import InputError
from tinyllm_jax.host import keep_freed_memory
from tinyllm_jax.settings import Parser, add_flags, parse_flags

if TYPE_CHECKING:
    from tinyllm_jax.data.asking import Asked
    from tinyllm_jax.tasks import Task
    from tinyllm_jax.training.figures import Figure
    from tinyllm_jax.training.loop import Outcome
    from tinyllm_jax.training.parallel import Parallel
    from tinyllm_jax.training.start import Start


def main(words: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Returns:
        0 when finished, 130 or 143 when stopped by a signal (after saving), 1 when the loss was no
        number for too long, or when a dry run does not fit into the memory.
    """
    preset, overrides, problems = read_command(words)
    if (
        words is None
    ):  # the command itself: before JAX, whose threads would have memory of their own
        keep_freed_memory()
    from tinyllm_jax.data.files import locked
    from tinyllm_jax.model.weights import model_structure
    from tinyllm_jax.tasks import open_task
    from tinyllm_jax.training.distributed import distributed_settings, joined
    from tinyllm_jax.training.dry_run import dry_run
    from tinyllm_jax.training.loggers import check_installed
    from tinyllm_jax.training.loop import Identity, fit
    from tinyllm_jax.training.parallel import make_parallel
    from tinyllm_jax.training.start import (
        best_so_far,
        check_folder,
        facts_of,
        find_folder,
        find_start,
        first_state,
        frozen_weights,
        open_together,
    )
    from tinyllm_jax.training.start_rules import check_data

    try:
        folder = find_folder(preset, overrides)
    except InputError as error:
        raise InputError("\n".join([str(error), *problems])) from None
    if wants_dry_run(preset, overrides):
        start = find_start(preset, overrides, problems, folder, say=say)
        set_up_jax(start.config)
        return dry_run(start.config, done_steps=start.resumed.step if start.resumed else 0, say=say)
    check_folder(folder)
    lock = folder.resolve().parent / f".{folder.name}.lock"
    with (
        joined(distributed_settings(preset, overrides, problems)) as here,
        here.first_in(locked(lock, on_wait=lambda: refuse_second_run(folder))),
    ):
        here.go_on = f"--resume {shlex.quote(str(folder))}"
        start = find_start(preset, overrides, problems, folder, say=say)
        config = start.config
        here.agree(facts_of(start), advice="Start all processes with the same settings.")
        if start.resumed and start.resumed.step >= config.train.max_steps:
            say(
                f"{start.resumed.folder}: the run is finished at step {start.resumed.step}. To "
                "train longer, add --max-steps with a larger number."
            )
            return 0
        check_installed(config.logging)
        set_up_jax(config)
        parallel = make_parallel(config)
        task = here.in_turn(lambda: open_task(config, start))
        here.agree(
            {"the prepared data": task.dataset_hash, "the tokenizer": task.tokenizer.hash},
            advice="Give every host the same files, best in one TINYLLM_DATA_DIR that all share.",
        )
        check_data(start.source, start.resumed, task)
        objective = here.in_turn(task.make_objective)
        sample = make_sampler(config, task.asked, tokens=task.tokenizer.vocab_size)
        say_what_starts(start, task, parallel)
        open_together(start, task, here, say=say)
        structure, _ = model_structure(config.model)
        outcome = fit(
            objective,
            first_state(start, parallel),
            frozen=frozen_weights(start, parallel),
            structure=structure,
            config=config,
            parallel=parallel,
            folder=folder,
            identity=Identity(task.tokenizer, task.dataset_hash),
            best=best_so_far(start),
            sample=sample,
            look_first=start.initial is not None and config.run.mode != "pretrain",
        )
    return say_how_it_ended(start, outcome, objective.figure)


def read_command(words: Sequence[str] | None) -> tuple[str | None, dict[str, Any], list[str]]:
    """Read the command line as preset, settings over it, and what is wrong with it."""
    parser = Parser(
        prog="python -m tinyllm_jax.train",
        description="Train a LLaMA-style language model on text.",
        epilog=f"Presets: {', '.join(preset_names())}. The run folder holds checkpoints, "
        "metrics.jsonl and report.html.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        metavar="NAME|FILE.toml",
        help="preset or TOML file (default tiny; a resumed run keeps its own settings)",
    )
    add_flags(parser, Config)
    arguments, overrides, problems = parse_flags(parser, Config, words)
    return arguments.config, overrides, problems


def wants_dry_run(preset: str | None, overrides: Mapping[str, Any]) -> bool:
    """Tell whether a command line, or its preset, asks for a dry run.

    Needed before the settings are checked, since a dry run locks no folder.
    """
    table = {**(read_preset(preset)[1] if preset else {}), **overrides}
    value = table.get("run.dry_run", False)
    return value is True or (isinstance(value, str) and value.lower() == "true")


def set_up_jax(config: Config) -> None:
    """Make the settings that JAX has for the whole process."""
    import jax

    from tinyllm_jax.compilation_cache import enable_compilation_cache

    if config.train.compilation_cache:
        enable_compilation_cache()
    if config.model.compute_dtype == "float64":
        jax.config.update("jax_enable_x64", True)


def make_sampler(config: Config, asked: "Asked", *, tokens: int) -> Callable[[Any], str]:
    """Make the function that lets the model in training go on with the prompt of the settings.

    Raises:
        InputError: the prompt fills the context.
    """
    from tinyllm_jax.inference.generate import Generator

    generator = Generator(config.model, tokens=tokens)
    generator.check([asked.ids], slide=config.sampling.slide)

    def sample(weights: Any) -> str:
        rows = generator.generate(
            weights, [asked.ids], sampling=config.sampling, eos_id=asked.end_id
        )
        return "\n".join(asked.text(row.token_ids.tolist()) for row in rows[0])

    return sample


def refuse_second_run(folder: Path) -> None:
    """Refuse to write into a folder that another process trains in."""
    raise InputError(
        f"{folder}: another process is training there. Wait for it, or name another folder "
        "with --out."
    )


def say_what_starts(start: "Start", task: "Task", parallel: "Parallel") -> None:
    """Print what is about to be trained, on what and where."""
    import jax

    from tinyllm_jax.model.attention import choose_implementation
    from tinyllm_jax.model.layers import compute_dtype
    from tinyllm_jax.model.lora import describe_adapters
    from tinyllm_jax.model.weights import describe_size

    config, device = start.config, jax.devices()[0]
    dtype = compute_dtype(config.model)
    kernel = choose_implementation(
        config.model.attention, dtype, dropout_rate=config.model.attention_dropout
    )
    tokens_per_step = config.rows_per_step * config.data.sequence_length
    say(f"Device   {device.device_kind} ({device.platform}), {dtype.name}, attention {kernel}")
    if parallel.description:
        say(f"Divided  {parallel.description}")
    say(f"Model    {describe_size(config.model)}")
    if config.lora.rank > 0:
        say(f"Trained  {describe_adapters(config.model, config.lora)}")
    say(f"Data     {task.description}")
    say(
        f"Steps    {config.train.max_steps:,} of {tokens_per_step:,} tokens: "
        f"{config.train.max_steps * config.rows_per_step / task.rows_to_learn:.1f} times through the "
        "data"
    )
    if start.resumed:
        say(f"Resumes  {start.resumed.folder}, exactly where step {start.resumed.step} ended")
    elif start.initial:
        say(f"Weights  of {start.initial.folder}")
    say(f"Folder   {start.folder}\n")


def say_how_it_ended(start: "Start", outcome: "Outcome", figure: "Figure") -> int:
    """Print where everything is and what to type next, and give the exit code."""
    folder, step = start.folder, int(outcome.state.step)
    if outcome.nonfinite:
        say(f"error: {outcome.nonfinite}")
        return 1
    if outcome.stopped_by is not None and step < start.config.train.max_steps:
        say(
            f"Stopped by {outcome.stopped_by.name}; step {step} is saved. Go on, exactly there, "
            f"with:\n  python -m tinyllm_jax.train --resume {shlex.quote(str(folder))}"
        )
        return 128 + outcome.stopped_by
    if outcome.best:
        best = figure.say_best(outcome.best["loss"])
        say(f"Finished. {best}, at step {outcome.best['step']}: {folder / 'best'}")
    say(f"Loss curve and samples: {folder / 'report.html'}")
    say(
        "More of what it writes:\n"
        f"  python -m tinyllm_jax.generate --checkpoint {shlex.quote(str(folder))} "
        f"--prompt {shlex.quote(start.config.sampling.prompt)}"
        + (" --chat" if start.config.run.mode != "pretrain" else "")
    )
    return 0


def say(text: str) -> None:
    """Tell the person something, on stderr, and once where there are several processes."""
    from tinyllm_jax.training.distributed import hosts

    if hosts().is_first:
        cli.say(text)


if __name__ == "__main__":
    run(main)
