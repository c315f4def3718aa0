"""The limits of the caller: every one refuses with its name and a remedy, before anything changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.host_tree import Host

import kvmpass
from kvmpass import host as library
from kvmpass.errors import HostNotReady, NotEnoughMemory
from kvmpass.host import Bdf, diagnose, limits
from kvmpass.host.doctor import Finding, Outcome
from kvmpass.layout import GIB, MIB

NVME = Bdf(0, 1, 0, 0)
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
SERVICE = "sys/fs/cgroup/system.slice/lab.service"
ABOVE = "sys/fs/cgroup/system.slice"
LINE = "{:<26}{:<21}{:<21}{:<10}"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.add(str(NVME), "nvme", 7, config=b"\x22\x10\x34\x12" + bytes(60))
    rlimits(host)
    host.put("proc/self/mountinfo", V2)
    host.put("proc/self/cgroup", "0::/system.slice/lab.service")
    for directory in ("sys/fs/cgroup", ABOVE, SERVICE):
        host.put(f"{directory}/memory.stat", "anon 1048576\nactive_file 10485760\ninactive_file 10485760")
        for file in ("memory.max", "memory.high", "pids.max", "hugetlb.2MB.max"):
            host.put(f"{directory}/{file}", "max")
        for file in ("memory.current", "pids.current", "hugetlb.2MB.current"):
            host.put(f"{directory}/{file}", "0")
    return host


def rlimits(host: Host, **values: str) -> None:
    names = {"as": "Max address space", "data": "Max data size", "nproc": "Max processes", "fsize": "Max file size"}
    names |= {"nofile": "Max open files", "cpu": "Max cpu time", "memlock": "Max locked memory"}
    lines = [LINE.format("Limit", "Soft Limit", "Hard Limit", "Units")]
    lines += [LINE.format(name, *[values.get(key, "unlimited")] * 2, "x") for key, name in names.items()]
    host.put("proc/self/limits", "\n".join(lines))


def found(host: Host, kind: str, outcome: Outcome = Outcome.FAIL, **options: int) -> Finding:
    """The one finding that is no pass."""
    wrong = [finding for finding in diagnose(host, NVME, **options) if finding.blocker]
    assert [(finding.blocker.kind, finding.outcome) for finding in wrong if finding.blocker] == [(kind, outcome)]
    assert host.writes == []
    return wrong[0]


def text(finding: Finding) -> str:
    assert finding.blocker is not None
    return "\n".join([finding.blocker.cause, finding.blocker.remedy, *finding.blocker.commands])


def test_without_limits(host: Host) -> None:
    assert {finding.outcome for finding in diagnose(host, NVME)} == {Outcome.PASS}
    host.put("proc/self/cgroup", "0::/")
    assert {finding.outcome for finding in diagnose(host, NVME, huge_page=0)} == {Outcome.PASS}


# --- cgroups


@pytest.mark.parametrize(
    ("directory", "command"),
    [
        (SERVICE, "systemctl set-property --runtime lab.service MemoryMax="),
        (ABOVE, "systemctl set-property --runtime system.slice MemoryMax="),
        ("sys/fs/cgroup", f"echo {1192 * MIB} > /sys/fs/cgroup/memory.max"),
    ],
)
def test_memory_at_every_level(host: Host, directory: str, command: str) -> None:
    host.put(f"{directory}/memory.max", str(300 * MIB))
    finding = found(host, "cgroup-memory")
    assert f"/{directory}/memory.max leaves 300 MiB" in text(finding)
    assert command in text(finding)
    assert f"/{directory}/memory.max: 300 MiB, 300 MiB of it left" in [str(reading) for reading in finding.read]
    with pytest.raises(NotEnoughMemory, match=r"memory\.max leaves 300 MiB"):
        library.doctor.check_memory(host, GIB)
    blockers = kvmpass.plan([NVME], memory="1G", sysfs=host).blockers
    assert [blocker.kind for blocker in blockers] == ["cgroup-memory"]
    assert {finding.outcome for finding in diagnose(host, NVME, memory=128 * MIB)} == {Outcome.PASS}


def test_what_the_cgroup_uses_counts_and_its_files_do_not(host: Host) -> None:
    host.put(f"{SERVICE}/memory.max", str(1266 * MIB))
    host.put(f"{SERVICE}/memory.current", str(100 * MIB))
    found(host, "cgroup-memory")  # 1186 MiB are left: 20 of the 100 are files
    host.put(f"{SERVICE}/memory.stat", f"active_file {50 * MIB}\ninactive_file {50 * MIB}\nshmem 7")
    assert {finding.outcome for finding in diagnose(host, NVME)} == {Outcome.PASS}
    [ceiling] = limits.memory_ceilings(host)
    assert ceiling.left == 1266 * MIB
    library.doctor.check_memory(host, 1258 * MIB, overhead=8 * MIB)
    with pytest.raises(NotEnoughMemory):
        library.doctor.check_memory(host, 1259 * MIB, overhead=8 * MIB)


def test_memory_high_stalls(host: Host) -> None:
    host.put(f"{SERVICE}/memory.high", str(300 * MIB))
    finding = found(host, "cgroup-memory-high")
    assert "lab.service MemoryHigh=" in text(finding)


@pytest.mark.parametrize("file", ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"])
def test_version_1(host: Host, file: str) -> None:
    base = "sys/fs/cgroup/memory/user.slice"
    host.put("proc/self/mountinfo", "31 30 0:27 / /sys/fs/cgroup/memory rw shared:5 - cgroup cgroup rw,memory")
    host.put(
        "proc/self/cgroup", "11:pids:/user.slice\n4:memory:/user.slice\n1:name=systemd:/user.slice/session-1.scope"
    )
    for name in ("memory", "memory.memsw"):
        host.put(f"{base}/{name}.limit_in_bytes", "9223372036854771712")
        host.put(f"{base}/{name}.usage_in_bytes", str(10 * MIB))
    host.put(f"{base}/memory.stat", f"inactive_file 0\ntotal_inactive_file {4 * MIB}")
    assert {finding.outcome for finding in diagnose(host, NVME)} == {Outcome.PASS}
    host.put(f"{base}/{file}", str(300 * MIB))
    assert f"/{base}/{file} leaves 294 MiB" in text(found(host, "cgroup-memory"))


def test_a_container_sees_its_root(host: Host) -> None:
    """A cgroup namespace; and one without, whose mount shows the container's cgroup as its root."""
    host.put("sys/fs/cgroup/memory.max", str(300 * MIB))
    for own, root in (("/", "/"), ("/../other", "/"), ("/docker/abc", "/docker/abc"), ("/gone", "/docker/abc")):
        host.put("proc/self/cgroup", f"0::{own}")
        host.put("proc/self/mountinfo", V2.replace(" / /sys", f" {root} /sys"))
        assert "/sys/fs/cgroup/memory.max leaves" in text(found(host, "cgroup-memory")), own


