"""Decompressing the kernel in a bzImage, and what is kept of it."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import zstandard
from support.kernel_files import bzimage, bzimage_of, vmlinux

from kvmpass import _cache
from kvmpass.boot import unpacking
from kvmpass.boot.e820 import E820Entry, E820Type
from kvmpass.boot.linux import ENTRY_64, KernelImage, Loaded, load_linux
from kvmpass.boot.unpacking import Unpacking, decompress
from kvmpass.errors import NotEnoughMemory
from kvmpass.layout import MIB, Range
from kvmpass.machine.execution import Execution

KERNEL = vmlinux() + bytes(range(256)) * 20_000  # 5 MB: several pieces
X86_XZ = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 32 * MIB}]


def sized(data: bytes, content: bytes = KERNEL) -> bytes:
    return data + struct.pack("<I", len(content))


def xz(content: bytes = KERNEL) -> bytes:
    """As scripts/xz_wrap.sh of the kernel does it."""
    return sized(lzma.compress(content, check=lzma.CHECK_CRC32, filters=X86_XZ), content)


FORMATS: dict[str, Callable[[], bytes]] = {
    "xz": xz,
    "gzip": lambda: gzip.compress(KERNEL, 1),  # its last four bytes are the size
    "bzip2": lambda: sized(bz2.compress(KERNEL)),
    "lzma": lambda: sized(lzma.compress(KERNEL, lzma.FORMAT_ALONE)),
    "zstd": lambda: sized(zstandard.ZstdCompressor(write_content_size=False).compress(KERNEL)),
}


def content_of(run: Unpacking) -> bytes | None:
    content = run.take()
    if content is None:
        return None
    with closing(content):
        return b"".join(bytes(piece) for piece in content.pieces())  # each is in a buffer that is used again


def written() -> None:
    """Wait until what was taken is in the cache, too."""
    for thread in threading.enumerate():
        if thread.name in ("unpack", "read"):
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("KVMPASS_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache/vmlinux"
    written()  # before the user's own cache is used again


@pytest.fixture
def decompressed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each decompression."""
    calls: list[int] = []

    def counted(data: memoryview, most: int, step: Callable[[], None]) -> memoryview:
        calls.append(len(data))
        return decompress(data, most, step)

    monkeypatch.setattr(unpacking, "decompress", counted)
    return calls


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str) -> None:
    kernel = KernelImage.parse(bzimage_of(FORMATS[form]()))
    content = content_of(Unpacking(kernel))
    assert content is not None and content == KERNEL


