"""The writes to sysfs that change the driver of a PCI device, in their order: computed, not made.

:class:`kvmpass.host.drivers.transaction.Transaction` makes them, a dry run shows them. Sources:
drivers/pci/pci-driver.c (``new_id`` is never used: it would bind siblings), drivers/base/bus.c (``unbind``,
``drivers_probe``), Documentation/ABI/testing/sysfs-bus-pci (``driver_override``).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from enum import StrEnum
from typing import Self

from kvmpass._dataclass import dataclass
from kvmpass.host.address import Bdf
from kvmpass.host.sysfs import PCI_DEVICES, PCI_DRIVERS, VFIO_PCI, Sysfs

MATCHING = "*"  # as a wanted driver: whichever matches, if any does


class Step(StrEnum):
    """The change that an entry in the journal announces. Restoring depends on the device's state, not on the step.

    Steps without ``RETURN`` lead to vfio-pci, the others to any other driver.
    """

    RECORDED = "recorded"
    OVERRIDE = "override"
    UNBIND = "unbind"
    PROBE = "probe"
    BOUND = "bound"
    RETURN_PREPARE = "return-prepare"
    RETURN_UNBIND = "return-unbind"
    RETURN_PROBE = "return-probe"
    RETURN_OVERRIDE = "return-override"
    RETURN_POWER = "return-power"
    RETURNED = "returned"


@dataclass(frozen=True, slots=True)
class Setting:
    """A device's driver and the attributes that change with it."""

    driver: str | None
    """The driver; None without one; :data:`MATCHING` as a wanted driver."""
    override: str | None
    """``driver_override``; None if it is not set."""
    power_control: str | None = None
    """``power/control``: ``auto`` or ``on``; None for unknown or any."""
    d3cold_allowed: str | None = None
    """``d3cold_allowed``: ``0`` or ``1``; None for unknown or any."""

    @classmethod
    def of(cls, sysfs: Sysfs, bdf: Bdf) -> Self:
        """Return the setting of a device at this moment."""
        base = (PCI_DEVICES, str(bdf))
        return cls(
            driver=sysfs.driver(bdf),
            override=sysfs.driver_override(bdf),
            power_control=sysfs.text(*base, "power/control"),
            d3cold_allowed=sysfs.text(*base, "d3cold_allowed"),
        )

    def __str__(self) -> str:
        driver = "the driver that matches" if self.driver == MATCHING else f"driver {self.driver or 'none'}"
        return driver + (f", override {self.override}" if self.override else "")


ON_VFIO_PCI = Setting(VFIO_PCI, VFIO_PCI)
UNBINDS = frozenset({Step.UNBIND, Step.RETURN_UNBIND})
PROBES = frozenset({Step.PROBE, Step.RETURN_PROBE})


@dataclass(frozen=True, slots=True)
class Change:
    """One write to sysfs; as text, the shell command for it."""

    step: Step
    """The step that it belongs to."""
    path: str
    """The file, without a leading slash."""
    text: str
    """What is written."""

    @property
    def may_wait(self) -> bool:
        """Whether the write may block: to files of drivers, not to attributes of devices."""
        return self.step in UNBINDS | PROBES

    def __str__(self) -> str:
        return f"echo {self.text} > /{self.path}" if self.text else f"echo > /{self.path}"


def driver_changes(bdf: Bdf, now: Setting, wanted: Setting) -> Iterator[Change]:
    """Yield the writes that bind the wanted driver; none if it is bound.

    The override comes first, so that no third driver can bind the device in between.
    """
    if now.driver == wanted.driver:
        return
    to_vfio = wanted.driver == VFIO_PCI
    if wanted.driver is not None:
        override = wanted.override if wanted.driver == MATCHING else wanted.driver
        if now.override != override:
            yield Change(Step.OVERRIDE if to_vfio else Step.RETURN_PREPARE, _override(bdf), override or "")
    if now.driver is not None:
        unbind = f"{PCI_DRIVERS}/{now.driver}/unbind"
        yield Change(Step.UNBIND if to_vfio else Step.RETURN_UNBIND, unbind, str(bdf))
    if wanted.driver is not None:
        yield Change(Step.PROBE if to_vfio else Step.RETURN_PROBE, "sys/bus/pci/drivers_probe", str(bdf))


def override_changes(bdf: Bdf, now: Setting, wanted: Setting) -> Iterator[Change]:
    """Yield the write that sets the wanted override after the driver is bound; none if it is set."""
    if now.override != wanted.override:
        yield Change(Step.RETURN_OVERRIDE, _override(bdf), wanted.override or "")


def power_changes(bdf: Bdf, now: Setting, wanted: Setting) -> Iterator[Change]:
    """Yield the writes that set the wanted power settings after the driver is bound."""
    for name, current, value in (
        ("power/control", now.power_control, wanted.power_control),
        ("d3cold_allowed", now.d3cold_allowed, wanted.d3cold_allowed),
    ):
        if value is not None and current not in (value, None):
            yield Change(Step.RETURN_POWER, f"{PCI_DEVICES}/{bdf}/{name}", value)


def all_changes(bdf: Bdf, now: Setting, wanted: Setting) -> list[Change]:
    """Return all writes as far as they are known before: power settings are listed even if they turn out right."""
    first = list(driver_changes(bdf, now, wanted))
    override = first[0].text or None if first and first[0].path == _override(bdf) else now.override
    # vfio-pci allows runtime suspend while a device is bound to it, and forbids it when it is unbound.
    then = Setting(wanted.driver, override, "?" if now.power_control else None, now.d3cold_allowed)
    return [*first, *override_changes(bdf, then, wanted), *power_changes(bdf, then, wanted)]


def _override(bdf: Bdf) -> str:
    return f"{PCI_DEVICES}/{bdf}/driver_override"


def check_privilege(sysfs: Sysfs, bdf: Bdf) -> None:
    """Check that this user may change the device's driver. Raises ``PermissionError``."""
    if not may_change_driver(sysfs, bdf):
        path = sysfs.device_path(bdf) / "driver_override"
        error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        error.add_note("run as root: this changes the device's driver")
        raise error


def may_change_driver(sysfs: Sysfs, bdf: Bdf) -> bool:
    """Return whether this user may write the device's ``driver_override``."""
    return os.access(sysfs.device_path(bdf) / "driver_override", os.W_OK, effective_ids=True)
