"""A guest that speaks FUSE itself, against the real daemon, confined as for a guest. No virtual machine is needed."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from support import fuse_client as fuse
from support.fuse_client import ROOT, FuseClient, Gone

from kvmpass.errors import DaemonError, ShareError
from kvmpass.files import FileDaemon, User, caller, covers, find_daemon

SOAK = bool(os.environ.get("KVMPASS_SOAK"))
REFUSALS = {errno.EROFS, errno.EPERM, errno.EACCES, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV}
# struct fuse_setattr_in, by what is set.
MODE, OWNER, LENGTH, TIMES = 1, 6, 8, 0x30


def user() -> User:
    return caller({})


@pytest.fixture
def tree() -> Iterator[Path]:
    """A directory that everybody may write to, as far as modes go, and that belongs to the daemon's user."""
    with TemporaryDirectory(dir="/var/tmp") as made:
        tree = Path(made, "tree")
        (tree / "sub").mkdir(parents=True)
        (tree / "file").write_bytes(b"content")
        (tree / "sub/other").write_bytes(b"other")
        (tree / "link").symlink_to("/etc/shadow")
        (tree / "up").symlink_to("../..")
        os.mkfifo(tree / "fifo")
        (Path(made) / "outside").write_bytes(b"outside")
        for path in (tree.parent, tree, *tree.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o777)
            if os.geteuid() == 0:
                os.chown(path, user().uid, user().gid, follow_symlinks=False)
        yield tree


def state(directory: Path) -> dict[str, tuple[object, ...]]:
    """What a change could not hide from: contents by hash, modes, owners, times."""
    found = {}
    for path in sorted((directory, *directory.rglob("*"))):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
        found[str(path)] = (*status[:7], status.st_mtime_ns, status.st_ctime_ns, content)
    return found


def serving(source: Path, *, writable: bool = False, covered: Sequence[str] = ()) -> FileDaemon:
    if find_daemon() is None:
        pytest.skip("no virtiofsd: apt-get install qemu-system-common (Debian 12) or virtiofsd makes it run")
    try:
        return FileDaemon(source, user(), writable=writable, covers=[*covers(str(source), []), *covered])
    except ShareError as error:
        if "user namespace" in str(error):
            pytest.skip(f"{error}: a machine with user namespaces makes it run")
        raise


def setattr_(valid: int, mode: int = 0o4777) -> bytes:
    return struct.pack("<IIQQQQQQIIIIIIII", valid, 0, 0, 3, 0, 1, 1, 1, 0, 0, 0, mode, 0, 0, 0, 0)


