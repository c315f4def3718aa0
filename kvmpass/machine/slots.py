"""The places of a machine's devices on the guest's PCI bus, and what the guest is told about them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from kvmpass.board.board import Board
from kvmpass.errors import GuestError
from kvmpass.machine.device import AssignedDevice
from kvmpass.pci import AssignedFunction, PciFunction, Wiring


class Slots:
    """``board`` is another one after each reset of the machine; ``devices`` are the machine's own list.

    Emulated functions keep their slots, and are made again for each board.

    Synchronization: callers hold the machine's lock of moves, except for ``unplug`` from a vCPU's thread and ``ask``.
    ``lock`` is the buses'.
    """

    def __init__(
        self,
        board: Board,
        devices: Sequence[AssignedDevice],
        lock: threading.RLock,
        running: Callable[[], bool],
    ) -> None:
        self.board = board
        self.devices = devices
        self.running = running
        self._lock = lock
        self._made: dict[int, Callable[[Wiring], PciFunction]] = {}  # what makes emulated functions, by slot

    def use(self, board: Board) -> None:
        """Take a new board. Raises what making a function raises: the old one is then still in use."""
        with self._lock:
            for slot, make in self._made.items():
                board.plug(make, slot)
        self.board = board

    def close(self, board: Board) -> None:
        """Release a board, and what is left on its bus."""
        with self._lock:
            board.close()

    def add(self, make: Callable[[Wiring], PciFunction]) -> None:
        """Plug an emulated function into a slot of its own. Raises ``LayoutError``, and what ``make`` raises."""
        with self._lock:
            slot = self.board.pci.free_slot()
            self.board.plug(make, slot)
            self._made[slot] = make

    def plug(self, device: AssignedDevice) -> None:
        """Show ``device`` to the guest: in the slot of function 0 of the same device, or in one of its own.

        A guest that has seen function 0 alone looks for no others there (pci_scan_slot, drivers/pci/probe.c).
        """
        mates = (one for one in self.devices if one.bdf == device.bdf.function_0 and one.function is not None)
        first = next(mates, None)
        if first is not None and device.bdf.function and not self.running():
            device.slot, device.number = first.slot, device.bdf.function
        else:
            device.slot, device.number = self.board.pci.free_slot(), 0
        with self._lock:
            device.function = self.board.plug(partial(AssignedFunction, device.vfio), device.slot, device.number)

    def unplug(self, device: AssignedDevice) -> None:
        """Out of the guest's view. Raises ``OSError``: what KVM keeps stays recorded, to be tried again."""
        with self._lock:
            if device.function is not None:
                if all(one is device or one.slot != device.slot for one in self.devices):
                    self.board.hotplug.forget(device.slot)
                self.board.unplug(device.function)
                device.function = None

    def announce(self, device: AssignedDevice) -> None:
        """Tell a guest that runs that ``device`` has come."""
        if self.running():
            with self._lock:
                self.board.hotplug.announce(device.slot)

    def request_eject(self, device: AssignedDevice) -> None:
        """Ask the running guest to eject what is in the slot of ``device``."""
        with self._lock:
            self.board.hotplug.request_eject(device.slot)

    def ask(self, device: AssignedDevice, timeout: float) -> list[AssignedDevice]:
        """The same, and wait until it has, or has ended: ``timeout`` seconds at most, then raises ``GuestError``.

        Returns the devices that were in the slot.
        """
        deadline = time.monotonic() + timeout
        leaving = [one for one in self.devices if one.slot == device.slot]
        self.request_eject(device)
        while self.running() and not device.ejected.wait(min(1.0, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                with self._lock:
                    self.board.hotplug.withdraw(device.slot)
                raise GuestError(
                    f"the guest has not let go of {device.bdf} within {timeout:g} seconds",
                    "Machine.deassign takes it out without asking",
                )
        return leaving
