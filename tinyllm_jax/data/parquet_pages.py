"""How large the pages of a parquet file say that they are, read before Arrow makes room for them.

Arrow takes a page's word for the memory that it needs, up to 2 GiB, whatever the file has. It gives no
access to the heads of pages, so they are read here.

Source: parquet-format, src/main/thrift/parquet.thrift (PageHeader), in Thrift's compact protocol:
apache/thrift, doc/specs/thrift-compact-protocol.md.
"""

import io
from collections.abc import Iterator

# Writers make pages of about 1 MiB; some, one of a row group.
MAX_PAGE_BYTES = 256 << 20
# Of a head, which may hold the smallest and the largest text of its page.
FIRST_HEAD_BYTES, MAX_HEAD_BYTES = 1 << 10, 64 << 20
DEEPEST = 16
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(13)


class LargePage(Exception):  # noqa: N818 -- says what it is, and never leaves this room
    """A page says that it takes more than is read; the message says how much."""


class NoPage(Exception):  # noqa: N818
    """Where a page begins there is none."""


def check_pages(file: io.BufferedIOBase, *, start: int, stop: int) -> None:
    """Refuse pages that would take too much memory.

    Args:
        start: Where the first page of a column begins in the file.
        stop: Where its last one ends.

    Raises:
        LargePage: one is.
        NoPage: what stands there is none.
    """
    for sizes in page_sizes(file, start=start, stop=stop):
        if min(sizes) < 0:
            raise NoPage
        if max(sizes) > MAX_PAGE_BYTES:
            raise LargePage(
                f"a page that takes {max(sizes):,} bytes, and at most {MAX_PAGE_BYTES:,} are read. "
                "Write the file again with smaller pages"
            )


def page_sizes(file: io.BufferedIOBase, *, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Give for each page its bytes in memory and in the file."""
    while start < stop:
        length, (unpacked, packed) = read_head(file, start, size=FIRST_HEAD_BYTES)
        yield unpacked, packed
        start += length + packed


def read_head(file: io.BufferedIOBase, place: int, *, size: int) -> tuple[int, tuple[int, int]]:
    """Read the head of a page as its length and the sizes of what follows, unpacked and packed."""
    while True:
        file.seek(place)
        head = Head(file.read(size))
        try:
            sizes = head.sizes()
        except IndexError:
            if len(head.content) < size or size >= MAX_HEAD_BYTES:
                raise NoPage from None
            size *= 8
            continue
        return head.place, sizes


class Head:
    """Reads one struct of Thrift's compact protocol."""

    def __init__(self, content: bytes):
        self.content, self.place = content, 0

    def sizes(self) -> tuple[int, int]:
        """Read it whole; its fields 2 and 3 are the sizes.

        Raises:
            IndexError: it goes on after the content.
            NoPage: it is no head of a page.
        """
        found: dict[int, int] = {}
        field = 0
        while head := self._byte():
            kind, step = head & 15, head >> 4
            field = field + step if step else self._signed()
            if kind in (I16, I32, I64):
                found[field] = self._signed()
            else:
                self._skip(kind, levels=DEEPEST)
        if not {1, 2, 3} <= found.keys():
            raise NoPage
        return found[2], found[3]

    def _byte(self) -> int:
        self.place += 1
        return self.content[self.place - 1]

    def _unsigned(self) -> int:
        number = shift = 0
        while True:
            byte = self._byte()
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
            if shift > 63:
                raise NoPage

    def _signed(self) -> int:
        number = self._unsigned()
        return number >> 1 ^ -(number & 1)

    def _skip(self, kind: int, *, levels: int) -> None:
        if levels == 0 or not TRUE <= kind <= STRUCT:
            raise NoPage
        if kind == BYTE:
            self.place += 1
        elif kind in (I16, I32, I64):
            self._unsigned()
        elif kind == DOUBLE:
            self.place += 8
        elif kind == BINARY:
            size = self._unsigned()
            self.place += size
        elif kind in (LIST, SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            self._skip_each([head & 15], count, levels=levels - 1)
        elif kind == MAP:
            if count := self._unsigned():
                kinds = self._byte()
                self._skip_each([kinds >> 4, kinds & 15], count, levels=levels - 1)
        elif kind == STRUCT:
            while head := self._byte():
                if not head >> 4:
                    self._signed()
                self._skip(head & 15, levels=levels - 1)

    def _skip_each(self, kinds: list[int], count: int, *, levels: int) -> None:
        for _ in range(count):
            for kind in kinds:
                # A truth value in a list is a byte of its own.
                self._skip(BYTE if kind in (TRUE, FALSE) else kind, levels=levels)
            if self.place > len(self.content):
                raise IndexError
