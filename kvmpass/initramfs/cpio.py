"""A root file system as a tree in memory, and as a cpio archive that the kernel unpacks.

The archive's format is "newc" (Documentation/driver-api/early-userspace/buffer-format.rst).
"""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from kvmpass.errors import KvmpassError

# A merged /usr as on today's distributions, so that a library found as /lib/x or as /usr/lib/x is the same file.
_PAGE = 4096
_INODE = 1024  # of memory, its name and entry included
MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


@dataclass(frozen=True, slots=True)
class Node:
    """One file: ``mode`` as in ``st_mode``; ``data`` is a regular file's content or a symlink's target."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


class Tree:
    """Paths and their nodes. Everything belongs to root and has the time 0, so equal input gives equal bytes."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        for name in MERGED:
            self.directory(f"/usr/{name}")
            self._nodes[name] = Node(stat.S_IFLNK | 0o777, f"usr/{name}".encode())

    @staticmethod
    def canonical(path: str) -> str:
        """The archive's name of an absolute path: no leading slash, inside the merged /usr."""
        pure = PurePosixPath(path)
        if not pure.is_absolute() or ".." in pure.parts:
            raise KvmpassError(f"{path!r} is not an absolute path in the guest")
        parts = list(pure.parts[1:])
        if len(parts) > 1 and parts[0] in MERGED:
            parts.insert(0, "usr")
        return "/".join(parts)

    def __contains__(self, path: str) -> bool:
        return self.canonical(path) in self._nodes

    def get(self, path: str) -> Node | None:
        return self._nodes.get(self.canonical(path))

    def is_directory(self, path: str) -> bool:
        name = self.canonical(path)
        if name in MERGED or not name:
            return True
        node = self._nodes.get(name)
        return node is not None and stat.S_ISDIR(node.mode)

    def add(self, path: str, node: Node) -> None:
        """Put ``node`` at ``path``, making parent directories; a later node replaces an earlier file.

        Raises ``KvmpassError`` if a file would take a directory's place, or lie below a file.
        """
        name = self.canonical(path)
        old = self._nodes.get(name)
        if old == node:
            return
        if not name or name in MERGED or (old is not None and stat.S_ISDIR(old.mode)):
            if stat.S_ISDIR(node.mode):
                if name and name not in MERGED:
                    self._nodes[name] = node
                return
            raise KvmpassError(f"/{name} is a directory in the guest")
        parent = ""
        for part in name.split("/")[:-1]:
            parent = f"{parent}/{part}" if parent else part
            node_there = self._nodes.setdefault(parent, Node(stat.S_IFDIR | 0o755))
            if not stat.S_ISDIR(node_there.mode):
                raise KvmpassError(f"/{parent} is not a directory in the guest")
        self._nodes[name] = node

    def directory(self, path: str, mode: int = 0o755) -> None:
        self.add(path, Node(stat.S_IFDIR | mode))

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self.add(path, Node(stat.S_IFREG | mode, data))

    def symlink(self, path: str, target: str) -> None:
        self.add(path, Node(stat.S_IFLNK | 0o777, target.encode("utf-8", "surrogateescape")))

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self.add(path, Node(stat.S_IFCHR | mode, b"", (major, minor)))

    @property
    def unpacked_size(self) -> int:
        """Bytes of memory that the unpacked tree takes in the guest: whole pages, and an inode for each node."""
        pages = sum(-(-len(node.data) // _PAGE) * _PAGE for node in self._nodes.values() if stat.S_ISREG(node.mode))
        return pages + _INODE * len(self._nodes)

    @property
    def names(self) -> frozenset[str]:
        """Those of all nodes, as the archive has them."""
        return frozenset(self._nodes)

    def archive(self, last: str = "", later: Collection[str] = ()) -> bytes:
        """The whole tree as a newc archive: directories first, then files, at the end an empty file ``last``.

        ``later``: names of files that come after the others: what a guest needs least, should it run out of memory.
        """
        end = [(self.canonical(last), Node(stat.S_IFREG | 0o444))] if last else []

        def place(item: tuple[str, Node]) -> tuple[bool, bool, str]:
            return not stat.S_ISDIR(item[1].mode), item[0] in later, item[0]

        return newc([*sorted(self._nodes.items(), key=place), *end])


def newc(nodes: Iterable[tuple[str, Node]]) -> bytes:
    """An archive of ``nodes`` in their order, by names without a leading slash; parents must come first.

    Its size is a multiple of four: another archive may follow. Raises ``KvmpassError`` for a file of 4 GiB.
    """
    pieces: list[bytes] = []
    for inode, (name, node) in enumerate(nodes, 1):
        _append(pieces, inode, name.encode("utf-8", "surrogateescape"), node)
    _append(pieces, 0, b"TRAILER!!!", Node(0))
    return b"".join(pieces)


def _append(pieces: list[bytes], inode: int, name: bytes, node: Node) -> None:
    links = 2 if stat.S_ISDIR(node.mode) else 1
    size = len(node.data)
    if size >= 1 << 32:
        raise KvmpassError(f"/{name.decode(errors='replace')} is too large for an initramfs: {size} bytes")
    major, minor = node.device
    fields = (inode, node.mode, 0, 0, links, 0, size, 0, 0, major, minor, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name + b"\0"
    pieces += [header, bytes(-len(header) % 4), node.data, bytes(-size % 4)]
