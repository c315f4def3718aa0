"""Overrides that driverctl(8) has saved: for each device a file with the driver to bind at each boot."""

from __future__ import annotations

from kvmpass._dataclass import dataclass
from kvmpass.host.address import Bdf
from kvmpass.host.sysfs import Sysfs

DIRECTORY = "etc/driverctl.d"
NO_DRIVER = "none"


@dataclass(frozen=True, slots=True)
class SavedOverride:
    """A saved override."""

    file: str
    """The path of its file."""
    driver: str
    """The driver that is bound at each boot; ``none`` for no driver."""

    @property
    def words(self) -> str:
        """``nvme``, or ``no driver``."""
        return "no driver" if self.driver == NO_DRIVER else self.driver


def saved_override(sysfs: Sysfs, bdf: Bdf) -> SavedOverride | None:
    """Return the saved override of a device; None without one.

    The file has the device's name; some releases put the bus before it. Its first line counts.
    """
    for name in (str(bdf), f"pci-{bdf}"):
        lines = sysfs.lines(DIRECTORY, name)
        if lines:
            return SavedOverride(f"/{DIRECTORY}/{name}", lines[0].strip())
    return None
