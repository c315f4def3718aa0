"""Host virtual mappings of guest memory, and their backings."""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import stat
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread

from kvmpass._fd import check
from kvmpass._native import ffi, lib
from kvmpass._signals import deferred
from kvmpass._teardown import undo_on_error
from kvmpass.errors import Closed, LayoutError, NotEnoughMemory
from kvmpass.hugepages import HugePagePool
from kvmpass.layout import GIB, MIB, PAGE, size_text
from kvmpass.numa import own_nodes

HUGE = 2 * MIB  # a large page: CPU and IOMMU tables both have 2 MiB entries (AMD IOMMU specification, 2.2.3)
ROOT = "/"
_PIECE = HUGE  # to populate at once: what else this process maps waits for it (mmap_lock)


class Backing(enum.StrEnum):
    """The memory behind a region."""

    ANONYMOUS = "anonymous"
    """Private pages; transparent huge pages where the kernel has them."""
    HUGETLB_2M = "hugetlb-2M"
    """Private huge pages of 2 MiB from the host's pool (Documentation/admin-guide/mm/hugetlbpage.rst)."""
    HUGETLB_1G = "hugetlb-1G"
    """Private huge pages of 1 GiB from the host's pool."""
    MEMFD = "memfd"
    """Ordinary pages of a memfd, which daemons may map too (``GuestMemory.add_ram``)."""
    MEMFD_2M = "memfd-2M"
    """A memfd of huge pages of 2 MiB from the host's pool."""
    MEMFD_1G = "memfd-1G"
    """A memfd of huge pages of 1 GiB from the host's pool."""
    SHARED = "shared"
    """A file or memfd of somebody else's, which other processes may map too (``GuestMemory.add_shared``)."""
    DEVICE = "device"
    """An assigned device's BAR."""

    @property
    def page_size(self) -> int:
        """The page size in bytes; addresses and sizes must be multiples of it."""
        return self.huge_page or PAGE

    @property
    def huge_page(self) -> int:
        """The size in bytes of the pages of its pool; 0: not from a pool."""
        return _POOLS.get(self, 0)

    @property
    def shared(self) -> Backing:
        """The backing with the same pages that daemons may map too: a memfd instead of private memory."""
        return _SHARED.get(self, self)

    @property
    def is_memfd(self) -> bool:
        """Whether it is a memfd that is made here."""
        return self in _SHARED.values()


_POOLS = {Backing.HUGETLB_2M: HUGE, Backing.HUGETLB_1G: GIB, Backing.MEMFD_2M: HUGE, Backing.MEMFD_1G: GIB}
_SHARED = {
    Backing.ANONYMOUS: Backing.MEMFD,
    Backing.HUGETLB_2M: Backing.MEMFD_2M,
    Backing.HUGETLB_1G: Backing.MEMFD_1G,
}


class StopFlag:
    """Tells the threads that populate a mapping to end.

    Synchronization: from any thread.
    """

    def __init__(self) -> None:
        self.flag = ffi.new("int *")
        """What C reads: not 0 once it is set."""

    def set(self) -> None:
        """Let them take no further piece."""
        self.flag[0] = 1


