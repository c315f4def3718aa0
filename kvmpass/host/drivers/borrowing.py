"""Borrow devices from the host for a while."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from kvmpass._signals import deferred
from kvmpass.errors import BadAddress
from kvmpass.host.address import Bdf
from kvmpass.host.blockers import check_assignable
from kvmpass.host.drivers.binding import DRIVER_TIMEOUT
from kvmpass.host.drivers.journal import Journal, Operation
from kvmpass.host.drivers.lock import Say
from kvmpass.host.drivers.undoing import Undo, check_privilege, may_change_driver
from kvmpass.host.sysfs import PciDevice, Sysfs
from kvmpass.host.usage import VFIO_PCI


class Borrow:
    """Devices of the host on vfio-pci for as long as the ``with`` block runs. Made by :func:`borrow`.

    Used once, by one thread; in the main thread Ctrl-C, SIGTERM and SIGHUP wait while a device is between
    two drivers (tens to hundreds of milliseconds; a driver that hangs is given up after ``timeout`` seconds).
    """

    def __init__(
        self, bdfs: tuple[Bdf, ...], sysfs: Sysfs, journal: Journal, timeout: float, say: Say | None = None
    ) -> None:
        self.bdfs = bdfs
        self.devices: list[PciDevice] = []
        self._undo = Undo(sysfs, journal, timeout, say)

    def __enter__(self) -> list[PciDevice]:
        """Take the devices, all or none. Returns them as they are now, in the order of the arguments.

        Raises what :func:`check_assignable` raises, before any change; ``PermissionError``; ``HostNotReady``,
        ``NotAssignable``, ``OSError``, ``JournalError`` after everything has been given back.
        """
        undo = self._undo
        devices = [check_assignable(undo.sysfs, bdf, together=self.bdfs) for bdf in self.bdfs]
        self.devices.clear()
        for device in devices:
            if device.driver != VFIO_PCI:
                check_privilege(undo.sysfs, device.bdf)
        if not any(may_change_driver(undo.sysfs, bdf) for bdf in self.bdfs):
            self.devices += devices  # bound for a user without that right: nothing to do, nothing to undo
            return list(self.devices)
        try:
            with undo.journal.lock(undo.say), deferred():
                for bdf in self.bdfs:
                    undo.clear_way(bdf)
                for bdf in self.bdfs:  # again: it may have come into use while this waited for the lock
                    check_assignable(undo.sysfs, bdf, together=self.bdfs)
                undo.binder.load_driver()
                for bdf in self.bdfs:
                    self.devices.append(undo.binder.take(undo.begin(bdf, Operation.ASSIGN)))
            return list(self.devices)
        except BaseException as error:
            undo.unwind(error)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give all devices back. Raises ``RestoreFailed``; with an error under way that becomes its note."""
        self._undo.unwind(error)

    def close(self) -> None:
        """Give back what is still borrowed; twice is harmless. Raises ``RestoreFailed`` naming the devices."""
        self._undo.close()


def borrow(
    *bdfs: Bdf | str,
    sysfs: Sysfs | None = None,
    state_dir: Path | None = None,
    timeout: float = DRIVER_TIMEOUT,
    say: Say | None = None,
) -> Borrow:
    """Have devices on vfio-pci for a while: ``with host.borrow("0000:01:00.0") as [device]: …``.

    Only these functions change, never their siblings. Before each change the journal (``state_dir``, default
    ``$KVMPASS_STATE_DIR`` or ``/var/lib/kvmpass``) says on disk what was there. On every way out the original driver
    is bound again and the original ``driver_override`` set; :func:`restore` does it for a process that was killed.
    A device that is on vfio-pci already is used as it is and stays there; a user who may not change drivers can
    borrow such devices only, and nothing is written. The module vfio-pci, if it had to be loaded, stays loaded. Close
    all VFIO descriptors of a device before the block ends: the kernel waits for them. ``timeout`` is in seconds, for
    each driver that lets go or takes; ``say`` is told when another process changes drivers for longer than a second.
    What a driver alone remembers (addresses of a network interface, for one) is the host's to set again.
    """
    return Borrow(distinct(bdfs), sysfs or Sysfs(), Journal(state_dir), timeout, say)


def distinct(bdfs: Sequence[Bdf | str]) -> tuple[Bdf, ...]:
    """The addresses as values. Raises ``BadAddress``, for one that is named twice too."""
    parsed = tuple(Bdf.parse(bdf) if isinstance(bdf, str) else bdf for bdf in bdfs)
    for bdf in parsed:
        if parsed.count(bdf) > 1:
            raise BadAddress(f"{bdf} is named twice", "name each device once")
    return parsed
