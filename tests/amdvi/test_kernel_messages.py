"""The warnings and errors of a guest's kernel under kvmpass are those under QEMU, with the same kernel and devices.

A kernel logs what is wrong with a machine. QEMU's q35 machine is the reference, since kernels are tested on it; each
message that only our machine causes is a bug, unless it is explained below.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.complaints import normal, unexplained
from support.inside import SOAK
from support.qemu_guest import qemu_words

from kvmpass import host
from kvmpass.assignment.assign import assigned
from kvmpass.guest import Guest, GuestImage, GuestSpec, prepare
from kvmpass.machine import GuestOutcome
from kvmpass.testing.state import Mode, State

pytestmark = pytest.mark.amdvi(profile="devices", timeout=900, duration=25)

QEMU = "/usr/bin/qemu-system-x86_64"
QEMU_SECONDS = 600
ROLES = ("nvme", "edu", "nic", "legacy_nic", "ahci", "xhci", "virtio_blk", "ivshmem")
MEMORY = "512M"
CONSOLE = "0x1af4:0x1043"  # of our guest, for the command's output; the other guest has serial ports

# Said at any level, these tell of a machine that is put together wrongly.
CLASSIC = (
    "no compatible bridge window",
    "can't claim",
    "failed to assign",
    "can't assign",
    "nobody cared",
    "spurious",
    "ACPI BIOS Error",
    "ACPI Error",
    "ACPI Warning",
    "Firmware Bug",
    "conflict",
    "_OSC failed",
    "no IRQ",
    "can't derive routing",
    "can't find IRQ",
    "DMAR",
    "IO_PAGE_FAULT",
)

PLANTED = (
    (3, "pci 0000:00:01.0: BAR 0 [mem size 0x00004000 64bit]: failed to assign"),
    (6, "ACPI Warning: \\_SB.PC00: planted"),
    (4, "planted: a warning that nothing else says"),
)
MARK = "--- planted from here on ---"

# Each driver has its device, and does something with it. The log is filtered here: a serial line is slow.
SCRIPT = f"""
complaints() {{ dmesg -r | grep -aEi {shlex.quote("^<([0-4]|[89]|1[0-2])>|" + "|".join(CLASSIC))}; }}
for device in /sys/bus/pci/devices/*; do
    [ -e $device/driver ] || continue
    echo "driver $(cat $device/vendor):$(cat $device/device) $(basename $(readlink $device/driver))"
done
for drive in /dev/nvme?n1 /dev/[sv]d?; do dd if=$drive of=/dev/null bs=1M count=4 2>/dev/null; done
for interface in /sys/class/net/e*; do ip link set ${{interface##*/}} up; done
sleep 4
complaints
echo {shlex.quote(MARK)}
{"".join(f"echo {shlex.quote(f'<{level}>{text}')} >/dev/kmsg; " for level, text in PLANTED)}
complaints
"""


@dataclass(frozen=True, slots=True)
class Talk:
    """A guest's PCI drivers by vendor and device, its warnings and errors, and those with planted ones."""

    drivers: dict[str, str]
    complaints: list[str]
    with_planted: list[str]

    @classmethod
    def of(cls, output: bytes) -> Talk:
        lines = output.decode(errors="replace").splitlines()
        assert MARK in lines, f"the guest did not come to its end: {lines[-20:]}"
        at = lines.index(MARK)
        drivers = dict(line.split()[1:] for line in lines[:at] if line.startswith("driver "))
        return cls(drivers, *([line for line in part if line[0] == "<"] for part in (lines[:at], lines[at:])))


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same kernel, root file system and devices, under both."""

    qemu: Talk
    kvmpass: Talk


def under_qemu(bdfs: Sequence[str], image: GuestImage, folder: Path) -> Talk:
    """A guest of the host's own QEMU, with devices bound to vfio-pci."""
    command = qemu_words([QEMU], image, folder, MEMORY)
    for bdf in bdfs:
        command += ["-device", f"vfio-pci,host={bdf}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=QEMU_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert b"exit 0" in (folder / "serial3").read_bytes()
    return Talk.of((folder / "serial1").read_bytes())


def under_kvmpass(bdfs: Sequence[str], spec: GuestSpec) -> Talk:
    output = bytearray()
    with (
        assigned(bdfs, spec, memory=MEMORY) as machine,
        Guest(machine, console=None, output=output.extend, errors=output.extend) as guest,
    ):
        result = guest.run()
    assert (result.outcome, result.status, result.failures) == (GuestOutcome.POWEROFF, 0, ()), result.console
    return Talk.of(bytes(output))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("full", marks=pytest.mark.amdvi(kernel="full")),
        # Two guests of Debian's kernel with eight devices each: ten minutes in the emulated host.
        *([pytest.param("stock", marks=pytest.mark.amdvi(kernel="stock"))] if SOAK else []),
    ],
)
def comparison(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """The guest's kernel is the host's, and every driver is the one that this kernel has."""
    state = State.of(pytestconfig)
    roles = [role for role in ROLES if role in state.roles]
    assert state.mode is Mode.HARDWARE or roles == list(ROLES)
    bdfs = [state.roles[role] for role in roles]
    sysfs = host.Sysfs()
    spec = GuestSpec(command=("sh", "-c", SCRIPT))
    image = prepare(spec, [sysfs.device(host.Bdf.parse(bdf)).modalias for bdf in bdfs])
    with host.borrow(*bdfs):
        theirs = under_qemu(bdfs, image, tmp_path_factory.mktemp("qemu"))
    ours = under_kvmpass(bdfs, spec)
    for name, talk in (("QEMU", theirs), ("kvmpass", ours)):  # shown with a failure
        print(f"--- under {name}", *talk.complaints, sep="\n")
    return Comparison(theirs, ours)


def test_drivers_are_those_under_qemu(comparison: Comparison) -> None:
    ours = {key: driver for key, driver in comparison.kvmpass.drivers.items() if key != CONSOLE}
    assert ours
    assert {key: comparison.qemu.drivers.get(key) for key in ours} == ours


def test_no_message_that_qemu_lacks(comparison: Comparison) -> None:
    assert unexplained(comparison.kvmpass.complaints, comparison.qemu.complaints) == []


def test_a_planted_message_is_found(comparison: Comparison) -> None:
    """As an error, as a warning, and by its words."""
    found = unexplained(comparison.kvmpass.with_planted, comparison.qemu.complaints)
    assert {normal(text) for _, text in PLANTED} <= {normal(line) for line in found}
