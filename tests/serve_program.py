"""`python serve_program.py FLAGS...` is `serve` with a model that answers long and never ends by itself."""

import sys

from serving import endless_model

from tinyllm_jax import serve
from tinyllm_jax.cli import run
from tinyllm_jax.inference import language_model

if __name__ == "__main__":
    load = language_model.load

    language_model.load = lambda path: endless_model(load(path))
    run(lambda: serve.main(sys.argv[1:]))
