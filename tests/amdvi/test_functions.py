"""What a guest may do to the functions it has: interrupts on and off, sleep, move BARs, read ROMs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.configuring import CONFIGURE, config_of
from support.inside import SOAK
from support.living import InSession, descriptors, device_routes, running, wait_until

from kvmpass import Session, host
from kvmpass.machine import Machine
from kvmpass.memory import RegionKind
from kvmpass.pciregs import BAR0, CAP_MSIX, COMMAND, capabilities
from kvmpass.testing.state import State
from kvmpass.vfio.device import MSIX

pytestmark = [pytest.mark.amdvi(duration=10), pytest.mark.usefixtures("as_without_tests")]

# One guest for several tests. A script leaves its device as it was, or takes it as it is.
SHARED = pytest.mark.guest(devices=("nvme?", "nic?", "edu?", "edu2?"), memory="192M", reuse="module")


class Shared:
    """The guest, and where its devices are."""

    def __init__(self, guest: Session, roles: Mapping[str, str]) -> None:
        self.session = guest
        names = {bdf: role for role, bdf in roles.items()}
        self.devices = {names[str(device.bdf)]: device for device in guest.devices}
        self._slots = "".join(f"{role}=0000:00:{device.slot:02x}.0\n" for role, device in self.devices.items())

    def script(self, text: str, first: str, second: str = "") -> InSession:
        """Start a script, in which ``$first`` and ``$second`` are the addresses of devices in the guest."""
        chosen = f"drive=/dev/nvme0n1; first=${first}; second=${second or first}\n"
        return InSession(self.session, CONFIGURE + self._slots + chosen + text)


@pytest.fixture
def shared(kvmpass_guest: Session, pytestconfig: pytest.Config) -> Shared:
    """The guest, for tests that name the devices that they need by their fixtures."""
    return Shared(kvmpass_guest, State.of(pytestconfig).roles)


@SHARED
def test_an_unbound_driver_leaves_no_interrupt(nvme: str, shared: Shared) -> None:
    """Unloaded and loaded again: MSI-X, then the pin with nothing behind it, then MSI-X again.

    The host counts what the guest handles, or more (two that come together are one there); of the guest's lines,
    ``31: 3 PCI-MSIX-0000:00:01.0 1-edge nvme0q1`` is three of vector 1.
    """
    rounds = 20 if SOAK else 3
    script = f"""for round in $(seq {rounds}); do
        echo $first >/sys/bus/pci/drivers/nvme/unbind; echo unbound; go_on
        echo $first >/sys/bus/pci/drivers/nvme/bind; wait_for drive
        dd if=$drive of=/dev/null bs=64k count=4 2>/dev/null
        awk '/nvme0q/ {{ split($4, number, "-"); print "'$round' vector", number[1], $2 }}' /proc/interrupts
        echo bound; go_on; done"""
    guest, device = shared.script(script, "nvme"), shared.devices["nvme"]
    machine = guest.machine
    for number in range(1, rounds + 1):
        guest.expect("unbound", number)
        assert (device.interrupt, device_routes(machine)) == ("INTx", [])
        assert list(device.interrupt_counts()) == ["INTx"]
        guest.go_on()
        guest.expect("\nbound", number)
        assert device.interrupt == "MSI-X"
        assert len(device_routes(machine)) >= 2
        words = [line.split()[2:] for line in guest.said.splitlines() if line.startswith(f"{number} vector ")]
        counts = {vector: count for vector, count in device.interrupt_counts().items() if count}
        handled = {int(vector): int(count) for vector, count in words if count != "0"}
        assert set(counts) == set(handled) == {0, 1}
        assert all(handled[vector] <= counts[vector] for vector in handled), (handled, counts)
        machine.audit()
        guest.go_on()
    assert guest.end() == 0


@SHARED
def test_a_device_that_vfio_and_the_guest_see_differently(nic: str, shared: Shared) -> None:
    """Asleep, decoding off, awake again: without No_Soft_Reset the device has its decoding back, VFIO does not.

    The disagreement itself: ``test_config_space_and_buses_agree_on_that_device`` (``test_hostile.py``).
    """
    script = """
        sleeper
        put $first 4 6; echo on $(devmem $((at + 8)) 32)
        put $first $register $(($(get $first $register) | 3)); usleep 20000
        put $first 4 0
        put $first $register $(($(get $first $register) & ~3)); usleep 20000
        echo off $(devmem $((at + 8)) 32)
        put $first 4 6; echo again $(devmem $((at + 8)) 32); go_on"""
    guest = shared.script(script, "nic")
    guest.expect("again")
    guest.expect("\n", 3)
    words = dict(line.split() for line in guest.said.splitlines())
    assert words["off"] == "0xFFFFFFFF"
    assert words["on"] == words["again"] != "0xFFFFFFFF"
    guest.machine.audit()
    guest.go_on()
    assert guest.end() == 0


@SHARED
def test_the_guest_resets_its_function(nvme: str, shared: Shared) -> None:
    """By the function's own reset, under a driver that works: its interrupts and its drive are there again."""
    script = """wait_for drive
        cd /sys/bus/pci/devices/$first; echo methods $(cat reset_method)
        for round in 1 2 3; do
            echo 1 >reset || exit 1
            dd if=$drive of=/dev/null bs=64k count=4 iflag=direct 2>/dev/null && echo "read it"; done; go_on"""
    guest = shared.script(script, "nvme")
    guest.expect("read it", 3)
    methods = guest.said.split("methods ")[1].splitlines()[0].split()
    assert "flr" in methods or "pm" in methods
    assert shared.devices["nvme"].interrupt == "MSI-X"
    guest.machine.audit()
    guest.go_on()
    assert guest.end() == 0


