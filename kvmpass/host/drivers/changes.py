"""What it takes to give a PCI device another driver: the writes, in their order, computed and not done.

:class:`kvmpass.host.drivers.transaction.Transaction` makes them, a dry run shows them. Sources:
drivers/pci/pci-driver.c (``new_id`` is never used: it would grab siblings), drivers/base/bus.c (``unbind``,
``drivers_probe``), Documentation/ABI/testing/sysfs-bus-pci (``driver_override``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from kvmpass.host.address import Bdf
from kvmpass.host.sysfs import PCI_DEVICES, PCI_DRIVERS, Sysfs
from kvmpass.host.usage import VFIO_PCI

MATCHING = "*"  # as a wanted driver: the one that the kernel finds, if it finds one


class Step(StrEnum):
    """What an owner is about to do when its entry says so. Putting back looks at the device, not at the step.

    Those without ``RETURN`` lead to vfio-pci, the others to any other driver.
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
    """A device's driver (None: none), and what belongs to it. None for a power setting: whatever it is."""

    driver: str | None
    override: str | None
    power_control: str | None = None
    d3cold_allowed: str | None = None

    @classmethod
    def of(cls, sysfs: Sysfs, bdf: Bdf) -> Self:
        """As it is at this moment."""
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
    """One write: ``path`` is below the root of the tree. As text, the shell's word for it."""

    step: Step
    path: str
    text: str

    @property
    def may_wait(self) -> bool:
        """Whether the kernel may keep the writer waiting: in files of drivers, not in attributes of devices."""
        return self.step in UNBINDS | PROBES

    def __str__(self) -> str:
        return f"echo {self.text} > /{self.path}" if self.text else f"echo > /{self.path}"


def driver_changes(bdf: Bdf, now: Setting, wanted: Setting) -> Iterator[Change]:
    """The writes that lead to the wanted driver; none where the device has it.

    The override comes first: there is no moment at which a third driver that matches could take the device.
    """
    if now.driver == wanted.driver:
        return
    there = wanted.driver == VFIO_PCI
    if wanted.driver is not None:
        override = wanted.override if wanted.driver == MATCHING else wanted.driver
        if now.override != override:
            yield Change(Step.OVERRIDE if there else Step.RETURN_PREPARE, _override(bdf), override or "")
    if now.driver is not None:
        unbind = f"{PCI_DRIVERS}/{now.driver}/unbind"
        yield Change(Step.UNBIND if there else Step.RETURN_UNBIND, unbind, str(bdf))
    if wanted.driver is not None:
        yield Change(Step.PROBE if there else Step.RETURN_PROBE, "sys/bus/pci/drivers_probe", str(bdf))


def override_changes(bdf: Bdf, now: Setting, wanted: Setting) -> Iterator[Change]:
    """The write that sets the wanted override once the device has its driver; none where it has it."""
    if now.override != wanted.override:
        yield Change(Step.RETURN_OVERRIDE, _override(bdf), wanted.override or "")


def power_changes(bdf: Bdf, now: Setting, wanted: Setting) -> Iterator[Change]:
    """The writes that set the wanted power settings once the device has its driver."""
    for name, is_now, wish in (
        ("power/control", now.power_control, wanted.power_control),
        ("d3cold_allowed", now.d3cold_allowed, wanted.d3cold_allowed),
    ):
        if wish is not None and is_now not in (wish, None):
            yield Change(Step.RETURN_POWER, f"{PCI_DEVICES}/{bdf}/{name}", wish)


def all_changes(bdf: Bdf, now: Setting, wanted: Setting) -> list[Change]:
    """All of them, as far as they are known before: a power setting is named even if it turns out right."""
    first = list(driver_changes(bdf, now, wanted))
    override = first[0].text or None if first and first[0].path == _override(bdf) else now.override
    # vfio-pci allows runtime suspend while a device is bound to it, and forbids it when it is unbound.
    then = Setting(wanted.driver, override, "?" if now.power_control else None, now.d3cold_allowed)
    return [*first, *override_changes(bdf, then, wanted), *power_changes(bdf, then, wanted)]


def _override(bdf: Bdf) -> str:
    return f"{PCI_DEVICES}/{bdf}/driver_override"
