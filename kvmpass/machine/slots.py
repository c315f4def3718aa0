"""The slots of a machine's devices on the guest's PCI bus, and their hot plug."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kvmpass.board.board import Board
from kvmpass.errors import GuestError
from kvmpass.machine.device import AssignedDevice
from kvmpass.pci import AssignedFunction, PciFunction, Wiring
from kvmpass.pci.bus import SLOTS


class Slots:
    """Plugs assigned devices and emulated functions into a board's PCI bus.

    Emulated functions keep their slots, and are constructed again for each board.

    Synchronization: callers hold the machine's device lock, except for ``unplug`` from a vCPU's thread and
    ``eject``.
    """

    def __init__(
        self,
        board: Board,
        devices: Sequence[AssignedDevice],
        bus_lock: threading.RLock,
        running: Callable[[], bool],
        p2p: bool = False,
    ) -> None:
        self.board = board
        """The board that is in use; each reset of the machine replaces it."""
        self.devices = devices
        """The machine's devices."""
        self.bus_lock = bus_lock
        """The machine's."""
        self.running = running
        """Whether a guest runs."""
        self.p2p = p2p
        """Whether the devices reach each other's BARs."""
        self._made: dict[int, Callable[[Wiring], PciFunction]] = {}  # constructors of emulated functions, by slot

    def use(self, board: Board) -> None:
        """Replace the board. Raises what a function's constructor raises: the old board is then still in use."""
        with self.bus_lock:
            for slot, make in self._made.items():
                board.plug(make, slot)
        self.board = board

    def close(self, board: Board) -> None:
        """Close a board, and the functions on its bus."""
        with self.bus_lock:
            board.close()

    def add(self, make: Callable[[Wiring], PciFunction], order: Iterable[int] = range(SLOTS)) -> int:
        """Plug an emulated function into the first free slot in ``order``, and return which. A running guest is told.

        Raises ``LayoutError``, and what ``make`` raises.
        """
        with self.bus_lock:
            slot = self.board.pci.free_slot(order)
            self.board.plug(make, slot)
            self._made[slot] = make
            if self.running():
                self.board.hotplug.announce(slot)
        return slot

    def hide(self, slot: int, function: PciFunction) -> None:
        """Take an emulated function off the bus, without closing it. Idempotent, also once another has its slot."""
        with self.bus_lock:
            if function in self.board.pci.functions:
                self._made.pop(slot, None)
                self.board.hotplug.forget(slot)
                self.board.pci.unplug(function)

    def close_function(self, function: PciFunction) -> None:
        """Close a function that is off the bus. Raises ``OSError``."""
        with self.bus_lock:
            function.close()

    def plug(self, device: AssignedDevice) -> None:
        """Show ``device`` to the guest: in the slot of function 0 of the same device, or in one of its own.

        A guest that has enumerated function 0 alone looks for no others there (pci_scan_slot, drivers/pci/probe.c).
        """
        plugged = (other for other in self.devices if other.function is not None)
        first = next((other for other in plugged if other.bdf == device.bdf.function_0), None)
        if first is not None and device.bdf.function and not self.running():
            device.slot, device.number = first.slot, device.bdf.function
        else:
            device.slot, device.number = self.board.pci.free_slot(), 0
        with self.bus_lock:
            make = partial(AssignedFunction, device.vfio, p2p=self.p2p)
            device.function = self.board.plug(make, device.slot, device.number)

    def unplug(self, device: AssignedDevice) -> None:
        """Hide ``device`` from the guest. Raises ``OSError``: what KVM keeps stays recorded; call it again."""
        with self.bus_lock:
            if device.function is not None:
                if all(other is device or other.slot != device.slot for other in self.devices):
                    self.board.hotplug.forget(device.slot)
                self.board.unplug(device.function)
                device.function = None

    def announce(self, device: AssignedDevice) -> None:
        """Notify a running guest of the new ``device``."""
        if self.running():
            with self.bus_lock:
                self.board.hotplug.announce(device.slot)

    def request_eject(self, device: AssignedDevice) -> None:
        """Ask the running guest to eject what is in the slot of ``device``."""
        with self.bus_lock:
            if not device.ejected.is_set():  # another device may have the slot then
                self.board.hotplug.request_eject(device.slot)

    def eject(self, device: AssignedDevice, timeout: float) -> list[AssignedDevice]:
        """Request the eject and wait for it, or for the guest's end. Return the devices of the slot.

        Raises ``GuestError`` after ``timeout`` seconds, as ``wait_for_eject`` returns false.
        """
        with self.bus_lock:
            done = device.ejected.is_set()  # another device may have the slot then
            ejected = [d for d in self.devices if d.slot == device.slot and d.ejected.is_set() == done]
        if not self.wait_for_eject(device.slot, device.ejected, timeout):
            raise GuestError(
                f"the guest did not eject {device.bdf} within {timeout:g} seconds",
                "use Machine.deassign, which does not wait for the guest",
            )
        return ejected

    def wait_for_eject(self, slot: int, ejected: threading.Event, timeout: float) -> bool:
        """Request the eject of ``slot``, and wait for ``ejected``, or for the guest's end; return whether it came.

        After ``timeout`` seconds the request is withdrawn. A guest that has read it may still eject.
        """
        deadline = time.monotonic() + timeout
        with self.bus_lock:
            if ejected.is_set():  # another device may have the slot
                return True
            self.board.hotplug.request_eject(slot)
        while self.running() and not ejected.wait(min(1.0, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                with self.bus_lock:  # a vCPU that ejects holds it
                    if not ejected.is_set():
                        self.board.hotplug.withdraw(slot)
                        return False
        return True
