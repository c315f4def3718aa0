"""Borrow devices: bind them to vfio-pci for the length of a ``with`` block."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from kvmpass._signals import deferred
from kvmpass.host.address import Bdf, parse_distinct
from kvmpass.host.blockers import check_assignable
from kvmpass.host.drivers.changes import ON_VFIO_PCI, check_privilege, may_change_driver
from kvmpass.host.drivers.journal import Journal, Operation
from kvmpass.host.drivers.lock import Say
from kvmpass.host.drivers.transaction import DRIVER_TIMEOUT, OnStep, Transaction
from kvmpass.host.look import Look
from kvmpass.host.sysfs import VFIO_PCI, PciDevice, Sysfs


class Borrow:
    """Devices that are bound to vfio-pci while the ``with`` block runs. Made by :func:`borrow`; used once.

    Synchronization: for one thread. In the main thread Ctrl-C, SIGTERM and SIGHUP are deferred while a device has no
    driver (tens to hundreds of milliseconds; at most ``timeout`` seconds for a driver that hangs).
    """

    def __init__(self, bdfs: tuple[Bdf, ...], transaction: Transaction, look: Look | None = None) -> None:
        self.bdfs = bdfs
        self.devices: list[PciDevice] = []
        self._transaction = transaction
        self._look = look

    def __enter__(self) -> list[PciDevice]:
        """Bind the devices to vfio-pci, all or none. Returns them as they are then, in the order of the arguments.

        The devices are checked before this waits for other processes, and once more with the lock held. Raises what
        :func:`check_assignable` raises, before any change of these devices, except that a device which a killed
        process has left is restored before the second check; ``PermissionError``; ``HostNotReady``,
        ``NotAssignable``, ``OSError``, ``JournalError`` after all devices are rebound to their drivers.
        """
        transaction, sysfs = self._transaction, self._transaction.sysfs
        self.devices.clear()
        able = [may_change_driver(sysfs, bdf) for bdf in self.bdfs]
        if self._look is None or not all(able):
            devices = self._check()
            for device in devices:
                if device.driver != VFIO_PCI:
                    check_privilege(sysfs, device.bdf)
            if not any(able):
                self.devices += devices  # bound by root for this user: nothing to change or to restore
                return list(self.devices)
        try:
            with transaction.lock():
                with deferred():
                    transaction.recover(self.bdfs)
                self._check()  # here: it may be in use since this waited for the lock
                with deferred():
                    self.devices += transaction.change(Operation.ASSIGN, dict.fromkeys(self.bdfs, ON_VFIO_PCI))
            return list(self.devices)
        except BaseException as error:
            transaction.put_back(error)
            raise

    def _check(self) -> list[PciDevice]:
        self._look = look = self._look.again() if self._look is not None else Look(self._transaction.sysfs)
        return [check_assignable(look.sysfs, bdf, together=self.bdfs, look=look) for bdf in self.bdfs]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Rebind all devices. Raises ``RestoreFailed``; if ``error`` is set, it becomes a note of ``error``."""
        self._transaction.put_back(error)

    def close(self) -> None:
        """Rebind what is still borrowed; idempotent. Raises ``RestoreFailed`` with the devices."""
        self._transaction.put_back()


def borrow(
    *bdfs: Bdf | str,
    sysfs: Sysfs | None = None,
    state_dir: Path | None = None,
    timeout: float = DRIVER_TIMEOUT,
    say: Say | None = None,
    on_step: OnStep | None = None,
    look: Look | None = None,
) -> Borrow:
    """Bind devices to vfio-pci for a while: ``with host.borrow("0000:01:00.0") as [device]: …``.

    Only these functions change, never their siblings. Before each change the journal (``state_dir``, default
    ``$KVMPASS_STATE_DIR`` or ``/var/lib/kvmpass``) records the driver. When the block ends, for any reason, the
    original driver is bound and the original ``driver_override`` set; :func:`restore` does it for a process that
    was killed. A device that is bound to vfio-pci already stays so; a user who may not change drivers can borrow such
    devices only, and nothing is written. If the module vfio-pci had to be loaded, it stays loaded. Close all VFIO
    descriptors of a device before the block ends: unbinding blocks until they are closed. ``timeout`` is in seconds,
    for each driver that is unbound or bound; ``say`` receives a line when another process changes drivers for more
    than a second, ``on_step`` each step and its device, just before that change. Several devices change at the same
    time, each in a thread of its own, from which ``on_step`` is called. ``look``: the view of the
    host with which the caller has just checked these devices, so that they are checked only once more, with the lock
    held. The state of a driver (addresses of a network interface, for example) is not restored.
    """
    transaction = Transaction(sysfs or Sysfs(), Journal(state_dir), timeout, say, on_step)
    return Borrow(parse_distinct(bdfs), transaction, look)
