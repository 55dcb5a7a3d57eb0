"""Turn data into token shards: `python -m tinyllm_jax.prepare --config NAME --data PATH...`.

Training does the same by itself, whatever it learns from; this command is for doing it beforehand, and
for looking at what was read and left out.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm_jax.cli import run, say
from tinyllm_jax.config import Config, load_config, preset_names, read_preset
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import Parser, add_flags, parse_flags

if TYPE_CHECKING:
    from tinyllm_jax.tasks import Task


def main(words: Sequence[str] | None = None) -> int:
    """Prepare as the command line says; the account of it goes to stdout as JSON."""
    parser = Parser(
        prog="python -m tinyllm_jax.prepare",
        description="Train or load the tokenizer and turn text into token shards, once. With --mode and "
        "--init-from also conversations and pairs.",
        epilog=f"Presets: {', '.join(preset_names())}. Takes the flags of tinyllm_jax.train, so "
        "that the same line does for both.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="NAME|FILE.toml", help="preset or file (default: that of the mode)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every shard again and compare its checksum"
    )
    add_flags(parser, Config)
    arguments, overrides, problems = parse_flags(parser, Config, words)
    problems += [
        f"--{key} does nothing here: a run that goes on keeps its data. Leave it out."
        for key in ("run.resume", "run.auto_resume")
        if key in overrides
    ]
    if begins_with_a_model(arguments.config, overrides):
        if words is None:  # the command itself: an accelerator is left to those who train
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        task = open_for_a_new_run(
            arguments.config, overrides, problems, is_verified=arguments.verify
        )
        prepared, stats = task.prepared, task.stats
    else:
        from tinyllm_jax.data.prepare import prepare

        config = load_config(arguments.config or "tiny", overrides, problems)
        prepared = prepare(config, progress=sys.stderr.isatty())
        stats = prepared.stats
    if arguments.verify and prepared:
        prepared.verify()
    print(json.dumps(stats, indent=1))
    if prepared:
        say(f"Prepared data: {prepared.folder}")
    else:
        say("Prompts are read anew by each run; nothing is kept.")
    return 0


def begins_with_a_model(preset: str | None, overrides: Mapping[str, Any]) -> bool:
    """Tell whether data are prepared with the tokenizer of a checkpoint; settings are not checked yet.

    All else needs no JAX, which takes seconds and memory to import.
    """
    table = {**(read_preset(preset)[1] if preset else {}), **overrides}
    return bool(table.get("run.init_from")) or table.get("run.mode", "pretrain") != "pretrain"


def open_for_a_new_run(
    preset: str | None,
    overrides: Mapping[str, Any],
    problems: Sequence[str],
    *,
    is_verified: bool,
) -> "Task":
    """Do what training does with the data of a run that begins.

    Raises:
        InputError: also where shards shall be verified and the mode writes none.
    """
    from tinyllm_jax.tasks import open_task
    from tinyllm_jax.training.start import find_start
    from tinyllm_jax.training.start_rules import check_data

    # No run folder is looked into.
    start = find_start(preset, {**overrides, "run.resume": "none"}, problems, Path(), say=say)
    if is_verified and start.config.run.mode == "rlhf":
        raise InputError(
            "--verify: --mode rlhf reads its prompts anew in each run and writes no shards. Leave it out."
        )
    task = open_task(start.config, start)
    check_data(start.source, None, task)
    return task


if __name__ == "__main__":
    run(main)
