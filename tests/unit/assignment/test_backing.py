"""The choice of a guest's backing and of its NUMA nodes, on hosts made of files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from support.host_tree import Host

from kvmpass.assignment import backing
from kvmpass.assignment.backing import choose_backing, choose_nodes
from kvmpass.host import Bdf
from kvmpass.layout import GIB, MIB
from kvmpass.memory import Backing
from kvmpass.numa import NODES

NVME, NIC = Bdf.parse("0000:01:00.0"), Bdf.parse("0000:02:00.0")
SHORT = "1 GiB pages: 0 MiB of 2048 MiB free"


def pool(host: Host, page: int, free: int, reserved: int = 0, node: int | None = None) -> None:
    """``node``: the part of a pool that is on it, of which the kernel does not say how much is reserved."""
    place = "sys/kernel/mm" if node is None else f"sys/devices/system/node/node{node}"
    base = f"{place}/hugepages/hugepages-{page >> 10}kB"
    host.put(f"{base}/free_hugepages", str(free))
    host.put(f"{base}/nr_hugepages", str(free))
    if node is None:
        host.put(f"{base}/resv_hugepages", str(reserved))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.add(str(NVME), "nvme", 7)
    host.add(str(NIC), "igb", 8)
    return host


@pytest.mark.parametrize(
    ("size", "large", "small", "backing", "reason"),
    [
        (2 * GIB, 2, 4096, "hugetlb-1G", "1 GiB pages: 2048 MiB free, 2048 MiB wanted"),
        (2 * GIB, 1, 1024, "hugetlb-2M", "1 GiB pages: 1024 MiB of 2048 MiB free; 2 MiB pages: 2048 MiB free, 2048"),
        (2 * GIB, 0, 1023, "anonymous", f"{SHORT}; 2 MiB pages: 2046 MiB of 2048 MiB free"),
        (512 * MIB, 8, 256, "hugetlb-2M", "1 GiB pages: 512 MiB is not a multiple; 2 MiB pages: 512 MiB free, 512"),
        (65 * MIB, 8, 256, "anonymous", "2 MiB pages: 65 MiB is not a multiple"),
    ],
)
def test_auto_takes_the_largest_pages_that_are_enough(
    host: Host, size: int, large: int, small: int, backing: str, reason: str
) -> None:
    pool(host, GIB, large)
    pool(host, 2 * MIB, small)
    choice = choose_backing(host, size, [NVME])
    assert (choice.backing, choice.automatic) == (backing, True)
    assert reason in choice.reason
    shared = choose_backing(host, size, [NVME], shared=True)
    assert (shared.backing, shared.reason) == (Backing(backing).shared, choice.reason)


def test_auto_takes_no_pages_that_leave_the_first_addresses_empty(host: Host) -> None:
    """Such as an exclusion range of the IVRS does, where the device reaches memory past the IOMMU."""
    host.put("sys/kernel/iommu_groups/7/reserved_regions", "0x0000000020000000 0x000000002000ffff reserved\n")
    pool(host, GIB, 8)
    pool(host, 2 * MIB, 4096)
    choice = choose_backing(host, 2 * GIB, [NVME])
    assert choice.backing is Backing.HUGETLB_2M
    assert "1 GiB pages: this host reserves addresses that the guest's first one needs" in choice.reason


def test_pages_that_others_have_reserved_are_not_free(host: Host) -> None:
    pool(host, GIB, 2, reserved=1)
    assert choose_backing(host, GIB).backing is Backing.HUGETLB_1G
    assert choose_backing(host, 2 * GIB).backing is Backing.ANONYMOUS


def test_a_host_without_pools(host: Host) -> None:
    choice = choose_backing(host, 2 * GIB)
    assert str(choice) == f"anonymous: {SHORT}; 2 MiB pages: 0 MiB of 2048 MiB free"


def test_a_limit_of_the_cgroup_rules_pages_out(host: Host) -> None:
    """An access beyond the limit would be a SIGBUS."""
    pool(host, GIB, 1)
    pool(host, 2 * MIB, 512)
    host.put("proc/self/mountinfo", "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
    host.put("proc/self/cgroup", "0::/part")
    host.put("sys/fs/cgroup/part/hugetlb.1GB.max", "0")
    host.put("sys/fs/cgroup/part/hugetlb.1GB.current", "0")
    choice = choose_backing(host, GIB)
    assert choice.backing is Backing.HUGETLB_2M
    assert choice.reason.startswith("1 GiB pages: 0 MiB of 1024 MiB left in /sys/fs/cgroup/part; 2 MiB pages: 1024")


def test_the_reason_says_what_is_free_on_the_devices_node(host: Host) -> None:
    pool(host, GIB, 3)
    pool(host, GIB, 2, node=0)
    pool(host, GIB, 1, node=1)
    host.put(f"sys/bus/pci/devices/{NVME}/numa_node", "1")
    free = "1 GiB pages: 3072 MiB free, 2048 MiB wanted"
    assert choose_backing(host, 2 * GIB, [NVME]).reason == f"{free}, 1024 MiB free on NUMA node 1, the device's"
    for elsewhere in ("0", "-1", "9"):  # no one node of both devices
        host.put(f"sys/bus/pci/devices/{NIC}/numa_node", elsewhere)
        assert choose_backing(host, 2 * GIB, [NVME, NIC]).reason == free
    assert choose_backing(host, 2 * GIB).reason == free


def test_what_is_asked_for_is_taken(host: Host) -> None:
    assert str(choose_backing(host, GIB, wanted="hugetlb-2M")) == "hugetlb-2M: requested"
    assert str(choose_backing(host, GIB, wanted=Backing.ANONYMOUS)) == "anonymous: no huge pages requested"
    assert choose_backing(host, GIB, wanted="anonymous", shared=True).backing is Backing.MEMFD
    assert not choose_backing(host, GIB, wanted="hugetlb-1G").automatic
    with pytest.raises(ValueError, match="4K"):
        choose_backing(host, GIB, wanted="4K")


# --- NUMA nodes


@pytest.fixture
def numa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Four nodes, a process with no policy of its own that may use all, and devices without a node."""
    numa = Host(tmp_path)
    for number, bdf in enumerate((NVME, NIC)):
        numa.add(str(bdf), "nvme", 7 + number)
    for node in range(4):
        numa.put(f"{NODES}/node{node}/meminfo", "")
    numa.put("proc/self/status", "Mems_allowed_list:\t0-3")
    numa.put("proc/sys/kernel/osrelease", "6.12.0")
    monkeypatch.setattr(backing, "memory_policy", lambda: 0)
    return numa


