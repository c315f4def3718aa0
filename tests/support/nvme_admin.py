"""Virtual functions of an NVMe controller: resources and state, by NVMe's own commands."""

from __future__ import annotations

import contextlib
import fcntl
import struct
import time
from collections.abc import Iterator
from pathlib import Path

SYSFS = Path("/sys/bus/pci/devices")
ADMIN_COMMAND = 0xC048_4E41  # NVME_IOCTL_ADMIN_CMD, struct nvme_admin_cmd of 72 bytes (linux/nvme_ioctl.h)
VIRTUALIZATION_MANAGEMENT = 0x1C  # NVM Express 2.0c, 5.37
RELEASE, OFFLINE, ASSIGN, ONLINE = 0x1, 0x7, 0x8, 0x9
QUEUES, INTERRUPTS = 0, 1


def virtualization(controller: Path, identifier: int, action: int, resource: int = 0, count: int = 0) -> None:
    """One Virtualization Management command. Raises ``OSError``; the kernel makes a status code of it."""
    command = bytearray(72)
    struct.pack_into("<B", command, 0, VIRTUALIZATION_MANAGEMENT)
    struct.pack_into("<II", command, 40, action | resource << 8 | identifier << 16, count)
    with controller.open("rb") as file:
        status = fcntl.ioctl(file, ADMIN_COMMAND, command)
    assert status == 0, f"NVMe status {status:#x}"


def reset(bdf: str) -> None:
    """The controller itself takes a new share of resources only at its next reset."""
    (state,) = (SYSFS / bdf).glob("nvme/nvme*/state")
    (state.parent / "reset_controller").write_text("1")
    deadline = time.monotonic() + 30
    while state.read_text().strip() != "live":
        assert time.monotonic() < deadline, "the controller does not come back"
        time.sleep(0.1)


@contextlib.contextmanager
def online_function(bdf: str) -> Iterator[str]:
    """One virtual function of the controller ``bdf`` with two queues and an interrupt; it has no driver.

    A function is offline, and no driver's for that reason, until the physical one has shared what it has.
    """
    (directory,) = (SYSFS / bdf).glob("nvme/nvme[0-9]*")
    controller = Path("/dev") / directory.name
    number, probe = SYSFS / bdf / "sriov_numvfs", SYSFS / bdf / "sriov_drivers_autoprobe"
    for resource in (QUEUES, INTERRUPTS):
        virtualization(controller, 0, RELEASE, resource)
    reset(bdf)
    probe.write_text("0")
    number.write_text("1")
    try:
        for resource, count in ((QUEUES, 2), (INTERRUPTS, 1)):
            virtualization(controller, 1, ASSIGN, resource, count)
        virtualization(controller, 1, ONLINE)
        yield (SYSFS / bdf / "virtfn0").readlink().name
    finally:
        number.write_text("0")
        probe.write_text("1")
