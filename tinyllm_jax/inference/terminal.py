"""Where people type and read: a terminal with line editing, or the lines of a pipe.

What is said goes to stdout and everything else to stderr, so that a pipe gets the talk alone.
"""

import functools
import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tinyllm_jax.errors import InputError

PROMPT = "> "
# A terminal obeys these; Unicode has pictures of them. Line ends and tabs stay.
CONTROLS = {
    code: 0x2400 + code if code < 32 else 0x2421 if code == 127 else 0xFFFD
    for code in [*range(32), *range(127, 160)]
    if chr(code) not in "\n\t"
}


class Terminal:
    """Reads lines and writes what is said.

    Args:
        commands: What Tab completes at the beginning of a line.
        history: File that keeps what was typed; "" keeps it until the end alone.

    Attributes:
        is_interactive: Somebody types, and sees what is written to stderr or stdout.

    Raises:
        InputError: the file of the history cannot be one.
    """

    def __init__(self, *, commands: Sequence[str], history: str):
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            # What is no text, or cannot be shown here, must not end a talk.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        shown = next((each for each in (sys.stderr, sys.stdout) if each.isatty()), None)
        self.is_interactive = sys.stdin.isatty() and shown is not None
        # A terminal already shows what was typed into it.
        self._tells_questions = not (self.is_interactive and sys.stdout.isatty())
        can_move = os.environ.get("TERM", "dumb") != "dumb"
        self._is_dim = sys.stderr.isatty() and can_move and not os.environ.get("NO_COLOR")
        self._lines = WordWrap(shutil.get_terminal_size().columns)
        self._read: Callable[[], str | None] = _line
        if self.is_interactive and shown is not None:
            self._read = (
                _reader(shown, commands, history)
                if can_move
                else functools.partial(_prompted_line, shown)
            )

    def read(self) -> str | None:
        """Read a line without its end; None when there are no more.

        Raises:
            KeyboardInterrupt: Ctrl-C was typed.
        """
        return self._read()

    def tell_question(self, text: str) -> None:
        """Write what was asked, where it does not stand yet."""
        if self._tells_questions:
            self.write(PROMPT + text.replace("\n", f"\n{PROMPT}"))
            self.end("\n")

    def write(self, text: str) -> None:
        """Write what is said; a terminal gets whole words, and keeps its controls to itself."""
        if sys.stdout.isatty():
            text = self._lines.push(text.translate(CONTROLS))
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self, text: str) -> None:
        """End what was written with this, the end of a line."""
        sys.stdout.write(self._lines.finish() + text)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Write what is not part of the talk."""
        text = text.translate(CONTROLS)
        print(f"\x1b[2m{text}\x1b[22m" if self._is_dim else text, file=sys.stderr, flush=True)

    @contextmanager
    def interrupts(self, act: Callable[[], None]) -> Iterator[None]:
        """Let Ctrl-C do this, and no more; without somebody who types it ends the program."""
        if not self.is_interactive:
            yield
            return
        before = signal.signal(signal.SIGINT, lambda *_: act())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class WordWrap:
    """Breaks lines between words, of a text that comes in pieces.

    Args:
        width: Columns of a line.
    """

    PIECES = re.compile(r"[^\S\n]*(?:\n|\S+(?=\s))")

    def __init__(self, width: int):
        self._width, self._column = width, 0
        self._held = ""  # may still become a longer word

    def push(self, text: str) -> str:
        """Take more of the text, and give what can be written now."""
        text, end = self._held + text, 0
        placed = []
        for found in self.PIECES.finditer(text):
            placed.append(self._place(found[0]))
            end = found.end()
        self._held = text[end:]
        return "".join(placed)

    def finish(self) -> str:
        """Give the rest; what follows begins a line."""
        rest, self._held = self._place(self._held), ""
        self._column = 0
        return rest

    def _place(self, piece: str) -> str:
        if piece.endswith("\n"):
            self._column = 0
            return piece
        if self._column > 0 and self._column + len(piece) > self._width:
            piece = "\n" + piece.lstrip()
            self._column = len(piece) - 1
        else:
            self._column += len(piece)
        return piece


def _line() -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _prompted_line(shown: TextIO) -> str | None:
    shown.write(PROMPT)
    shown.flush()
    return _line()


def _reader(shown: TextIO, commands: Sequence[str], history: str) -> Callable[[], str | None]:
    """Make what reads edited lines; its prompt goes where somebody sees it."""
    # Imported here since pipes need none of it.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    path = Path(history).expanduser()
    if history and (path.is_dir() or not path.parent.is_dir()):
        raise InputError(
            f"terminal.history={history}: not a file in a folder that is there. Name one."
        )

    class Commands(Completer):
        """Completes the name of a command."""

        def get_completions(self, document: Any, complete_event: Any) -> Iterator[Completion]:
            del complete_event
            typed = document.text_before_cursor
            for name in commands if typed.startswith("/") else ():
                if name.startswith(typed):
                    yield Completion(name, start_position=-len(typed))

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        PROMPT,
        completer=Commands(),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
        history=FileHistory(str(path)) if history else InMemoryHistory(),
        key_bindings=keys,
        output=create_output(stdout=shown),
    )

    def read() -> str | None:
        try:
            return session.prompt()
        except EOFError:
            return None

    return read
