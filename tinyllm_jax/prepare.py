"""Turn text into token shards: `python -m tinyllm_jax.prepare --config NAME --data PATH...`.

Training does the same by itself; this command is for doing it beforehand, and for looking at what
was read and left out.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from tinyllm_jax.cli import run
from tinyllm_jax.config import Config, load_config, preset_names
from tinyllm_jax.settings import Parser, add_flags, parse_flags


def main(words: Sequence[str] | None = None) -> int:
    """Prepare as the command line says; the account of it goes to stdout as JSON."""
    parser = Parser(
        prog="python -m tinyllm_jax.prepare",
        description="Train or load the tokenizer and turn text into token shards, once.",
        epilog=f"Presets: {', '.join(preset_names())}. Takes the flags of tinyllm_jax.train, so "
        "that the same line does for both.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="NAME|FILE.toml", default="tiny", help="preset or file (default tiny)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every shard again and compare its checksum"
    )
    add_flags(parser, Config)
    arguments, overrides, problems = parse_flags(parser, Config, words)
    problems += [
        f"--{key} does nothing here: a run that goes on keeps its data. Leave it out."
        for key in ("run.resume", "run.init_from", "run.auto_resume")
        if key in overrides
    ]
    config = load_config(arguments.config, overrides, problems)
    from tinyllm_jax.data.prepare import prepare

    prepared = prepare(config, progress=sys.stderr.isatty())
    if arguments.verify:
        prepared.verify()
    print(json.dumps(prepared.stats, indent=1))
    print(f"Prepared data: {prepared.folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
