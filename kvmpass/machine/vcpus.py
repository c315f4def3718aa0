"""The run loop: one thread for each vCPU, exits dispatched over two buses."""

from __future__ import annotations

import enum
import errno
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvmpass._log import load_logging
from kvmpass.bus import Bus
from kvmpass.errors import GuestError
from kvmpass.kvm import Fastpath, Vcpu, exits, install_kick

KICK = signal.SIGRTMIN + 4
"""Makes a vCPU leave the guest. The handler does nothing, and is C's: Python's run in the main thread only."""

_REFUSALS = {
    errno.EFAULT: ": the guest's access to its memory or to a device's cannot be resolved",
    errno.EIO: ": KVM has ended this VM",
}


class GuestOutcome(enum.Enum):
    """How a guest ended: the value completes a message that begins with 'the guest'."""

    POWEROFF = "powered off"
    """It entered ACPI's S5 state."""
    REBOOT = "rebooted"
    """It wrote ACPI's reset register."""
    PANIC = "panicked"
    """Its kernel panicked and reset the machine (``panic=-1 reboot=panic_warm``)."""
    TRIPLE_FAULT = "had a triple fault"
    """A triple fault, such as an exception without a handler."""
    FAULT = "was ended because KVM_RUN failed"
    """``KVM_RUN`` failed, or returned an exit that is not handled; ``Machine.fault`` says why."""
    DEVICE_ERROR = "was ended because a device failed"
    """The host reported an uncorrected error of an assigned device."""
    TIMEOUT = "was ended by its time limit"
    """It ran longer than its time limit."""
    STOPPED = "was stopped"
    """``Machine.stop`` was called, or the machine was closed."""


class Accesses(NamedTuple):
    """Number of exits for accesses of one device."""

    reads: int
    """Exits for reads."""
    writes: int
    """Exits for writes."""