def test_a_users_unit_and_a_containers_scope(host: Host) -> None:
    user = "user.slice/user-1000.slice/user@1000.service/app.slice/mine.service"
    docker = "system.slice/docker-0123.scope"
    for path, command in (
        (user, "systemctl --user set-property --runtime mine.service MemoryMax="),
        (docker, f"> /sys/fs/cgroup/{docker}/memory.max"),
    ):
        host.put("proc/self/cgroup", f"0::/{path}")
        host.put(f"sys/fs/cgroup/{path}/memory.max", str(300 * MIB))
        assert command in text(found(host, "cgroup-memory"))


def test_huge_pages(host: Host) -> None:
    pool = "sys/kernel/mm/hugepages/hugepages-2048kB"
    for name in ("free_hugepages", "nr_hugepages"):
        host.put(f"{pool}/{name}", "1000")
    host.put(f"{SERVICE}/memory.max", str(300 * MIB))  # huge pages are none of its business
    options = {"memory": GIB, "huge_page": 2 * MIB}
    assert {finding.outcome for finding in diagnose(host, NVME, **options)} == {Outcome.PASS}
    host.put("proc/self/mountinfo", f"{V2},memory_hugetlb_accounting")
    found(host, "cgroup-memory", **options)
    host.put("proc/self/mountinfo", V2)
    host.put(f"{ABOVE}/hugetlb.2MB.max", str(512 * MIB))
    finding = found(host, "cgroup-huge-pages", **options)
    assert f"echo {GIB} > /{ABOVE}/hugetlb.2MB.max" in text(finding)
    host.put(f"{ABOVE}/hugetlb.2MB.max", "max")
    host.put(f"{SERVICE}/hugetlb.2MB.rsvd.max", "0")
    found(host, "cgroup-huge-pages", **options)


