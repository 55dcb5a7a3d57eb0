"""`python chat_program.py FLAGS...` is `chat` with a model that answers and never ends by itself."""

import sys

from serving import Endless, chat_model

from tinyllm_jax import chat
from tinyllm_jax.cli import run
from tinyllm_jax.inference import language_model

if __name__ == "__main__":
    load = language_model.load

    def load_endless(path: str) -> language_model.LanguageModel:
        model = chat_model(load(path), context=16384)
        return language_model.LanguageModel(model.config, model.weights, Endless(model.tokenizer))

    language_model.load = load_endless
    run(lambda: chat.main(sys.argv[1:]))