@SHARED
def test_the_guest_moves_bars(edu: str, edu2: str, shared: Shared) -> None:
    """Twice in a row, on top of each other, switched off in between; the identification register follows."""
    script = """
        for device in $first $second; do echo 1 >/sys/bus/pci/devices/$device/enable; done
        one=$(($(get $first 16) & ~15)); two=$(($(get $second 16) & ~15))
        devmem $((one + 4)) 32 0x11; devmem $((two + 4)) 32 0x22
        look() { echo $1 $(devmem $((one + 4)) 32) $(devmem $((two + 4)) 32) $(devmem $((0xd0000000 + 4)) 32); }
        look home
        put $first 16 $((0xd0000000)); look moved
        put $first 16 $((0xd4000000)); put $first 16 $((0xd0000000)); look again
        put $second 16 $((0xd0000000)); look on-top
        put $first 16 $((one)); look uncovered
        put $first 4 0; look off
        put $second 16 $((two)); put $first 4 2; look back
        put $first 16 $((0xffffffff)); echo size $(get $first 16); look sizing
        put $first 16 $((one)); look end; go_on"""
    off = "0xFFFFFFFF"
    one, two = "0xFFFFFFEE", "0xFFFFFFDD"  # edu answers with what was written, inverted
    expected = {
        "home": [one, two, off],
        "moved": [off, two, one],
        "again": [off, two, one],
        "on-top": [off, off, one],
        "uncovered": [one, off, two],
        "off": [off, off, two],
        "back": [one, two, off],
        "size": ["0xfff00000"],
        "sizing": [off, two, off],
        "end": [one, two, off],
    }
    guest = shared.script(script, "edu", "edu2")
    guest.expect("end ")
    guest.expect("\n", len(expected))
    assert {line.split()[0]: line.split()[1:] for line in guest.said.splitlines()} == expected
    size = shared.devices["edu"].regions[0].size  # no other device has a BAR of that size
    bars = [region for region in guest.machine.memory if region.kind is RegionKind.BAR and region.size == size]
    assert len(bars) == 2
    guest.machine.audit()
    guest.go_on()
    assert guest.end() == 0


