"""A person at a terminal: types into a program and sees what it writes, for tests."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Makes the terminal the program's own, so that Ctrl-C reaches it; then becomes the program.
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)
COLUMNS = 120
CURSOR_QUESTION = b"\x1b[6n"
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][0-9A-B]|\x1b[=>]|\x07|\r")


class Typist:
    """Runs a program on a terminal of its own.

    Args:
        words: The command.
        stdout: A file that stdout goes to instead of the terminal.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        cwd: Path,
        environment: Mapping[str, str],
        stdout: Any = None,
    ):
        self._terminal, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *words],
            cwd=cwd,
            env={**environment, "TERM": "xterm"},
            stdin=end,
            stdout=end if stdout is None else stdout,
            stderr=end,
            start_new_session=True,
        )
        os.close(end)
        self._seen = b""
        self._told = 0

    @property
    def screen(self) -> str:
        """Everything that was seen so far, without colours and moves of the cursor."""
        return CONTROLS.sub("", self._seen.decode(errors="replace"))

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._terminal, text.encode())

    def wait_for(self, pattern: str, *, seconds: float = 120) -> str:
        """Wait until what has come since the last call fits; gives that, up to the end of the fit."""
        end = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self.screen[self._told :])
            if found:
                told = self.screen[self._told : self._told + found.end()]
                self._told += found.end()
                return told
            assert time.monotonic() < end, (
                f"{pattern!r} has not come: {self.screen[self._told :]!r}"
            )
            self._read()

    def end(self, *, seconds: float = 30) -> int:
        """Wait for its end; gives the exit code."""
        limit = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < limit, f"it goes on: {self.screen[-400:]!r}"
            self._read()
        while self._read():
            pass
        return self.process.returncode

    def close(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._terminal)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._terminal], [], [], 0.2)
        if not ready:
            return False
        try:
            new = os.read(self._terminal, 65536)
        except OSError:  # the other side has closed
            return False
        self._seen += new
        for _ in range(new.count(CURSOR_QUESTION)):
            os.write(self._terminal, b"\x1b[1;1R")
        return bool(new)
