"""Changing a device's driver: each step announced in the journal, checked afterwards, and the one way back."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator

from kvmpass.errors import HostNotReady, KvmpassError, NoSuchDevice, NotAssignable, RestoreFailed
from kvmpass.host.address import Bdf
from kvmpass.host.drivers.journal import Entry, Journal, Operation
from kvmpass.host.drivers.steps import MATCHING, ON_VFIO_PCI, Setting, Step, driver_changes, other_changes
from kvmpass.host.kernel.processes import holders
from kvmpass.host.look import Look
from kvmpass.host.sysfs import PCI_DRIVERS, PciDevice, Sysfs
from kvmpass.host.usage import VFIO_PCI, usage, vfio_nodes

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

    def load_driver(self) -> None:
        """Have vfio-pci in the kernel. Raises ``HostNotReady``."""
        if not self.sysfs.path(PCI_DRIVERS, VFIO_PCI).is_dir():
            self.sysfs.load_module(VFIO_PCI)

    # --- there

    def take(self, entry: Entry) -> PciDevice:
        """Bind the entry's device to vfio-pci. Raises ``OSError``, ``NotAssignable``, ``HostNotReady``."""
        bdf = entry.bdf
        with self._changing(bdf):
            self._announce(entry, Step.RECORDED)
            self._change_driver(entry, ON_VFIO_PCI)
            self._wait_for_node(bdf)
            self._announce(entry, Step.BOUND)
            self.confirm(bdf, ON_VFIO_PCI)
            log.debug("%s is on vfio-pci, before: %s", bdf, entry.driver or "no driver")
            return self.sysfs.device(bdf)

    def give(self, entry: Entry, wanted: Setting) -> None:
        """Take the entry's device from vfio-pci and make it as wanted. Raises ``OSError``, ``RestoreFailed``."""
        with self._changing(entry.bdf):
            self._announce(entry, Step.RECORDED)
            self._make(entry, wanted)
            self._announce(entry, Step.RETURNED)
            self.confirm(entry.bdf, wanted)

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
        now = Setting.of(self.sysfs, bdf)
        if now.driver not in (None, entry.driver, entry.target) and entry.target != MATCHING:
            # Somebody bound it anew meanwhile: taking it away from them would be a second surprise.
            if now.override in (VFIO_PCI, entry.target) and now.override != entry.override:
                self._override(bdf, entry.override)
            return f"bound to {now.driver} by someone else meanwhile, left there"
        if entry.operation is Operation.UNBIND and now.driver not in (None, VFIO_PCI):
            uses = usage(Look(self.sysfs), self.sysfs.device(bdf))
            if uses:  # the unbind was all but done, and the host has begun to use the device
                self._finish(entry, Setting(now.driver, entry.target_override))
                return f"driver {now.driver}, in use there by now, left there: {'; '.join(uses)}"
        if now == entry.before and now.driver == VFIO_PCI:
            return "it was on vfio-pci before and stays there"
        self._make(entry, entry.before)
        return str(entry.before)

    # --- either way

    def _make(self, entry: Entry, wanted: Setting) -> None:
        """Driver, override and power settings. Raises ``OSError``, ``RestoreFailed``, ``NotAssignable``."""
        self._change_driver(entry, wanted)
        self._finish(entry, wanted)
        now = Setting.of(self.sysfs, entry.bdf)
        if wanted.driver not in (now.driver, MATCHING) or now.override != wanted.override:
            raise RestoreFailed(
                f"{entry.bdf} has driver {now.driver or 'none'} and override {now.override or 'none'} now"
            )

    def _change_driver(self, entry: Entry, wanted: Setting) -> None:
        bdf = entry.bdf
        now = Setting.of(self.sysfs, bdf)
        if now.driver == VFIO_PCI != wanted.driver:
            self._check_let_go(self.sysfs.device(bdf))
        for change in driver_changes(bdf, now, wanted):
            self._announce(entry, change.step)
            if change.step in (Step.UNBIND, Step.RETURN_UNBIND):
                self._unbind(bdf, now.driver or "")
            elif change.step in (Step.PROBE, Step.RETURN_PROBE):
                self._bind(bdf, wanted.driver or "")
            else:
                self._override(bdf, change.text)

    def _finish(self, entry: Entry, wanted: Setting) -> None:
        for change in other_changes(entry.bdf, Setting.of(self.sysfs, entry.bdf), wanted):
            if change.step is Step.RETURN_OVERRIDE:
                self._announce(entry, change.step)
                self._override(entry.bdf, change.text)
        self._announce(entry, Step.RETURN_POWER)
        for change in other_changes(entry.bdf, Setting.of(self.sysfs, entry.bdf), wanted):
            self.sysfs.write(self.sysfs.path(change.path), change.text)

    def _check_let_go(self, device: PciDevice) -> None:
        # The kernel would wait for the holder, and for ever if the holder is this process.
        held = {
            who for found in holders(self.sysfs, vfio_nodes(self.sysfs, device.bdf, None)).values() for who in found
        }
        if device.group is not None:
            shared = len(self.sysfs.group(device.group).devices) > 1
            for found in holders(self.sysfs, vfio_nodes(self.sysfs, device.bdf, device.group)).values():
                # A group that is shared may be open in this process for a sibling.
                held.update(who for who in found if not shared or who.pid != os.getpid())
        if held:
            raise RestoreFailed(f"{device.bdf} is still open in {' and '.join(map(str, sorted(held)))}")

    # --- the changes

    @contextlib.contextmanager
    def _changing(self, bdf: Bdf) -> Iterator[None]:
        """Wait until no earlier change of the device is under way in the kernel, then keep others waiting.

        A write outlives the process that was killed while it waited for it: what we saw now would not last.
        Whatever fails because the device has gone is a ``NoSuchDevice``.
        """
        gone = f"there is no PCI device {bdf} any more"
        path = self.sysfs.device_path(bdf)
        try:
            try:  # a file that only root may open, or any user could lock root out; nothing is written to it
                fd = os.open(path / "remove", os.O_WRONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # virtual functions have none
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NoSuchDevice(gone) from None
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
        except (OSError, KvmpassError) as error:
            if self.sysfs.device_path(bdf).exists():
                raise
            raise NoSuchDevice(gone) from error
        finally:
            self._change = None
            os.close(fd)

    def _announce(self, entry: Entry, step: Step) -> None:
        entry.step = step
        try:
            self.journal.write(entry)
        except OSError as error:
            if step is Step.RECORDED:
                raise
            # What was there is on disk; a full disk must not keep the device from going where it belongs.
            log.warning("the journal of %s: %s", entry.bdf, error)
        _step(step, entry.bdf)

    def _override(self, bdf: Bdf, driver: str | None) -> None:
        # A lone newline clears the override; writing nothing would do nothing.
        self.sysfs.write(self.sysfs.device_path(bdf) / "driver_override", f"{driver or ''}\n")

    def _unbind(self, bdf: Bdf, driver: str) -> None:
        try:
            self._write(bdf, PCI_DRIVERS, driver, "unbind")
        except TimeoutError:
            raise
        except OSError:  # ENODEV: somebody else unbound it after we looked
            if self.sysfs.driver(bdf) == driver:
                raise
        now = self.sysfs.driver(bdf)
        if now == driver:
            raise RestoreFailed(f"{driver} does not let go of {bdf}")
        if now is not None:
            raise RestoreFailed(f"{bdf} went from {driver} to {now}: somebody else changes its driver too")

    def _bind(self, bdf: Bdf, driver: str) -> None:
        """Let the kernel find the driver that the override names, or with ``MATCHING`` any."""
        reason = self._attempt(bdf, "sys/bus/pci/drivers_probe")
        if driver == MATCHING:
            self._wait_for_driver(bdf, driver, 0.2)
            if self.sysfs.driver(bdf) == VFIO_PCI:
                device = self.sysfs.device(bdf)
                raise RestoreFailed(
                    f"vfio-pci takes {bdf} again: it was told to take all devices of that kind",
                    f"echo {device.vendor:04x} {device.device:04x} > /sys/bus/pci/drivers/vfio-pci/remove_id, "
                    "or remove vfio-pci.ids from the kernel's command line or from modprobe.d",
                )
            return
        if not self._wait_for_driver(bdf, driver, 0.2) and self.sysfs.driver(bdf) is None:
            reason = self._attempt(bdf, PCI_DRIVERS, driver, "bind") or reason
        if self._wait_for_driver(bdf, driver):
            return
        kind = NotAssignable if driver == VFIO_PCI else RestoreFailed
        now = self.sysfs.driver(bdf)
        if now is not None:
            raise kind(f"{bdf} went to {now} instead of {driver}: somebody else changes its driver too")
        if not self.sysfs.path(PCI_DRIVERS, driver).is_dir():
            raise kind(f"{bdf} cannot go to {driver}: there is no such driver in this kernel now", "load its module")
        raise kind(
            f"{driver} does not take {bdf}: it has no driver now" + (f" ({reason})" if reason else ""),
            f"the kernel's log says why: dmesg | grep {bdf}",
        )

    def confirm(self, bdf: Bdf, wanted: Setting) -> None:
        """The last look: nobody else has changed the driver since."""
        now = self.sysfs.driver(bdf)
        if now != wanted.driver and (wanted.driver != MATCHING or now == VFIO_PCI):
            kind = NotAssignable if wanted.driver == VFIO_PCI else RestoreFailed
            raise kind(f"{bdf} is on {now or 'no driver'} by now: somebody else changes its driver too")

    def _attempt(self, bdf: Bdf, *parts: str) -> str:
        """Write, where only the driver link tells whether it worked; returns what the kernel said against it."""
        try:
            self._write(bdf, *parts)
        except TimeoutError:
            raise
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def _write(self, bdf: Bdf, *parts: str) -> None:
        self.sysfs.write(self.sysfs.path(*parts), str(bdf), self.timeout, self._change)

    # --- waiting

    def _wait_for_driver(self, bdf: Bdf, driver: str, seconds: float | None = None) -> bool:
        # Probing is done when the write returns, except for drivers that ask for it to be asynchronous.
        deadline = time.monotonic() + (NODE_TIMEOUT if seconds is None else seconds)
        while (now := self.sysfs.driver(bdf)) != driver:
            if now is not None or time.monotonic() > deadline or not self.sysfs.device_path(bdf).exists():
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
