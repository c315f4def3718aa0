"""Peer-to-peer: an edu device's DMA engine copies into and out of a BAR of another assigned device, or not at all."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.configuring import CONFIGURE, config_of
from support.guests import run
from support.inside import SOAK
from support.modes import MODES, Mode, machines_use
from support.witness import Edu, pattern

from kvmpass import host
from kvmpass.dma import DmaMapping
from kvmpass.errors import HostNotReady
from kvmpass.layout import MIB, PAGE
from kvmpass.machine import AssignedDevice, Machine
from kvmpass.memory import MemoryRegion, RegionKind
from kvmpass.pci import AssignedFunction
from kvmpass.pciregs import BAR0, CAP_EXPRESS, CAP_POWER, COMMAND, capabilities
from kvmpass.vfio import RegionMapping

Valid = Callable[[str, str | bytes], Any]
SCRATCH = 0x10_0000
SHARED = 2  # ivshmem's BAR with the shared memory
FILTER_TABLE, FILTER_SIZE = 0x5600, 512  # of an igb: registers that keep what is written (VFTA)

NEXT = pytest.mark.amdvi(profile="next", duration=4)
in_both_ways = pytest.mark.parametrize("mode", ["type1", "iommufd"], indirect=True)


class Bench:
    """A machine with an edu, whose DMA is what reaches a peer's BAR, or does not."""

    def __init__(self, machine: Machine, edu: str) -> None:
        self.machine = machine
        self.source = machine.assign(edu)
        self.edu = Edu(self.source)

    def assign(self, bdf: str) -> AssignedDevice:
        """Another device, which decodes memory."""
        peer = self.machine.assign(bdf)
        peer.enable(bus_master=False)
        return peer

    def bars(self, peer: AssignedDevice) -> list[DmaMapping]:
        """What is mapped of its BARs."""
        return [mapping for mapping in self.machine.domain.ledger if mapping.device == str(peer.bdf)]

    def shared(self, peer: AssignedDevice) -> int:
        """Where the shared memory is mapped, all of it."""
        [mapping] = [mapping for mapping in self.bars(peer) if mapping.bar == SHARED]
        assert (mapping.size, mapping.writable) == (peer.regions[SHARED].size, True)
        assert mapping.iova == self.address(peer)
        return mapping.iova

    def address(self, peer: AssignedDevice, bar: int = SHARED) -> int:
        """Where the BAR's register says that it is."""
        config, at = config_of(self.machine, peer), BAR0 + 4 * bar
        low = config(at, 4)
        return low & ~0xF | (config(at + 4, 4) << 32 if low & 4 else 0)

    def copy(self, source: int, target: int) -> None:
        """16 bytes by the edu's DMA."""
        self.edu.load(source)
        self.edu.store(target)

    def check_reaches(self, peer: AssignedDevice, offset: int = 0, bar: int = SHARED) -> None:
        """In both directions."""
        memory, region, at = self.machine.memory, peer.regions[bar], self.address(peer, bar) + offset
        data, other = pattern(), pattern()
        memory.write(SCRATCH, data)
        self.copy(SCRATCH, at)
        assert region.read(offset, 16) == data
        for part in range(0, 16, 4):
            region.write(offset + part, other[part : part + 4])
        self.copy(at, SCRATCH)
        assert memory.read(SCRATCH, 16) == other
        self.machine.audit()

    def check_misses(self, at: int, peer: AssignedDevice) -> None:
        """Neither direction at ``at``, where the peer's shared memory was, or is for others."""
        memory, region = self.machine.memory, peer.regions[SHARED]
        kept, data = pattern(), pattern()
        region.write(0, kept)
        memory.write(SCRATCH, data)
        self.copy(SCRATCH, at)
        assert region.read(0, 16) == kept
        self.copy(at, SCRATCH)
        assert memory.read(SCRATCH, 16) != kept
        self.machine.audit()


def bar_of(machine: Machine) -> MemoryRegion:
    """The region of the shared memory."""
    return next(region for region in machine.memory if region.kind is RegionKind.BAR and region.size >= MIB * 2)


@contextmanager
def bench_with(edu: str, *others: str, p2p: bool = True) -> Iterator[Bench]:
    with host.borrow(edu, *others), Machine(memory="8M", p2p=p2p) as machine:
        yield Bench(machine, edu)


@NEXT
@in_both_ways
def test_the_first_and_the_last_page(mode: Mode, edu: str, peer: str) -> None:
    with bench_with(edu, peer) as bench:
        device = bench.assign(peer)
        assert bench.shared(device)
        for offset in (0, device.regions[SHARED].size - PAGE, device.regions[SHARED].size - 16):
            bench.check_reaches(device, offset)


