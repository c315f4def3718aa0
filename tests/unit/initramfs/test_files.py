"""Copied files: warnings and errors, and the memory that a guest needs for them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvmpass.boot.linux import KernelImage
from kvmpass.errors import KvmpassError, NotEnoughMemory
from kvmpass.guest import GuestImage, GuestSpec
from kvmpass.initramfs import init
from kvmpass.initramfs.cpio import Tree
from kvmpass.initramfs.files import copy_into, size_of, split_spec
from kvmpass.layout import MIB
from kvmpass.machine import Machine


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A directory with files that cannot be copied, and one that can."""
    directory = tmp_path / "tree"
    directory.mkdir()
    (directory / "good").write_text("good")
    (directory / "script").write_text("#!/no/such/interpreter\n")
    (directory / "binary-script").write_bytes(b"#!\x1b[31m\xff\x07" + b"x" * 200 + b"\n")
    (directory / "broken").write_bytes(b"\x7fELF\x02\x01".ljust(18, b"\xff") + b"\x3e\0" + b"\xff" * 100)
    for name in ("script", "binary-script", "broken"):
        (directory / name).chmod(0o755)
    os.mkfifo(directory / "fifo")
    return directory


def test_the_size_of_what_is_copied_is_known_before(odd: Path) -> None:
    (odd / "below").mkdir()
    (odd / "below" / "large").write_bytes(bytes(5000))
    (odd / "link").symlink_to("below/large")
    tree = Tree()
    copy_into(tree, odd, "/tree", lambda text: None)
    assert size_of(odd / "below") == size_of(odd / "link") == 5000
    found = [file for file in odd.rglob("*") if file.is_file() and file.name != "link"]
    assert size_of(odd) == sum(file.stat().st_size for file in found)
    assert size_of(odd / "absent") == 0
    spec = GuestSpec(copy=(f"{odd}/below:/a", f"{odd}/good:/b", f"{odd}/absent:/c"))
    assert spec.copied_size == 2 * (5000 + 4)
    assert GuestSpec(initrd=odd / "below" / "large").copied_size == 5000
    assert GuestSpec(initrd=odd / "below" / "large", session=True).copied_size == 2 * 5000, "behind the agent's"


def test_files_in_a_directory_that_cannot_be_copied_are_warnings(odd: Path) -> None:
    tree, warnings = Tree(), list[str]()
    copy_into(tree, odd, "/tree", warnings.append)
    assert tree.get("/tree/good") is not None
    assert len(warnings) == 4
    text = "\n".join(warnings)
    assert "is run by /no/such/interpreter, not on this host" in text
    assert "broken is a broken ELF file" in text
    assert "fifo is neither a file, a directory nor a symlink" in text
    assert "/tree/fifo" not in tree
    assert all(line.isprintable() for line in warnings), "no bytes of the file"
    assert max(map(len, warnings)) < 200 + len(str(odd))


@pytest.mark.parametrize("name", ["script", "broken", "fifo"])
def test_files_that_cannot_be_copied_are_refused(odd: Path, name: str) -> None:
    with pytest.raises(KvmpassError, match=name):
        copy_into(Tree(), odd / name, f"/{name}")


def tree_of(directory: Path) -> dict[str, str]:
    """Mode, and content or target, of all files in a directory, by relative path."""
    found = {}
    for path in sorted(directory.rglob("*")):
        content = str(path.readlink()) if path.is_symlink() else "" if path.is_dir() else path.read_text()
        found[str(path.relative_to(directory))] = f"{path.lstat().st_mode:o} {content}"
    return found


@pytest.mark.parametrize(
    ("source", "target"),
    [("tree", "/"), ("tree/", "/"), ("tree", "/dir/"), ("tree/.", "/"), ("tree/.", "/dir/"), ("tree/new", "/dir/")],
)
def test_a_slash_at_the_end_copies_as_cp_does(tmp_path: Path, source: str, target: str) -> None:
    """As ``cp -r`` does, into a directory that exists and keeps its mode."""
    (tmp_path / "tree/dir").mkdir(parents=True)
    (tmp_path / "tree/dir").chmod(0o700)
    (tmp_path / "tree/dir/file").write_text("below")
    (tmp_path / "tree/link").symlink_to("dir/file")
    (tmp_path / "tree/new").write_text("new")
    (tmp_path / "root/dir").mkdir(parents=True)
    subprocess.run(["cp", "-r", f"{tmp_path}/{source}", f"{tmp_path}/root{target}"], check=True)
    guest = Tree()
    guest.directory("/dir", 0o755)
    before = guest.names - {"dir"}
    copy_into(guest, *split_spec(f"{tmp_path}/{source}:{target}"))
    nodes = {name: guest.get(f"/{name}") for name in guest.names - before}
    made = {name: f"{node.mode:o} {node.data.decode()}" for name, node in nodes.items() if node is not None}
    assert made == tree_of(tmp_path / "root")


def test_a_file_that_would_replace_a_directory_is_refused_with_a_hint(odd: Path) -> None:
    tree = Tree()
    tree.directory("/root")
    for target in ("/root", "/", "/lib"):
        with pytest.raises(KvmpassError, match="is a directory in the guest") as refused:
            copy_into(tree, odd / "good", target)
        assert refused.value.__notes__[0].endswith(f"{odd}/good:{target.rstrip('/')}/")