def test_tasks(host: Host) -> None:
    host.put(f"{ABOVE}/pids.max", "20")
    host.put(f"{ABOVE}/pids.current", "12")
    finding = found(host, "tasks-low")
    assert "systemctl set-property --runtime system.slice TasksMax=22" in text(finding)
    with pytest.raises(HostNotReady, match="up to 10 threads"):
        library.doctor.check_limits(host, 64 * MIB)
    host.put(f"{ABOVE}/pids.current", "2")
    assert {finding.outcome for finding in diagnose(host, NVME)} == {Outcome.PASS}
    found(host, "tasks-low", cpus=32)


@pytest.mark.parametrize(
    "damage",
    [
        {"proc/self/cgroup": "nonsense"},
        {"proc/self/cgroup": "0::/../../.."},
        {"proc/self/mountinfo": "x - y\n1 2 3\n - cgroup2"},
        {f"{SERVICE}/memory.max": "-1"},
        {f"{SERVICE}/memory.max": ""},
        {f"{SERVICE}/memory.stat": "active_file x\n\nactive_file"},
        {"proc/self/limits": "Max open files\nMax processes 1\nMax address space  x y z"},
        {"proc/self/status": "Uid:\nCapEff: zz\nMems_allowed_list: 0-99999999999,x,3-"},
    ],
)
def test_damaged_files(host: Host, damage: dict[str, str]) -> None:
    for path, content in damage.items():
        host.put(path, content)
    assert {finding.outcome for finding in diagnose(host, NVME)} == {Outcome.PASS}


# --- the process's own


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("address-space-low", {"as": str(GIB)}, ["RLIMIT_AS is 1024 MiB of which 50 MiB are used", "LimitAS="]),
        ("address-space-low", {"data": str(GIB)}, ["RLIMIT_DATA is 1024 MiB of which 20 MiB are used", "LimitDATA="]),
        ("descriptors-low", {"nofile": "12"}, ["23 file descriptors are needed, 12", "LimitNOFILE=23"]),
        ("file-size-low", {"fsize": "4096"}, ["RLIMIT_FSIZE", "LimitFSIZE=1048576"]),
        ("memlock-low", {"memlock": "8388608"}, ["LimitMEMLOCK=1073741824"]),
        ("tasks-low", {"nproc": "12"}, ["RLIMIT_NPROC leaves 5", "LimitNPROC=17"]),
    ],
)
def test_its_own_limits(host: Host, kind: str, values: dict[str, str], words: list[str]) -> None:
    host.put("proc/self/status", "Uid:\t7\t7\t7\t7\nVmSize: 51200 kB\nVmData: 20480 kB\nCapEff: 0")
    host.put("proc/99/status", "Uid:\t7\t7\t7\t7\nThreads:\t7")
    host.put("proc/98/status", "Uid:\t8\t7\t7\t7\nThreads:\t70")
    rlimits(host, **values)
    finding = found(host, kind)
    for word in words:
        assert word in text(finding)
    assert "/etc/systemd/system/lab.service.d/kvmpass.conf; systemctl daemon-reload" in text(finding)
    host.put("proc/self/cgroup", "0::/user.slice/user-7.slice/session-1.scope")
    assert "systemctl" not in "".join(found(host, kind).blocker.commands)  # type: ignore[union-attr]
    if kind not in ("memlock-low",):
        with pytest.raises((HostNotReady, NotEnoughMemory)):
            library.doctor.check_limits(host, GIB)


