"""Train the twin: `python -m tinyllm_torch.train --config tiny`.

Takes the settings of `python -m tinyllm_jax.train`, reads the same token shards and sees the same
batches. Its checkpoints are what `python -m convert SRC DST --to safetensors` writes.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tinyllm_jax.cli import run, say
from tinyllm_jax.config import Config, ParallelConfig, preset_names
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import Parser, add_flags, parse_flags

if TYPE_CHECKING:
    from tinyllm_jax.data.tokenizer import Tokenizer
    from tinyllm_torch.training.loop import Outcome
    from tinyllm_torch.training.start import Start


def main(words: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Returns:
        0 when finished, 130 or 143 when stopped by a signal (after saving), 1 when the loss was no
        number for too long.
    """
    preset, overrides, problems = read_command(words)
    # Imported here: the processes that prepare data import this module again, and --help need not
    # wait for torch.
    from tinyllm_jax.data.files import locked
    from tinyllm_jax.data.prepare import prepare
    from tinyllm_jax.training.loggers import check_installed
    from tinyllm_jax.training.start_rules import check_data
    from tinyllm_torch.model.weights import model_structure
    from tinyllm_torch.objectives.pretrain import make_pretraining
    from tinyllm_torch.training.loop import Identity, fit
    from tinyllm_torch.training.start import (
        best_so_far,
        check_folder,
        find_start,
        first_state,
        open_folder,
    )

    start = find_start(preset, overrides, problems, say=say)
    config, folder = start.config, start.folder
    refuse_what_is_not_here(config)
    check_installed(config.logging)
    if start.resumed and start.resumed.step >= config.train.max_steps:
        say(
            f"{start.resumed.folder}: the run is finished at step {start.resumed.step}. To train "
            "longer, add --max-steps with a larger number."
        )
        return 0
    lock = folder.parent / f".{folder.name}.lock"
    with locked(lock, on_wait=lambda: refuse_second_run(start)):
        check_folder(start)
        prepared = prepare(config, progress=sys.stderr.isatty(), tokenizer=tokenizer_of(start))
        check_data(start.source, start.resumed, prepared)
        sample = make_sampler(config, prepared.tokenizer)
        open_folder(start, prepared, say=say)
        structure, _ = model_structure(config.model)
        outcome = fit(
            make_pretraining(config, prepared),
            first_state(start),
            structure=structure,
            config=config,
            folder=folder,
            identity=Identity(prepared.tokenizer, prepared.dataset_hash),
            best=best_so_far(start),
            sample=sample,
        )
    return say_how_it_ended(start, outcome)


def refuse_what_is_not_here(config: Config) -> None:
    """Refuse settings of which only the JAX side makes something."""
    if config.run.mode != "pretrain":
        raise InputError(
            f"run.mode={config.run.mode}: the twin has its losses, and no runs of it. Use python -m "
            "tinyllm_jax.train with the same flags."
        )
    if config.lora.rank > 0:
        raise InputError(
            f"lora.rank={config.lora.rank}: the twin trains no adapters. Use python -m tinyllm_jax.train "
            "with the same flags."
        )
    if config.run.dry_run:
        raise InputError(
            "run.dry_run: the twin has no compiler to ask for memory and time. Use python -m "
            "tinyllm_jax.train --dry-run with the same flags."
        )
    if config.run.profile:
        raise InputError(
            "run.profile: the twin writes no trace. Use --profile 0, or python -m tinyllm_jax.train."
        )
    if config.train.steps_per_dispatch > 1:
        raise InputError(
            "train.steps_per_dispatch: the twin takes one step after another. Add "
            "--train.steps_per_dispatch 1."
        )
    if config.train.corpus_on_device == "always":
        raise InputError(
            "train.corpus_on_device: the twin reads its rows on the host. Add "
            "--train.corpus_on_device auto."
        )
    if config.monitor.interval_steps:
        raise InputError(
            "monitor.interval_steps: the twin does not look at its layers. Add "
            "--monitor.interval_steps 0, or use python -m tinyllm_jax.train."
        )
    if config.distributed.coordinator:
        raise InputError(
            "distributed.coordinator: the twin trains in one process. Leave it out, or use python -m "
            "tinyllm_jax.train."
        )
    if config.parallel != ParallelConfig():
        raise InputError(
            "parallel: the twin trains on one device. Add --parallel.strategy mesh --parallel.data -1 "
            "--parallel.fsdp 1 --parallel.tensor 1 --parallel.expert 1."
        )


def read_command(words: Sequence[str] | None) -> tuple[str | None, dict[str, Any], list[str]]:
    """Read the command line as preset, settings over it, and what is wrong with it."""
    parser = Parser(
        prog="python -m tinyllm_torch.train",
        description="Train the PyTorch twin on text, with the settings and data of tinyllm_jax.",
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


def tokenizer_of(start: "Start") -> "Tokenizer | None":
    """Give the tokenizer of the checkpoint that the run starts from, unless another is asked for."""
    source, path = start.source, start.config.tokenizer.path
    if source is None or path not in ("", source.config.tokenizer.path):
        return None
    return source.tokenizer


def make_sampler(config: Config, tokenizer: "Tokenizer") -> Callable[[Any], str]:
    """Make the function that lets the model in training go on with the prompt of the settings.

    Raises:
        InputError: the prompt fills the context.
    """
    from tinyllm_torch.inference.generate import Generator

    generator = Generator(config.model)
    prompt = tokenizer.encode(config.sampling.prompt, bos=True)
    generator.check([prompt], slide=config.sampling.slide)

    def sample(weights: Any) -> str:
        rows = generator.generate(
            weights, [prompt], sampling=config.sampling, eos_id=tokenizer.eos_id
        )
        return "\n".join(tokenizer.decode([*prompt, *row.token_ids.tolist()]) for row in rows[0])

    return sample


def refuse_second_run(start: "Start") -> None:
    """Refuse to write into a folder that another process trains in."""
    raise InputError(
        f"{start.folder}: another process is training there. Wait for it, or name another folder "
        "with --out."
    )


def say_how_it_ended(start: "Start", outcome: "Outcome") -> int:
    """Print where everything is and what to type next, and give the exit code."""
    folder, step = start.folder, outcome.state.step
    if outcome.nonfinite:
        say(f"error: {outcome.nonfinite}")
        return 1
    if outcome.stopped_by is not None and step < start.config.train.max_steps:
        say(
            f"Stopped by {outcome.stopped_by.name}; step {step} is saved. Go on, exactly there, "
            f"with:\n  python -m tinyllm_torch.train --resume {folder}"
        )
        return 128 + outcome.stopped_by
    say(
        f"Finished. Loss curve and samples: {folder / 'report.html'}\nMore of what it writes:\n"
        f'  python -m tinyllm_torch.generate --checkpoint {folder} --prompt "{start.config.sampling.prompt}"'
    )
    return 0


if __name__ == "__main__":
    run(main)
