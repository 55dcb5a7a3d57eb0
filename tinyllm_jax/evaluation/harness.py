"""Run lm-evaluation-harness, whose hundreds of tasks then work on our checkpoints.

    python -m tinyllm_jax.evaluation.harness run --model tinyllm --model_args checkpoint=RUN --tasks piqa

takes every flag of `lm_eval`. Needs the extra `eval`; the harness downloads the data of its tasks
itself, unless `--include_path` names a folder of YAML files about local data.
"""

import importlib
import sys

from tinyllm_jax.cli import run
from tinyllm_jax.errors import InputError


def main() -> int:
    """Run the harness's own command with our models known to it."""
    try:
        command = importlib.import_module("lm_eval.__main__")
    except ImportError:
        raise InputError(
            "lm-evaluation-harness is not installed. Type pip install 'tinyllm[eval]'."
        ) from None
    importlib.import_module("tinyllm_jax.evaluation.harness_model")
    command.cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.argv[0] = "lm_eval"
    run(main)
