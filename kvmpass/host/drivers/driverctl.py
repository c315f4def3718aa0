"""What driverctl does to devices at each boot (driverctl(8)): a file for each, which holds a driver's name."""

from __future__ import annotations

from dataclasses import dataclass

from kvmpass.host.address import Bdf
from kvmpass.host.sysfs import Sysfs

DIRECTORY = "etc/driverctl.d"
NO_DRIVER = "none"


@dataclass(frozen=True, slots=True)
class SavedOverride:
    """``file`` is its path; ``driver`` the driver that the device gets at each boot, ``none`` for no driver."""

    file: str
    driver: str

    @property
    def words(self) -> str:
        """``nvme``, or ``no driver``."""
        return "no driver" if self.driver == NO_DRIVER else self.driver


def saved_override(sysfs: Sysfs, bdf: Bdf) -> SavedOverride | None:
    """None where driverctl leaves the device alone.

    The file has the device's name; some releases put the bus before it. Its first line counts.
    """
    for name in (str(bdf), f"pci-{bdf}"):
        lines = (sysfs.text(DIRECTORY, name) or "").splitlines()
        if lines:
            return SavedOverride(f"/{DIRECTORY}/{name}", lines[0].strip())
    return None