@pytest.mark.parametrize("form", FORMATS)
def test_broken_payloads(form: str) -> None:
    """Truncated, longer or shorter than it says, larger than the kernel may be: never a piece too much."""
    whole = FORMATS[form]()
    for data in (
        whole[: len(whole) // 2] + struct.pack("<I", len(KERNEL)),
        whole[:-4] + struct.pack("<I", len(KERNEL) + 1),
        whole[:-4] + struct.pack("<I", len(KERNEL) - 1),
        whole[:-4] + struct.pack("<I", 0),
        whole[:-4] + struct.pack("<I", 2**32 - 1),
        whole[:6] + os.urandom(64) + struct.pack("<I", 4096),
    ):
        assert content_of(Unpacking(KernelImage.parse(bzimage_of(data)))) is None, data[-4:]
    with pytest.raises(ValueError, match=f"{len(KERNEL)} bytes when decompressed, of at most"):
        decompress(memoryview(whole), len(KERNEL) - 1)


@pytest.mark.parametrize(
    "image",
    [
        bzimage(),
        bzimage_of(sized(b"\x02\x21\x4c\x18" + bytes(100))),  # LZ4
        bzimage_of(xz(), payload_offset=(0x248, "<I", 2**31)),
        bzimage_of(xz(), payload_length=(0x24C, "<I", 2**32 - 1)),
        bzimage_of(xz(), payload_length=(0x24C, "<I", 3)),
    ],
    ids=["none", "lz4", "offset", "length", "short"],
)
def test_payloads_that_are_left_to_the_kernel(image: bytes, cache: Path) -> None:
    assert content_of(Unpacking(KernelImage.parse(image))) is None
    assert not cache.exists()


def test_the_second_run_reads_the_cache(cache: Path, decompressed: list[int]) -> None:
    for _ in range(2):
        run = Unpacking(KernelImage.parse(bzimage_of(xz())))
        assert content_of(run) == KERNEL
        assert content_of(run) == KERNEL, "on guest reboot"
    written()
    assert len(decompressed) == 1 and len(list(cache.iterdir())) == 1
    other = xz(KERNEL + b"built again")
    assert content_of(Unpacking(KernelImage.parse(bzimage_of(other)))) == KERNEL + b"built again"
    written()
    assert len(decompressed) == 2 and len(list(cache.iterdir())) == 2


def test_in_a_thread(cache: Path, decompressed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken is there before it is in the cache; without a thread ``take`` does it all."""
    keep, may_keep = unpacking.KeptFiles.keep, threading.Event()

    def later(*arguments: object) -> None:
        assert may_keep.wait(10)
        keep(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(unpacking.KeptFiles, "keep", later)
    run = Unpacking(KernelImage.parse(bzimage_of(xz())))
    run.begin()
    run.begin()
    assert content_of(run) == KERNEL and not list(cache.iterdir())
    may_keep.set()
    written()
    assert len(list(cache.iterdir())) == 1

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    run = Unpacking(KernelImage.parse(bzimage_of(xz())))
    assert content_of(run) is None and len(decompressed) == 1
    assert run.note == "not decompressed on this host: can't start new thread"


def test_a_reboot_neither_decompresses_nor_writes(cache: Path, decompressed: list[int]) -> None:
    run = Unpacking(KernelImage.parse(bzimage_of(xz())))
    assert content_of(run) == KERNEL and not run.note
    assert content_of(run) == KERNEL
    [file] = cache.iterdir()
    os.truncate(file, 1000)
    assert content_of(run) is None and run.note == "not in the cache"
    file.unlink()
    assert content_of(run) is None
    assert len(decompressed) == 1 and not list(cache.iterdir())
    file.parent.chmod(0o770)
    again = Unpacking(KernelImage.parse(bzimage_of(xz())))
    assert content_of(again) == KERNEL and again.note == f"not kept in the cache: another user can write {cache}"


@pytest.mark.parametrize("step", ["open", "keep"])
def test_a_cache_that_stalls(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """It holds up nothing for long, and after that nothing at all: no further thread waits for it."""
    may_go_on = threading.Event()

    def stalls(*arguments: object) -> None:
        may_go_on.wait(30)

    monkeypatch.setattr(unpacking.KeptFiles, step, stalls)
    run = Unpacking(KernelImage.parse(bzimage_of(xz())))
    if step == "keep":
        assert content_of(run) == KERNEL
    monkeypatch.setattr(_cache, "PATIENCE", 0.1)
    for _ in range(5):
        assert content_of(run) is None
    assert run.note == "not decompressed on this host: no progress in 0.1 seconds"
    waiting = [thread for thread in threading.enumerate() if thread.name == "unpack"]
    assert len(waiting) == (1 if step == "open" else 2)
    may_go_on.set()


def test_who_is_slow_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(data: memoryview, most: int, step: Callable[[], None]) -> memoryview:
        for _ in range(5):
            threading.Event().wait(0.4)
            step()
        return decompress(data, most, step)

    monkeypatch.setattr(_cache, "PATIENCE", 1.5)
    monkeypatch.setattr(unpacking, "decompress", slow)
    assert content_of(Unpacking(KernelImage.parse(bzimage_of(xz())))) == KERNEL


def test_the_host_bounds_what_a_kernel_file_may_take() -> None:
    """Its ``init_size`` is its own word."""
    data = xz()[:-4] + struct.pack("<I", 257 * MIB)
    kernel = KernelImage.parse(bzimage_of(data, init_size=(0x260, "<I", 0xFFFF_F000)))
    run = Unpacking(kernel)
    assert content_of(run) is None
    assert run.note.endswith(f"{257 * MIB} bytes when decompressed, of at most {256 * MIB}")


def test_payloads_with_equal_checksums(decompressed: list[int]) -> None:
    """The name in the cache is one that nobody can find another payload for."""
    names = {unpacking._name(memoryview(data)) for data in (b"plumless", b"buckeroo")}
    assert zlib.crc32(b"plumless") == zlib.crc32(b"buckeroo")
    assert len(names) == 2 and all(len(name) == 64 for name in names)


class Memory:
    """The guest memory of ``CODE``, and nothing of what is written elsewhere."""

    def __init__(self) -> None:
        self.code = bytearray(CODE.size)

    def write(self, gpa: int, data: bytes | memoryview, /) -> None:
        at = gpa - CODE.start
        if 0 <= at < CODE.size:
            self.code[at : at + len(data)] = data


CODE = Range(16 * MIB, 24 * MIB)


def load(kernel: KernelImage, unpacking: Unpacking | None, *ram: Range) -> tuple[Memory, Loaded]:
    memory = Memory()
    e820 = [E820Entry(part, E820Type.USABLE) for part in ram or (Range(MIB, 63 * MIB),)]
    return memory, load_linux(memory, kernel, initrd=b"initrd", cmdline="x", e820=e820, unpacking=unpacking)


def test_a_vmlinux_is_loaded_as_it_is(tmp_path: Path) -> None:
    banner = b"Linux version 6.12.1 (me) #1\n"
    (tmp_path / "vmlinux").write_bytes(vmlinux((16 * MIB, banner, 4096)))
    kernel = KernelImage.from_file(tmp_path / "vmlinux")
    assert content_of(Unpacking(kernel)) is None
    memory, loaded = load(kernel, Unpacking(kernel))
    assert loaded == Loaded(16 * MIB, True)
    assert memory.code.startswith(banner + b"\0")
    with pytest.raises(NotEnoughMemory):
        load(kernel, None, Range(MIB, MIB), Range(32 * MIB, 32 * MIB))


def is_bzimage(kernel: KernelImage, memory: Memory, loaded: Loaded, place: int = 16 * MIB) -> bool:
    return loaded == Loaded(place + ENTRY_64, False) and memory.code[place - CODE.start :].startswith(kernel.payload)


def test_loading_one_way_or_the_other() -> None:
    def kernel_of(content: bytes) -> KernelImage:
        return KernelImage.parse(bzimage_of(xz(content)))

    kernel = kernel_of(KERNEL)
    for _ in range(2):  # decompressed, and from the cache
        run = Unpacking(kernel)
        memory, loaded = load(kernel, run)
        assert loaded == Loaded(16 * MIB, True) and not run.note
        assert memory.code.startswith(b"code" * 1024) and kernel.payload not in memory.code
        written()
    # The file is not as expected; the kernel is not where it was linked to; it would have to reach too much.
    high = (Range(MIB, 19 * MIB), Range(33 * MIB, 31 * MIB))
    for content, ram, place, reason in (
        (vmlinux(entry=0), (), 16 * MIB, "the entry point 0x0 is in no segment"),
        (KERNEL, high, 34 * MIB, "no memory at 0x1000000, where it was linked to"),
        (
            KERNEL,
            (Range(MIB, 63 * MIB), Range(2**46, MIB)),
            16 * MIB,
            "so much memory needs page tables of five levels",
        ),
    ):
        other = kernel_of(content)
        for begin in (True, False):
            run = Unpacking(other)
            if begin:
                run.begin()
            assert is_bzimage(other, *load(other, run, *ram), place), reason
            assert run.note == f"not decompressed on this host: {reason}"
        written()


def kept(cache: Path) -> Path:
    """The file in the cache of a kernel that was decompressed."""
    assert content_of(Unpacking(KernelImage.parse(bzimage_of(xz())))) == KERNEL
    written()
    [file] = cache.iterdir()
    return file


def test_a_kept_kernel_that_is_not_what_was_written(cache: Path, decompressed: list[int]) -> None:
    """It is found out at the end: the bzImage is loaded instead, and the next run decompresses again."""
    file = kept(cache)
    for at in (64, 64 + 4096, -1):  # in the ELF header, in a segment, in what follows them
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)
        kernel = KernelImage.parse(bzimage_of(xz()))
        run = Unpacking(kernel)
        assert is_bzimage(kernel, *load(kernel, run))
        assert run.note == "not decompressed on this host: what is in the cache is not what was written"
        assert not file.exists()
        assert is_bzimage(kernel, *load(kernel, run)) and run.note == "not in the cache", "on guest reboot"
        before = len(decompressed)
        assert load(kernel, Unpacking(kernel))[1].decompressed and len(decompressed) == before + 1
        written()


def test_a_kept_kernel_that_cannot_be_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad block of a disk stays one: the next run decompresses again."""
    file = kept(cache)

    class Unreadable(_cache.FileIO):
        def readinto(self, buffer: Any, /) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    kernel = KernelImage.parse(bzimage_of(xz()))
    run = Unpacking(kernel)
    with monkeypatch.context() as patch:
        patch.setattr(_cache, "FileIO", Unreadable)
        assert is_bzimage(kernel, *load(kernel, run))
    assert run.note == "not decompressed on this host: Input/output error" and not file.exists()
    assert load(kernel, Unpacking(kernel))[1].decompressed


def test_a_kept_kernel_that_stalls_while_it_is_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes later is written nowhere, and nothing is read a second time."""
    kept(cache)
    may_go_on, readinto = threading.Event(), _cache.FileIO.readinto

    class Stalls(_cache.FileIO):
        def readinto(self, buffer: Any, /) -> int:
            if self.tell() > MIB:
                assert may_go_on.wait(30)
            return readinto(self, buffer)

    monkeypatch.setattr(_cache, "FileIO", Stalls)
    monkeypatch.setattr(_cache, "PATIENCE", 0.1)
    kernel = KernelImage.parse(bzimage_of(xz()))
    run = Unpacking(kernel)
    memory, loaded = load(kernel, run)
    assert is_bzimage(kernel, memory, loaded)
    assert run.note == "not decompressed on this host: no progress in 0.1 seconds"
    before = bytes(memory.code)
    may_go_on.set()
    written()
    assert memory.code == before
    assert is_bzimage(kernel, *load(kernel, run))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_is_left_is_closed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that decompresses itself holds neither memory nor a descriptor."""
    kept(cache)
    kernel, before = KernelImage.parse(bzimage_of(xz())), descriptors()
    run = Unpacking(kernel)
    for leave in (lambda: run.leave("a reason"), run.cancel):
        run.begin()
        leave()
        written()
        assert run._latest is not None and run._latest._content is None
        assert descriptors() == before
    assert content_of(run) == KERNEL

    def interrupted(timeout: float) -> bool:
        raise KeyboardInterrupt

    run.begin()
    with monkeypatch.context() as patch:
        patch.setattr(run._latest._ready, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.take()
    written()
    assert descriptors() == before


def test_a_machine_refuses_the_decompression_of_another_kernel() -> None:
    kernel, other = (KernelImage.parse(bzimage_of(xz()), name) for name in ("one", "other"))
    nobody: Any = None  # it is refused before anything is done
    with pytest.raises(ValueError, match="the decompression of other, and not of one"):
        Execution.load_linux(nobody, kernel, None, "", unpacking=Unpacking(other))
