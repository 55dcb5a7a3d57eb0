"""Walk over the header of a GGUF file before the library does.

The library believes every count that it reads: a few bytes of a damaged file can have it build lists
until memory ends.

Source: ggml-org/ggml, docs/gguf.md ("File Structure").
"""

import mmap
import struct
from pathlib import Path

STRING, ARRAY = 8, 9
# Bytes of one value of each type that has a fixed size.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
MOST_DIMENSIONS = 4


def check_header(path: Path) -> None:
    """Read every length of the header against what is left of the file.

    Raises:
        ValueError: something reaches beyond its end, or is of no known type.
    """
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        header = _Header(content)
        tensors, settings = header.number("Q"), header.number("Q")
        for _ in range(settings):
            header.skip_string()
            header.skip_value(header.number("I"))
        for _ in range(tensors):
            header.skip_string()
            header.skip_tensor()


class _Header:
    """A place in a file that moves on and never beyond the end."""

    def __init__(self, content: mmap.mmap):
        self._content = content
        self._place = 4
        self._order = "<"
        if self.number("I") & 0xFFFF == 0:  # the version, written by a machine of the other order
            self._order = ">"

    def number(self, kind: str) -> int:
        place = self._place
        self.skip(struct.calcsize(f"={kind}"))
        return struct.unpack_from(self._order + kind, self._content, place)[0]

    def skip(self, size: int) -> None:
        if size > len(self._content) - self._place:
            raise ValueError(f"cut short after {len(self._content):,} bytes, inside its header")
        self._place += size

    def skip_string(self) -> None:
        self.skip(self.number("Q"))

    def skip_value(self, kind: int) -> None:
        if kind == STRING:
            self.skip_string()
        elif kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in SIZES:
                self.skip(SIZES[inner] * count)
            elif inner == STRING:
                for _ in range(count):
                    self.skip_string()
            else:
                raise ValueError(f"a list of values of type {inner}")
        else:
            raise ValueError(f"a value of type {kind}")

    def skip_tensor(self) -> None:
        dimensions = self.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        count = 1
        for _ in range(dimensions):
            count *= self.number("Q")
        # The smallest types have more than one bit for a number.
        if count > 8 * len(self._content):
            raise ValueError(f"a tensor of {count:,} numbers in {len(self._content):,} bytes")
        self.number("I")
        self.number("Q")