@NEXT
@in_both_ways
def test_what_is_not_a_peers(mode: Mode, edu: str, edu2: str, peer: str) -> None:
    """Without peer-to-peer; of another machine, with it in both."""
    with bench_with(edu, peer, p2p=False) as bench:
        device = bench.assign(peer)
        assert bench.bars(device) == []
        bench.check_misses(bench.address(device), device)
    with bench_with(edu, edu2, peer) as bench, Machine(memory="8M", p2p=True) as machine:
        other = Bench(machine, edu2)
        device = other.assign(peer)
        bench.check_misses(other.shared(device), device)
        other.check_reaches(device)


@NEXT
@in_both_ways
def test_what_ends_a_mapping_and_what_brings_it_back(mode: Mode, edu: str, peer: str) -> None:
    """Decoding, another place, resets by the host, a reset of the machine, the device's removal."""
    with bench_with(edu, peer) as bench:
        device = bench.assign(peer)
        config, size = config_of(bench.machine, device), device.regions[SHARED].size
        home, register = bench.shared(device), BAR0 + 4 * SHARED
        config(COMMAND, 2, 0)
        assert bench.bars(device) == []
        device.config.write_int(COMMAND, 2, 2)  # behind the guest's back: to see what arrives
        bench.check_misses(home, device)
        device.config.write_int(COMMAND, 0, 2)
        config(COMMAND, 2, 2)
        bench.check_reaches(device)

        config(register, 4, (home + 2 * size) & 0xFFFF_FFFF)
        assert bench.shared(device) == home + 2 * size
        bench.check_misses(home, device)
        bench.check_reaches(device, size - PAGE)

        assert device.vfio.resettable
        bench.machine.reset_device(device)
        device.enable(bus_master=False)
        assert bench.shared(device) == home + 2 * size
        bench.check_reaches(device)

        bench.machine.reset()
        assert bench.bars(device) == []
        device.enable(bus_master=False)
        bench.edu = Edu(bench.machine.devices[0])
        bench.check_reaches(device)
        home = bench.shared(device)

        bench.machine.deassign(device)
        bench.machine.audit()
        assert bench.bars(device) == []
        with Machine(memory="8M") as machine:
            elsewhere = machine.assign(peer)
            elsewhere.enable(bus_master=False)
            bench.check_misses(home, elsewhere)
        bench.check_reaches(bench.assign(peer))


@NEXT
@in_both_ways
def test_a_guest_resets_a_peer_and_lets_it_sleep(mode: Mode, edu: str, igb: str) -> None:
    """Its registers around the MSI-X table are reached again each time: with iommufd these are new dma-bufs."""
    with bench_with(edu, igb) as bench:
        device = bench.assign(igb)
        config = config_of(bench.machine, device)
        at = {capability.id: capability.offset for capability in capabilities(config)}
        control, power = at[CAP_EXPRESS] + 8, at[CAP_POWER] + 4
        before = [(mapping.bar, mapping.iova, mapping.size) for mapping in bench.bars(device)]
        bench.check_reaches(device, FILTER_TABLE, bar=0)
        config(control, 2, config(control, 2) | 0x8000)
        assert device.regions[0].read_int(FILTER_TABLE) == 0, "it was not reset"
        assert [(mapping.bar, mapping.iova, mapping.size) for mapping in bench.bars(device)] == before
        bench.check_reaches(device, FILTER_TABLE, bar=0)
        config(power, 2, 3)
        assert bench.bars(device) == []
        bench.machine.audit()
        config(power, 2, 0)
        config(COMMAND, 2, 2)
        assert [(mapping.bar, mapping.iova, mapping.size) for mapping in bench.bars(device)] == before
        bench.check_reaches(device, FILTER_TABLE + FILTER_SIZE - 16, bar=0)


