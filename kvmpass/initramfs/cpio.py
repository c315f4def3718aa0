"""A root file system in memory, and the cpio archive that the kernel unpacks.

The format is "newc" (Documentation/driver-api/early-userspace/buffer-format.rst).
"""

from __future__ import annotations

import itertools
import stat
from collections.abc import Collection, Iterable
from typing import NamedTuple

from kvmpass.errors import KvmpassError

_HEADER = b"070701" + b"%08X" * 13
_PAGE = 4096
_INODE = 1024  # bytes of memory, its name and directory entry included
# Merged /usr, as in current distributions, so that /lib/x and /usr/lib/x are the same file.
MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


class Node(NamedTuple):  # a tree has hundreds
    """A file."""

    mode: int
    """Type and mode, as in ``st_mode``."""
    data: bytes = b""
    """A regular file's content, or a symlink's target."""
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device node."""


class Tree:
    """Paths and their nodes. All are owned by root, with time 0: equal input gives equal bytes.

    ``merged``: whether it has the directories of a merged /usr, and the symlinks to them.
    """

    def __init__(self, *, merged: bool = True) -> None:
        self._nodes: dict[str, Node] = {}
        for name in MERGED if merged else ():
            self.directory(f"/usr/{name}")
            self._nodes[name] = Node(stat.S_IFLNK | 0o777, f"usr/{name}".encode())

    @staticmethod
    def canonical(path: str) -> str:
        """Return the archive's name of an absolute path: no leading slash, in the merged /usr."""
        parts = path.split("/")
        if parts[0] or len(parts) < 2 or ".." in parts:
            raise KvmpassError(f"{path!r} is not an absolute path in the guest")
        parts = [part for part in parts if part and part != "."]
        if len(parts) > 1 and parts[0] in MERGED:
            parts.insert(0, "usr")
        return "/".join(parts)

    def __contains__(self, path: str) -> bool:
        return self.canonical(path) in self._nodes

    def get(self, path: str) -> Node | None:
        """Return the node at ``path``."""
        return self._nodes.get(self.canonical(path))

    def is_directory(self, path: str) -> bool:
        """Return whether ``path`` is a directory, or a symlink of the merged /usr."""
        return self._is_directory(self.canonical(path))

    def _is_directory(self, name: str) -> bool:
        node = self._nodes.get(name)
        return name in MERGED or not name or (node is not None and stat.S_ISDIR(node.mode))

    def add(self, path: str, node: Node) -> None:
        """Add ``node`` at ``path``, with parent directories; it replaces a file.

        Raises ``KvmpassError`` if it would replace a directory by a file, or lie below a file.
        """
        name = self.canonical(path)
        if self._is_directory(name):
            if name and name not in MERGED and stat.S_ISDIR(node.mode):
                self._nodes[name] = node
            elif not stat.S_ISDIR(node.mode) and node != self._nodes.get(name):
                raise KvmpassError(f"/{name} is a directory in the guest")
            return
        parents = name.split("/")[:-1]
        if not self._is_directory("/".join(parents)):
            for parent in itertools.accumulate(parents, "{}/{}".format):
                if not stat.S_ISDIR(self._nodes.setdefault(parent, Node(stat.S_IFDIR | 0o755)).mode):
                    raise KvmpassError(f"/{parent} is not a directory in the guest")
        self._nodes[name] = node

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory."""
        self.add(path, Node(stat.S_IFDIR | mode))

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self.add(path, Node(stat.S_IFREG | mode, data))

    def symlink(self, path: str, target: str) -> None:
        """Add a symlink."""
        self.add(path, Node(stat.S_IFLNK | 0o777, target.encode("utf-8", "surrogateescape")))

    def symlinks(self, directory: str, names: Iterable[str], target: str) -> None:
        """Add symlinks to one target, of these names, in ``directory``. Raises as ``add``."""
        node = Node(stat.S_IFLNK | 0o777, target.encode("utf-8", "surrogateescape"))
        self.directory(directory)
        place = self.canonical(f"{directory}/_")[:-1]
        for name in names:
            if "/" in name or not name.strip(".") or self._is_directory(place + name):
                self.add(f"{directory}/{name}", node)
            else:
                self._nodes[place + name] = node

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device node."""
        self.add(path, Node(stat.S_IFCHR | mode, b"", (major, minor)))

    @property
    def unpacked_size(self) -> int:
        """Bytes of the guest's memory that the unpacked tree takes: whole pages, and an inode for each node."""
        pages = sum(-(-len(node.data) // _PAGE) * _PAGE for node in self._nodes.values() if stat.S_ISREG(node.mode))
        return pages + _INODE * len(self._nodes)

    @property
    def names(self) -> frozenset[str]:
        """The names of all nodes, as in the archive."""
        return frozenset(self._nodes)

    def archive(self, last: str = "", later: Collection[str] = ()) -> bytes:
        """Return a newc archive: directories, files, the files named in ``later``, an empty file ``last``.

        A guest that runs out of memory unpacks what comes first.
        """
        end = [(self.canonical(last), Node(stat.S_IFREG | 0o444))] if last else []

        def place(item: tuple[str, Node]) -> tuple[bool, bool, str]:
            return not stat.S_ISDIR(item[1].mode), item[0] in later, item[0]

        return newc([*sorted(self._nodes.items(), key=place), *end])


def newc(nodes: Iterable[tuple[str, Node]]) -> bytes:
    """Return an archive of ``nodes`` in their order, named without a leading slash; parents must come first.

    Its size is a multiple of four: another archive may follow. Raises ``KvmpassError`` for a file of 4 GiB or more.
    """
    pieces: list[bytes] = []
    for inode, (name, node) in enumerate([*nodes, ("TRAILER!!!", Node(0))], 1):
        size = len(node.data)
        if size >= 1 << 32:
            raise KvmpassError(f"/{name} is too large for an initramfs: {size} bytes")
        encoded = name.encode("utf-8", "surrogateescape") + b"\0"
        links = 2 if stat.S_ISDIR(node.mode) else 1
        fields = (inode, node.mode, 0, 0, links, 0, size, 0, 0, *node.device, len(encoded), 0)
        header = _HEADER % fields + encoded
        pieces += [header, bytes(-len(header) % 4), node.data, bytes(-size % 4)]
    return b"".join(pieces)
