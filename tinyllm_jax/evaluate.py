"""Measure a trained model: `python -m tinyllm_jax.evaluate --checkpoint DIR --data PATH...`.

The table goes to stdout, `--out FILE` gets every number as JSON, and all else goes to stderr.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tinyllm_jax.cli import run, say
from tinyllm_jax.config import EvaluateConfig
from tinyllm_jax.data.files import for_json, write_file
from tinyllm_jax.errors import InputError
from tinyllm_jax.evaluation.run import Writer, evaluate
from tinyllm_jax.evaluation.table import write_table
from tinyllm_jax.evaluation.windows import Scorer
from tinyllm_jax.settings import Parser, add_checkpoint_flag, add_flags, parse_checkpoint_flags

PROGRAM = "python -m tinyllm_jax.evaluate"


def main(words: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; 0 when done."""
    checkpoint, config = read_command(words, program=PROGRAM)
    # Imported here so that --help and bad flags need not wait for JAX.
    from tinyllm_jax.compilation_cache import enable_compilation_cache
    from tinyllm_jax.evaluation.scorer import TokenScorer
    from tinyllm_jax.inference.language_model import load

    enable_compilation_cache()
    model = load(checkpoint)
    scorer = TokenScorer(model, compute_dtype=config.evaluate.compute_dtype)
    report(model, scorer, config, checkpoint=checkpoint)
    return 0


def read_command(words: Sequence[str] | None, *, program: str) -> tuple[str, EvaluateConfig]:
    """Read the command line as (checkpoint, checked settings)."""
    parser = Parser(
        prog=program,
        description="Measure a model: loss and bits per byte of documents and conversations, answers "
        "to choose from, minimal pairs, and stories that it writes.",
    )
    add_checkpoint_flag(parser)
    add_flags(parser, EvaluateConfig)
    arguments, config = parse_checkpoint_flags(
        parser,
        EvaluateConfig,
        words,
        missing=f"Type {program} --checkpoint RUN --data FILE..., where RUN is a run folder or one of its "
        "checkpoints.",
    )
    return arguments.checkpoint, config


def report(model: Writer, scorer: Scorer, config: EvaluateConfig, *, checkpoint: str) -> None:
    """Evaluate, print the table and write the file."""
    out = Path(config.evaluate.out) if config.evaluate.out else None
    if out is not None and out.is_dir():
        raise InputError(
            f"--out {out}: a folder. Name a file, such as --out {out / 'results.json'}."
        )
    with Progress() as progress:
        table = {"checkpoint": checkpoint, **evaluate(model, scorer, config, teller=progress)}
    print(write_table(table))
    if out is not None:
        text = json.dumps(for_json(table), indent=1, ensure_ascii=False) + "\n"
        # Half of a surrogate pair, as names of files may hold, becomes the escape that JSON has for it.
        write_file(out, text.encode(errors="backslashreplace"))
        say(f"Results: {out}")


class Progress:
    """Says on stderr how far it is: on one line of a terminal, a line now and then elsewhere."""

    LINE_INTERVAL_SECONDS = 10.0
    REDRAW_SECONDS = 0.2

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._is_terminal = clock, sys.stderr.isatty()
        self._last = clock()
        self._drawn = 0

    def show(
        self,
        name: str,
        done: int,
        size: int | None,
        *,
        tokens_read: float,
        seconds: float,
        tokens_per_second: float,
    ) -> None:
        """Show how much of a data set is done; its size may not be known."""
        now = self._clock()
        interval = self.REDRAW_SECONDS if self._is_terminal else self.LINE_INTERVAL_SECONDS
        if now - self._last < interval:
            return
        self._last = now
        of = f" of {size:,}" if size else ""
        text = (
            f"{name}: {done:,}{of} done, {tokens_read:,} tokens, {tokens_per_second:,.0f} tokens/s"
        )
        if size and done:
            text += f", {seconds / done * (size - done):,.0f} s left"
        if self._is_terminal:
            print(f"\r{text:<{self._drawn}}", end="", file=sys.stderr, flush=True)
            self._drawn = len(text)
        else:
            self.note(text)

    def note(self, text: str) -> None:
        """Print a line."""
        self._clear()
        say(text)

    def _clear(self) -> None:
        if self._drawn:
            print("\r" + " " * self._drawn + "\r", end="", file=sys.stderr)
            self._drawn = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()


if __name__ == "__main__":
    run(main)