def changes(client: FuseClient, prefix: str) -> Iterator[tuple[str, int]]:
    """Try every change that there is below ``prefix``; yield its name and its errno."""
    tree, file, sub = (client.find(f"{prefix}{name}".strip("/")) for name in ("", "/file", "/sub"))
    handle = client.open(file, os.O_RDONLY)[1]
    plain: list[tuple[str, int, int, bytes]] = [
        ("chmod", fuse.SETATTR, file, setattr_(MODE, 0o777)),
        ("set-user-ID", fuse.SETATTR, file, setattr_(MODE)),
        ("set-group-ID", fuse.SETATTR, file, setattr_(MODE, 0o2777)),
        ("chown", fuse.SETATTR, file, setattr_(OWNER)),
        ("truncate", fuse.SETATTR, file, setattr_(LENGTH)),
        ("utimes", fuse.SETATTR, tree, setattr_(TIMES)),
        ("symlink", fuse.SYMLINK, tree, b"made\0/etc/passwd\0"),
        ("mknod", fuse.MKNOD, tree, struct.pack("<IIII", stat.S_IFREG | 0o755, 0, 0, 0) + b"node\0"),
        ("mknod set-user-ID", fuse.MKNOD, tree, struct.pack("<IIII", stat.S_IFREG | 0o4755, 0, 0, 0) + b"suid\0"),
        ("device", fuse.MKNOD, tree, struct.pack("<IIII", stat.S_IFBLK | 0o666, 0x801, 0, 0) + b"disk\0"),
        ("mkdir", fuse.MKDIR, tree, struct.pack("<II", 0o777, 0) + b"directory\0"),
        ("create", fuse.CREATE, tree, struct.pack("<IIII", os.O_RDWR | os.O_CREAT, 0o755, 0, 0) + b"created\0"),
        ("create set-ID", fuse.CREATE, tree, struct.pack("<IIII", os.O_RDWR | os.O_CREAT, 0o6755, 0, 0) + b"sid\0"),
        ("link", fuse.LINK, tree, struct.pack("<Q", file) + b"hard\0"),
        ("rename", fuse.RENAME, tree, struct.pack("<Q", sub) + b"file\0file\0"),
        ("exchange", fuse.RENAME2, tree, struct.pack("<QII", sub, 2, 0) + b"file\0other\0"),
        ("unlink", fuse.UNLINK, tree, b"file\0"),
        ("rmdir", fuse.RMDIR, tree, b"sub\0"),
        ("setxattr", fuse.SETXATTR, file, struct.pack("<II", 1, 0) + b"user.test\0x"),
        ("capability", fuse.SETXATTR, file, struct.pack("<II", 20, 0) + b"security.capability\0" + bytes(20)),
        ("removexattr", fuse.REMOVEXATTR, file, b"user.test\0"),
        ("write to a reader's handle", fuse.WRITE, file, struct.pack("<QQIIQII", handle, 0, 1, 0, 0, 1, 0) + b"x"),
        ("fallocate", fuse.FALLOCATE, file, struct.pack("<QQQII", handle, 0, 100000, 0, 0)),
        ("ioctl", fuse.IOCTL, file, struct.pack("<QIIQII", handle, 0, 0x40086602, 0, 8, 0) + bytes(8)),
    ]
    for name, opcode, node, payload in plain:
        yield name, client.request(opcode, node, payload)[0]
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
        yield f"open {flags:#o}", client.open(file, flags)[0]


@pytest.mark.parametrize("whole", [True, False], ids=["the host's root", "a share"])
def test_nothing_can_be_changed(tree: Path, whole: bool) -> None:
    before = state(tree.parent)
    with serving(Path("/") if whole else tree) as daemon, FuseClient(daemon.connection) as client:
        client.init()
        if not whole:  # the tree is the file system's root, which no lookup finds
            client.find = lambda path, start=ROOT, find=client.find: find(path) if path else ROOT  # type: ignore
        tried = dict(changes(client, str(tree) if whole else ""))
        assert len(tried) == 28
        assert not {name: os.strerror(error) for name, error in tried.items() if error not in REFUSALS}
        assert tried["create"] == tried["unlink"] == tried["chmod"] == tried[f"open {os.O_RDWR:#o}"] == errno.EROFS
        assert daemon.running
    assert state(tree.parent) == before


def test_the_same_changes_are_made_where_writing_is_allowed(tree: Path) -> None:
    """Else the refusals would prove nothing. No device, no set-user-ID, and what is outside stays as it is."""
    outside = state(tree.parent / "outside")
    with serving(tree, writable=True) as daemon, FuseClient(daemon.connection) as client:
        client.init()
        client.find = lambda path, start=ROOT, find=client.find: find(path) if path else ROOT  # type: ignore
        tried = dict(changes(client, ""))
    for name in ("chmod", "truncate", "utimes", "symlink", "mknod", "mkdir", "create", "link", "rename"):
        assert tried[name] == 0, (name, os.strerror(tried[name]))
    for name in ("device", "set-user-ID", "set-group-ID", "mknod set-user-ID", "create set-ID"):
        assert tried[name] == errno.EPERM, (name, os.strerror(tried[name]))
    assert not [path for path in tree.rglob("*") if path.lstat().st_mode & 0o6000]
    assert (tree / "created").lstat().st_uid == user().uid
    assert state(tree.parent / "outside") == outside


