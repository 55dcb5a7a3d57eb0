"""The one exception for what a person supplied, so that entry points can tell it from a bug."""


class InputError(ValueError):
    """A setting, file or folder that breaks a rule; the message says what to type instead.

    Entry points print it as one line and exit with code 2 (`tinyllm_jax.cli.run`). Every other
    exception is a defect of this code and keeps its traceback.
    """
