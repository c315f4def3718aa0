"""Files that a run keeps for later ones: only what is whole and the user's own is used."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
import threading
import zlib
from contextlib import closing
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from kvmpass import _cache
from kvmpass._cache import KeptFile, KeptFiles, cache_root

KEPT = KeptFiles("kept", most_files=3, most_bytes=100_000)
CONTENT = memoryview(bytes(range(256)) * 64)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMPASS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pieces_of(file: KeptFile) -> bytes:
    return b"".join(bytes(piece) for piece in file.pieces())


def read(kept: KeptFiles, name: str) -> bytes | None:
    """The content of a file; None if it is not used or not what was written."""
    file = kept.open(name)
    if file is None:
        return None
    try:
        return pieces_of(file)
    except OSError as error:
        if error.errno != errno.EBADMSG:
            raise
        return None


def descriptors() -> list[str]:
    """What is open once the threads that read have ended."""
    for thread in threading.enumerate():
        if thread.name == "read":
            thread.join(30)
            assert not thread.is_alive()
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "kept").iterdir())


def test_what_is_kept_is_read(root: Path) -> None:
    assert read(KEPT, "a") is None
    assert not root.exists(), "reading makes nothing"
    KEPT.keep("a", CONTENT)
    assert read(KEPT, "a") == CONTENT
    KEPT.keep("a", CONTENT[:100])
    assert read(KEPT, "a") == CONTENT[:100]
    assert stat.S_IMODE((root / "kept").stat().st_mode) == 0o700
    assert stat.S_IMODE((root / "kept/a").stat().st_mode) == 0o600


def test_an_open_file_is_still_read_when_it_is_replaced(root: Path) -> None:
    KEPT.keep("a", CONTENT)
    file = KEPT.open("a")
    KEPT.keep("a", memoryview(b"other"))
    KEPT.remove("a")
    KEPT.remove("a")
    assert names(root) == []
    assert file is not None and pieces_of(file) == CONTENT


def test_a_file_that_changes_while_it_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapping of a file that became shorter would be a SIGBUS."""
    size = 5 << 20
    kept, content, path = KeptFiles("kept", 1, 1 << 24), memoryview(os.urandom(size)), root / "kept/large"

    def other(at: int) -> None:
        with path.open("r+b") as written:
            written.seek(at)
            written.write(b"other")

    for change in (
        lambda: os.truncate(path, 64 + (3 << 20)),
        lambda: os.truncate(path, 100),
        lambda: os.truncate(path, size + 63),
        lambda: other(64 + (4 << 20)),
    ):
        kept.keep("large", content)
        file = kept.open("large")
        assert file is not None
        pieces, found = file.pieces(), 0
        with pytest.raises(OSError, match="is not what was written") as refused:
            for piece in pieces:
                found += len(piece)
                change()
        assert refused.value.errno == errno.EBADMSG and found < size
    kept.keep("large", content)

    class Unreadable(FileIO):
        def readinto(self, buffer: Any, /) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(_cache, "FileIO", Unreadable)
        with pytest.raises(OSError, match="Input/output error"):
            read(kept, "large")
    assert read(kept, "large") == content