def test_a_merged_root_is_copied(tmp_path: Path) -> None:
    """With ``lib`` a symlink to ``usr/lib``, as in a distribution; another symlink is left out with a warning."""
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/file").write_text("x")
    (tmp_path / "lib").symlink_to("usr/lib")
    tree, warnings = Tree(), list[str]()
    copy_into(tree, tmp_path, "/", warnings.append)
    assert tree.get("/lib/file") is not None and not warnings
    (tmp_path / "bin").symlink_to("elsewhere")
    copy_into(tree, tmp_path, "/", warnings.append)
    assert warnings == ["--copy: /bin is a directory in the guest"]


def test_the_size_of_a_tree_is_in_pages() -> None:
    tree = Tree()
    empty = tree.unpacked_size
    tree.file("/one", b"x")
    tree.file("/two", b"x" * 4097)
    assert tree.unpacked_size - empty == 3 * 4096 + 2 * 1024


def names(archive: bytes) -> list[str]:
    found, at = [], 0
    while True:
        size, length = int(archive[at + 54 : at + 62], 16), int(archive[at + 94 : at + 102], 16)
        name = archive[at + 110 : at + 110 + length - 1].decode()
        if name == "TRAILER!!!":
            return found
        found.append(name)
        at += 110 + length
        at += -at % 4 + size
        at += -at % 4


def test_the_last_file_marks_a_complete_archive() -> None:
    tree = Tree()
    tree.file("/zzz/last", b"x")
    tree.directory(init.DIRECTORY)
    assert names(tree.archive(init.COMPLETE))[-2:] == ["zzz/last", init.COMPLETE[1:]]
    script = init.SCRIPT.read_text()
    assert f"[ -e {init.COMPLETE} ] || die" in script
    end = '|| open_channels\n    [ -z "$port" ] || become_agent -\n    finish\n}'
    assert "\ndie() {" in script and end in script, "a failure is reported"


def test_copied_files_are_last() -> None:
    """So a guest that runs out of memory while it unpacks can report it."""
    tree = Tree()
    tree.file("/usr/bin/busybox", b"x")
    before = tree.names
    tree.file("/data/large", b"x")
    found = names(tree.archive(init.COMPLETE, tree.names - before))
    assert found[-3:] == ["usr/bin/busybox", "data/large", "kvmpass/complete"]
    assert found.index("data") < found.index("usr/bin/busybox"), "directories come first"


class Memory:
    def __init__(self, size: int) -> None:
        self.memory = SimpleNamespace(ram_size=size)
        self.loaded: list[Any] = []

    def load_linux(self, *what: Any) -> None:
        self.loaded.append(what)


def test_files_that_do_not_fit_are_refused_with_the_size_that_does() -> None:
    kernel = cast(KernelImage, SimpleNamespace(init_size=40 * MIB, preferred=16 * MIB))
    image = GuestImage(kernel, bytes(60 * MIB), "", unpacked=60 * MIB)
    machine = Memory(256 * MIB)
    image.load(cast(Machine, machine))
    assert len(machine.loaded) == 1
    for size in (64, 192, 208):
        with pytest.raises(NotEnoughMemory, match=f"60 MiB unpacked.*: {size} MiB are too little") as refused:
            image.load(cast(Machine, Memory(size * MIB)))
        assert "--memory 256M" in refused.value.__notes__[0]
    unknown = GuestImage(kernel, bytes(60 * MIB), "")  # an initramfs of the user's own
    unknown.load(cast(Machine, machine))
    assert len(machine.loaded) == 2


@pytest.mark.parametrize(("initrd", "unpacked"), [(2 * MIB, 3 * MIB), (2 * MIB, 0)])
def test_a_kernel_that_does_not_fit_is_refused_with_the_size_that_does(initrd: int, unpacked: int) -> None:
    """It needs ``init_size`` bytes from its preferred address on."""
    kernel = cast(KernelImage, SimpleNamespace(init_size=56 * MIB, preferred=16 * MIB))
    image = GuestImage(kernel, bytes(initrd), "", unpacked=unpacked)
    assert image.least_memory == 80 * MIB
    for size in (2, 64, 79):
        with pytest.raises(NotEnoughMemory, match=f"needs 80 MiB to start: {size} MiB are too little") as refused:
            image.load(cast(Machine, Memory(size * MIB)))
        assert refused.value.__notes__ == ["give the guest 112 MiB (--memory 112M)"]
    image.load(cast(Machine, Memory(80 * MIB)))


def program(interpreter: bytes) -> bytes:
    """An ELF file with a dynamic linker only."""
    header = bytearray(64 + 56)
    header[:6], header[18:20] = b"\x7fELF\x02\x01", b"\x3e\x00"
    header[0x20:0x28], header[0x36:0x3A] = (64).to_bytes(8, "little"), (56 | 1 << 16).to_bytes(4, "little")
    header[64:68] = (3).to_bytes(4, "little")  # PT_INTERP
    header[72:80], header[96:104] = (120).to_bytes(8, "little"), (len(interpreter) + 1).to_bytes(8, "little")
    return bytes(header) + interpreter + b"\0"


@pytest.mark.parametrize(
    ("interpreter", "words"),
    [
        (b"", "one without a name"),
        (b"ld.so", "ld.so"),
        (b"/no/ld.so", "/no/ld.so"),
        (b"\x1b[2J\xff" + b"y" * 500, "?[2J?"),
    ],
)
def test_missing_dynamic_linkers(tmp_path: Path, interpreter: bytes, words: str) -> None:
    file = tmp_path / "program"
    file.write_bytes(program(interpreter))
    file.chmod(0o755)
    with pytest.raises(KvmpassError) as refused:
        copy_into(Tree(), file, "/program")
    text = str(refused.value)
    assert f"needs the dynamic linker {words}" in text
    assert text.isprintable() and len(text) < 250 + len(str(file))
