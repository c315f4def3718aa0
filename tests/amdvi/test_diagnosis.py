"""Hosts that really lack something: doctor names the one cause, and nothing else fails. Plans that come true."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.inside import LAB_ONLY
from support.modes import Mode, through_compat_too
from support.recording import Calls, recording

import kvmpass
from kvmpass import host
from kvmpass.host import Bdf, Sysfs
from kvmpass.host.doctor import Outcome
from kvmpass.host.limits import CONSOLE_DESCRIPTORS
from kvmpass.layout import MIB, Range, Reserved
from kvmpass.vfio.device import MSI, MSIX

SYSFS = Sysfs()
NOBODY = 65534
HOLE = Reserved(Range(32 * MIB, 16 * MIB), "reserved")
STANDARD = 3  # input, output, errors: open whatever we do


@pytest.fixture(autouse=True)
def unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KVMPASS_STATE_DIR", str(tmp_path / "state"))
    before = [(device.bdf, device.driver, device.driver_override) for device in SYSFS.devices()]
    yield
    assert [(device.bdf, device.driver, device.driver_override) for device in SYSFS.devices()] == before


def failures(bdf: str | None = None, **options: Any) -> list[str]:
    findings = host.diagnose(SYSFS, Bdf.parse(bdf) if bdf else None, **options)
    return [finding.blocker.kind for finding in findings if finding.outcome is Outcome.FAIL and finding.blocker]


def failures_as(action: Callable[[], object], bdf: str | None = None, **options: Any) -> list[str]:
    """The same in a fork that has done ``action`` to itself."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
            os.write(writer, json.dumps(failures(bdf, **options)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, "rb") as file:  # noqa: PTH123 - a descriptor
        found = json.loads(file.read())
    assert isinstance(found, list)
    return found


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_the_commands(nvme: str, valid: Callable[..., Any], emulated_host: bool) -> None:
    """A host that is ready, as the command line tells it; real hosts may have warnings of their own."""
    words = [sys.executable, "-m", "kvmpass"]
    done = subprocess.run([*words, "doctor", nvme, "--json"], capture_output=True, text=True, timeout=60, check=False)
    document = valid("doctor", done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert document["ok"]
    if emulated_host:
        assert {finding["outcome"] for finding in document["findings"]} == {"pass"}
    done = subprocess.run(
        [*words, "plan", nvme, "--memory", "64M", "--json"], capture_output=True, text=True, timeout=60, check=False
    )
    document = valid("plan", done.stdout)
    assert (done.returncode, done.stderr, document["blockers"]) == (0, "", [])
    assert document["devices"][0]["driver"] == "nvme"


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("svm-off", marks=pytest.mark.amdvi(profile="no-svm")),
        pytest.param("no-ivrs", marks=pytest.mark.amdvi(profile="no-iommu")),
        # The emulated firmware names no IOAPIC then, and the kernel says so.
        pytest.param("ioapic-not-in-ivrs", marks=pytest.mark.amdvi(profile="no-intremap")),
    ],
)
def test_a_host_that_lacks_something(kind: str, edu: str) -> None:
    assert failures(edu) == [kind]
    assert [blocker.kind for blocker in kvmpass.plan([edu], memory="64M").blockers] == [kind]


@pytest.mark.amdvi(profile="wrong-ioapic", kernel="full")
def test_the_kernels_message_explains_a_refusal(edu: str) -> None:
    """And what it made of the command line: two words that it ignores, one of which it says so itself."""
    findings = {finding.check: finding for finding in host.diagnose(SYSFS, Bdf.parse(edu))}
    remapping, idle = findings["interrupt-remapping"].blocker, findings["idle-options"].blocker
    assert remapping is not None
    assert remapping.kind == "no-southbridge-ioapic"
    assert "ivrs_ioapic=ID@00:14.0" in remapping.remedy
    read = " ".join(map(str, findings["interrupt-remapping"].read))
    assert "No southbridge IOAPIC found" in read
    assert "/proc/cmdline: ivrs_ioapic=0@00:13.0" in read
    assert idle is not None
    assert "amd_iommu=pt and pcie_acs_override=downstream" in idle.cause
    assert findings["acs-override"].outcome is Outcome.PASS
    with pytest.raises(kvmpass.errors.HostNotReady, match="southbridge"):
        host.doctor.check_host(SYSFS)


@pytest.mark.amdvi(profile="no-iommu", kernel="full")
def test_no_iommu_mode(edu: str) -> None:
    switch = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")
    override = Path("/sys/bus/pci/devices", edu, "driver_override")
    switch.write_text("Y")
    override.write_text("vfio-pci\n")
    try:
        Path("/sys/bus/pci/drivers_probe").write_text(edu)
        findings = {finding.check: finding for finding in host.diagnose(SYSFS, Bdf.parse(edu))}
        assert [finding.check for finding in findings.values() if finding.outcome is Outcome.FAIL] == [
            "firmware-iommu"
        ]
        mode = findings["noiommu-mode"]
        assert mode.outcome is Outcome.WARN
        assert mode.blocker is not None
        assert edu in mode.blocker.cause
    finally:
        Path("/sys/bus/pci/drivers/vfio-pci/unbind").write_text(edu)
        override.write_text("\n")
        switch.write_text("N")