def test_a_reader_ends_with_who_asks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first piece, before it, at a signal or at a limit of threads: the file is closed."""
    kept = KeptFiles("kept", 1, 1 << 24)
    kept.keep("large", memoryview(bytes(5 << 20)))
    before = descriptors()
    for begun in (True, False):
        file = kept.open("large")
        assert file is not None
        pieces = file.pieces()
        if begun:
            next(pieces)
        pieces.close()
        file.close()
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        file = kept.open("large")
        assert file is not None
        with closing(file), pytest.raises(KeyboardInterrupt):
            next(file.pieces())
    assert descriptors() == before

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    file = kept.open("large")
    assert file is not None
    with closing(file), pytest.raises(OSError, match="can't start new thread"):
        next(file.pieces())
    assert descriptors() == before


def test_torn_files_are_not_used(root: Path) -> None:
    KEPT.keep("a", CONTENT)
    file = root / "kept/a"
    whole = file.read_bytes()
    assert len(whole) == 64 + len(CONTENT) and whole[64:] == CONTENT
    for torn in (
        b"",
        whole[:64],
        whole[:-1],
        whole + b"\0",
        b"x" + whole[1:],
        whole[:-1] + b"x",
        whole[:30] + bytes(len(whole) - 30),
        whole[:24] + bytes([whole[24] ^ 1]) + whole[25:],
    ):
        file.write_bytes(torn)
        assert read(KEPT, "a") is None
    file.write_bytes(whole)
    assert read(KEPT, "a") == CONTENT


def test_files_of_others_are_not_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KEPT.keep("a", CONTENT)
    directory, file = root / "kept", root / "kept/a"
    for path, mode in ((file, 0o620), (file, 0o602), (directory, 0o770), (directory, 0o703)):
        usual = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode)
        assert read(KEPT, "a") is None, (path, mode)
        path.chmod(usual)
        assert read(KEPT, "a") == CONTENT
    file.rename(root / "elsewhere")
    file.symlink_to(root / "elsewhere")
    assert read(KEPT, "a") is None
    file.unlink()
    os.mkfifo(file)
    assert read(KEPT, "a") is None
    file.unlink()
    file.mkdir()
    before = descriptors()
    assert read(KEPT, "a") is None
    assert descriptors() == before
    file.rmdir()
    (root / "elsewhere").rename(file)
    assert read(KEPT, "a") == CONTENT
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert read(KEPT, "a") is None
    KEPT.keep("b", CONTENT)
    assert names(root) == ["a"]


def test_the_home_of_another_user_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    usual, others = Path.stat, tmp_path.stat()

    def owned_by(uid: int, mode: int) -> None:
        made = os.stat_result((stat.S_IFDIR | mode, *others[1:4], uid, *others[5:10]))
        monkeypatch.setattr(Path, "stat", lambda path, **more: made if path == tmp_path else usual(path, **more))

    for uid, mode in ((own + 2, 0o755), (own + 2, 0o1777), (0, 0o777), (0, 0o775)):
        owned_by(uid, mode)
        KEPT.keep("a", CONTENT)
        assert not os.listdir(tmp_path)  # noqa: PTH208 - names, and no Path.stat
        assert KEPT.obstacle().endswith("is another user's, or all can replace what is in it")


@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_below_a_directory_of_root(mode: int) -> None:
    """As in /tmp or a container: an ordinary user's cache is made there."""
    if os.geteuid():
        pytest.skip("root makes it run: it becomes another user")
    program = f"""if True:
        import fcntl, mmap, os, queue, threading, zlib
        from kvmpass._cache import KeptFiles
        os.setgid(65534), os.setuid(65534)
        kept = KeptFiles("kept", 3, 1 << 24)
        kept.keep("a", memoryview(b"content"))
        file = kept.open("a")
        found = file and b"".join(map(bytes, file.pieces()))
        assert (found, not kept.obstacle()) == ((b"content", True) if {mode == 0o1777} else (None, False)), found"""
    with tempfile.TemporaryDirectory() as above:  # another user reaches it, which pytest's own directories are not
        Path(above).chmod(mode)
        environment = {**os.environ, "KVMPASS_CACHE": f"{above}/cache"}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.parametrize("step", ["flock", "rename", "mkdir", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_cache_that_cannot_be_written(root: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int) -> None:
    def fails(*arguments: object, **more: object) -> int:
        raise OSError(code, os.strerror(code))

    if step != "mkdir":
        (root / "kept").mkdir(mode=0o700, parents=True)
    with monkeypatch.context() as patch:
        patch.setattr({"flock": fcntl, "mkdir": Path}.get(step, os), step, fails)
        KEPT.keep("a", CONTENT)
        if step == "open":
            assert read(KEPT, "a") is None
    assert step == "mkdir" or names(root) == []
    KEPT.keep("a", CONTENT)
    assert read(KEPT, "a") == CONTENT


def test_a_disk_that_is_full_half_way(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fdopen = os.fdopen

    def full(fd: int, mode: str) -> object:
        os.dup2(os.open("/dev/full", os.O_WRONLY), fd)
        return fdopen(fd, mode)

    monkeypatch.setattr(os, "fdopen", full)
    KEPT.keep("a", CONTENT)
    assert names(root) == []


def test_without_a_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.write_text("a file")
    KEPT.keep("a", CONTENT)
    assert read(KEPT, "a") is None
    monkeypatch.delenv("KVMPASS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    KEPT.keep("a", CONTENT)
    assert read(KEPT, "a") is None


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPASS_CACHE", "here")
    assert cache_root() == Path.cwd() / "here"
    before = Path.cwd()
    monkeypatch.chdir("/")  # as a guest in the background does
    assert cache_root() == before / "here"
    monkeypatch.delenv("KVMPASS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root() == Path("/x/kvmpass")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_root() == Path("/home/me/.cache/kvmpass")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root() == Path("/home/me/.cache/kvmpass")


def test_the_least_recently_used_are_removed(root: Path) -> None:
    for number, name in enumerate("abc"):
        KEPT.keep(name, CONTENT)
        os.utime(root / "kept" / name, (1000 + number, 1000 + number))
    assert read(KEPT, "a") == CONTENT  # now it is the latest
    KEPT.keep("d", CONTENT)
    assert names(root) == ["a", "c", "d"]
    KEPT.keep("large", memoryview(bytes(100_000 - 64)))
    assert names(root) == ["large"], "with it there would be too many bytes"
    KEPT.keep("larger", memoryview(bytes(100_001)))
    assert names(root) == ["large"]


def test_what_a_killed_writer_has_left_is_removed(root: Path) -> None:
    KEPT.keep("a", CONTENT)
    (root / "kept/.b.123").write_bytes(b"half")
    descriptor = os.open(root / "kept", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    KEPT.keep("d", CONTENT)
    assert names(root) == [".b.123", "a"], "while another one is at work"
    os.close(descriptor)
    KEPT.keep("e", CONTENT)
    assert names(root) == ["a", "e"]


def test_a_process_that_ends_while_it_writes(root: Path) -> None:
    """It does not wait for the thread; what that leaves is removed by the next writer."""
    program = """if True:
        import os, threading, time
        from kvmpass._cache import KeptFile, KeptFiles, cache_root
        os.rename = lambda *arguments, **options: time.sleep(1000)  # however fast it writes
        keep = KeptFiles("kept", 3, 1 << 28).keep
        threading.Thread(target=keep, args=("a", memoryview(bytes(1 << 26))), daemon=True).start()
        while not (cache_root() / "kept").exists() or not any((cache_root() / "kept").iterdir()):
            time.sleep(0)"""
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
    [left] = names(root)
    KEPT.keep("b", CONTENT)
    assert names(root) == ["b"], left
    assert read(KEPT, "b") == CONTENT


def test_two_processes_at_once(root: Path) -> None:
    """Each reads what one of them has written, and never a part of it. One at a time writes."""
    program = """if True:
        import sys
        from kvmpass._cache import KeptFiles
        kept = KeptFiles("kept", 3, 1 << 24)
        for round in range(30):
            kept.keep("a", memoryview(bytes([round]) * 300_000))
            file = kept.open("a")
            content = file and b"".join(map(bytes, file.pieces()))
            assert content is None or len(content) == 300_000 and len(set(content)) == 1
            sys.exit(3) if content is None else None"""
    KeptFiles("kept", 3, 1 << 24).keep("a", memoryview(bytes(300_000)))  # who is not the first keeps nothing
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    assert names(root) == ["a"]


def test_the_checksum_is_of_the_content(root: Path) -> None:
    KEPT.keep("a", CONTENT)
    _, size, checksum, zero = _cache._HEADER.unpack((root / "kept/a").read_bytes()[:64])
    assert (size, checksum, zero) == (len(CONTENT), zlib.crc32(CONTENT), 0)