def test_what_the_user_may_not_read_stays_unread(tree: Path) -> None:
    """Nothing of the kernel's, no other user's files, nothing of the daemon itself."""
    with serving(Path("/")) as daemon, FuseClient(daemon.connection) as client:
        client.init()
        assert client.content(f"{tree}/file".lstrip("/")) == b"content"
        assert client.content("etc/passwd").startswith(b"root:")
        for path in ("proc", "sys", "dev", "run"):
            assert client.names(path) <= {".", ".."}, path
        for path in ("proc/self", "proc/sys/kernel/core_pattern", "dev/mem", "run/systemd"):
            with pytest.raises(FileNotFoundError):
                client.find(path)
        with pytest.raises(PermissionError):
            client.content("etc/shadow")


def test_a_cover_is_empty_whatever_it_is_on(tree: Path) -> None:
    """Also a file that a kernel's file system is mounted on, as that of a network namespace is."""
    hidden = ["/file", "/sub", "/fifo", "/missing"]
    with serving(tree, writable=True, covered=hidden) as daemon, FuseClient(daemon.connection) as client:
        client.init()
        client.find = lambda path, start=ROOT, find=client.find: find(path) if path else ROOT  # type: ignore
        assert (client.content("file"), client.content("fifo")) == (b"", b"")
        assert client.names("sub") <= {".", ".."}
        for name in ("file", "fifo"):
            assert client.open(client.find(name), os.O_RDWR)[0] == errno.EROFS
    assert (tree / "file").read_bytes() == b"content"


def test_an_overlay_can_open_what_belongs_to_others() -> None:
    """It does so with O_NOATIME, which the kernel refuses to all but a file's owner."""
    with serving(Path("/")) as daemon, FuseClient(daemon.connection) as client:
        client.init()
        node = client.find("etc/passwd")
        error, handle = client.open(node, os.O_RDONLY | os.O_NOATIME)
        assert error == 0
        assert client.read(node, handle)[1].startswith(b"root:")


def test_no_mount_point_is_announced() -> None:
    """An overlay would not enter it (FUSE_ATTR_SUBMOUNT)."""
    with serving(Path("/")) as daemon, FuseClient(daemon.connection) as client:
        client.init(fuse.SUBMOUNTS)
        for name in ("proc", "sys", "usr"):
            error, data = client.request(fuse.LOOKUP, ROOT, name.encode() + b"\0")
            assert (error, struct.unpack_from("<I", data, 124)[0] & 1) == (0, 0), name


def test_nothing_leads_out_of_a_share(tree: Path) -> None:
    inside = {path.lstat().st_ino for path in (tree, *tree.rglob("*"))}
    with serving(tree) as daemon, FuseClient(daemon.connection) as client:
        client.init()
        for name in ("..", "../outside", "/etc/passwd", "sub/../../outside", "", "link/", "sub/other"):
            error, node = client.lookup(ROOT, name)
            if not error:  # ".." of the root is the root
                attributes = client.request(fuse.GETATTR, node, bytes(16))[1]
                assert struct.unpack_from("<Q", attributes, 16)[0] in inside, name
        sub = client.find("sub")
        above = client.find("..", sub)
        assert client.lookup(above, "outside")[0] == errno.ENOENT
        assert client.lookup(client.find("..", above), "outside")[0] == errno.ENOENT
        for name in ("link", "up", "fifo"):  # O_NOFOLLOW is the client's to leave out
            for flags in (os.O_RDONLY, os.O_RDONLY | os.O_NONBLOCK, os.O_PATH, os.O_RDONLY | os.O_NOFOLLOW):
                error, handle = client.open(client.find(name), flags)
                assert error or client.read(client.find(name), handle)[0], (name, flags)
        for node in (0, 1 << 20, 1 << 40, (1 << 64) - 1):
            assert client.request(fuse.GETATTR, node, bytes(16))[0]
            assert client.lookup(node, "file")[0]
            assert client.open(node, os.O_RDONLY)[0]
        for handle in (0, 5, 1 << 33, (1 << 64) - 1):
            assert client.read(client.find("file"), handle)[0] or handle == 0
        assert client.content("file") == b"content"