@NEXT
@in_both_ways
def test_whatever_is_written_to_configuration_space(mode: Mode, edu: str, igb: str, peer: str) -> None:
    """Decoding, places, power states and resets at random: no mapping while a device sleeps or does not decode.

    BARs are put over each other, over guest memory and where interrupts are. At the end both are reached as before.
    """
    chance = random.Random(14)
    with bench_with(edu, igb, peer) as bench:
        devices = [bench.assign(igb), bench.assign(peer)]
        registers = {device: (0,) if device is devices[0] else (SHARED,) for device in devices}
        places = [bench.address(device, bar) for device in devices for bar in registers[device]]
        places += [SCRATCH, 0xFEE0_0000, 0xFFFF_FFFF, 0]
        config = config_of(bench.machine, devices[0])
        at = {capability.id: capability.offset for capability in capabilities(config)}
        control, power = at[CAP_EXPRESS] + 8, at[CAP_POWER] + 4
        for _ in range(400 if SOAK else 60):
            device = chance.choice(devices)
            config = config_of(bench.machine, device)
            what = chance.choice(("decode", "decode", "move", "move", "reset", "sleep", "wake", "host"))
            if what == "decode":
                config(COMMAND, 2, chance.choice((0, 2, 2)))
            elif what == "move":
                config(BAR0 + 4 * chance.choice(registers[device]), 4, chance.choice(places) & 0xFFFF_FFFF)
            elif what == "host":
                bench.machine.reset_device(device)
            elif device is devices[0]:
                register, value = {"reset": (control, 0x8000), "sleep": (power, 3), "wake": (power, 0)}[what]
                config(register, 2, value)
            bench.machine.audit()
            if bench.bars(device):
                assert config(COMMAND, 2) & 2
                assert device is devices[1] or not config(power, 2) & 3
            assert len(bench.machine.domain.ledger) == len(bench.machine.memslots.ledger)
        for number, device in enumerate(devices):
            config, [bar] = config_of(bench.machine, device), registers[device]
            if device is devices[0]:
                config(power, 2, 0)
            config(COMMAND, 2, 0)
            config(BAR0 + 4 * bar, 4, places[number] & 0xFFFF_FFFF)
        for device, [bar] in registers.items():
            device.enable(bus_master=False)
            bench.check_reaches(device, FILTER_TABLE if bar == 0 else 0, bar)


def siblings_are_reset_together(edu: str, sibling: str, sibling2: str) -> None:
    """A reset of one's bus resets the other one: both are reached before it and after it."""
    with bench_with(edu, sibling, sibling2) as bench:
        devices = [bench.assign(bdf) for bdf in (sibling, sibling2)]
        for device in devices:
            for offset in (0, device.regions[SHARED].size - PAGE):
                bench.check_reaches(device, offset)
        assert bench.machine.reset_device(devices[0]).method == "bus"
        for device in devices:
            device.enable(bus_master=False)
            bench.check_reaches(device)


@NEXT
@in_both_ways
def test_a_reset_of_a_bus(mode: Mode, edu: str, sibling: str, sibling2: str) -> None:
    siblings_are_reset_together(edu, sibling, sibling2)


@pytest.mark.amdvi(profile="odd")
def test_a_reset_of_a_bus_on_any_kernel(edu: str, sibling: str, sibling2: str) -> None:
    """Type 1, on the run's own kernel and QEMU."""
    siblings_are_reset_together(edu, sibling, sibling2)