class VcpuThreads:
    """Run vCPUs until one of them, or ``end()``, ends the guest.

    ``lock`` is held for each dispatched exit: devices on the buses see one access at a time. ``throttle`` is called
    after each access to a port, without the lock: it may block, which delays this vCPU only.
    ``count_accesses``: count exits by what was accessed; ``fastpath`` has counted its own.

    Synchronization: ``end``, ``wait``, ``ended``, ``stop``, ``pause`` and ``resume`` from any thread. ``_state``
    guards the outcome, whether it is paused, and which threads are inside their loop, so that none is signalled
    after its end; it is held briefly, and no other lock is taken under it.
    """

    def __init__(
        self,
        vcpus: Sequence[Vcpu],
        ports: Bus,
        mmio: Bus,
        lock: threading.RLock,
        throttle: Callable[[], None],
        count_accesses: bool = False,
        fastpath: Fastpath | None = None,
    ) -> None:
        self._vcpus = list(vcpus)
        self._ports = ports
        self._mmio = mmio
        self._bus_lock = lock
        self._throttle = throttle
        self._ended = threading.Event()
        self._state = threading.RLock()  # reentrant: a signal handler may call end()
        self._changed = threading.Condition(self._state)
        self._inside: dict[threading.Thread, Vcpu] = {}
        self._paused = False
        self._parked = 0
        self._outcome: GuestOutcome | None = None
        self._failure: BaseException | None = None
        self.fault = ""
        """Why KVM could not run the guest; empty otherwise."""
        self._threads: list[threading.Thread] = []
        self._reasons: list[Counter[type[exits.Exit]]] = [Counter() for _ in vcpus]  # each thread has its own
        self._accesses: Counter[tuple[str, bool]] | None = Counter() if count_accesses else None
        self._fastpath = fastpath
        self._repeated = [-1 for _ in vcpus]  # number of the exit that was repeated last

    def start(self) -> None:
        """Start one thread for each vCPU."""
        install_kick(KICK)
        for vcpu in self._vcpus:
            thread = threading.Thread(target=self._loop, args=(vcpu,), name=f"vcpu{vcpu.index}", daemon=True)
            self._threads.append(thread)
            thread.start()
        load_logging()  # while the guest begins to boot, long before it can use up this process's descriptors

    def end(self, outcome: GuestOutcome | None = None) -> None:
        """End the guest with ``outcome`` (the first call wins), without waiting for its vCPUs; None: ``STOPPED``."""
        with self._state:
            if self._outcome is None:
                self._outcome = outcome or GuestOutcome.STOPPED
            self._ended.set()
            self._kick()
            self._changed.notify_all()

    def _kick(self) -> None:
        """Make every vCPU leave the guest; called with ``_state`` held."""
        for thread, vcpu in self._inside.items():
            vcpu.request_exit()
            if thread is not threading.current_thread():
                signal.pthread_kill(thread.ident or 0, KICK)

    def pause(self, timeout: float) -> bool:
        """Stop every vCPU until ``resume``; return whether all left the guest within ``timeout`` seconds.

        If not (one blocks in ``throttle``) they are resumed. Not from a vCPU's thread.
        """
        with self._changed:
            self._paused = True
            self._kick()
            stopped = self._changed.wait_for(lambda: self._parked == len(self._inside) or self.ended, timeout)
            if not stopped:
                self.resume()
            return stopped

    def resume(self) -> None:
        """Undo ``pause``. Idempotent."""
        with self._changed:
            self._paused = False
            if not self.ended:
                for vcpu in self._inside.values():
                    vcpu.request_exit(False)
            self._changed.notify_all()

    @property
    def reasons(self) -> dict[str, int]:
        """Number of exits by class of ``kvmpass.kvm.exits``, named without ``Exit``."""
        total = Counter[type[exits.Exit]]()
        for reasons in self._reasons:
            total.update(reasons.copy())  # its thread may add to it
        if answered := sum(vcpu.answered for vcpu in self._vcpus):
            total[exits.MmioExit] += answered
        return {kind.__name__.removesuffix("Exit"): count for kind, count in total.items()}

    @property
    def accesses(self) -> dict[str, Accesses]:
        """Number of exits by what was accessed, most first; empty unless they are counted."""
        if self._accesses is None:
            return {}
        counts = self._accesses.copy()
        if self._fastpath is not None:
            for label, numbers in self._fastpath.counts.items():
                counts.update(
                    {(label, is_write): numbers[is_write] for is_write in (False, True) if numbers[is_write]}
                )
        found = {name: Accesses(counts[name, False], counts[name, True]) for name, _ in counts}
        return dict(sorted(found.items(), key=lambda entry: -sum(entry[1])))

    @property
    def ended(self) -> bool:
        """Whether the guest has ended."""
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> GuestOutcome | None:
        """Wait until the guest has ended, and return how; None after ``timeout`` seconds.

        Raises the exception that ended a vCPU's thread. What the guest can make KVM refuse is an outcome instead
        (``FAULT``; ``fault`` says why).
        """
        if not self._ended.wait(timeout):
            return None
        if self._failure is not None:
            raise self._failure
        return self._outcome

    def stop(self) -> None:
        """End the guest and wait for the threads. Idempotent. Not from a vCPU's thread."""
        self.end()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    # --- in the vCPU's thread

    def _loop(self, vcpu: Vcpu) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (KICK,))  # a thread inherits its creator's mask
        with self._state:
            self._inside[threading.current_thread()] = vcpu
            if self._paused:  # before this thread was in _inside
                vcpu.request_exit()
        try:
            while not self._ended.is_set():
                exit_ = vcpu.run()
                # This entry has completed the exit that was dispatched before (api.rst, 5: kvm_run).
                if self._paused and isinstance(exit_, exits.InterruptedExit):
                    self._park()
                self._dispatch(vcpu, exit_)
        except GuestError as error:
            self.fault = self.fault or str(error)
            self.end(GuestOutcome.FAULT)
        except BaseException as error:
            if self._outcome is None:  # else the guest has ended already
                self._failure = self._failure or error
            self.end(GuestOutcome.STOPPED)
        finally:
            with self._changed:
                del self._inside[threading.current_thread()]
                self._changed.notify_all()

    def _park(self) -> None:
        with self._changed:
            self._parked += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._paused or self.ended)
            self._parked -= 1

    def _dispatch(self, vcpu: Vcpu, exit_: exits.Exit) -> None:
        self._reasons[vcpu.index][type(exit_)] += 1
        match exit_:
            case exits.PortExit():
                with self._bus_lock:
                    if self._accesses is not None:
                        self._accesses[self._ports.label(exit_.port), exit_.is_write] += 1
                    self._drain(vcpu)
                    self._port(vcpu, exit_)
                    self._drain(vcpu)
                self._throttle()
            case exits.MmioExit(address, size, is_write, data):
                with self._bus_lock:
                    if self._accesses is not None:
                        self._accesses[self._mmio.label(address), is_write] += 1
                    self._drain(vcpu)
                    if is_write:
                        self._mmio.write(address, data)
                    else:
                        vcpu.complete(exit_, self._mmio.read(address, size))
                    self._drain(vcpu)
            case exits.InterruptedExit():
                pass
            case exits.ShutdownExit():
                self.end(GuestOutcome.TRIPLE_FAULT)
            case exits.HaltExit():
                time.sleep(0.01)
            case exits.SystemEventExit(kind):
                raise GuestError(f"KVM reports system event {kind}")
            case exits.MemoryFaultExit(gpa, size, flags):
                raise GuestError(f"the guest's access to {gpa:#x}+{size:#x} cannot be resolved (flags {flags:#x})")
            case exits.DeliveryExit(gpa):
                if not self._repeat(vcpu):
                    raise GuestError(f"vCPU {vcpu.index}: an access to {gpa:#x} while an event was delivered")
            case exits.FailedExit(what, code, detail):
                raise GuestError(f"vCPU {vcpu.index}: {what}: code {code:#x}, detail {detail:#x}")
            case exits.RefusedExit(code):
                raise GuestError(f"vCPU {vcpu.index}: KVM_RUN: {os.strerror(code)}{_REFUSALS.get(code, '')}")

    def _repeat(self, vcpu: Vcpu) -> bool:
        """Whether to enter the guest again after a ``DeliveryExit``: not if the exit before was one, too.

        From Linux 6.15 on, KVM concludes from the type of an event in the VMCB alone, without its valid bit, that the
        event is being delivered (svm_check_emulate_instruction). QEMU's emulation of AMD-V leaves the type there when
        it has delivered an exception, and clears it at the next exit.
        """
        number = sum(self._reasons[vcpu.index].values()) + vcpu.answered
        before, self._repeated[vcpu.index] = self._repeated[vcpu.index], number
        return number != before + 1

    def _drain(self, vcpu: Vcpu) -> None:
        """Dispatch the writes that KVM has collected.

        Before an exit they come first. After it: if the exit has ended the collection, another vCPU may have added to
        it in the meantime, and nothing would take that until the next exit.
        """
        for is_port, address, data in vcpu.coalesced_writes():
            (self._ports if is_port else self._mmio).write(address, data)

    def _port(self, vcpu: Vcpu, exit_: exits.PortExit) -> None:
        """Dispatch each of the ``repeat`` accesses of a string instruction."""
        port, size = exit_.port, exit_.size
        if exit_.repeat == 1:  # nearly every access
            if exit_.is_write:
                self._ports.write(port, exit_.data)
            else:
                vcpu.complete(exit_, self._ports.read(port, size))
        elif exit_.is_write:
            for at in range(0, size * exit_.repeat, size):
                self._ports.write(port, exit_.data[at : at + size])
        else:
            vcpu.complete(exit_, b"".join(self._ports.read(port, size) for _ in range(exit_.repeat)))
