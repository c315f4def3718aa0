"""What an assignment reads of the host: counts, as times depend on the machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from support.host_tree import Host

from kvmpass.assignment import assign
from kvmpass.assignment.backing import choose_backing, choose_nodes
from kvmpass.host import Bdf, Look, borrow
from kvmpass.host.kernel.kmsg import KernelLog
from kvmpass.memory import Backing, plan_memory

NVME, EDU = Bdf(0, 1, 0, 0), Bdf(0, 0, 4, 0)
KMSG = "dev/kmsg"
GROUPS = "sys/kernel/iommu_groups"
# Read by the checks more than once: the power state, which the read of configuration space changes; and small files,
# by what has no `Look`.
BY_CHECKS = {
    "proc/self/cgroup": 2,
    "proc/self/mountinfo": 2,
    **{f"sys/bus/pci/devices/{bdf}/power_state": 2 for bdf in (NVME, EDU)},
}
# With the choice of pages, that of nodes, and the plan of memory.
BY_ALL = BY_CHECKS | {
    "proc/self/cgroup": 4,
    "proc/self/mountinfo": 4,
    "proc/self/status": 3,
    "sys/devices/system/node": 5,
    "sys/devices/system/node/has_memory": 3,
    **{f"sys/bus/pci/devices/{bdf}/numa_node": 3 for bdf in (NVME, EDU)},
    GROUPS: 3,
    **{f"{GROUPS}/{group}/{file}": 3 for group in (5, 7) for file in ("devices", "name", "reserved_regions", "type")},
}


class CountingHost(Host):
    """Counts the reads of each file and directory."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()

    def data(self, *parts: str, size: int = -1) -> bytes:
        self.reads["/".join(parts)] += 1
        return super().data(*parts, size=size)

    def names(self, *parts: str) -> list[str]:
        self.reads["/".join(parts)] += 1
        return super().names(*parts)

    def log(self, word: bytes = b"") -> KernelLog:
        self.reads[KMSG] += 1
        return super().log(word)

    def counted(self) -> Counter[str]:
        found, self.reads = self.reads, Counter()
        return found


@pytest.fixture
def host(tmp_path: Path) -> CountingHost:
    host = CountingHost(tmp_path / "host")
    host.add(str(NVME), "nvme", 7)
    host.add(str(EDU), "vfio-pci", 5)
    return host


def test_the_checks_read_few_files_again(host: CountingHost) -> None:
    """The host's, those of both devices, of the memory and of the limits."""
    look = Look(host)
    assign.check_guest([NVME, EDU], look, 1 << 26, Backing.ANONYMOUS, 2)
    assign.check([NVME, EDU], look)
    reads = host.counted()
    assert reads[KMSG] == 1
    assert {file: count for file, count in reads.items() if count > 1} == BY_CHECKS


def test_an_assignment_reads_few_files_again(host: CountingHost) -> None:
    """All that is read before the machine is made, in the order of an assignment."""
    look, bdfs, size = Look(host), [NVME, EDU], 1 << 30
    for bdf in bdfs:
        look.require(bdf)
    backing = choose_backing(host, size, bdfs).backing
    choose_nodes(host, bdfs)
    assign.check_guest(bdfs, look, size, backing, 2)
    plan_memory(size, host.reserved_regions(), backing=backing)
    assign.check(bdfs, look)
    reads = host.counted()
    assert reads[KMSG] == 1
    assert {file: count for file, count in reads.items() if count > 1} == BY_ALL


@pytest.mark.parametrize("bdf", [NVME, EDU])
def test_a_borrow_checks_again_but_not_the_kernels_log(host: CountingHost, tmp_path: Path, bdf: Bdf) -> None:
    """The uses of the device once, under the lock; open nodes once more before vfio-pci is unbound."""
    look = Look(host)
    assign.check([bdf], look)
    host.counted()
    with borrow(bdf, sysfs=host, state_dir=tmp_path / "state", look=look):
        reads = host.counted()
        assert (reads[KMSG], reads["proc"]) == (0, 1)
        assert reads[f"sys/bus/pci/devices/{bdf}/vendor"] == 3  # checked; recorded in the journal; bound
    reads = host.counted()
    assert (reads[KMSG], reads["proc"]) == (0, 1 if bdf == NVME else 0)


def test_a_borrow_alone_checks_twice_but_reads_the_kernels_log_once(host: CountingHost, tmp_path: Path) -> None:
    """Before the lock, and under it."""
    with borrow(NVME, EDU, sysfs=host, state_dir=tmp_path / "state"):
        reads = host.counted()
    assert (reads[KMSG], reads["proc"]) == (1, 2)