def test_a_device_in_d3hot_reads_as_ones_and_returns_to_d0(nic: str) -> None:
    """D3 and back; on hardware a register of a sleeping device is no register either.

    Its configuration space, as the guest reads it on the fast path, is as Python reads it; then it is removed while
    the guest reads on, and the guest is not told.
    """
    script = """
        sleeper
        echo awake $(devmem $((at + 8)) 32)
        put $first $register $(($(get $first $register) | 3)); usleep 20000
        echo asleep $(devmem $((at + 8)) 32)
        put $first $register $(($(get $first $register) & ~3)); usleep 20000
        echo 0 >/sys/bus/pci/devices/$first/enable; echo 1 >/sys/bus/pci/devices/$first/enable
        echo back $(devmem $((at + 8)) 32)
        echo config $(hexdump -v -e '1/1 "%02x"' /sys/bus/pci/devices/$first/config)
        until [ $(get $first 0) = 0xffffffff ]; do :; done; echo gone; go_on"""
    with host.borrow(nic), running(CONFIGURE + script, nic) as guest:
        guest.expect("\n", 4)
        words = dict(line.split() for line in guest.said.splitlines())
        assert words["asleep"] == "0xFFFFFFFF"
        assert words["awake"] == words["back"] != "0xFFFFFFFF"
        guest.machine.audit()
        (device,), fastpath, config = (
            guest.machine.devices,
            guest.machine._board.fastpath,
            bytes.fromhex(words["config"]),
        )
        read = config_of(guest.machine, device)
        assert config == b"".join(read(at, 4).to_bytes(4, "little") for at in range(0, len(config), 4))
        reads = fastpath.counts["ECAM"][0]
        assert len(config) // 4 <= reads <= guest.machine.exit_reasons["Mmio"]
        wait_until(lambda: fastpath.counts["ECAM"][0] > reads + 10)
        guest.machine.deassign(device)
        guest.expect("gone")
        guest.go_on()
        assert guest.end().status == 0


@pytest.mark.amdvi(profile="odd")
def test_the_guest_reads_the_expansion_rom(nic: str) -> None:
    """Every byte is the device's, as the host reads it."""
    rom = Path("/sys/bus/pci/devices") / nic / "rom"
    if not rom.exists():
        pytest.skip("this card has no expansion ROM: name one that has, as KVMPASS_TEST_NIC")
    rom.write_text("1")
    content = rom.read_bytes()
    rom.write_text("0")
    script = """cd /sys/bus/pci/devices/$first; echo 1 >rom; cat rom >/rom; wc -c </rom; sha256sum /rom; go_on"""
    with host.borrow(nic), running(CONFIGURE + script, nic) as guest:
        guest.expect("\n", 2)
        size, digest, _ = guest.said.split()
        assert int(size) == len(content) > 0
        assert digest == hashlib.sha256(content).hexdigest()
        guest.go_on()
        assert guest.end().status == 0


@pytest.mark.amdvi(profile="devices")
def test_a_large_bar_is_mapped_for_large_pages_and_a_small_one_exits(ivshmem: str) -> None:
    """1 GiB at a host address that is congruent to the guest's; 256 bytes of registers by system call."""
    with host.borrow(ivshmem), Machine(memory="8M") as machine:
        device = machine.assign(ivshmem)
        config = config_of(machine, device)
        config(COMMAND, 2, 0x2)
        size = device.regions[2].size
        assert size >= 2 << 20
        bars = [region for region in machine.memory if region.kind is RegionKind.BAR]
        assert [region.size for region in bars] == [size]
        assert bars[0].gpa == config(BAR0 + 8, 4) & ~0xF | config(BAR0 + 12, 4) << 32
        assert (bars[0].hva - bars[0].gpa) % min(size, 1 << 30) == 0
        small = config(BAR0, 4) & ~0xF
        assert device.regions[0].size < 4096
        machine._board.mmio.write(small, (0x5A5A).to_bytes(4, "little"))  # the interrupt mask: kept, and unused
        assert machine._board.mmio.read(small, 4) == device.regions[0].read(0, 4) == (0x5A5A).to_bytes(4, "little")
        assert machine._board.mmio.read(small + 4096, 4) == b"\xff" * 4
        machine.audit()


