"""A guest with a PCI function that no device is behind (tests/support/emulated_edu.py): what Linux makes of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from support.configuring import CONFIGURE
from support.emulated_edu import BUFFER, EmulatedEdu
from support.inside import PRELUDE, SOAK, Done, compiled, edu_script
from support.living import device_routes

from kvmpass.errors import GuestError
from kvmpass.guest import Guest, GuestSpec, prepare
from kvmpass.layout import PAGE
from kvmpass.machine import Machine
from kvmpass.memory import RegionKind
from kvmpass.pci import Wiring

RAISES = 20_000 if SOAK else 500


class Emulated:
    """A machine with the function, its guests' words, and the function as it is now."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.made: list[EmulatedEdu] = []
        machine.add_function(self._make)

    def _make(self, wiring: Wiring) -> EmulatedEdu:
        self.made.append(EmulatedEdu(wiring))
        return self.made[-1]

    def run(self, script: str, *copy: str) -> Done:
        said = bytearray()
        image = prepare(GuestSpec(command=("sh", "-c", script), copy=copy), [])
        with Guest(self.machine, console=None, output=said.extend, errors=said.extend) as guest:
            image.load(self.machine)
            result = guest.run(timeout=240)
        assert result.status is not None, result
        return Done(result.status, said.decode())


def test_linux_enumerates_it_and_reads_its_registers() -> None:
    """Again after a reset of the machine, in the same slot."""
    script = (
        CONFIGURE
        + """
        cd /sys/bus/pci/devices/$first; echo $(cat vendor device class); head -n 1 resource
        echo 1 >enable; at=$(($(get $first 16) & ~15)); devmem $at 32
        devmem $((at + 4)) 32 0x11223344; devmem $((at + 4)) 32; devmem $((at + 0x40000)) 32 0xCAFE0000
        ls -1 /sys/bus/pci/devices"""
    )
    with Machine(memory="192M") as machine:
        emulated = Emulated(machine)
        for _ in range(2):
            found = emulated.run(script).checked
            ids, resource, identity, liveness, *devices = found.splitlines()
            assert ids == "0x1234 0x11e8 0xff0000"
            start, last, _ = (int(number, 16) for number in resource.split())
            assert last - start + 1 == 1 << 20
            assert (identity, liveness) == ("0x010000ED", "0xEEDDCCBB")
            assert devices == ["0000:00:00.0", "0000:00:01.0", "0000:00:1f.0"]
            assert bytes(emulated.made[-1].registers.buffer[:4]) == bytes.fromhex("0000feca")
            [bar] = [region for region in machine.memory if region.kind is RegionKind.BAR]
            assert (bar.gpa, bar.size) == (start + BUFFER, PAGE), "ordinary memory, and the reset takes it out"
            machine.audit()
            with pytest.raises(GuestError, match="before the guest is started"):
                machine.add_function(EmulatedEdu)
            machine.reset()
            if os.environ.get("KVMPASS_LAB"):  # elsewhere its compression may be one that Python does not know
                assert machine.kernel_decompressed, "read from the cache"
            assert all(region.kind is not RegionKind.BAR for region in machine.memory)
    assert len(emulated.made) == 3


def test_a_failed_constructor_uses_no_slot() -> None:
    def fail(wiring: Wiring) -> EmulatedEdu:
        raise OSError("no")

    with Machine(memory="8M") as machine:
        for _ in range(2):
            with pytest.raises(OSError, match="no"):
                machine.add_function(fail)
            assert machine._board.pci.free_slot() == 1
        machine.add_function(EmulatedEdu)
        machine.add_function(EmulatedEdu)
        assert machine._board.pci.free_slot() == 3
        machine.audit()


@pytest.mark.amdvi(kernel="full")  # Debian's kernels have no VFIO without an IOMMU, which edu's program uses
def test_each_of_its_interrupts_is_counted(tmp_path: Path) -> None:
    """By /proc/interrupts of the guest, whose vfio-pci has its MSI-X; none more, none less."""
    script = f"{PRELUDE}\ndevice=$(find_device 0x1234:0x11e8 1)\n{edu_script('msix', RAISES)}"
    with Machine(memory="192M") as machine:
        emulated = Emulated(machine)
        done = emulated.run(script, f"{compiled('edu', tmp_path)}:/edu")
        assert f"raised {RAISES}\n" in done.checked
        assert re.search(r"^dma [1-9]\d* bytes$", done.text, re.MULTILINE)
        kinds, total = done.interrupts("after")
        assert kinds == {"PCI-MSIX"}
        [function] = emulated.made
        assert total == function.registers.raised == RAISES + 2, "one at the end of each DMA"
        assert device_routes(machine) == [], "vfio-pci in the guest has turned them off"
