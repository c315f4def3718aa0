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

from kvmpass.bus import Bus
from kvmpass.errors import GuestError
from kvmpass.kvm import Vcpu, install_kick
from kvmpass.kvm.exits import (
    Exit,
    FailedExit,
    HaltExit,
    InterruptedExit,
    MemoryFaultExit,
    MmioExit,
    PortExit,
    RefusedExit,
    ShutdownExit,
    SystemEventExit,
)

KICK = signal.SIGRTMIN + 4  # its handler does nothing; installed by C, since Python's work in the main thread only


_REFUSALS = {
    errno.EFAULT: ": the guest's access to its memory or to a device's cannot be resolved",
    errno.EIO: ": KVM has ended this VM",
}


class GuestOutcome(enum.Enum):
    """How a guest came to its end."""

    POWEROFF = "powered off"
    REBOOT = "rebooted"
    PANIC = "panicked"
    TRIPLE_FAULT = "triple fault"
    FAULT = "KVM could not run it"
    DEVICE_ERROR = "a device failed"
    TIMEOUT = "out of time"
    STOPPED = "stopped"


class VcpuThreads:
    """Run vCPUs until one of them, or ``end()``, ends the guest.

    ``lock`` is held for each dispatched exit: devices on the buses see one access at a time. ``throttle`` is called
    after each access to a port, without the lock: it may block, which delays this vCPU only.

    Synchronization: ``end``, ``wait``, ``ended``, ``stop``, ``pause`` and ``resume`` from any thread. ``_state``
    guards how it ended, whether it is paused, and which threads are inside their loop, so that none is signalled
    after its end; it is held for moments only, and nothing else is locked under it.
    """

    def __init__(
        self, vcpus: Sequence[Vcpu], ports: Bus, mmio: Bus, lock: threading.RLock, throttle: Callable[[], None]
    ) -> None:
        self._vcpus = list(vcpus)
        self._ports = ports
        self._mmio = mmio
        self._lock = lock
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
        self._threads: list[threading.Thread] = []
        self.exits = 0
        self._reasons: list[Counter[type[Exit]]] = [Counter() for _ in vcpus]  # each thread has its own

    def start(self) -> None:
        """Start one thread for each vCPU."""
        install_kick(KICK)
        for vcpu in self._vcpus:
            thread = threading.Thread(target=self._loop, args=(vcpu,), name=f"vcpu{vcpu.index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def end(self, outcome: GuestOutcome) -> None:
        """Say how it ended (the first call wins), and take every vCPU out of the guest at once. Does not wait."""
        with self._state:
            if self._outcome is None:
                self._outcome = outcome
            self._ended.set()
            self._kick()
            self._changed.notify_all()

    def _kick(self) -> None:
        """Every vCPU out of the guest; called with ``_state`` held."""
        for thread, vcpu in self._inside.items():
            vcpu.request_exit()
            if thread is not threading.current_thread():
                signal.pthread_kill(thread.ident or 0, KICK)

    def pause(self, timeout: float) -> bool:
        """Take every vCPU out of the guest and keep it there; whether all were within ``timeout`` seconds.

        Where not (one waits for a slow reader of its output) they go on. Not from a vCPU's thread.
        """
        with self._changed:
            self._paused = True
            self._kick()
            stopped = self._changed.wait_for(lambda: self._parked == len(self._inside) or self.ended, timeout)
            if not stopped:
                self.resume()
            return stopped

    def resume(self) -> None:
        """Let them go on; idempotent."""
        with self._changed:
            self._paused = False
            if not self.ended:
                for vcpu in self._inside.values():
                    vcpu.request_exit(False)
            self._changed.notify_all()

    @property
    def reasons(self) -> dict[str, int]:
        """How often the vCPUs left the guest, by the names of ``kvmpass.kvm.exits`` without ``Exit``."""
        total = sum(self._reasons, Counter[type[Exit]]())
        return {kind.__name__.removesuffix("Exit"): count for kind, count in total.items()}

    @property
    def paused(self) -> bool:
        """Whether ``pause`` holds them."""
        return self._paused

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> GuestOutcome | None:
        """Wait for the end; None after ``timeout`` seconds. Raises what made a vCPU's thread fail.

        What the guest itself made KVM refuse is an outcome (``FAULT``, with ``fault`` saying what), not an error.
        """
        if not self._ended.wait(timeout):
            return None
        if self._failure is not None:
            raise self._failure
        return self._outcome

    def stop(self) -> None:
        """Take every vCPU out of the guest and wait for its thread; idempotent. Not from a vCPU's thread."""
        self.end(GuestOutcome.STOPPED)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    # --- in the vCPU's thread

    def _loop(self, vcpu: Vcpu) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (KICK,))  # whatever the thread inherited
        with self._state:
            self._inside[threading.current_thread()] = vcpu
            if self._paused:  # before this thread was known
                vcpu.request_exit()
        try:
            while not self._ended.is_set():
                exit_ = vcpu.run()
                # What was dispatched before has been completed by this entry (api.rst, 5: kvm_run).
                if self._paused and isinstance(exit_, InterruptedExit):
                    self._park()
                self._dispatch(vcpu, exit_)
        except GuestError as error:
            self.fault = self.fault or str(error)
            self.end(GuestOutcome.FAULT)
        except BaseException as error:
            if self._outcome is None:  # later ones are of a guest that is gone
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

    def _dispatch(self, vcpu: Vcpu, exit_: Exit) -> None:
        self._reasons[vcpu.index][type(exit_)] += 1
        match exit_:
            case PortExit():
                with self._lock:
                    self.exits += 1
                    self._port(vcpu, exit_)
                self._throttle()
            case MmioExit(address, size, is_write, data):
                with self._lock:
                    self.exits += 1
                    if is_write:
                        self._mmio.write(address, data)
                    else:
                        vcpu.complete(exit_, self._mmio.read(address, size))
            case InterruptedExit():
                pass
            case ShutdownExit():
                self.end(GuestOutcome.TRIPLE_FAULT)
            case HaltExit():
                time.sleep(0.01)
            case SystemEventExit(kind):
                raise GuestError(f"KVM reports system event {kind}")
            case MemoryFaultExit(gpa, size, flags):
                raise GuestError(f"the guest's access to {gpa:#x}+{size:#x} cannot be resolved (flags {flags:#x})")
            case FailedExit(what, code, detail):
                raise GuestError(f"vCPU {vcpu.index}: {what}: code {code:#x}, detail {detail:#x}")
            case RefusedExit(code):
                raise GuestError(f"vCPU {vcpu.index}: KVM_RUN: {os.strerror(code)}{_REFUSALS.get(code, '')}")

    def _port(self, vcpu: Vcpu, exit_: PortExit) -> None:
        """String instructions come as ``repeat`` items of one port."""
        port, size = exit_.port, exit_.size
        if exit_.is_write:
            for at in range(0, size * exit_.repeat, size):
                self._ports.write(port, exit_.data[at : at + size])
        else:
            vcpu.complete(exit_, b"".join(self._ports.read(port, size) for _ in range(exit_.repeat)))
