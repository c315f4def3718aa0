"""Archives in any pieces, and what is not one."""

from __future__ import annotations

import random
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpass.errors import BadArchive
from kvmpass.guest.archive import MAX_NAME, MAX_ZEROS, ArchiveReader, Entry
from kvmpass.initramfs.cpio import Node, newc

DIRECTORY, FILE, LINK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777


class Taken:
    """What a reader has passed on."""

    def __init__(self) -> None:
        self.entries: list[tuple[Entry, bytes]] = []
        self.archives = 0
        self._content = bytearray()

    def entry(self, entry: Entry) -> None:
        self.entries.append((entry, b""))

    def content(self, data: memoryview) -> None:
        self._content += data

    def end_of_entry(self) -> None:
        self.entries[-1] = self.entries[-1][0], bytes(self._content)
        self._content.clear()

    def end_of_archive(self) -> None:
        self.archives += 1


def in_pieces(data: bytes, seed: int) -> Taken:
    taken, chance = Taken(), random.Random(seed)
    reader = ArchiveReader(taken)
    while data:
        size = chance.choice((1, 3, 110, 4096, 1 << 20))
        reader.feed(data[:size])
        data = data[size:]
    assert reader.between
    return taken


NODES = st.lists(
    st.tuples(
        st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=50),
        st.builds(Node, st.sampled_from((DIRECTORY, FILE, LINK)), st.binary(max_size=300), st.just((0, 0))),
    ),
    max_size=8,
)


@given(st.lists(NODES, max_size=3), st.integers(), st.integers(0, 600))
def test_what_was_written_is_read(archives: list[list[tuple[str, Node]]], seed: int, zeros: int) -> None:
    taken = in_pieces(b"".join(newc(nodes) + bytes(zeros) for nodes in archives), seed)
    wanted = [(name, node.mode, node.data) for nodes in archives for name, node in nodes]
    assert [(entry.name, entry.mode, data) for entry, data in taken.entries] == wanted
    assert taken.archives == len(archives)


def header(**fields: int) -> bytes:
    names = ["ino", "mode", "uid", "gid", "nlink", "mtime", "size", "a", "b", "c", "d", "namesize", "check"]
    values = {"mode": FILE, "nlink": 1, "namesize": 2} | fields
    return b"070701" + b"".join(b"%08X" % values.get(name, 0) for name in names)


@pytest.mark.parametrize(
    "data",
    [
        b"070702" + header()[6:] + b"a\0",
        b"070701" + b"+" * 104,
        header()[:-1] + b" a\0",
        header(namesize=0),
        header(namesize=1) + b"\0",
        header(namesize=MAX_NAME + 1) + b"a" * MAX_NAME + b"\0",
        header(namesize=0xFFFFFFFF),
        header(namesize=2) + b"ab",
        header(namesize=4) + b"a\0b\0",
        header(namesize=3) + b"\0\0\0",
        b"sh: cpio: not found\n" * 10,
    ],
)
def test_what_is_not_an_archive_is_an_error(data: bytes) -> None:
    with pytest.raises(BadArchive):
        ArchiveReader(Taken()).feed(data)


def test_zeros_without_end_are_an_error() -> None:
    """Between archives, and before the first one."""
    for before in (b"", newc([])):
        reader = ArchiveReader(Taken())
        reader.feed(before + bytes(MAX_ZEROS - 1024))
        with pytest.raises(BadArchive, match="zeros"):
            reader.feed(bytes(2048))


def test_a_name_of_the_largest_size() -> None:
    taken = Taken()
    ArchiveReader(taken).feed(header(namesize=MAX_NAME) + b"a" * (MAX_NAME - 1) + b"\0\0\0")
    assert taken.entries[0][0].name == "a" * (MAX_NAME - 1)


def test_a_part_of_an_archive_is_not_complete() -> None:
    data = newc([("a", Node(FILE, b"12345"))])
    for size in range(1, len(data) - 3):
        taken = Taken()
        reader = ArchiveReader(taken)
        reader.feed(data[:size])
        assert not reader.between
        assert taken.archives == 0