def test_root_has_as_many_processes_as_it_likes(host: Host) -> None:
    rlimits(host, nproc="1")
    host.put("proc/self/status", "Uid:\t0\t0\t0\t0\nCapEff: 0")
    assert {finding.outcome for finding in diagnose(host, NVME)} == {Outcome.PASS}
    host.put("proc/self/status", "Uid:\t7\t7\t7\t7\nCapEff: 1000000")  # CAP_SYS_RESOURCE
    assert {finding.outcome for finding in diagnose(host, NVME)} == {Outcome.PASS}


def test_cpu_time_is_a_warning(host: Host) -> None:
    rlimits(host, cpu="600")
    finding = found(host, "cpu-time-limited", Outcome.WARN)
    assert "kvmpass restore" in text(finding)
    library.doctor.check_limits(host, GIB)


def test_memory_of_some_nodes(host: Host) -> None:
    for node, free in ((0, 100), (1, 4000)):
        host.put(
            f"sys/devices/system/node/node{node}/meminfo",
            f"Node {node} MemFree: {free * 1024} kB\nNode {node} Inactive(file): {10 * 1024} kB",
        )
    host.put("proc/self/status", "Uid:\t7\nMems_allowed_list:\t0-1")
    assert {finding.outcome for finding in diagnose(host, NVME)} == {Outcome.PASS}
    host.put("proc/self/status", "Uid:\t7\nMems_allowed_list:\t0")
    assert "110 MiB are available on the NUMA nodes that this process may use: 0" in text(
        found(host, "memory-nodes-short")
    )


def test_huge_pages_of_some_nodes(host: Host) -> None:
    """The pool counts those of all nodes. What others have reserved may be on nodes that are not this process's."""
    base = "sys/kernel/mm/hugepages/hugepages-2048kB"
    for file, number in (("free", 600), ("nr", 700), ("resv", 400)):
        host.put(f"{base}/{file}_hugepages", str(number))
    for node, free in ((0, 200), (1, 400)):
        host.put(f"sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/free_hugepages", str(free))
        host.put(f"sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/nr_hugepages", "350")
        host.put(f"sys/devices/system/node/node{node}/meminfo", f"Node {node} MemFree: {200 << 10} kB")

    def short(pages: int) -> list[str]:
        findings = diagnose(host, NVME, memory=pages * 2 * MIB, huge_page=2 * MIB)
        return [finding.blocker.kind for finding in findings if finding.blocker]

    host.put("proc/self/status", "Uid:\t7\nMems_allowed_list:\t0-1")
    assert (short(200), short(201)) == ([], ["huge-pages-short"])
    host.put("sys/devices/system/node/node2/meminfo", "")  # a node without memory is online, and never allowed
    host.put("sys/devices/system/node/has_memory", "0-1\n")
    assert (short(200), short(201)) == ([], ["huge-pages-short"])
    host.put("proc/self/status", "Uid:\t7\nMems_allowed_list:\t0")
    assert (short(200), short(201)) == ([], ["huge-pages-nodes-short"])
    host.put(f"{base}/resv_hugepages", "450")  # 50 of them are on node 0
    assert (short(150), short(151)) == ([], ["huge-pages-nodes-short"])
    finding = found(host, "huge-pages-nodes-short", memory=160 * 2 * MIB, huge_page=2 * MIB)
    assert "300 MiB of them are free on the NUMA nodes that this process may use: 0" in text(finding)
    assert finding.blocker is not None and finding.blocker.commands == (
        "echo 360 > /sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages",
    )


def test_this_very_process() -> None:
    """The kernel's own files: each limit is one that getrlimit tells, too."""
    import resource

    sysfs = library.Sysfs()
    for name, which in (("Max open files", resource.RLIMIT_NOFILE), ("Max address space", resource.RLIMIT_AS)):
        mine = [None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(which)]
        found = limits.rlimit(library.Look(sysfs), name)
        assert [found.soft, found.hard] == mine
    for ceiling in [*limits.memory_ceilings(sysfs), *limits.task_ceilings(sysfs)]:
        assert ceiling.limit >= 0
