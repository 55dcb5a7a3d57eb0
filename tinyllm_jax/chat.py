"""Talk to a trained model: `python -m tinyllm_jax.chat --checkpoint DIR`.

What is said goes to stdout, everything else to stderr. Lines may also come through a pipe, one
question each. /help lists the commands.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinyllm_jax.cli import run
from tinyllm_jax.config import EngineConfig, TalkConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import Parser, add_checkpoint_flag, add_flags, parse_checkpoint_flags

if TYPE_CHECKING:
    from tinyllm_jax.inference.talk import Answer, Talk
    from tinyllm_jax.inference.terminal import Terminal


def main(words: Sequence[str] | None = None) -> int:
    """Talk until there are no more lines; 0 then."""
    checkpoint, settings = read_command(words)
    # Imported here so that --help and bad flags need not wait for JAX.
    from tinyllm_jax.compilation_cache import enable_compilation_cache
    from tinyllm_jax.inference.language_model import load
    from tinyllm_jax.inference.service import Service
    from tinyllm_jax.inference.talk import Talk
    from tinyllm_jax.inference.talk_commands import NAMES
    from tinyllm_jax.inference.terminal import Terminal

    terminal = Terminal(commands=NAMES, history=settings.terminal.history)
    enable_compilation_cache()
    engine = EngineConfig(slots=1, queue=0, weights=settings.terminal.weights)
    service = Service(load(checkpoint), engine)
    if settings.terminal.system and not service.can_chat:
        raise InputError(
            "--system: this model has read no conversations, so it has no system prompt. Leave it out."
        )
    service.start()
    try:
        talk = Talk(service, system=settings.terminal.system, sampling=settings.for_service)
        return Chat(talk, terminal).run()
    finally:
        service.stop()


class Chat:
    """Reads lines, and does or answers each."""

    def __init__(self, talk: "Talk", terminal: "Terminal"):
        from tinyllm_jax.inference.talk_commands import Commands

        self.talk, self.terminal = talk, terminal
        self.commands = Commands(talk, note=terminal.note)
        self._left_out = 0  # turns that were last said not to be read

    def run(self) -> int:
        """Go on until there are no more lines."""
        self.greet()
        while True:
            try:
                line = self.terminal.read()
            except KeyboardInterrupt:
                if not self.terminal.is_interactive:
                    raise
                self.terminal.note("Ctrl-D leaves.")
                continue
            if line is None:
                return 0
            try:
                if self.take(line) == "quit":
                    return 0
            except InputError as error:
                if not self.terminal.is_interactive:
                    raise
                self.terminal.note(str(error))

    def greet(self) -> None:
        """Say what this model does, and how it is asked."""
        note = self.terminal.note
        if not self.talk.is_chat:
            note("This model has read no conversations: it goes on with the text that you begin.")
        if self.terminal.is_interactive:
            what = (
                "Ask something"
                if self.talk.is_chat
                else "Type a beginning, such as Once upon a time"
            )
            note(f"{what}, then press Enter. /help lists the commands; Ctrl-D leaves.")

    def take(self, line: str) -> str:
        """Do what a line says, or answer it; gives "quit" where it says so.

        Raises:
            InputError: there is something wrong with it.
        """
        talk = self.talk
        if line.startswith("/") and not line.startswith("//"):
            done = self.commands.run(line.strip())
            if done == "retry":
                self.show(talk.retry(), lead=talk.last_text)
            return done
        text = line.removeprefix("/") if line.startswith("//") else line
        if text.strip():
            answer = talk.ask(text)
            if talk.is_chat:
                self.terminal.tell_question(text)
            self.show(answer, lead=text)
        elif talk.turns and not talk.is_chat and self.terminal.is_interactive:
            self.show(talk.go_on(), lead="")
        return ""

    def show(self, answer: "Answer", *, lead: str) -> None:
        """Write an answer as it comes, then how it ended where that is not plain.

        Args:
            lead: What the model goes on with; it is written before, as part of the same text.
        """
        talk, terminal = self.talk, self.terminal
        if answer.left_out > self._left_out:
            terminal.note(
                f"(The oldest {answer.left_out} of {len(talk.turns)} turns no longer fit the "
                f"{talk.service.context} tokens of the context, and are not read.)"
            )
        self._left_out = answer.left_out
        if not talk.is_chat:
            terminal.write(lead)
        with terminal.interrupts(answer.cancel):
            for text in answer:
                terminal.write(text)
        terminal.end("" if answer.text.endswith("\n") else "\n")
        if answer.ended == "failed":
            raise RuntimeError("The engine has failed; what it wrote above says why.")
        limit = talk.sampling.max_new_tokens
        name, more = "--max-new-tokens", ""
        if terminal.is_interactive:
            name = "/set max_new_tokens"
            more = "" if talk.is_chat else ", and an empty line goes on"
        ends = {
            "length": f"(Cut at {limit} tokens. {name} {2 * limit} allows more{more}.)",
            "context": f"(Cut where the {talk.service.context} tokens of the context are full.)",
            "cancelled": "(Stopped.)",
        }
        if answer.ended in ends:
            terminal.note(ends[answer.ended])
        terminal.end("\n")


def read_command(words: Sequence[str] | None) -> tuple[str, TalkConfig]:
    """Read the command line as (checkpoint, checked settings)."""
    parser = Parser(
        prog="python -m tinyllm_jax.chat",
        description="Talk to a trained model. What is said goes to stdout, everything else to stderr.",
    )
    add_checkpoint_flag(parser)
    add_flags(parser, TalkConfig)
    arguments, config = parse_checkpoint_flags(parser, TalkConfig, words)
    return arguments.checkpoint, config


if __name__ == "__main__":
    run(main)