class HostMapping:
    """A mapping in this process, at an address equal to ``congruent`` modulo ``align``; all are bytes.

    It maps ``fd`` from ``offset`` on, shared, or anonymous memory; with a ``page`` above 4096 bytes anonymous memory
    comes from the pool of such pages. Not inherited over ``fork``. ``close()`` unmaps. Raises ``OSError`` (``mmap``:
    ``ENOMEM``, ``EACCES``, ``EPERM``).
    """

    def __init__(
        self,
        size: int,
        *,
        align: int = PAGE,
        congruent: int = 0,
        fd: int = -1,
        offset: int = 0,
        writable: bool = True,
        page: int = PAGE,
    ) -> None:
        self.size = size
        self.writable = writable
        self.page = page
        protection = lib.PROT_READ | (lib.PROT_WRITE if writable else 0)
        flags = lib.MAP_SHARED if fd >= 0 else lib.MAP_PRIVATE | lib.MAP_ANONYMOUS
        if fd < 0:
            # Huge pages are reserved by mmap, or it fails: without that the first access would be a SIGBUS.
            huge = lib.MAP_HUGETLB | (page.bit_length() - 1) << lib.MAP_HUGE_SHIFT
            flags |= huge if page > PAGE else lib.MAP_NORESERVE
        result = lib.kvmpass_mmap(size, align, congruent % align, protection, flags, fd, offset)
        self._address = check(result, "mmap", f"{size:#x} bytes", _MMAP_REMEDY.get(-result))
        check(lib.kvmpass_madvise(self._address, self._span, lib.MADV_DONTFORK), "madvise(MADV_DONTFORK)")

    @property
    def _span(self) -> int:
        return -(-self.size // self.page) * self.page

    @property
    def address(self) -> int:
        """The host virtual address. Raises ``Closed`` after ``close()``."""
        if not self._address:
            raise Closed("the mapping is closed")
        return self._address

    def advise_huge(self) -> None:
        """Request transparent huge pages (``MADV_HUGEPAGE``); a kernel without them ignores it."""
        lib.kvmpass_madvise(self.address, self._span, lib.MADV_HUGEPAGE)

    def prefer_nodes(self, nodes: Collection[int]) -> None:
        """Take pages that do not exist yet from these NUMA nodes, as long as they have free ones.

        One node (``MPOL_PREFERRED``), or several from Linux 5.15 on (``MPOL_PREFERRED_MANY``). Raises ``OSError``
        (``mbind``: ``EINVAL`` without such nodes, ``EPERM`` in some containers, ``ENOSYS``).
        """
        mask = ffi.new("unsigned long[]", max(nodes) // 64 + 1)
        for node in nodes:
            mask[node // 64] |= 1 << node % 64
        mode = lib.MPOL_PREFERRED if len(nodes) == 1 else lib.MPOL_PREFERRED_MANY
        check(lib.kvmpass_mbind(self.address, self._span, mode, mask, len(mask) * 64), "mbind")

    def populate(self, stop: StopFlag | None = None) -> None:
        """Allocate and zero every page now, by all CPUs of this process (``MADV_POPULATE_WRITE``).

        It ends early, after at most 2 MiB or a page for each thread, once ``stop`` is set. Raises ``OSError``:
        ``ENOMEM``; ``EFAULT`` beyond the end of a file, or without a huge page that a limit or a NUMA node allows. On
        kernels older than 5.14 (``EINVAL``) pages are allocated on first use.
        """
        stop = stop or StopFlag()
        pieces = ffi.new("struct kvmpass_pieces *")
        pieces.address, pieces.size = self.address, self._span
        pieces.step = max(_PIECE, self.page)
        pieces.advice = lib.MADV_POPULATE_WRITE if self.writable else lib.MADV_POPULATE_READ
        pieces.stopped = stop.flag
        failed: list[int] = []

        def fill(flag: StopFlag = stop) -> None:  # which C reads until this thread ends, even if nobody waits for it
            if (result := lib.kvmpass_populate(pieces)) < 0:
                failed.append(result)

        # Not concurrent.futures: to import it takes longer than to populate a small guest. The caller takes no piece:
        # the main thread would see no signal before the last one. Daemons: the process never waits for them at exit.
        count = min(-(-self._span // pieces.step), len(os.sched_getaffinity(0)))
        threads: list[Thread] = []
        try:
            with deferred(), suppress(RuntimeError):  # a limit of threads: those that have started take all pieces
                for _ in range(count):
                    thread = Thread(target=fill, name="populate", daemon=True)
                    thread.start()
                    threads.append(thread)
            if not threads:
                fill()
            for thread in threads:
                thread.join()
        finally:
            with deferred():  # the caller unmaps the memory next
                pieces.failed = 1  # after Ctrl-C the threads end with their pieces
                for thread in threads:
                    thread.join()
        if failed and failed[0] != -errno.EINVAL:
            name = "madvise(MADV_POPULATE_WRITE)" if self.writable else "madvise(MADV_POPULATE_READ)"
            check(failed[0], name, remedy=_POPULATE_REMEDY.get(-failed[0]))

    def view(self, offset: int, size: int) -> memoryview:
        """Return ``size`` bytes at ``offset``, writable if the mapping is. Raises ``IndexError`` outside it."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise IndexError(f"{offset:#x}+{size:#x} is outside a mapping of {self.size:#x} bytes")
        view = memoryview(ffi.buffer(ffi.cast("char *", self.address + offset), size)).cast("B")
        return view if self.writable else view.toreadonly()

    def close(self) -> None:
        """Unmap; idempotent. Raises ``OSError`` (``ENOMEM``: too many mappings), and remains mapped then."""
        if self._address:
            check(lib.kvmpass_munmap(self._address, self._span), "munmap")
            self._address = 0


_MMAP_REMEDY = {
    errno.ENOMEM: "free memory or huge pages, or raise the process's limits (ulimit -v, max_map_count)",
    errno.EACCES: "open the descriptor for reading, and for writing if the region is to be writable",
    errno.EPERM: "make the region read-only: the memfd is sealed against writing (F_SEAL_WRITE)",
}
_POPULATE_REMEDY = {  # of what would be a SIGBUS for an access (mm/madvise.c)
    errno.EFAULT: "make the file as large as the region; for huge pages raise hugetlb.SIZE.max of this process's "
    "cgroups, or reserve them on NUMA nodes that it may use",
}


def memory_policy() -> int:
    """Return the NUMA policy of this thread (``MPOL_*`` of linux/mempolicy.h); 0: the default, or unknown."""
    mode = ffi.new("int *")
    return int(mode[0]) if lib.kvmpass_get_mempolicy(mode) == 0 else lib.MPOL_DEFAULT


def make_memfd(name: str, size: int, page: int = PAGE) -> int:
    """Return a memfd of ``size`` bytes of zeroes, in pages of ``page`` bytes, whose size is sealed.

    A process that has it may punch holes into it nevertheless: ``F_SEAL_WRITE`` would keep everybody from writing.
    ``name`` is shown in ``/proc``. Raises ``OSError`` (``memfd_create``: ``EMFILE``, ``ENOMEM``).
    """
    huge = os.MFD_HUGETLB | (page.bit_length() - 1) << os.MFD_HUGE_SHIFT if page > PAGE else 0
    fd = os.memfd_create(f"kvmpass-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | huge)
    with undo_on_error(partial(os.close, fd)):
        os.truncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def check_huge_pages(page: int, size: int) -> None:
    """Raise ``NotEnoughMemory`` if this host's pool of pages of ``page`` bytes has less than ``size`` bytes free.

    Only those on NUMA nodes that this process may use are counted.
    """
    page_size, count = size_text(page), size // page
    ours, others = own_nodes()
    try:
        pool = HugePagePool.read(page, lambda path: int(Path(ROOT, path).read_text()), (ours, others))
    except OSError as error:
        raise NotEnoughMemory(
            f"this host has no huge pages of {page_size} ({error.filename}: {error.strerror})",
            "use another backing; 1 GiB pages need the CPU flag pdpe1gb and a kernel with CONFIG_HUGETLBFS",
        ) from None
    if size > pool.available * page:
        enough = pool.nr_for(size)
        where = f" on the NUMA nodes that this process may use: {', '.join(map(str, ours))}" if others else ""
        boot = f", or boot with hugepagesz={page >> 30}G hugepages={enough}" if page >= GIB and not others else ""
        raise NotEnoughMemory(
            f"{count} huge pages of {page_size} are needed, {max(0, pool.available)} are free{where}",
            f"reserve them: echo {enough} > /{pool.place}/nr_hugepages{boot}",
        )


def check_file(fd: int, offset: int, size: int, name: str) -> int:
    """Check that ``fd`` is a file with ``size`` bytes at ``offset``; return its page size in bytes.

    A process that truncates the file later removes the pages; ``F_SEAL_SHRINK`` prevents that. ``name`` is the
    region's, for messages. Raises ``LayoutError``, ``OSError`` (``EBADF``).
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise LayoutError(f"{name}: descriptor {fd} is neither a file nor a memfd")
    page = check(lib.kvmpass_fhugepage(fd), "fstatfs", name) or PAGE
    if offset < 0 or offset % page or size % page:
        raise LayoutError(f"{name}: offset {offset:#x} and size {size:#x} must be multiples of this file's {page:#x}")
    if offset + size > status.st_size:
        raise LayoutError(
            f"{name}: the file has {status.st_size:#x} bytes, the region would end at {offset + size:#x} of it",
            "make the file larger first: an access behind its end is a SIGBUS",
        )
    return page
