"""The console script: `tinyllm train ...` is `python -m tinyllm_jax.train ...`."""

import runpy
import sys

COMMANDS = {
    "train": "train a model",
    "generate": "let a trained model write",
    "chat": "talk to a trained model in the terminal",
    "evaluate": "measure a model: loss, multiple choice, minimal pairs, stories",
    "serve": "answer over HTTP, as OpenAI's API",
    "report": "show a run on a page, or compare runs",
    "verify_resume": "prove on this machine that a killed run goes on exactly",
    "inspect": "look at the first batch, the model and one step",
    "prepare": "turn text, conversations or pairs into token shards",
    "tokenizer": "train a tokenizer",
}


def main() -> None:
    """Run the command that the first word names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"tinyllm {name}", *sys.argv[2:]]
        runpy.run_module(f"tinyllm_jax.{name}", run_name="__main__", alter_sys=True)
        return
    lines = ["Usage: tinyllm COMMAND [flags]; --help after a command shows its flags.", ""]
    lines += [f"  {command:<13} {what}" for command, what in COMMANDS.items()]
    if name in ("-h", "--help"):
        print("\n".join(lines))
        return
    print(f"error: '{name}' is no command. Use one of {', '.join(COMMANDS)}.", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