def test_a_sibling_in_use(multifunction: str) -> None:
    assert failures(multifunction) == ["group-not-viable"]
    made = kvmpass.plan([multifunction], memory="64M")
    assert [sibling.role for sibling in made.devices[0].siblings] == ["blocks"]
    group = SYSFS.device(Bdf.parse(multifunction)).group
    assert group is not None
    whole = kvmpass.plan(SYSFS.group(group).devices, memory="64M")
    assert whole.blockers == ()
    assert {sibling.role for device in whole.devices for sibling in device.siblings} == {"assigned"}


def test_a_bridge_in_the_group(bridged: str) -> None:
    made = kvmpass.plan([bridged], memory="64M")
    assert made.blockers == ()
    assert {sibling.role for sibling in made.devices[0].siblings} == {"bridge"}


@pytest.mark.destructive
def test_a_mounted_drive(nvme2: str, tmp_path: Path) -> None:
    node = next(Path(f"/sys/bus/pci/devices/{nvme2}").glob("nvme/nvme*/nvme*n1")).name
    subprocess.run(["/bin/busybox", "mke2fs", f"/dev/{node}"], check=True, capture_output=True)
    subprocess.run(["mount", "-t", "ext4", f"/dev/{node}", str(tmp_path)], check=True)
    try:
        assert failures(nvme2) == ["in-use"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_memlock(edu: str) -> None:
    """CAP_IPC_LOCK overrides the limit, so it must go first."""
    script = """if True:
        import sys
        from kvmpass import host
        found = host.diagnose(host.Sysfs(), host.Bdf.parse(sys.argv[1]))
        print(*[finding.blocker.kind for finding in found if finding.outcome == "fail"])
        """
    words = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit", "--memlock=8388608"]
    words += [sys.executable, "-c", script, edu]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "memlock-low\n", done.stderr


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A control group of version 2 with the controllers that limit us, for children to move into."""
    root, made = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/kvmpass-test/inner.service")
    if not (root / "cgroup.controllers").exists():
        pytest.skip("no cgroup version 2 at /sys/fs/cgroup: systemd.unified_cgroup_hierarchy=1 at boot makes it run")
    (root / "cgroup.subtree_control").write_text("+memory +pids")
    made.mkdir(parents=True)
    (made.parent / "cgroup.subtree_control").write_text("+memory +pids")
    yield made
    made.rmdir()
    made.parent.rmdir()


def in_cgroup(cgroup: Path, *words: str) -> subprocess.CompletedProcess[str]:
    def enter() -> None:
        (cgroup / "cgroup.procs").write_text("0")

    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=120, check=False, preexec_fn=enter
    )


@pytest.mark.amdvi(kernel="full", duration=20)
def test_the_memory_of_a_cgroup(nvme: str, cgroup: Path) -> None:
    """doctor, plan and assign see the limit, be it the group's own or that of one above it; the drive stays."""
    for limited in (cgroup, cgroup.parent):
        (limited / "memory.max").write_text(str(300 * MIB))
        for command in ("doctor", "plan"):
            done = in_cgroup(cgroup, "-m", "kvmpass", command, nvme, "--memory", "1G", "--json")
            document = json.loads(done.stdout)
            kinds = [
                finding["blocker"]["kind"] for finding in document.get("findings", ()) if finding["outcome"] == "fail"
            ]
            assert (done.returncode, [*kinds, *[blocker["kind"] for blocker in document.get("blockers", ())]]) == (
                1,
                ["cgroup-memory"],
            )
        done = in_cgroup(cgroup, "-m", "kvmpass", "assign", nvme, "--memory", "1G", "--", "true")
        assert done.returncode == 125, done.stderr
        assert f"{limited}/memory.max leaves" in done.stderr
        assert SYSFS.driver(Bdf.parse(nvme)) == "nvme"
        (limited / "memory.max").write_text("max")
    (cgroup.parent / "pids.max").write_text("5")
    done = in_cgroup(cgroup, "-m", "kvmpass", "doctor", "--json")
    (cgroup.parent / "pids.max").write_text("max")
    kinds = [
        finding["blocker"]["kind"] for finding in json.loads(done.stdout)["findings"] if finding["outcome"] == "fail"
    ]
    assert kinds == ["tasks-low"]


@pytest.mark.amdvi(kernel="full")
def test_killed_while_populating(nvme: str, cgroup: Path) -> None:
    """Without the check the out-of-memory killer answers: no driver has changed hands by then, nothing is left."""
    (cgroup / "memory.max").write_text(str(200 * MIB))
    script = """if True:
        import sys
        from kvmpass import host
        from kvmpass.cli.main import main
        from kvmpass.machine import assignments
        host.doctor.check_memory = assignments.check_memory = lambda *_, **__: None
        sys.argv[1:] = ["assign", "-v", sys.argv[1], "--memory", "512M", "--", "true"]
        main()
        """
    done = in_cgroup(cgroup, "-c", script, nvme)
    (cgroup / "memory.max").write_text("max")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert SYSFS.driver(Bdf.parse(nvme)) == "nvme"
    assert host.restore() == []


def test_more_memory_than_there_is(edu: str) -> None:
    assert failures(edu, memory=1 << 50) == ["memory-short"]
    assert failures(edu, memory=1 << 40, huge_page=2 * MIB) == ["huge-pages-short"]


def test_an_ordinary_user(edu: str) -> None:
    def become_nobody() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    found = failures_as(become_nobody, edu)
    if Path("/dev/kvm").stat().st_mode & 0o006 == 0o006:  # the world may open it: then the next thing is the cause
        assert found[0] == "no-driver-rights"
    else:
        assert found == ["no-access"]


@pytest.mark.amdvi(profile="stock")  # the full kernel has no modules
def test_a_module_that_is_kept_from_loading(nvme: str, emulated_host: bool) -> None:
    if not emulated_host:
        pytest.skip(f"unloads vfio-pci: {LAB_ONLY}")
    obstacle = Path("/etc/modprobe.d/kvmpass-test.conf")
    node = Path("/dev/vfio/vfio")
    mode = node.stat().st_mode
    subprocess.run(["/sbin/modprobe", "-r", "vfio_pci"], check=True)
    try:
        assert failures(nvme) == []  # it can be loaded
        obstacle.write_text("install vfio-pci /bin/false\n")
        assert failures(nvme) == ["no-vfio-pci"]
    finally:
        obstacle.unlink(missing_ok=True)
        subprocess.run(["/sbin/modprobe", "vfio-pci"], check=True)
        node.chmod(mode & 0o777)  # the node may have gone with the module


# --- plans


class Holed(Sysfs):
    """The host, whose IOMMU does not translate one more range: memory lies on both sides of it."""

    def reserved_regions(self) -> list[Reserved]:
        return sorted([*super().reserved_regions(), HOLE], key=lambda line: line.range)


@through_compat_too
@pytest.mark.parametrize("sysfs", [SYSFS, Holed()], ids=["as-it-is", "with-a-hole"])
def test_a_plan_equals_the_assignment(mode: Mode, nvme: str, edu: str, sysfs: Sysfs) -> None:
    """Its table is the machine's, its counts are those of the kernel, and making it changed nothing."""
    backend = "iommufd" if mode.name == "iommufd" else "type1"
    made = kvmpass.plan([nvme, edu], memory="64M", cpus=2, sysfs=sysfs, backend=backend)
    assert made.blockers == ()
    assert made.memory is not None
    regions = made.memory.regions
    assert len(regions) == made.map_calls == (1 if sysfs is SYSFS else 2)
    opened, locked = descriptors(), mode.locked()
    calls: Calls = []
    with (
        host.borrow(nvme, edu),
        kvmpass.Machine(memory="64M", cpus=2, sysfs=sysfs, backend=recording(calls, mode.backend)) as machine,
    ):
        devices = machine.assign_all([nvme, edu])
        assert machine.layout == made.memory.layout
        real = [region for region in machine.memory if region.kind.dma]  # devices may have BARs in it already
        assert [(region.kind, region.range, region.name, region.backing) for region in real] == [
            (region.kind, region.range, region.name, region.backing) for region in regions
        ]
        assert [(mapping.iova, mapping.size, mapping.writable) for mapping in machine.domain.ledger] == [
            (region.range.start, region.range.size, region.kind.dma_writable) for region in made.memory.mapped
        ]
        slots = sorted((slot.slot, slot.gpa, slot.size, not slot.readonly) for slot in machine.memslots.ledger)
        assert slots[: len(regions)] == [
            (slot, region.range.start, region.range.size, region.kind.guest_writable)
            for slot, region in enumerate(regions)
        ]
        assert [operation for operation, _ in calls] == ["map"] * made.map_calls
        assert mode.locked() - locked == made.locked
        # Not there yet: two vCPUs, two eventfds of INTx each. Not on every host: two of ERR, the kernel's log.
        expected = made.descriptors.fixed - STANDARD - CONSOLE_DESCRIPTORS  # no command runs
        assert expected - 2 - 4 - 2 - 1 <= descriptors() - opened <= expected
        for device, planned in zip(devices, made.devices, strict=True):
            assert device.reset_methods == planned.reset_methods
            assert (device.vfio.irqs[MSIX].count, device.vfio.irqs[MSI].count) == (
                planned.vectors.msix,
                planned.vectors.msi,
            )
            assert device.function is not None
            for bar in planned.bars:
                if bar.name != "rom":
                    shown = next(own for own in device.function._bars if own.name == bar.name)
                    assert (shown.kind, shown.size) == (bar.kind, bar.size)
                    assert tuple(area for area, _ in shown._mappings) == bar.mapped