@NEXT
@in_both_ways
def test_a_device_whose_bar_stays_mapped_is_not_given_back(
    mode: Mode, edu: str, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays open, and its file with it; until then the edu reaches it, and the machine says so."""
    with host.borrow(edu, peer):
        machine = Machine(memory="8M", p2p=True)
        bench = Bench(machine, edu)
        device, real = bench.assign(peer), machine.domain.backend.unmap

        def unmap(region: MemoryRegion) -> int:
            if isinstance(region.mapping, RegionMapping) and region.mapping.device is device.vfio:
                raise OSError(errno.EBUSY, "unmap")
            return real(region)

        with monkeypatch.context() as patch:
            patch.setattr(machine.domain.backend, "unmap", unmap)
            with pytest.raises(OSError, match="unmap"):
                machine.reset_device(device)
            bench.check_reaches(device)
            home, data = bench.shared(device), pattern()
            with pytest.raises(OSError, match="unmap"):
                machine.deassign(device)
            machine.memory.write(SCRATCH, data)
            bench.copy(SCRATCH, home)
            assert device.regions[SHARED].read(0, 16) == data
            machine.audit()
            with pytest.raises(OSError, match="unmap") as failed:
                machine.close()
            assert any(f"{peer} stays open" in note for note in failed.value.__notes__)
            assert [other.vfio.closed for other in (*machine.devices, bench.source)] == [False, True]
        assert device.function is not None
        device.function.close()
        machine.domain.close()
        machine.memory.close()
        assert device.vfio.closed


# --- a guest


COPY = """
put $first 4 6; put $second 4 2  # memory, and of the edu bus mastering
edu=$(($(get $first 16) & ~15))
shared=$(($(get $second 24) & ~15 | $(get $second 28) << 32))
dma() {
    devmem $((edu + 0x80)) 64 $1; devmem $((edu + 0x88)) 64 $2
    devmem $((edu + 0x90)) 64 8; devmem $((edu + 0x98)) 64 $3
    while [ $(($(devmem $((edu + 0x98)) 64) & 1)) -eq 1 ]; do usleep 10000; done
}
devmem $shared 64 0x1122334455667788
dma $shared 0x40000 1
dma 0x40000 $((shared + SIZE - 8)) 3
devmem $((shared + SIZE - 8)) 64
printf '0x%x\\n' $shared
"""


@pytest.mark.parametrize(
    "role, size",
    [
        pytest.param("sibling", MIB, marks=pytest.mark.amdvi(profile="odd")),
        *([pytest.param("peer", 64 * MIB, marks=NEXT)] if SOAK else []),
    ],
)
def test_a_guest_copies_from_bar_to_bar(
    role: str, size: int, edu: str, tmp_path: Path, valid: Valid, request: pytest.FixtureRequest
) -> None:
    """The guest lets its edu copy from one end of the BAR to the other; the status file says where that was."""
    peer = request.getfixturevalue(role)
    status, script = tmp_path / "status.json", CONFIGURE + COPY.replace("SIZE", str(size))
    options = ("--p2p", "--memory", "192M", "--status-file", str(status))
    result = run("assign", *options, edu, peer, "--", "sh", "-c", script)
    assert result.returncode == 0, result.stderr
    copied, at = result.stdout.split()
    assert copied == b"0x1122334455667788"
    report = valid("status-file", status.read_text())
    assert {"bdf": peer, "bar": SHARED, "iova": at.decode(), "size": size} in report["peer_mappings"]
    assert {mapping["bdf"] for mapping in report["peer_mappings"]} == {edu, peer}


# --- planted bugs: the checks above must catch them


@NEXT
@in_both_ways
def test_a_mapping_that_is_not_removed_is_caught(
    mode: Mode, edu: str, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Type 1 keeps it, and the device is still reached; iommufd revokes it, and unmapping it tells nothing."""
    with bench_with(edu, peer) as bench:
        device, backend = bench.assign(peer), bench.machine.domain.backend
        home, config, region = bench.shared(device), config_of(bench.machine, device), bar_of(bench.machine)
        with monkeypatch.context() as patch:
            patch.setattr(backend, "unmap", lambda region: region.size)
            config(COMMAND, 2, 0)
        device.config.write_int(COMMAND, 2, 2)
        if mode.name == "type1":
            with pytest.raises(AssertionError):
                bench.check_misses(home, device)
        else:
            bench.check_misses(home, device)
        assert backend.unmap(region) == region.size
        bench.check_misses(home, device)


@NEXT
def test_a_reset_without_a_new_mapping_is_caught(edu: str, igb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Iommufd's is revoked for good: the audit holds, and nothing arrives any more."""
    with machines_use(MODES["iommufd"]), bench_with(edu, igb) as bench:
        monkeypatch.setattr(AssignedFunction, "_starts_reset", lambda *_: False)
        device = bench.assign(igb)
        config = config_of(bench.machine, device)
        control = next(cap.offset for cap in capabilities(config) if cap.id == CAP_EXPRESS) + 8
        bench.check_reaches(device, FILTER_TABLE, bar=0)
        config(control, 2, config(control, 2) | 0x8000)
        bench.machine.audit()
        with pytest.raises(AssertionError):
            bench.check_reaches(device, FILTER_TABLE, bar=0)


# --- kernels that cannot


@pytest.mark.amdvi(kernel="full")
@pytest.mark.parametrize("name, where", [("iommufd", r"Linux 6\.19"), ("compat", "iommufd serves")])
def test_a_kernel_that_maps_no_bars(name: str, where: str, edu: str) -> None:
    """It is refused before anything is mapped; without peer-to-peer the device is taken."""
    with host.borrow(edu), machines_use(MODES[name]), Machine(memory="8M", p2p=True) as machine:
        if name == "iommufd" and host.Sysfs().kernel() >= (6, 19):
            pytest.skip("this kernel maps BARs: a kernel before 6.19 makes it run")
        with pytest.raises(HostNotReady, match=where):
            machine.assign(edu)
        assert (machine.devices, machine.domain.active, machine.domain.ledger) == ([], False, [])
        machine.domain.p2p = False
        machine.assign(edu)
        machine.audit()
