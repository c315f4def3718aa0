"""Mappings of this process as in /proc/self/smaps, and refusals before mapping."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kvmpass.memory.mapping
from kvmpass._native import ffi, lib
from kvmpass.errors import Closed, LayoutError, NotEnoughMemory
from kvmpass.hugepages import POOLS, node_pool
from kvmpass.layout import GIB, MIB, PAGE
from kvmpass.memory import HUGE, Backing, HostMapping, StopFlag
from kvmpass.memory.mapping import check_file, check_huge_pages, make_memfd

HUGE_SHIFT = 26  # MAP_HUGE_SHIFT (include/uapi/asm-generic/hugetlb_encode.h)


def smaps(address: int) -> SimpleNamespace:
    """The kernel's account of the mapping that holds ``address``: permissions, flags, bytes that are resident."""
    entry: SimpleNamespace | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+)", line):
            if entry is not None:
                return entry
            start, end = int(head[1], 16), int(head[2], 16)
            if start <= address < end:
                entry = SimpleNamespace(start=start, end=end, mode=head[3], offset=int(head[4], 16))
        elif entry is not None:
            name, _, value = line.partition(":")
            if name == "Rss":
                entry.resident = int(value.split()[0]) * 1024
            elif name == "VmFlags":
                entry.flags = value.split()
    assert entry is not None, f"nothing is mapped at {address:#x}"
    return entry


def mapped(address: int) -> bool:
    return any(
        int(start, 16) <= address < int(end, 16)
        for start, end in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/maps").read_text(), re.M)
    )


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("kvmpass-test", os.MFD_CLOEXEC)
    os.truncate(fd, 8 * PAGE)
    yield fd
    os.close(fd)


# --- HostMapping


def test_anonymous_memory_is_private_reserves_nothing_and_is_not_inherited() -> None:
    mapping = HostMapping(4 * MIB, align=HUGE)
    seen = smaps(mapping.address)
    assert (seen.mode, seen.start, seen.resident) == ("rw-p", mapping.address, 0)
    assert {"nr", "dc"} <= set(seen.flags), "no reservation; not copied by fork"
    assert "hg" not in seen.flags
    mapping.advise_huge()
    assert "hg" in smaps(mapping.address).flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()
    mapping.close()
    assert not mapped(seen.start)


def test_a_file_is_shared_from_its_offset_on(memfd: int) -> None:
    os.pwrite(memfd, b"second", PAGE)
    mapping = HostMapping(PAGE, fd=memfd, offset=PAGE)
    seen = smaps(mapping.address)
    assert (seen.mode, seen.offset, bytes(mapping.view(0, 6))) == ("rw-s", PAGE, b"second")
    assert "dc" in seen.flags
    mapping.view(0, 1)[:] = b"S"
    assert os.pread(memfd, 6, PAGE) == b"Second"
    mapping.close()


def test_a_read_only_mapping_is_read_only_for_the_host(memfd: int) -> None:
    mapping = HostMapping(PAGE, fd=memfd, writable=False)
    assert smaps(mapping.address).mode == "r--s"
    assert mapping.view(0, 8).readonly
    assert not HostMapping(PAGE).view(0, 8).readonly
    mapping.populate()
    mapping.close()


@pytest.mark.parametrize("align", [PAGE, HUGE, 16 * MIB, GIB])
def test_the_address_is_congruent(align: int) -> None:
    for congruent in (0, PAGE, 3 * PAGE, align - PAGE, align, 5 * GIB + MIB):
        mapping = HostMapping(PAGE, align=align, congruent=congruent)
        assert mapping.address % align == congruent % align
        mapping.close()


def test_alignment_leaves_no_other_mapping() -> None:
    """The search for an aligned address maps more for a moment."""
    before = len(Path("/proc/self/maps").read_text().splitlines())
    mapping = HostMapping(PAGE, align=GIB)
    seen = smaps(mapping.address)
    assert (seen.start, seen.end - seen.start) == (mapping.address, PAGE)
    mapping.close()
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= before


