"""Borrow devices from the host for a while."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from kvmpass._signals import deferred
from kvmpass.host.address import Bdf, parse_distinct
from kvmpass.host.blockers import check_assignable
from kvmpass.host.drivers.journal import Journal, Operation
from kvmpass.host.drivers.lock import Say
from kvmpass.host.drivers.transaction import (
    DRIVER_TIMEOUT,
    OnStep,
    Transaction,
    check_privilege,
    may_change_driver,
)
from kvmpass.host.sysfs import PciDevice, Sysfs
from kvmpass.host.usage import VFIO_PCI


class Borrow:
    """Devices of the host on vfio-pci for as long as the ``with`` block runs. Made by :func:`borrow`.

    Used once, by one thread; in the main thread Ctrl-C, SIGTERM and SIGHUP wait while a device is between
    two drivers (tens to hundreds of milliseconds; a driver that hangs is given up after ``timeout`` seconds).
    """

    def __init__(self, bdfs: tuple[Bdf, ...], transaction: Transaction) -> None:
        self.bdfs = bdfs
        self.devices: list[PciDevice] = []
        self._transaction = transaction

    def __enter__(self) -> list[PciDevice]:
        """Take the devices, all or none. Returns them as they are now, in the order of the arguments.

        Raises what :func:`check_assignable` raises, before any change; ``PermissionError``; ``HostNotReady``,
        ``NotAssignable``, ``OSError``, ``JournalError`` after everything has been given back.
        """
        transaction, sysfs = self._transaction, self._transaction.sysfs
        devices = [check_assignable(sysfs, bdf, together=self.bdfs) for bdf in self.bdfs]
        self.devices.clear()
        for device in devices:
            if device.driver != VFIO_PCI:
                check_privilege(sysfs, device.bdf)
        if not any(may_change_driver(sysfs, bdf) for bdf in self.bdfs):
            self.devices += devices  # bound for a user without that right: nothing to do, nothing to put back
            return list(self.devices)
        try:
            with transaction.lock(), deferred():
                for bdf in self.bdfs:
                    transaction.recover(bdf)
                for bdf in self.bdfs:  # again: it may have come into use while this waited for the lock
                    check_assignable(sysfs, bdf, together=self.bdfs)
                for bdf in self.bdfs:
                    self.devices.append(transaction.change(bdf, Operation.ASSIGN))
            return list(self.devices)
        except BaseException as error:
            transaction.put_back(error)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give all devices back. Raises ``RestoreFailed``; with an error under way that becomes its note."""
        self._transaction.put_back(error)

    def close(self) -> None:
        """Give back what is still borrowed; idempotent. Raises ``RestoreFailed`` naming the devices."""
        self._transaction.put_back()


def borrow(
    *bdfs: Bdf | str,
    sysfs: Sysfs | None = None,
    state_dir: Path | None = None,
    timeout: float = DRIVER_TIMEOUT,
    say: Say | None = None,
    on_step: OnStep | None = None,
) -> Borrow:
    """Have devices on vfio-pci for a while: ``with host.borrow("0000:01:00.0") as [device]: …``.

    Only these functions change, never their siblings. Before each change the journal (``state_dir``, default
    ``$KVMPASS_STATE_DIR`` or ``/var/lib/kvmpass``) says on disk what was there. On every way out the original driver
    is bound again and the original ``driver_override`` set; :func:`restore` does it for a process that was killed.
    A device that is on vfio-pci already is used as it is and stays there; a user who may not change drivers can
    borrow such devices only, and nothing is written. The module vfio-pci, if it had to be loaded, stays loaded. Close
    all VFIO descriptors of a device before the block ends: the kernel waits for them. ``timeout`` is in seconds, for
    each driver that is unbound or bound; ``say`` is called with a line when another process changes drivers for more
    than a second, ``on_step`` with each step and its device, just before that change.
    What a driver alone remembers (addresses of a network interface, for one) is the host's to set again.
    """
    return Borrow(parse_distinct(bdfs), Transaction(sysfs or Sysfs(), Journal(state_dir), timeout, say, on_step))