def test_a_file_that_is_replaced_by_a_symlink_is_not_followed(tree: Path) -> None:
    """Names are looked up by the daemon without following; what has been looked up stays what it was."""
    with serving(tree) as daemon, FuseClient(daemon.connection) as client:
        client.init()
        node = client.find("file")
        (tree / "file").unlink()
        (tree / "file").symlink_to("/etc/passwd")
        assert client.read(node, client.open(node, os.O_RDONLY)[1])[1] == b"content"
        with pytest.raises(OSError, match=r"ymbolic link|descriptor"):
            client.content("file")


def flood(client: FuseClient, source: random.Random) -> None:
    """One round of garbage: a message, or a ring, that no driver would send."""
    data = source.randbytes(source.choice((0, 1, 39, 40, 41, 80, 4096)))
    if source.random() < 0.5 and len(data) >= 40:  # a valid header, and garbage behind it
        data = struct.pack("<IIQQIIII", len(data), source.randrange(60), 1, ROOT, 0, 0, 1, 0) + data[40:]
    kind = source.randrange(6)
    if kind < 3:
        client.exchange(data, source.choice((0, 1, 15, 16, 100, 8192)), source.randrange(2))
        return
    ring = source.randrange(2)
    for number in range(4):
        address = source.choice((0, 0x10000, fuse.SIZE - 1, fuse.SIZE, 1 << 40, (1 << 64) - 1))
        size = source.choice((0, 1, 40, 1 << 20, (1 << 32) - 1))
        client.descriptor(ring, number, address, size, source.randrange(8), source.choice((0, 1, 2, 3, 15, 65535)))
    client.offer(ring, source.choice((0, 1, 15, 16, 65535)), source.choice((None, None, source.randrange(65536))))
    time.sleep(0.01)


@pytest.mark.parametrize("seed", range(200 if SOAK else 12))
def test_garbage_ends_cleanly(tree: Path, seed: int) -> None:
    """It may end the daemon, and nothing else; then everything of it is gone."""
    before, source = state(tree.parent), random.Random(seed)
    with serving(tree) as daemon:
        first = daemon._process.pid
        with FuseClient(daemon.connection, seconds=1.0) as client:
            if seed % 3:
                client.init()
            try:
                for _ in range(20):
                    flood(client, source)
            except (Gone, DaemonError):
                pass
    assert not Path(f"/proc/{first}").exists()
    assert state(tree.parent) == before


def test_many_nodes_are_no_more_than_its_descriptors(tree: Path) -> None:
    """A guest that never forgets one reaches the limit, not the host's."""
    limits = Path("/proc/self/limits").read_text()
    assert "open files" in limits
    with serving(tree) as daemon, FuseClient(daemon.connection) as client:
        client.init()
        pid = program(daemon)
        resource_limit(pid, 64)
        errors = {client.lookup(ROOT, "file")[0] for _ in range(100)}
        assert errors == {0}, "one file is one descriptor"
        (tree / "many").mkdir()
        for number in range(100):
            (tree / "many" / str(number)).touch()
        many = client.find("many")
        errors = {client.lookup(many, str(number))[0] for number in range(100)}
        assert errors - {0} <= {errno.EMFILE, errno.ENFILE}
        assert errors - {0}
        assert daemon.running


def program(daemon: FileDaemon) -> int:
    """The process that serves."""
    found = [daemon._process.pid]
    for process in found:
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found[-1]


def resource_limit(pid: int, most: int) -> None:
    import resource

    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))
