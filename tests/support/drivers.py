"""What tests that change drivers share: how the host's devices stand, and processes that do something to them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kvmpass.host import Bdf, PciDevice, Sysfs
from kvmpass.host.sysfs import PCI_DEVICES

SYSFS = Sysfs()
PCI = Path("/sys/bus/pci")
# Some kernels lack some of them; then they are None before and after.
ATTRIBUTES = ("power/control", "d3cold_allowed", "msi_bus", "reset_method", "numa_node", "sriov_numvfs")


def facts(*, group: bool = True) -> list[tuple[object, ...]]:
    """Of every device, what a change of drivers could change. A device that is plugged again changes its group."""
    return [
        (
            d.bdf,
            d.driver,
            d.driver_override,
            d.group if group else None,
            *(SYSFS.text(PCI_DEVICES, str(d.bdf), name) for name in ATTRIBUTES),
        )
        for d in SYSFS.devices()
    ]


def look(bdf: str) -> PciDevice:
    return SYSFS.device(Bdf.parse(bdf))


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def namespace(nvme: str) -> str:
    """The drive's first namespace, such as ``nvme0n1``; the driver finds it some time after it has the drive."""

    def names() -> list[str]:
        found = Path("/sys/bus/pci/devices", nvme, "nvme").glob("nvme*/nvme*n*")
        return sorted(path.name for path in found if Path("/dev", path.name).exists())

    until(lambda: bool(names()))
    return names()[0]


def set_driver(bdf: str, name: str) -> None:
    """What somebody with a shell does, if need be from another driver."""
    with suppress(FileNotFoundError):
        (PCI / "devices" / bdf / "driver/unbind").write_text(bdf)
    (PCI / "devices" / bdf / "driver_override").write_text(f"{name}\n")
    (PCI / "drivers_probe").write_text(bdf)
    assert look(bdf).driver == name


def replug(bdf: str) -> None:
    """The device goes, and comes back as new."""
    unplug(bdf)
    (PCI / "rescan").write_text("1")
    until((PCI / "devices" / bdf).exists)


def unplug(bdf: str) -> None:
    (PCI / "devices" / bdf / "remove").write_text("1")
    assert not (PCI / "devices" / bdf).exists()


class Child:
    """A forked process that does something until it is told to end."""

    def __init__(self, action: Callable[[], object]) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 9
            try:
                os.close(reader)
                self.ready = lambda: os.close(writer)
                action()
                status = 0
            except KeyboardInterrupt:
                status = 7
            finally:
                os._exit(status)
        os.close(writer)
        self.reader = reader

    def wait(self) -> int:
        """The exit status, or the negated signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self, number: int = signal.SIGKILL) -> int:
        os.kill(self.pid, number)
        return self.wait()
