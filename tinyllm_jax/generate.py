"""Let a trained model write: `python -m tinyllm_jax.generate --checkpoint DIR --prompt TEXT`.

The story (prompt and continuation) goes to stdout, everything else to stderr.
"""

import argparse
import sys
from collections.abc import Sequence

from tinyllm_jax.cli import run
from tinyllm_jax.config import GenerateConfig, SamplingConfig
from tinyllm_jax.settings import Parser, add_checkpoint_flag, add_flags, parse_checkpoint_flags

# Stands between samples, on a line of its own.
SEPARATOR = "-" * 40


def main(words: Sequence[str] | None = None) -> int:
    """Generate as the command line says; 0 when done."""
    checkpoint, sampling, chat = read_command(words)
    # Imported here so that --help and bad flags need not wait for JAX.
    from tinyllm_jax.compilation_cache import enable_compilation_cache
    from tinyllm_jax.inference.language_model import load

    enable_compilation_cache()
    model = load(checkpoint)
    found = model.continue_texts([sampling.prompt], sampling=sampling, chat=chat)
    print(f"\n{SEPARATOR}\n".join(text for text, _ in found))
    full = sum(ended == "context" for _, ended in found)
    if full:
        which = "It ends" if len(found) == 1 else f"{full} of {len(found)} end"
        print(
            f"{which} where the context of {model.config.max_position_embeddings} tokens "
            "(model.max_position_embeddings) is full. Add --slide to go on.",
            file=sys.stderr,
        )
    return 0


def read_command(words: Sequence[str] | None) -> tuple[str, SamplingConfig, bool]:
    """Read the command line as (checkpoint, checked settings, whether the prompt is a question)."""
    parser = Parser(
        prog="python -m tinyllm_jax.generate",
        description="Let a trained model go on with a text.",
    )
    add_checkpoint_flag(parser)
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is what a user says, and the model answers; for models of --mode sft and on",
    )
    add_flags(parser, GenerateConfig)
    # Short here; `train` has a seed of its own under this name.
    parser.add_argument(
        "--seed",
        dest="sampling.seed",
        metavar="N",
        default=argparse.SUPPRESS,
        help="the same as --sampling.seed",
    )
    arguments, config = parse_checkpoint_flags(parser, GenerateConfig, words)
    return arguments.checkpoint, config.sampling, arguments.chat


if __name__ == "__main__":
    run(main)
