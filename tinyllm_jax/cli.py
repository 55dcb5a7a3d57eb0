"""What every command shares: one clear line for bad input, exit code 2, no traceback."""

import errno
import gc
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from tinyllm_jax.errors import InputError

# Failures of the machine rather than of this code, and what to type when they happen.
_ADVICE = {
    errno.ENOSPC: "No space is left there. Free some, or name another disk with --out or "
    "TINYLLM_DATA_DIR.",
    errno.EDQUOT: "The disk quota is used up. Free some, or name another disk with --out or "
    "TINYLLM_DATA_DIR.",
    errno.EFBIG: "The file would be larger than this process may write. Raise the limit (ulimit "
    "-f), or name another disk with --out or TINYLLM_DATA_DIR.",
    errno.EROFS: "That disk is read-only. Name another folder with --out or TINYLLM_DATA_DIR.",
    errno.EACCES: "This user may not do that there. Name another folder with --out or "
    "TINYLLM_DATA_DIR, or change the permissions.",
    errno.EPERM: "This user may not do that there. Name another folder with --out or "
    "TINYLLM_DATA_DIR, or change the permissions.",
    errno.ENOTDIR: "A file stands where a folder is needed. Name another folder.",
    errno.EISDIR: "A folder stands where a file is needed. Name a file.",
    errno.ENAMETOOLONG: "The name is too long for this disk. Check for a missing space or quote, and "
    "name a shorter one.",
    errno.EEXIST: "Something is already there. Name another folder with --out.",
}
# Whatever runs out, a checkpoint that is there is whole.
_LESS_MEMORY = (
    "Ask for less, as with a smaller --batch-size (train --dry-run true tells what a run needs), or give "
    "it a larger machine. A run goes on from its last checkpoint with --auto-resume."
)

# Of a message, in characters.
LONGEST_LINE = 4000


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit: 0 when done, 2 with one line when its input was wrong.

    Any other exception is a defect of this code and keeps its traceback.
    """
    # Imports and tracing make many objects that stay: to look through them after every 700 new ones is a
    # tenth of the time until a program runs.
    gc.set_threshold(20_000)
    # Names of files, and texts of data, need not be text that a terminal can show.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except InputError as error:
        fail(str(error))
    except BrokenPipeError:
        # The reader of stdout (head, less) has gone; nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0)
        if advice is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        fail(f"{place}{os.strerror(error.errno or 0)}. {advice}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        words = str(error).strip().splitlines()[:1]
        fail(f"out of memory{f' ({words[0]})' if words else ''}. {_LESS_MEMORY}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code or 0)


def is_out_of_memory(error: Exception) -> bool:
    """Tell a lack of memory of Python, of JAX's devices or of PyTorch's, which has classes of its own."""
    words = ("RESOURCE_EXHAUSTED", "bad_alloc", "can't start new thread")  # no room for its stack
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(each in str(error) for each in words)
    )


def say(text: str) -> None:
    """Tell the person something, on stderr; stdout is for what was asked for."""
    print(text, file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """Print what is wrong on stderr, a line a problem, and exit with code 2."""
    for line in lines_to_show(message):
        print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def lines_to_show(message: str) -> list[str]:
    """Cut a message into lines for a terminal.

    Messages quote what stood in a file. Its control characters stay visible, so that no file sends
    commands to a terminal, and of a very long line the beginning and the end are shown.
    """
    lines = []
    for line in message.splitlines():
        if len(line) > LONGEST_LINE:
            half = LONGEST_LINE // 2
            line = f"{line[:half]} ... {line[-half:]}"
        lines.append("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))
    return lines