@pytest.mark.amdvi(profile="odd")
def test_vectors_far_beyond_those_enabled_first(nvme: str) -> None:
    """What a guest with many CPUs would do, done by its buses: each vector that is unmasked gets its own way.

    As many as the host has: where it refuses one, the others go on.
    """
    with host.borrow(nvme), Machine(memory="8M") as machine:
        device = machine.assign(nvme)
        board, config = machine._board, config_of(machine, device)
        count = device.vfio.irqs[MSIX].count
        at = next(cap.offset for cap in capabilities(config) if cap.id == CAP_MSIX)
        table = config(at + 4, 4)
        bar = config(BAR0 + 4 * (table & 7), 4) & ~0xF | config(BAR0 + 4 * (table & 7) + 4, 4) << 32
        config(COMMAND, 2, 0x6)
        config(at + 2, 2, 0x8000)
        before = descriptors()
        numbers = [*range(0, count, max(1, count // 100)), count - 1]
        for number in numbers:
            entry = bar + (table & ~7) + 16 * number
            board.mmio.write(entry, (0xFEE0_0000).to_bytes(8, "little"))
            board.mmio.write(entry + 8, (0x4000 + number & 0xFF).to_bytes(8, "little"))
        got = len(machine.routes.msi)
        assert descriptors() - before <= len(numbers)
        assert got > 30 if count > 100 else got == count, f"{got} of {len(numbers)} vectors"
        assert (device.interrupt, board.mmio.read(bar + (table & ~7) + 16 * (count - 1) + 12, 4)) == (
            "MSI-X",
            bytes(4),
        )
        board.mmio.write(bar + (table & ~7) + 12, b"\1\0\0\0")
        assert len(machine.routes.msi) == got - 1
        config(at + 2, 2, 0xC000)
        assert machine.routes.msi == [], "all masked"
        config(at + 2, 2, 0x8000)
        assert len(machine.routes.msi) == got - 1
        config(at + 2, 2, 0)
        assert (device.interrupt, machine.routes.msi) == ("INTx", [])
        machine.audit()


def test_memory_and_devices_change_during_io(nvme: str, edu: str) -> None:
    """Regions and another device come and go under the DMA of a guest that reads and compares without a pause."""
    rounds, plugs = (1000, 100) if SOAK else (40, 4)
    script = """wait_for drive
        hash() { dd if=$drive bs=1M count=4 iflag=direct 2>/dev/null | sha256sum; }
        wanted=$(hash); count=0; echo reading
        until [ -e /kvmpass/stop ] || read -t 0 word </dev/ttyS0; do
            [ "$(hash)" = "$wanted" ] || { echo "other bytes in round $count"; exit 1; }
            count=$((count + 1)); done
        echo read $count times"""
    with host.borrow(nvme, edu), running(script, nvme) as guest:
        machine = guest.machine
        guest.expect("reading")
        before = (machine.domain.ledger, [(slot.gpa, slot.size) for slot in machine.memslots.ledger])
        for number in range(rounds):
            region = machine.memory.add_ram(5 << 30, 4 << 20, "extra")
            machine.audit()
            machine.memory.remove(region)
            machine.audit()
            if number % (rounds // plugs) == 0:
                device = machine.assign(edu)
                machine.audit()
                machine.unplug(device, 60)
                machine.audit()
        assert (machine.domain.ledger, [(slot.gpa, slot.size) for slot in machine.memslots.ledger]) == before
        guest.go_on()
        guest.expect("read ", 1)
        guest.expect("times")
        assert guest.end().status == 0
        assert int(guest.said.split("read ")[1].split()[0]) > 2
