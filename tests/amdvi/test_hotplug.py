"""Hotplug: devices added to a running guest, and removed by the machine, by the guest and by the host."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.inside import SOAK
from support.living import InSession, descriptors, device_routes, image_for, running, wait_until
from support.modes import Mode, through_all_modes
from support.recording import Calls, recording
from support.witness import traces

from kvmpass import Session, host
from kvmpass.errors import GuestError
from kvmpass.events import DeviceError, DeviceEvent, DeviceReleased, DeviceRequest, DeviceReset
from kvmpass.guest.agent import Agent
from kvmpass.initramfs.init import AGENT_PORT, RUN_COMMAND
from kvmpass.layout import MIB, Range
from kvmpass.machine import AssignedDevice, GuestOutcome, Machine
from kvmpass.pci.barspace import IO_WINDOW
from kvmpass.vfio.device import ERR

pytestmark = [pytest.mark.amdvi(duration=8), pytest.mark.usefixtures("as_without_tests")]
PLUGS = 100 if SOAK else 5


@through_all_modes
def test_hotplug_of_a_drive(mode: Mode, nvme: str) -> None:
    """The guest reads it; no mapping, memslot, route, descriptor or locked memory remains."""
    script = f"""n=0; while [ $n -lt {PLUGS} ]; do
        wait_for drive; dd if=$drive of=/dev/null bs=64k count=4 && echo "read it"
        wait_for '! present'; echo gone; n=$((n + 1)); done"""
    with host.borrow(nvme), running(script) as guest:
        machine = guest.machine
        before = None
        for number in range(1, PLUGS + 1):
            device = machine.assign(nvme)
            machine.audit()
            assert mode.locked() == 192 * MIB
            guest.expect("read it", number)
            assert device.interrupt == "MSI-X"
            assert device_routes(machine)
            machine.unplug(device, 30)
            machine.audit()
            assert (machine.devices, device_routes(machine), machine.domain.ledger, mode.locked()) == ([], [], [], 0)
            assert len(machine.memslots.ledger) == len(machine.memory)
            assert traces("vfio/[0-9]|vfio/devices|vfio-device|iommu") == []
            guest.expect("gone", number)
            before = before or descriptors()
            assert descriptors() == before
        assert guest.end().status == 0


def test_a_guest_that_does_not_eject_keeps_the_device(edu: str) -> None:
    """A paused guest runs, and cannot eject; ``deassign`` does not ask."""
    with host.borrow(edu), running("echo up; sleep 1000", events=(events := [])) as guest:
        guest.expect("up")
        guest.machine.pause(30)
        device = guest.machine.assign(edu)
        with pytest.raises(GuestError, match="did not eject"):
            guest.machine.unplug(device, 0.05)
        assert guest.machine.devices == [device]
        guest.machine.audit()
        guest.machine.deassign(device)
        assert DeviceReleased(edu, "host") in events
        guest.machine.audit()


# One guest for several tests, which has the drivers of these devices. A test plugs those that it is about.
GUEST = {"devices": ("nvme?", "nic?", "edu?"), "memory": "192M", "reuse": "module"}
SHARED = pytest.mark.guest(**GUEST)


@pytest.fixture
def empty(kvmpass_guest: Session) -> Session:
    """The guest, once it has ejected its devices, which are still bound to vfio-pci."""
    for device in list(kvmpass_guest.machine.devices):
        kvmpass_guest.machine.unplug(device, 30)
    assert kvmpass_guest.machine.devices == []
    return kvmpass_guest


def since(guest: Session, count: int) -> tuple[DeviceEvent, ...]:
    """The events after the first ``count``."""
    return guest.events[-(guest.event_count - count) :] if guest.event_count > count else ()


def place(device: AssignedDevice) -> str:
    """Where the guest finds it."""
    return f"/sys/bus/pci/devices/0000:00:{device.slot:02x}.{device.number}"


@SHARED
def test_the_guest_ejects_a_device(edu: str, empty: Session) -> None:
    before, device = empty.event_count, empty.machine.assign(edu)
    script = f"""wait_for '[ -e {place(device)} ]'; echo 0 >/sys/bus/pci/slots/{device.slot}/power
        wait_for '[ ! -e {place(device)} ]'; echo ejected"""
    guest = InSession(empty, script)
    guest.expect("ejected")
    wait_until(lambda: DeviceReleased(edu, "guest") in since(empty, before))
    assert guest.machine.devices == []
    guest.machine.audit()
    assert guest.end() == 0


@SHARED
def test_hotplug_of_a_card_with_an_io_bar(nic: str, empty: Session) -> None:
    """The guest finds ports for it, and reads a register through them: the receive address that every card has."""
    device = empty.machine.assign(nic)
    script = f"""wait_for '[ -e {place(device)}/net ]'; cd {place(device)}
        echo ${{PWD##*/}} >driver/unbind; echo 1 >enable
        number=0; while read -r start end flags; do
            [ $((flags & 0x100)) -eq 0 ] || {{ port=$number; echo ports $start $end; }}; number=$((number + 1))
        done <resource
        printf '\\000\\124\\000\\000' | dd of=resource$port bs=4 count=1 conv=notrunc 2>/dev/null
        echo address $(dd if=resource$port bs=4 skip=1 count=1 2>/dev/null | hexdump -e '1/4 "%08x"'); go_on"""
    guest = InSession(empty, script)
    guest.expect("\n", 2)
    words = [line.split() for line in guest.said.splitlines()]
    assert words[0][0] == "ports", guest.said
    assert IO_WINDOW.contains(Range(int(words[0][1], 16), int(words[0][2], 16) - int(words[0][1], 16) + 1))
    wanted = device.regions[0].read_int(0x5400)
    assert words[1] == ["address", f"{wanted:08x}"]
    guest.go_on()
    assert guest.end() == 0


@SHARED
def test_hotplug_of_a_second_function(multifunction: str, empty: Session) -> None:
    """A guest does not scan a slot again whose function 0 is not multifunction: the other gets its own slot."""
    group = (Path("/sys/bus/pci/devices") / multifunction / "iommu_group/devices").iterdir()
    functions, machine = sorted(path.name for path in group), empty.machine
    script = "wait_for present; echo one; wait_for '[ -e /sys/bus/pci/devices/0000:00:02.0 ]'; echo two"
    with host.borrow(*functions):
        try:
            first = machine.assign(functions[0])
            guest = InSession(empty, script)
            guest.expect("one")
            second = machine.assign(functions[1])
            guest.expect("two")
            assert [(device.slot, device.number) for device in (first, second)] == [(1, 0), (2, 0)]
            machine.unplug(first, 30)
            assert machine.devices == [second]
            machine.audit()
            machine.unplug(second, 30)
        finally:  # if it has failed
            for device in list(machine.devices):
                machine.deassign(device)
    assert guest.end() == 0


@pytest.mark.guest(**GUEST, may_die=True)
def test_the_host_requests_a_devices_release(edu: str, nvme: str, empty: Session) -> None:
    """The device is unbound: the guest ejects it, and keeps the other one."""
    before, machine = empty.event_count, empty.machine
    kept, requested = machine.assign(nvme), machine.assign(edu)
    script = (
        f"wait_for '[ -e {place(requested)} ]'; wait_for drive; echo up; wait_for '[ ! -e {place(requested)} ]'; "
    )
    script += "dd if=$drive of=/dev/null bs=64k count=4 2>/dev/null && echo 'read it'"
    guest = InSession(empty, script)
    guest.expect("up")
    Path("/sys/bus/pci/drivers/vfio-pci/unbind").write_text(edu)
    assert host.Sysfs().driver(host.Bdf.parse(edu)) is None
    guest.expect("read it")
    assert {DeviceRequest(edu), DeviceReleased(edu, "guest")} <= set(since(empty, before))
    assert machine.devices == [kept]
    machine.audit()
    assert guest.end() == 0
    empty.stop()
    assert host.Sysfs().driver(host.Bdf.parse(edu)) is None
    assert host.Sysfs().driver(host.Bdf.parse(nvme)) == "nvme"


def test_an_error_of_the_device_ends_the_guest_or_calls_python(nvme: str) -> None:
    """The interrupt of an uncorrected error, raised by VFIO's loopback."""
    with host.borrow(nvme):
        with running("echo up; sleep 1000") as guest:
            device = guest.machine.assign(nvme)
            guest.expect("up")
            device.vfio.irqs[ERR].trigger()
            assert guest.end().outcome is GuestOutcome.DEVICE_ERROR
        with running("echo up; sleep 1000", events=(events := [])) as guest:
            device = guest.machine.assign(nvme)
            guest.expect("up")
            device.vfio.irqs[ERR].trigger()
            wait_until(lambda: DeviceError(nvme) in events)
            assert not guest.machine.ended


@pytest.mark.amdvi(profile="modern", qemu="modern", kernel="full")
def test_an_error_that_the_root_port_reports(nic: str) -> None:
    """PCI Express AER from the port's service driver on: injected there (drivers/pci/pcie/aer_inject.c)."""
    injector = Path("/dev/aer_inject")
    if not injector.exists():
        pytest.skip("this kernel has no /dev/aer_inject: CONFIG_PCIEAER_INJECT would make it run")
    bdf = host.Bdf.parse(nic)
    poisoned = 0x1000  # a poisoned TLP in the uncorrectable error status (PCI Express base, 7.8.4.2)
    error = struct.pack("<BBBxIIIIIII", bdf.bus, bdf.device, bdf.function, poisoned, 0, 0, 1, 2, 3, bdf.domain)
    events: list[DeviceEvent] = []
    with host.borrow(nic), Machine(memory="8M", on_event=events.append, stop_on_error=False) as machine:
        device = machine.assign(nic)
        assert ERR in device.vfio.irqs
        injector.write_bytes(error)
        wait_until(lambda: DeviceError(nic) in events)
        machine.audit()


def test_a_drive_after_guest_reboot(nvme: str, destructive: None) -> None:
    """The guest counts its boots on the drive; each boot has a new VM."""
    boots = 100 if SOAK else 3
    script = f"""n=$(dd if=/dev/nvme0n1 bs=512 count=1 2>/dev/null | tr -d '\\0'); n=$((${{n:-0}} + 1))
        printf %s $n | dd of=/dev/nvme0n1 bs=512 conv=sync,fsync 2>/dev/null
        grep -c nvme0q /proc/interrupts; [ $n -lt {boots} ] || {{ echo "boot $n"; exit 0; }}; reboot -f; sleep 30"""
    node = next(Path(f"/sys/bus/pci/devices/{nvme}").glob("nvme/nvme*/nvme*n1")).name
    Path(f"/dev/{node}").write_bytes(bytes(512))
    options = ("--memory", "192M", "--on-reboot", "restart")
    result = subprocess.run(
        [sys.executable, "-m", "kvmpass", "assign", nvme, *options, "--", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=60 * boots,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["2"] * boots + [f"boot {boots}"]
    assert host.Sysfs().driver(host.Bdf.parse(nvme)) == "nvme"


def run_command(machine: Machine, said: bytearray) -> Agent:
    """Let the next boot's agent run the image's command."""
    port = machine.ports[AGENT_PORT]
    port.reset()
    agent = Agent(port.send)
    agent.start(RUN_COMMAND, receive=lambda process, stream, data: said.extend(data))
    return agent


@through_all_modes
def test_a_reset_clears_all_state(mode: Mode, nvme: str) -> None:
    said, events, calls = bytearray(), list[DeviceEvent](), Calls()
    options: dict[str, Any] = {"on_event": events.append, "backend": recording(calls, mode.backend)}
    with host.borrow(nvme), Machine(memory="192M", **options) as machine:
        image = image_for("wait_for drive; echo up; sleep 1000")
        device = machine.assign(nvme)
        image.load(machine)
        agents = [run_command(machine, said)]
        machine.connect({AGENT_PORT: lambda data: agents[-1].feed(data)})
        machine.start()
        wait_until(lambda: said.count(b"up") == 1, 60)
        assert device.interrupt == "MSI-X"
        mapped, former, open_before = list(calls), machine.vm, descriptors()
        machine.reset()
        assert calls == mapped, "nothing is mapped again"
        assert machine.vm is not former and former.closed
        assert machine.routes.msi == []
        assert (device.interrupt, machine.devices) == ("INTx", [device])
        resets = [event for event in events if isinstance(event, DeviceReset)]
        assert [event.reason for event in resets] == ["assign", "guest reset"]
        assert "unknown" not in [event.method for event in resets]
        machine.audit()
        agents.append(run_command(machine, said))
        machine.start()
        wait_until(lambda: said.count(b"up") == 2, 60)
        assert descriptors() == open_before
    assert [event.reason for event in events if isinstance(event, DeviceReset)][2:] == ["deassign"]
    assert traces("vfio|kvm|iommu") == []
