"""Hosts with NUMA nodes: where a guest's pages come from, by the kernel's account of this process."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmpass.assignment.assign import assigned
from kvmpass.guest import GuestSpec
from kvmpass.hugepages import node_pool
from kvmpass.layout import MIB
from kvmpass.memory import HUGE, Backing, MachineMemory, MemoryRegion, plan_memory

SIZE = 64 * MIB
SET_MEMPOLICY, MPOL_INTERLEAVE = 238, 3  # asm/unistd_64.h, linux/mempolicy.h

pytestmark = pytest.mark.amdvi(profile="stock")


@pytest.fixture(autouse=True)
def nodes() -> None:
    if not Path("/sys/devices/system/node/node1").exists():
        pytest.skip("needs two NUMA nodes: numa=fake=2 at boot makes them, where the kernel has CONFIG_NUMA_EMU")


@pytest.fixture
def pools() -> Iterator[None]:
    """As many huge pages as a guest needs, on each of two nodes."""
    files = [Path("/", node_pool(node, HUGE), "nr_hugepages") for node in (0, 1)]
    before = [file.read_text() for file in files]
    for file in files:
        file.write_text(str(SIZE // HUGE))
    yield
    for file, number in zip(files, before, strict=True):
        file.write_text(number)


def pages(region: MemoryRegion) -> tuple[str, dict[int, int]]:
    """The policy of a region, and its pages on each node (Documentation/filesystems/proc.rst)."""
    [line] = [
        line for line in Path("/proc/self/numa_maps").read_text().splitlines() if line.startswith(f"{region.hva:x} ")
    ]
    return line.split()[1], {int(node): int(count) for node, count in re.findall(r" N(\d+)=(\d+)", line)}


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("backing", [Backing.ANONYMOUS, Backing.MEMFD, Backing.HUGETLB_2M, Backing.MEMFD_2M])
def test_pages_of_every_kind_come_from_the_node(backing: Backing, node: int, pools: None) -> None:
    memory = MachineMemory(plan_memory(SIZE, backing=backing), (node,))
    try:
        memory.wait()
        [region] = memory.regions
        assert pages(region) == (f"prefer:{node}", {node: SIZE // backing.page_size})
    finally:
        memory.close()


def test_other_nodes_have_what_the_node_lacks(pools: None) -> None:
    """It is a preference: half of these are in the pool of the other node."""
    memory = MachineMemory(plan_memory(2 * SIZE, backing=Backing.HUGETLB_2M), (1,))
    memory.wait()
    [region] = memory.regions
    assert pages(region)[1] == {0: SIZE // HUGE, 1: SIZE // HUGE}
    memory.close()


@pytest.fixture
def on_node_1(nvme: str) -> Iterator[str]:
    file = Path(f"/sys/bus/pci/devices/{nvme}/numa_node")
    before = file.read_text()
    file.write_text("1")
    yield nvme
    file.write_text(before)


def test_a_guest_gets_the_memory_of_its_devices_node(on_node_1: str, tmp_path: Path) -> None:
    (initrd := tmp_path / "initrd").write_bytes(bytes(4096))
    said: list[str] = []
    spec = GuestSpec(initrd=initrd)
    with assigned([on_node_1], spec, memory="256M", say=said.append) as machine:
        for region in machine.memory:
            if region.kind.dma:
                assert pages(region) == ("prefer:1", {1: region.size // 4096})
    assert "NUMA node 1 preferred: the devices are on it" in said


def planned(bdf: str, *options: str, **arguments: Any) -> dict[str, Any]:
    words = [sys.executable, "-m", "kvmpass", "plan", "--json", "--memory", "64M", *options, bdf]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, **arguments)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_policy_of_ones_own_is_respected(on_node_1: str) -> None:
    def interleave() -> None:
        mask = ctypes.c_ulong(3)
        assert ctypes.CDLL(None).syscall(SET_MEMPOLICY, MPOL_INTERLEAVE, ctypes.byref(mask), 64) == 0

    assert planned(on_node_1)["numa"] == {"nodes": [1], "reason": "the devices are on it"}
    own = planned(on_node_1, preexec_fn=interleave)["numa"]
    assert own == {"nodes": [], "reason": "this process has a memory policy of its own"}


def test_a_process_that_may_use_one_node(on_node_1: str, pools: None) -> None:
    """Neither the node of the device nor its huge pages count."""
    root, inner = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/kvmpass-nodes")
    if not (root / "cgroup.controllers").exists():
        pytest.skip("no cgroup version 2 at /sys/fs/cgroup: systemd.unified_cgroup_hierarchy=1 at boot makes it run")
    (root / "cgroup.subtree_control").write_text("+cpuset")
    inner.mkdir()
    try:
        (inner / "cpuset.mems").write_text("0")

        def enter() -> None:
            (inner / "cgroup.procs").write_text(str(os.getpid()))

        def kinds(memory: int) -> list[str]:
            options = ("--hugepages", "2M", "--memory", str(memory))
            return [blocker["kind"] for blocker in planned(on_node_1, *options, preexec_fn=enter)["blockers"]]

        assert (kinds(SIZE), kinds(SIZE + HUGE)) == ([], ["huge-pages-nodes-short"])
        reason = planned(on_node_1, preexec_fn=enter)["numa"]["reason"]
        assert reason == "the devices are on node 1, this process may use node 0 only"
    finally:
        inner.rmdir()