def test_a_view_is_inside_or_refused() -> None:
    mapping = HostMapping(2 * PAGE)
    for offset, size in ((0, 2 * PAGE), (2 * PAGE, 0), (5, 0)):
        assert len(mapping.view(offset, size)) == size
    mapping.view(2 * PAGE - 1, 1)[:] = b"!"
    assert bytes(mapping.view(2 * PAGE - 2, 2)) == b"\0!"
    for offset, size in ((-1, 1), (0, -1), (2 * PAGE, 1), (0, 2 * PAGE + 1), (PAGE, PAGE + 1), (PAGE, -1)):
        with pytest.raises(
            IndexError, match=re.escape(f"{offset:#x}+{size:#x} is outside a mapping of 0x2000 bytes")
        ):
            mapping.view(offset, size)
    mapping.close()


def test_a_closed_mapping_raises() -> None:
    mapping = HostMapping(PAGE)
    mapping.close()
    mapping.close()
    for use in (lambda: mapping.address, lambda: mapping.view(0, 1), mapping.populate, mapping.advise_huge):
        with pytest.raises(Closed, match="the mapping is closed"):
            use()


@pytest.mark.parametrize("chunk", [PAGE, 2 * PAGE, 3 * PAGE, 1 << 30])
def test_populate_reaches_every_page_and_nothing_else(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """In pieces, the last of which may be smaller; behind the mapping nothing is mapped, which would be an error."""
    monkeypatch.setattr(kvmpass.memory.mapping, "_PIECE", chunk)
    mapping = HostMapping(7 * PAGE, align=GIB)
    assert smaps(mapping.address).resident == 0
    mapping.populate()
    assert smaps(mapping.address).resident == 7 * PAGE
    mapping.close()


def test_populate_begins_nothing_once_it_is_told_to_end() -> None:
    mapping, stop = HostMapping(7 * PAGE, align=GIB), StopFlag()
    stop.set()
    mapping.populate(stop)
    assert smaps(mapping.address).resident == 0
    mapping.populate(StopFlag())
    assert smaps(mapping.address).resident == 7 * PAGE
    mapping.close()


def pieces(mapping: HostMapping, stop: StopFlag, **fields: int) -> Any:
    made = ffi.new("struct kvmpass_pieces *")
    made.address, made.size, made.step = mapping.address, mapping.size, PAGE
    made.advice, made.stopped = lib.MADV_POPULATE_WRITE, stop.flag
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_each_thread_takes_the_pieces_that_are_left() -> None:
    mapping, stop = HostMapping(7 * PAGE, align=GIB), StopFlag()
    left = pieces(mapping, stop, next=5 * PAGE)
    assert lib.kvmpass_populate(left) == 0
    assert smaps(mapping.address).resident == 2 * PAGE and left.next >= 7 * PAGE
    for ended in (pieces(mapping, stop, failed=1), pieces(mapping, stop, next=1 << 62)):
        assert lib.kvmpass_populate(ended) == 0
    assert smaps(mapping.address).resident == 2 * PAGE, "another thread has failed, or there is nothing left"
    mapping.close()


def test_a_thread_that_fails_ends_the_others() -> None:
    mapping, stop = HostMapping(PAGE), StopFlag()
    behind = pieces(mapping, stop, address=mapping.address + PAGE, advice=-1)
    assert lib.kvmpass_populate(behind) == -errno.EINVAL and behind.failed
    mapping.close()


def test_an_interruption_ends_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the main thread waits: when the exception arrives nobody uses the mapping."""
    join, calls = threading.Thread.join, []

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise KeyboardInterrupt
        join(self, timeout)

    mapping = HostMapping(MIB)
    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mapping.populate()
    assert not any(thread.is_alive() for thread in calls)
    mapping.close()


def test_populate_ends_midway_once_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the pieces that its threads are at, not after all: those of this mapping take seconds."""
    monkeypatch.setattr(kvmpass.memory.mapping, "_PIECE", PAGE)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    mapping, stop = HostMapping(GIB), StopFlag()
    thread = threading.Thread(target=mapping.populate, args=(stop,))
    thread.start()
    for _ in range(10_000):
        if seen := smaps(mapping.address).resident:
            break
    stop.set()
    thread.join()
    assert 0 < seen <= smaps(mapping.address).resident < mapping.size
    mapping.close()


@pytest.mark.parametrize("allowed", [0, 1])
def test_populate_with_too_few_threads(monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    start, left = threading.Thread.start, [None] * allowed

    def limited(self: threading.Thread) -> None:
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        start(self)

    monkeypatch.setattr(kvmpass.memory.mapping, "_PIECE", PAGE)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(threading.Thread, "start", limited)
    mapping = HostMapping(7 * PAGE, align=GIB)
    mapping.populate()
    assert smaps(mapping.address).resident == 7 * PAGE
    mapping.close()


def test_populating_does_not_delay_the_end_of_the_process() -> None:
    """Even where an exception has skipped what ends it."""
    code = """
import threading
from kvmpass.memory import GuestMemory, MachineMemory, plan_memory
memory = MachineMemory(plan_memory(1 << 20))
begun = threading.Event()
GuestMemory.populate = lambda self, stop: (begun.set(), threading.Event().wait())
memory.begin()
begun.wait()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_populate_of_a_read_only_file(monkeypatch: pytest.MonkeyPatch, memfd: int) -> None:
    """It is read, not written: that would be refused."""
    os.pwrite(memfd, bytes(8 * PAGE), 0)
    monkeypatch.setattr(kvmpass.memory.mapping, "_PIECE", PAGE)
    mapping = HostMapping(8 * PAGE, fd=memfd, writable=False)
    mapping.populate()
    assert smaps(mapping.address).resident == 8 * PAGE
    mapping.close()


def test_populate_beyond_the_end_of_a_file(memfd: int) -> None:
    for writable, name in ((True, "MADV_POPULATE_WRITE"), (False, "MADV_POPULATE_READ")):
        mapping = HostMapping(9 * PAGE, fd=memfd, writable=writable)
        with pytest.raises(OSError, match=rf"madvise\({name}\)") as refused:
            mapping.populate()
        assert refused.value.errno == errno.EFAULT
        assert "make the file as large" in refused.value.__notes__[0]
        mapping.close()


class FakeLib:
    """The C functions as a kernel answers that has huge pages, or lacks something; every call is kept."""

    def __init__(self, madvise: int = 0, mmap: int = 0x7F00_0000_0000) -> None:
        self.madvise, self.mmap = madvise, mmap
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def kvmpass_mmap(self, size: int, align: int, congruent: int, protection: int, flags: int, *rest: int) -> int:
        self.calls.append(("mmap", size, align, congruent, flags, *rest))
        return self.mmap

    def kvmpass_madvise(self, address: int, size: int, advice: int) -> int:
        self.calls.append(("madvise", address, size, advice))
        return self.madvise if advice in (lib.MADV_POPULATE_WRITE, lib.MADV_POPULATE_READ) else 0

    def kvmpass_populate(self, pieces: Any) -> int:
        while pieces.next < pieces.size:
            size = min(pieces.step, pieces.size - pieces.next)
            result = self.kvmpass_madvise(pieces.address + pieces.next, size, pieces.advice)
            if result < 0:
                return result
            pieces.next += pieces.step
        return 0

    def kvmpass_munmap(self, address: int, size: int) -> int:
        self.calls.append(("munmap", address, size))
        return 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLib:
    fake = FakeLib()
    monkeypatch.setattr(kvmpass.memory.mapping, "lib", fake)
    return fake


@pytest.mark.parametrize("page, code", [(HUGE, 21), (GIB, 30)])
def test_huge_pages_come_from_the_pool_of_their_size(fake: FakeLib, page: int, code: int) -> None:
    """And are reserved: without MAP_NORESERVE, or the first access would be a SIGBUS."""
    HostMapping(2 * page, align=page, congruent=5 * page, page=page)
    _, size, align, congruent, flags, fd, offset = fake.calls[0]
    assert (size, align, congruent, fd, offset) == (2 * page, page, 0, -1, 0)
    assert flags == lib.MAP_PRIVATE | lib.MAP_ANONYMOUS | lib.MAP_HUGETLB | code << HUGE_SHIFT
    assert lib.MAP_HUGE_SHIFT == HUGE_SHIFT


def test_small_pages_and_files_never_come_from_a_pool(fake: FakeLib) -> None:
    HostMapping(PAGE)
    HostMapping(HUGE, fd=5, offset=HUGE, page=HUGE)
    assert fake.calls[0][4:] == (lib.MAP_PRIVATE | lib.MAP_ANONYMOUS | lib.MAP_NORESERVE, -1, 0)
    assert [call[4:] for call in fake.calls if call[0] == "mmap"][1] == (lib.MAP_SHARED, 5, HUGE)
    HostMapping(PAGE, fd=0)
    assert fake.calls[-2][4:] == (lib.MAP_SHARED, 0, 0), "0 is a descriptor like any other"


def test_unmapping_covers_whole_pages(fake: FakeLib) -> None:
    """The kernel unmaps huge pages only as a whole (EINVAL)."""
    for size, page, span in (
        (PAGE + 1, PAGE, 2 * PAGE),
        (PAGE, PAGE, PAGE),
        (PAGE, HUGE, HUGE),
        (3 * MIB, HUGE, 4 * MIB),
    ):
        fake.calls.clear()
        HostMapping(size, page=page).close()
        assert fake.calls[1:] == [("madvise", fake.mmap, span, lib.MADV_DONTFORK), ("munmap", fake.mmap, span)]


def test_pieces_are_never_smaller_than_a_page(fake: FakeLib, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})  # the fake's loop is for one thread
    mapping = HostMapping(3 * GIB, page=GIB)
    fake.calls.clear()
    mapping.populate()
    assert sorted(fake.calls) == [("madvise", fake.mmap + n * GIB, GIB, lib.MADV_POPULATE_WRITE) for n in range(3)]
    plain = HostMapping(5 * MIB)
    fake.calls.clear()
    plain.populate()
    assert sorted(call[1:3] for call in fake.calls) == [
        (fake.mmap, 2 * MIB),
        (fake.mmap + 2 * MIB, 2 * MIB),
        (fake.mmap + 4 * MIB, MIB),
    ]


def test_a_kernel_that_cannot_populate_fills_on_first_use(fake: FakeLib) -> None:
    fake.madvise = -errno.EINVAL
    HostMapping(PAGE).populate()
    fake.madvise = -errno.ENOMEM
    with pytest.raises(OSError) as refused:
        HostMapping(PAGE).populate()
    assert refused.value.errno == errno.ENOMEM


@pytest.mark.parametrize(
    "code, remedy",
    [
        (errno.ENOMEM, "free memory or huge pages"),
        (errno.EACCES, "open the descriptor for reading"),
        (errno.EPERM, "F_SEAL_WRITE"),
    ],
)
def test_remedies_of_a_failed_mmap(fake: FakeLib, code: int, remedy: str) -> None:
    fake.mmap = -code
    with pytest.raises(OSError, match=r"mmap.*0x1000 bytes") as refused:
        HostMapping(PAGE)
    assert refused.value.errno == code
    assert remedy in refused.value.__notes__[0]


# --- backings


def test_page_sizes_of_backings() -> None:
    assert {backing.value: backing.page_size for backing in Backing} == {
        "anonymous": PAGE,
        "hugetlb-2M": 2 * MIB,
        "hugetlb-1G": GIB,
        "memfd": PAGE,
        "memfd-2M": 2 * MIB,
        "memfd-1G": GIB,
        "shared": PAGE,
        "device": PAGE,
    }
    assert {backing.value: backing.huge_page for backing in Backing if backing.huge_page} == {
        "hugetlb-2M": 2 * MIB,
        "hugetlb-1G": GIB,
        "memfd-2M": 2 * MIB,
        "memfd-1G": GIB,
    }
    assert {backing.value: backing.shared.value for backing in Backing if backing.shared is not backing} == {
        "anonymous": "memfd",
        "hugetlb-2M": "memfd-2M",
        "hugetlb-1G": "memfd-1G",
    }
    assert all(backing.shared.is_memfd is (backing.value not in ("shared", "device")) for backing in Backing)


def test_a_memfd_keeps_its_size() -> None:
    fd = make_memfd("ram7", 3 * PAGE)
    assert (os.fstat(fd).st_size, os.get_inheritable(fd)) == (3 * PAGE, False)
    assert "kvmpass-ram7" in str(Path(f"/proc/self/fd/{fd}").readlink())
    for size in (PAGE, 4 * PAGE):
        with pytest.raises(PermissionError):
            os.truncate(fd, size)
    with pytest.raises(PermissionError):  # nor can anybody seal it against the guest's writes
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(fd)


def test_a_memfd_of_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is asked for pages of that size. If it has none, no descriptor is left."""
    made: list[int] = []
    real = os.memfd_create

    def memfd_create(name: str, flags: int) -> int:
        made.append(flags)
        return real(name, os.MFD_CLOEXEC)  # and without leave for seals

    monkeypatch.setattr(os, "memfd_create", memfd_create)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(PermissionError):
        make_memfd("ram", 2 * GIB, GIB)
    assert made == [os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | os.MFD_HUGETLB | os.MFD_HUGE_1GB]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- pools of huge pages: free, reserved, overcommitted


def pool(directory: Path, page: int, **values: int) -> None:
    """What is not named is 0."""
    path = directory / f"hugepages-{page >> 10}kB"
    path.mkdir()
    for name in ("free", "resv", "nr_overcommit", "surplus", "nr"):
        (path / f"{name}_hugepages").write_text(f"{values.get(name, 0)}\n")


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kvmpass.memory.mapping, "ROOT", str(tmp_path))
    pools = tmp_path / POOLS
    pools.mkdir(parents=True)
    return pools


@pytest.mark.parametrize(
    "free, resv, overcommit, surplus, available",
    [(4, 0, 0, 0, 4), (4, 1, 0, 0, 3), (0, 0, 3, 1, 2), (2, 1, 5, 2, 4), (3, 0, 1, 2, 3), (1, 1, 0, 0, 0)],
)
def test_free_pages_of_a_pool(
    pools: Path, free: int, resv: int, overcommit: int, surplus: int, available: int
) -> None:
    """A pool whose surplus exceeds what it may have on demand gives none of that."""
    pool(pools, HUGE, free=free, resv=resv, nr_overcommit=overcommit, surplus=surplus, nr=6)
    for wanted in range(available + 1):
        check_huge_pages(HUGE, wanted * HUGE)
    message = f"{available + 2} huge pages of 2 MiB are needed, {available} are free"
    with pytest.raises(NotEnoughMemory, match=message) as refused:
        check_huge_pages(HUGE, (available + 2) * HUGE)
    assert refused.value.__notes__ == [f"reserve them: echo 8 > /{POOLS}/hugepages-2048kB/nr_hugepages"]


def test_gigantic_pages_are_best_reserved_at_boot(pools: Path) -> None:
    pool(pools, GIB, free=1, nr=2)
    check_huge_pages(GIB, GIB)
    with pytest.raises(NotEnoughMemory, match="4 huge pages of 1 GiB are needed, 1 are free") as refused:
        check_huge_pages(GIB, 4 * GIB)
    assert refused.value.__notes__ == [
        f"reserve them: echo 5 > /{POOLS}/hugepages-1048576kB/nr_hugepages, or boot with hugepagesz=1G hugepages=5"
    ]


def test_more_pages_reserved_than_free(pools: Path) -> None:
    """Zero is the least in the message."""
    pool(pools, HUGE, free=1, resv=3)
    with pytest.raises(NotEnoughMemory, match="1 huge pages of 2 MiB are needed, 0 are free"):
        check_huge_pages(HUGE, HUGE)


def policy(address: int) -> str:
    [line] = [
        line for line in Path("/proc/self/numa_maps").read_text().splitlines() if line.startswith(f"{address:x} ")
    ]
    return line.split(" ", 1)[1]


@pytest.mark.parametrize("file", [False, True])
def test_pages_come_from_a_node(file: bool) -> None:
    if not Path("/proc/self/numa_maps").exists():
        pytest.skip("needs a kernel with CONFIG_NUMA")
    fd = make_memfd("test", MIB) if file else -1
    mapping = HostMapping(MIB, fd=fd)
    assert policy(mapping.address).startswith("default")
    mapping.prefer_nodes([0])
    assert policy(mapping.address).split()[0] == "prefer:0"
    mapping.prefer_nodes([0, 1])  # of which the kernel keeps those that exist
    assert policy(mapping.address).startswith("prefer (many):0")
    with pytest.raises(OSError, match="mbind") as refused:
        mapping.prefer_nodes([1000])
    assert refused.value.errno == errno.EINVAL
    mapping.close()
    if file:
        os.close(fd)


def test_nodes_are_bits(fake: FakeLib) -> None:
    seen: list[tuple[int, list[int], int]] = []
    fake.kvmpass_mbind = lambda address, size, mode, mask, bits: seen.append((mode, list(mask), bits)) or 0  # type: ignore[attr-defined, func-returns-value]
    mapping = HostMapping(PAGE)
    for nodes in ([3], [0, 63, 64], [130]):
        mapping.prefer_nodes(nodes)
    assert seen == [
        (lib.MPOL_PREFERRED, [8], 64),
        (lib.MPOL_PREFERRED_MANY, [1 | 1 << 63, 1], 128),
        (lib.MPOL_PREFERRED, [0, 0, 4], 192),
    ]


def test_pages_on_other_nodes_are_not_free(pools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool(pools, HUGE, free=4, nr=4)
    monkeypatch.setattr(kvmpass.memory.mapping, "own_nodes", lambda: ([0, 2], [1, 3]))
    place = Path(kvmpass.memory.mapping.ROOT, node_pool(1, HUGE))
    place.mkdir(parents=True)
    (place / "free_hugepages").write_text("3\n")
    check_huge_pages(HUGE, HUGE)
    message = "2 MiB are needed, 1 are free on the NUMA nodes that this process may use: 0, 2"
    with pytest.raises(NotEnoughMemory, match=message) as refused:
        check_huge_pages(HUGE, 2 * HUGE)
    assert refused.value.__notes__ == [f"reserve them: echo 1 > /{node_pool(0, HUGE)}/nr_hugepages"]


def test_a_host_without_such_pages(pools: Path) -> None:
    with pytest.raises(NotEnoughMemory, match=r"no huge pages of 2 MiB \(.*free_hugepages: No such file"):
        check_huge_pages(HUGE, HUGE)


# --- files


def test_size_and_alignment_of_a_file(memfd: int) -> None:
    assert check_file(memfd, 0, 8 * PAGE, "it") == PAGE
    assert check_file(memfd, 7 * PAGE, PAGE, "it") == PAGE
    for offset, size, end in ((0, 9 * PAGE, "0x9000"), (8 * PAGE, PAGE, "0x9000"), (7 * PAGE, 2 * PAGE, "0x9000")):
        with pytest.raises(
            LayoutError, match=f"it: the file has 0x8000 bytes, the region would end at {end}"
        ) as refused:
            check_file(memfd, offset, size, "it")
        assert "make the file larger first" in refused.value.__notes__[0]
    for offset, size in ((-PAGE, PAGE), (1, PAGE), (0, PAGE + 1), (PAGE - 1, 1)):
        with pytest.raises(LayoutError, match="must be multiples of this file's 0x1000"):
            check_file(memfd, offset, size, "it")


def test_page_size_of_a_hugetlbfs_file(monkeypatch: pytest.MonkeyPatch, memfd: int) -> None:
    """On hugetlbfs: what fstatfs calls the block's size."""
    os.truncate(memfd, 4 * MIB)
    fake = FakeLib()
    fake.kvmpass_fhugepage = lambda fd: HUGE  # type: ignore[attr-defined]
    monkeypatch.setattr(kvmpass.memory.mapping, "lib", fake)
    assert check_file(memfd, 2 * MIB, 2 * MIB, "it") == HUGE
    for offset, size in ((MIB, 2 * MIB), (0, MIB)):
        with pytest.raises(LayoutError, match="multiples of this file's 0x200000"):
            check_file(memfd, offset, size, "it")


@pytest.mark.parametrize("path", ["/dev/null", "/proc"])
def test_a_descriptor_that_is_not_a_file(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(LayoutError, match=f"it: descriptor {fd} is neither a file nor a memfd"):
            check_file(fd, 0, PAGE, "it")
    finally:
        os.close(fd)


@pytest.mark.parametrize("processors", [1, 2, 64])
def test_populate_works_on_any_number_of_processors(monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    monkeypatch.setattr(kvmpass.memory.mapping, "_PIECE", PAGE)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    mapping = HostMapping(3 * PAGE, align=GIB)
    mapping.populate()
    assert smaps(mapping.address).resident == 3 * PAGE
    mapping.close()