def choose(numa: Host, *near: int) -> tuple[Sequence[int], str]:
    for bdf, node in zip((NVME, NIC), near, strict=False):
        numa.put(f"sys/bus/pci/devices/{bdf}/numa_node", str(node))
    choice = choose_nodes(numa, (NVME, NIC)[: len(near)])
    return choice.nodes, str(choice)


def test_the_devices_nodes(numa: Host) -> None:
    assert choose(numa, 2) == ((2,), "NUMA node 2 preferred: the devices are on it")
    assert choose(numa, 3, 1) == ((1, 3), "NUMA nodes 1, 3 preferred: the devices are on them")
    assert choose(numa, 1, 1) == ((1,), "NUMA node 1 preferred: the devices are on it")
    assert choose(numa, -1, 0) == (
        (0,),
        "NUMA node 0 preferred: 0000:01:00.0 is on an unknown node, 0000:02:00.0 is on node 0",
    )


def test_several_need_a_kernel_that_prefers_several(numa: Host) -> None:
    numa.put("proc/sys/kernel/osrelease", "5.14.21")
    assert choose(numa, 3, 1) == (
        (),
        "no NUMA node preferred: 0000:01:00.0 is on node 3, 0000:02:00.0 is on node 1, and Linux prefers several "
        "nodes from 5.15 on",
    )
    assert choose(numa, 3, 3)[0] == (3,)


def test_devices_without_a_node(numa: Host) -> None:
    for near in ((-1,), (-1, -1)):
        assert choose(numa, *near) == ((), "no NUMA node preferred: the devices' node is unknown")


def test_a_policy_of_ones_own_is_respected(numa: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "memory_policy", lambda: 3)
    assert choose(numa, 2) == ((), "no NUMA node preferred: this process has a memory policy of its own")


def test_nodes_that_the_process_may_not_use(numa: Host) -> None:
    numa.put("proc/self/status", "Mems_allowed_list:\t0-1")
    places, only = "0000:01:00.0 is on node {}, 0000:02:00.0 is on node {}", "this process may use nodes 0, 1 only"
    assert choose(numa, 1, 3) == ((1,), f"NUMA node 1 preferred: {places.format(1, 3)}, {only}")
    assert choose(numa, 2, 3) == ((), f"no NUMA node preferred: {places.format(2, 3)}, {only}")
    assert choose(numa, 3, 3) == ((), f"no NUMA node preferred: the devices are on node 3, {only}")


def test_nodes_without_memory(numa: Host) -> None:
    numa.put(f"{NODES}/has_memory", "0-1")
    assert choose(numa, 2) == ((), "no NUMA node preferred: the devices are on node 2, node 2 has no memory")
    assert choose(numa, 1) == ((1,), "NUMA node 1 preferred: the devices are on it")


def test_a_host_with_one_node_has_nothing_to_say(numa: Host, tmp_path: Path) -> None:
    for node in (1, 2, 3):
        numa.path(NODES, f"node{node}", "meminfo").unlink()
        numa.path(NODES, f"node{node}").rmdir()
    assert choose(numa, 0) == ((), "no NUMA node preferred: ")
    assert choose_nodes(numa, []).reason == ""


def test_this_very_process() -> None:
    assert backing.memory_policy() in range(8)
