"""The lines of a talk that begin with a slash."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from tinyllm_jax.config import TalkConfig, TalkSamplingConfig
from tinyllm_jax.data.files import write_file
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference.talk import Talk
from tinyllm_jax.settings import build, closest

HELP = {
    "/help": "show this",
    "/show": "show the settings, and how much of the context is used",
    "/set NAME VALUE": "change a setting, such as /set temperature 0.7",
    "/system TEXT": "change the system prompt; without TEXT there is none",
    "/retry": "draw the last answer again",
    "/reset": "forget what was said",
    "/save FILE": "write what was said; a .jsonl can be trained on (--mode sft)",
    "/quit": "leave, as Ctrl-D does",
}
NAMES = tuple(line.split()[0] for line in HELP)
TALK_SETTINGS = tuple(TalkSamplingConfig.__dataclass_fields__)


class Commands:
    """Does what such a line says.

    Args:
        talk: What is changed.
        note: Tells the one who typed.
    """

    def __init__(self, talk: Talk, *, note: Callable[[str], None]):
        self.talk = talk
        self._note = note
        self._saved: set[Path] = set()

    def run(self, line: str) -> str:
        """Do it; "retry" or "quit" is left to the one who asks.

        Raises:
            InputError: there is no such command, or what follows it is wrong.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name not in NAMES:
            raise InputError(
                f"{name}: no such command.{closest(name, NAMES)} /help shows all; to say something "
                "that begins with a slash, type two."
            )
        if rest and name not in ("/set", "/system", "/save"):
            raise InputError(f"{name} takes nothing after it. Type {name} alone.")
        if name == "/quit":
            return "quit"
        if name == "/retry":
            if not self.talk.can_retry:
                raise InputError("/retry: nothing was asked yet. Ask something first.")
            return "retry"
        act = {
            "/help": self.help,
            "/show": self.show,
            "/set": lambda: self.set(rest),
            "/system": lambda: self.system(rest),
            "/reset": self.reset,
            "/save": lambda: self.save(rest),
        }
        act[name]()
        return ""

    def help(self) -> None:
        """List the commands and keys."""
        lines = [f"  {name:<16} {what}" for name, what in HELP.items()]
        keys = {
            "Ctrl-C": "stop an answer",
            "Ctrl-D": "leave",
            "Alt-Enter": "begin a new line",
            "Up": "what was typed before",
        }
        if not self.talk.is_chat:
            keys["Enter"] = "on an empty line: go on with the text"
        self._note("\n".join([*lines, *(f"  {key:<16} {what}" for key, what in keys.items())]))

    def show(self) -> None:
        """List the settings."""
        fields = TalkSamplingConfig.__dataclass_fields__
        lines = [
            f"  {f'{name} = {shown(getattr(self.talk.sampling, name))}':<26} {fields[name].metadata['help']}"
            for name in TALK_SETTINGS
        ]
        if self.talk.is_chat:
            lines.append(
                f"  system = {self.talk.system!r}" if self.talk.system else "  no system prompt"
            )
        used, context = self.talk.used_tokens(), self.talk.service.context
        what = f"{len(self.talk.turns)} turns" if self.talk.is_chat else "the last text"
        lines.append(f"  {what}: {used} of the {context} tokens of the context")
        self._note("\n".join(lines))

    def set(self, rest: str) -> None:
        """Change a setting of sampling."""
        words = rest.replace("=", " ", 1).split()
        if len(words) != 2:
            raise InputError(
                f"/set takes a name and a value. Type /set temperature 0.7; the names are "
                f"{', '.join(TALK_SETTINGS)}."
            )
        name, value = words[0].removeprefix("sampling."), words[1]
        if name not in TALK_SETTINGS:
            raise InputError(
                f"/set {name}: no such setting.{closest(name, TALK_SETTINGS)} There are "
                f"{', '.join(TALK_SETTINGS)}."
            )
        now = {f"sampling.{each}": getattr(self.talk.sampling, each) for each in TALK_SETTINGS}
        changed = build(TalkConfig, [("", {**now, f"sampling.{name}": value})])
        self.talk.sampling = changed.for_service
        self._note(f"{name} = {shown(getattr(self.talk.sampling, name))}")

    def system(self, text: str) -> None:
        """Change the system prompt."""
        if not self.talk.is_chat:
            raise InputError("/system: this model knows no turns, so it has no system prompt.")
        self.talk.system = text
        told = "The system prompt is changed" if text else "There is no system prompt any more"
        self._note(f"{told}; what was said stays.")

    def reset(self) -> None:
        """Begin anew."""
        self.talk.reset()
        self._note("What was said is forgotten.")

    def save(self, name: str) -> None:
        """Write what was said."""
        if not name:
            raise InputError(
                "/save needs the name of a file. Type /save talk.txt or /save talk.jsonl."
            )
        messages = self.talk.messages()
        if not self.talk.turns:
            raise InputError("/save: nothing was said yet. Ask something first.")
        path = Path(name).expanduser()
        if path.exists() and path.resolve() not in self._saved:
            raise InputError(f"/save {name}: there is such a file already. Name another.")
        if path.suffix in (".json", ".jsonl"):
            record = {"messages": [dataclasses.asdict(message) for message in messages]}
            text = json.dumps(record, ensure_ascii=False) + "\n"
        elif self.talk.is_chat:
            text = "".join(f"{each.role}: {each.content}\n\n" for each in messages)
        else:
            text = "".join(each.content for each in messages) + "\n"
        try:
            write_file(path, text.encode(errors="replace"))
        except OSError as error:
            raise InputError(f"/save {name}: {error.strerror}. Name another file.") from None
        self._saved.add(path.resolve())
        self._note(f"Written to {path}.")


def shown(value: object) -> str:
    """Write a value as it is typed."""
    return str(value).lower() if isinstance(value, bool) else f"{value}"
