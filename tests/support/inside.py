"""Guests that do several jobs, one for each of their devices, and how each of them went."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys/bus/pci/devices")
SOAK = os.environ.get("KVMPASS_SOAK") == "1"
# Ends the reason of a skip on real hardware.
LAB_ONLY = "it runs in the emulated host, without KVMPASS_TEST_… in the environment"
GUEST_SECONDS = 3000 if SOAK else 250
SOURCES = Path(__file__).parents[1] / "amdvi/guest"
HOST_ADDRESS, GUEST_ADDRESS = "192.0.2.1", "192.0.2.2"  # RFC 5737

PRELUDE = """
# The PCI device $1 (vendor:device), the $2th of them, as its directory in sysfs.
find_device() {
    left=$2
    for directory in /sys/bus/pci/devices/*; do
        read -r vendor <$directory/vendor; read -r model <$directory/device
        [ $vendor:$model = $1 ] || continue
        left=$((left - 1)); [ $left -gt 0 ] || { readlink -f $directory; return; }
    done
    echo "no $1 in this guest" >&2; return 1
}
# The drive behind $device: a stick on a USB controller takes seconds to appear.
find_drive() {
    for try in $(seq 20); do
        # A namespace may belong to a subsystem rather than to its controller.
        if [ -d $device/nvme ] && [ -b /dev/nvme0n1 ]; then echo /dev/nvme0n1; return; fi
        for block in /sys/block/[nsv]*; do
            case $(readlink -f $block) in $device/*) echo /dev/${block##*/}; return ;; esac
        done
        sleep 1
    done
    echo "no drive behind $device" >&2; return 1
}
# What /proc/interrupts says of $device, each line after the word $1.
interrupts() {
    numbers=$(ls $device/msi_irqs 2>/dev/null || true)  # there and empty once a driver has given them up
    [ -n "$numbers" ] || numbers=$(cat $device/irq)
    for number in $numbers; do sed -n "s/^ *$number:/$1&/p" /proc/interrupts; done
}
"""
DRIVE = """
drive=$(find_drive)
interrupts before
dd if=$drive bs=64k count=16 2>/dev/null | sha256sum
dd if=/marker of=$drive bs=4096 seek=3 conv=fsync 2>/dev/null
interrupts after
"""
PING = f"""
net=$(ls $device/net)
ip addr add {GUEST_ADDRESS}/24 dev $net; ip link set $net up
for try in $(seq 30); do ping -q -c 1 -W 1 {HOST_ADDRESS} >/dev/null && break; done
interrupts before
ping -A -c 20 -W 5 -s 1400 {HOST_ADDRESS} | grep received
interrupts after
ip addr flush dev $net; ip link set $net down
"""


def edu_script(kind: str, count: int) -> str:
    """Drive ``$device``, an edu, by ``/edu`` (tests/amdvi/guest/edu.c): ``count`` interrupts of a kind, then DMA."""
    return f"""
