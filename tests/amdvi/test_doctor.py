"""Hosts that really lack something: doctor names the one cause, and nothing else fails. Plans that come true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from witness import locked_bytes

import kvmpass
from kvmpass import host
from kvmpass.host import Bdf, Outcome, Sysfs
from kvmpass.layout import MIB

SYSFS = Sysfs()
NOBODY = 65534


@pytest.fixture(autouse=True)
def unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KVMPASS_STATE_DIR", str(tmp_path / "state"))
    before = [(one.bdf, one.driver, one.driver_override) for one in SYSFS.devices()]
    yield
    assert [(one.bdf, one.driver, one.driver_override) for one in SYSFS.devices()] == before


def failures(bdf: str | None = None, **options: Any) -> list[str]:
    findings = host.diagnose(SYSFS, Bdf.parse(bdf) if bdf else None, **options)
    return [one.trouble.kind for one in findings if one.outcome is Outcome.FAIL and one.trouble]


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


def test_the_commands(nvme: str, valid: Callable[..., Any], emulated_host: bool) -> None:
    """A host that is ready, as the command line tells it; real hosts may have warnings of their own."""
    words = [sys.executable, "-m", "kvmpass"]
    done = subprocess.run([*words, "doctor", nvme, "--json"], capture_output=True, text=True, timeout=60, check=False)
    document = valid("doctor", done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert document["ok"]
    if emulated_host:
        assert {one["outcome"] for one in document["findings"]} == {"pass"}
    done = subprocess.run(
        [*words, "plan", nvme, "--memory", "64M", "--json"], capture_output=True, text=True, timeout=60, check=False
    )
    document = valid("plan", done.stdout)
    assert (done.returncode, done.stderr, document["blocks"]) == (0, "", [])
    assert document["devices"][0]["driver"] == "nvme"


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("svm-off", marks=pytest.mark.amdvi(profile="no-svm")),
        pytest.param("no-ivrs", marks=pytest.mark.amdvi(profile="no-iommu")),
        pytest.param("no-intremap", marks=pytest.mark.amdvi(profile="no-intremap")),
    ],
)
def test_a_host_that_lacks_something(kind: str, edu: str) -> None:
    assert failures(edu) == [kind]
    assert [one.reason.kind for one in kvmpass.plan([edu], memory="64M").blocks] == [kind]


@pytest.mark.amdvi(profile="no-iommu", kernel="full")
def test_no_iommu_mode(edu: str) -> None:
    switch = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")
    override = Path("/sys/bus/pci/devices", edu, "driver_override")
    switch.write_text("Y")
    override.write_text("vfio-pci\n")
    try:
        Path("/sys/bus/pci/drivers_probe").write_text(edu)
        findings = {one.check: one for one in host.diagnose(SYSFS, Bdf.parse(edu))}
        assert [one.check for one in findings.values() if one.outcome is Outcome.FAIL] == ["firmware-iommu"]
        mode = findings["noiommu-mode"]
        assert mode.outcome is Outcome.WARN
        assert mode.trouble is not None
        assert edu in mode.trouble.cause
    finally:
        Path("/sys/bus/pci/drivers/vfio-pci/unbind").write_text(edu)
        override.write_text("\n")
        switch.write_text("N")


def test_a_sibling_in_use(multifunction: str) -> None:
    assert failures(multifunction) == ["group-not-viable"]
    made = kvmpass.plan([multifunction], memory="64M")
    assert [one.part for one in made.devices[0].members] == ["blocks"]
    group = SYSFS.device(Bdf.parse(multifunction)).group
    assert group is not None
    whole = kvmpass.plan(SYSFS.group(group).devices, memory="64M")
    assert whole.blocks == ()
    assert {member.part for device in whole.devices for member in device.members} == {"taken"}


def test_beside_a_bridge(bridged: str) -> None:
    made = kvmpass.plan([bridged], memory="64M")
    assert made.blocks == ()
    assert {one.part for one in made.devices[0].members} == {"stays"}


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
    script = "import sys; from test_doctor import failures; sys.stdout.write(' '.join(failures(sys.argv[1])))"
    words = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit", "--memlock=8388608"]
    done = subprocess.run(
        [*words, sys.executable, "-c", script, edu],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "memlock-low", done.stderr


def test_more_memory_than_there_is(edu: str) -> None:
    assert failures(edu, memory=1 << 50) == ["memory-short"]
    assert failures(edu, memory=1 << 40, huge_page=2 * MIB) == ["huge-pages-short"]


def test_an_ordinary_user(edu: str) -> None:
    def become_nobody() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    found = failures_as(become_nobody, edu)
    # Where the world may open /dev/kvm the next thing is the one cause.
    assert found == (
        ["no-driver-rights", "memlock-low"] if os.stat("/dev/kvm").st_mode & 0o006 == 0o006 else ["no-access"]
    )


@pytest.mark.amdvi(kernel="stock")
def test_a_module_that_is_kept_from_loading(edu: str, emulated_host: bool) -> None:
    if not emulated_host:
        pytest.skip("unloads vfio-pci: only in the lab")
    obstacle = Path("/etc/modprobe.d/kvmpass-test.conf")
    modules = [name for name in ("vfio_pci", "vfio_pci_core") if Path("/sys/module", name).is_dir()]
    subprocess.run(["/sbin/modprobe", "-r", *modules], check=True)
    try:
        assert failures(edu) == []  # it can be loaded
        obstacle.write_text("install vfio-pci /bin/false\n")
        assert failures(edu) == ["no-vfio-pci"]
    finally:
        obstacle.unlink(missing_ok=True)
        subprocess.run(["/sbin/modprobe", "vfio-pci"], check=True)


# --- plans


@pytest.mark.parametrize("memory", ["64M", "3200M"])
def test_a_plan_comes_true(nvme: str, edu: str, memory: str) -> None:
    """Its table is the machine's, its counts are those of the kernel, and making it changed nothing."""
    made = kvmpass.plan([nvme, edu], memory=memory, cpus=2)
    assert made.blocks == ()
    assert made.memory is not None
    descriptors = len(os.listdir("/proc/self/fd"))
    before = locked_bytes()
    with host.borrow(nvme, edu), kvmpass.Machine(memory=memory, cpus=2) as machine:
        devices = [machine.assign(nvme), machine.assign(edu)]
        table = [(one.range, one.name, one.kind, one.backing) for one in machine.memory if one.dma]
        assert [(one.range, one.name, one.kind, one.backing) for one in made.memory.mapped] == table
        assert machine.layout == made.memory.layout
        ledger = [(one.iova, one.size, one.writable) for one in machine.domain.ledger]
        assert [(r.range.start, r.range.size, r.kind.dma_writable) for r in made.memory.mapped] == ledger
        slots = [(one.slot, one.gpa, one.size, not one.readonly) for one in machine.memslots.ledger]
        assert slots[: len(table)] == [
            (slot, region.range.start, region.range.size, region.kind.guest_writable)
            for slot, region in enumerate(made.memory.regions)
        ]
        assert [call.operation for call in machine.domain.calls] == ["map"] * made.map_calls
        assert locked_bytes() - before == made.locked
        # Counted for a guest that runs and uses INTx; the standard three are among those that were there.
        used = len(os.listdir("/proc/self/fd")) - descriptors
        assert made.descriptors.fixed - 3 - 2 - 4 - 2 <= used <= made.descriptors.fixed - 3
        for device, planned in zip(devices, made.devices, strict=True):
            assert device.reset_methods == planned.resets
            assert planned.vectors.msix == device.vfio.irqs[2].count
            assert planned.vectors.msi == device.vfio.irqs[1].count
            assert device.function is not None
            for bar in planned.bars:
                if bar.name != "rom":
                    real = device.function._bars[bar.index]
                    assert (bar.kind, bar.size) == (real.kind, real.size)
                    assert bar.mapped == tuple(area for area, _ in real._mappings)
