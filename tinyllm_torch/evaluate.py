"""Measure a trained twin: `python -m tinyllm_torch.evaluate --checkpoint DIR --data PATH...`.

The flags and the results are those of `python -m tinyllm_jax.evaluate`.
"""

from collections.abc import Sequence

from tinyllm_jax.cli import run
from tinyllm_jax.evaluate import read_command, report

PROGRAM = "python -m tinyllm_torch.evaluate"


def main(words: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; 0 when done."""
    checkpoint, config = read_command(words, program=PROGRAM)
    # Imported here so that --help and bad flags need not wait for torch.
    from tinyllm_torch.evaluation.scorer import TokenScorer
    from tinyllm_torch.inference.language_model import load

    model = load(checkpoint)
    scorer = TokenScorer(model, compute_dtype=config.evaluate.compute_dtype)
    report(model, scorer, config, checkpoint=checkpoint)
    return 0


if __name__ == "__main__":
    run(main)