echo 1 >/sys/module/vfio/parameters/enable_unsafe_noiommu_mode
name=${{device##*/}}
echo vfio-pci >$device/driver_override; echo $name >/sys/bus/pci/drivers_probe
group=$(readlink $device/iommu_group)
/edu /dev/vfio/noiommu-${{group##*/}} $name {kind} {count}
"""


@dataclass(frozen=True, slots=True)
class Job:
    """What a guest does with one device: a shell script in which ``$device`` is its directory in sysfs."""

    name: str
    bdf: str
    script: str


@dataclass(frozen=True, slots=True)
class Done:
    """How a job ended, and both its streams."""

    status: int
    text: str

    @property
    def checked(self) -> str:
        """The text of a job that went well."""
        assert self.status == 0, f"status {self.status}\n{self.text}"
        return self.text

    def interrupts(self, when: str) -> tuple[set[str], int]:
        """The kinds (the first word behind the counts) and the sum of what ``interrupts WHEN`` printed."""
        kinds, total = set(), 0
        for counts, kind in re.findall(rf"^{when} *\d+:((?: +\d+)+) +(\S+)", self.text, re.MULTILINE):
            kinds.add(re.sub(r"-0000:.*", "", kind))
            total += sum(map(int, counts.split()))
        return kinds, total

    def check_interrupts(self, kind: str, at_least: int) -> None:
        """That they were of this kind, and that there were some between the two looks at them."""
        kinds, before = self.interrupts("before")
        assert kinds == {kind}, self.text
        kinds, after = self.interrupts("after")
        assert kinds == {kind}, self.text
        assert after - before >= at_least, self.text


def identity(bdf: str) -> str:
    return ":".join((SYSFS / bdf / name).read_text().strip() for name in ("vendor", "device"))


def script(jobs: Sequence[Job]) -> str:
    """What a guest that has the devices of all ``jobs``, in their order, runs to do one after the other."""
    bdfs = list(dict.fromkeys(job.bdf for job in jobs))
    text = PRELUDE
    for job in jobs:
        alike = [bdf for bdf in bdfs if identity(bdf) == identity(job.bdf)]
        find = f"device=$(find_device {identity(job.bdf)} {alike.index(job.bdf) + 1})"
        text += f'echo "=== {job.name}"\n(set -e\n{find}\n{job.script}\n) 2>&1\necho "=== {job.name} $?"\n'
    return text


def outcomes(jobs: Sequence[Job], output: str) -> dict[str, Done]:
    """How each job went, from the output of ``script``."""
    found = re.findall(r"^=== (\S+)\n(.*?)^=== \1 (\d+)$", output, re.MULTILINE | re.DOTALL)
    assert [name for name, _, _ in found] == [job.name for job in jobs], output
    return {name: Done(int(status), text) for name, text, status in found}


def command(jobs: Sequence[Job], *options: str, memory: str = "256M") -> list[str]:
    """``kvmpass assign`` for these jobs."""
    bdfs = dict.fromkeys(job.bdf for job in jobs)
    words = [sys.executable, "-m", "kvmpass", "assign", *bdfs, "--memory", memory, *options]
    return [*words, "--", "sh", "-c", script(jobs)]


def boot(jobs: Sequence[Job], *options: str, memory: str = "256M") -> dict[str, Done]:
    """Boot one guest with the devices of all ``jobs``, which it does one after the other."""
    words = command(jobs, *options, memory=memory)
    result = subprocess.run(words, capture_output=True, text=True, timeout=GUEST_SECONDS, check=False)
    assert result.returncode == 0, f"{result.stderr}\n{result.stdout}"
    return outcomes(jobs, result.stdout)


def compiled(name: str, directory: Path) -> Path:
    """A program of ``tests/amdvi/guest``, static: it needs nothing in the guest."""
    program = directory / name
    words = ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-o", str(program), str(SOURCES / f"{name}.c")]
    subprocess.run(words, check=True, timeout=120)
    return program


def drive_of(bdf: str) -> Path:
    """The block device behind a controller that the host has; it takes a while after the driver is bound."""
    deadline = time.monotonic() + 60
    while True:
        inside = str((SYSFS / bdf).resolve()) + "/"
        for block in Path("/sys/block").iterdir():
            if str(block.resolve()).startswith(inside) and (node := Path("/dev") / block.name).exists():
                return node
        for namespace in (SYSFS / bdf).glob("nvme/nvme*/nvme*n1"):
            if (node := Path("/dev") / re.sub(r"c\d+n", "n", namespace.name)).exists():
                return node
        assert time.monotonic() < deadline, f"no drive behind {bdf} has come back"
        time.sleep(0.1)


def interface_of(bdf: str) -> str:
    """The network interface of a card that the host has."""
    deadline = time.monotonic() + 60
    while not (found := list((SYSFS / bdf).glob("net/*"))):
        assert time.monotonic() < deadline, f"no interface of {bdf} has come back"
        time.sleep(0.1)
    return found[0].name


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=30)


@contextlib.contextmanager
def host_interface(bdf: str, address: str = HOST_ADDRESS) -> Iterator[str]:
    """A card of the host's, up and with an address for as long as it lasts."""
    name = interface_of(bdf)
    ip("addr", "add", f"{address}/24", "dev", name)
    ip("link", "set", name, "up")
    try:
        yield name
    finally:
        ip("addr", "flush", "dev", name)
        ip("link", "set", name, "down")
