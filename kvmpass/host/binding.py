"""The steps that change a device's driver, each announced in the journal, and the one way back.

Sources: drivers/pci/pci-driver.c (``new_id`` is never used: it would grab siblings), drivers/base/bus.c
(``unbind``, ``drivers_probe``), Documentation/ABI/testing/sysfs-bus-pci (``driver_override``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator

from kvmpass.errors import HostNotReady, NoSuchDevice, NotAssignable, RestoreFailed
from kvmpass.host.address import Bdf
from kvmpass.host.journal import Entry, Journal, Step
from kvmpass.host.processes import holders
from kvmpass.host.sysfs import PCI_DRIVERS, PciDevice, Sysfs
from kvmpass.host.usage import VFIO_PCI, vfio_nodes

log = logging.getLogger(__name__)

DRIVER_TIMEOUT = 30.0  # seconds a driver may take to let go of a device, or to take it
NODE_TIMEOUT = 5.0  # seconds until /dev/vfio/GROUP exists, and until a bound driver shows


def _step(step: Step, bdf: Bdf) -> None:
    """Tests put something in place of this: it is called when the journal is written, before the change."""


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Binder:
    """Takes devices to vfio-pci and back. The caller holds the journal's lock."""

    _change: int | None = None

    def __init__(self, sysfs: Sysfs, journal: Journal, timeout: float = DRIVER_TIMEOUT) -> None:
        self.sysfs = sysfs
        self.journal = journal
        self.timeout = timeout

    # --- there

    def take(self, entry: Entry) -> PciDevice:
        """Bind the entry's device to vfio-pci. Raises ``OSError``, ``NotAssignable``, ``HostNotReady``."""
        with self._changing(entry.bdf):
            return self._take(entry)

    def _take(self, entry: Entry) -> PciDevice:
        bdf = entry.bdf
        self._announce(entry, Step.RECORDED)
        if entry.driver != VFIO_PCI:
            self._announce(entry, Step.OVERRIDE)
            self._override(bdf, VFIO_PCI)
            if entry.driver is not None:
                self._announce(entry, Step.UNBIND)
                self._unbind(bdf, entry.driver)
            self._announce(entry, Step.PROBE)
            self._probe(bdf)
            if not self._wait_for_driver(bdf, VFIO_PCI):
                raise NotAssignable(
                    f"vfio-pci does not take {bdf}: its driver is {self.sysfs.driver(bdf) or 'none'} now",
                    "the kernel's log says why: dmesg | grep vfio",
                )
        self._wait_for_node(bdf)
        self._announce(entry, Step.BOUND)
        log.debug("%s is on vfio-pci, before: %s", bdf, entry.driver or "no driver")
        return self.sysfs.device(bdf)

    # --- and back

    def give_back(self, entry: Entry) -> str:
        """Make the device as the entry says, from whatever state it is in, and drop the entry.

        Returns what was done, in words. Safe to call again after a failure at any point. Raises ``RestoreFailed``,
        ``OSError``; ``NoSuchDevice`` (after dropping the entry) when the device has gone.
        """
        try:
            with self._changing(entry.bdf):
                done = self._give_back(entry)
        except NoSuchDevice:
            self.journal.remove(entry.bdf)
            raise
        self._announce(entry, Step.RETURNED)
        self.journal.remove(entry.bdf)
        log.debug("%s: %s", entry.bdf, done)
        return done

    def _give_back(self, entry: Entry) -> str:
        bdf = entry.bdf
        now = self.sysfs.device(bdf)
        if entry.driver == VFIO_PCI:
            return "it was on vfio-pci before and stays there"
        if now.driver == VFIO_PCI:
            self._check_let_go(now)
            self._announce(entry, Step.RETURN_UNBIND)
            self._unbind(bdf, VFIO_PCI)
        elif now.driver not in (None, entry.driver):
            # Somebody bound it anew meanwhile: taking it away from them would be a second surprise.
            if now.driver_override == VFIO_PCI:
                self._override(bdf, entry.override)
            return f"bound to {now.driver} by someone else meanwhile, left there"
        if entry.driver is not None and self.sysfs.driver(bdf) is None:
            self._announce(entry, Step.RETURN_PROBE)
            self._bind(bdf, entry.driver)
        if self.sysfs.driver_override(bdf) != entry.override:
            self._announce(entry, Step.RETURN_OVERRIDE)
            self._override(bdf, entry.override)
        self._announce(entry, Step.RETURN_POWER)
        self._power(entry)
        found = (self.sysfs.driver(bdf), self.sysfs.driver_override(bdf))
        if found != (entry.driver, entry.override):
            raise RestoreFailed(f"{bdf} has driver {found[0] or 'none'} and override {found[1] or 'none'} now")
        return f"driver {entry.driver or 'none'}" + (f", override {entry.override}" if entry.override else "")

    def _check_let_go(self, device: PciDevice) -> None:
        # The kernel would wait for the holder, and for ever if the holder is this process.
        held = holders(self.sysfs, vfio_nodes(self.sysfs, device.bdf, None))
        group = self.sysfs.group(device.group) if device.group is not None else None
        if group is not None and len(group.devices) == 1:  # a shared group may be open for a sibling
            held |= holders(self.sysfs, [f"/dev/vfio/{group.id}"])
        for who in held.values():
            raise RestoreFailed(f"{device.bdf} is still open in {' and '.join(map(str, who))}")

    # --- the changes

    @contextlib.contextmanager
    def _changing(self, bdf: Bdf) -> Iterator[None]:
        """Wait until no earlier change of the device is under way in the kernel, then keep others waiting.

        A write outlives the process that was killed while it waited for it: what we saw now would not last.
        """
        try:
            fd = os.open(self.sysfs.device_path(bdf), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NoSuchDevice(f"there is no PCI device {bdf} any more") from None
        try:
            deadline = time.monotonic() + self.timeout
            while not _try_lock(fd):
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        errno.ETIMEDOUT, "an earlier change of its driver still hangs in the kernel", str(bdf)
                    )
                time.sleep(0.01)
            self._change = fd
            yield
        finally:
            self._change = None
            os.close(fd)

    def _announce(self, entry: Entry, step: Step) -> None:
        entry.step = step
        self.journal.write(entry)
        _step(step, entry.bdf)

    def _override(self, bdf: Bdf, driver: str | None) -> None:
        # A lone newline clears the override; writing nothing would do nothing.
        self.sysfs.write(self.sysfs.device_path(bdf) / "driver_override", f"{driver or ''}\n")

    def _unbind(self, bdf: Bdf, driver: str) -> None:
        self.sysfs.write(self.sysfs.path(PCI_DRIVERS, driver, "unbind"), str(bdf), self.timeout, self._change)
        if self.sysfs.driver(bdf) == driver:
            raise RestoreFailed(f"{driver} does not let go of {bdf}")

    def _probe(self, bdf: Bdf) -> None:
        self.sysfs.write(self.sysfs.path("sys/bus/pci/drivers_probe"), str(bdf), self.timeout, self._change)

    def _bind(self, bdf: Bdf, driver: str) -> None:
        # With an override no other driver that matches the device can come first.
        self._override(bdf, driver)
        with contextlib.suppress(OSError):
            self._probe(bdf)
        if self._wait_for_driver(bdf, driver, 0.2):
            return
        self.sysfs.write(self.sysfs.path(PCI_DRIVERS, driver, "bind"), str(bdf), self.timeout, self._change)
        if not self._wait_for_driver(bdf, driver):
            raise RestoreFailed(f"{driver} does not take {bdf} back")

    def _power(self, entry: Entry) -> None:
        # vfio-pci allows runtime suspend while it has the device and forbids it afterwards.
        base = self.sysfs.device_path(entry.bdf)
        for name, before in (("power/control", entry.power_control), ("d3cold_allowed", entry.d3cold_allowed)):
            if before is not None and self.sysfs.text(str(base / name)) not in (before, None):
                self.sysfs.write(base / name, before)

    # --- waiting

    def _wait_for_driver(self, bdf: Bdf, driver: str, seconds: float | None = None) -> bool:
        # Probing is done when the write returns, except for drivers that ask for it to be asynchronous.
        deadline = time.monotonic() + (NODE_TIMEOUT if seconds is None else seconds)
        while (now := self.sysfs.driver(bdf)) != driver:
            if now is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def _wait_for_node(self, bdf: Bdf) -> None:
        deadline = time.monotonic() + NODE_TIMEOUT
        group = self.sysfs.device(bdf).group
        while True:
            nodes = vfio_nodes(self.sysfs, bdf, group)
            if any(self.sysfs.path(node.lstrip("/")).exists() for node in nodes):
                return
            if time.monotonic() > deadline:
                raise HostNotReady(
                    f"{bdf} is on vfio-pci, but {' or '.join(nodes)} does not appear",
                    "is /dev a devtmpfs, or does udev run?",
                )
            time.sleep(0.01)
