"""The vCPUs of a machine, from one start to the end of that guest."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvmpass._teardown import run_all
from kvmpass.board.board import Board
from kvmpass.boot import mtrr
from kvmpass.boot.cpuid import guest_cpuid
from kvmpass.boot.linux import LinuxEntry
from kvmpass.errors import GuestError
from kvmpass.kvm import System, Vcpu
from kvmpass.machine.vcpus import Ending, VcpuThreads


class Execution:
    """Makes vCPUs and their threads; before the first ``start`` and after ``reset`` there are none.

    ``lock`` is the buses'; ``pace`` is called between accesses to ports.

    Synchronization: ``start``, ``close`` and ``reset`` from one thread at a time, the others from any.
    """

    def __init__(self, system: System, cpus: int, lock: threading.RLock, pace: Callable[[], None]) -> None:
        self._system = system
        self._cpus = cpus
        self._lock = lock
        self._pace = pace
        self._threads: VcpuThreads | None = None
        self.vcpus: list[Vcpu] = []

    def start(self, board: Board, entry: LinuxEntry) -> None:
        """Let the guest run on ``board`` from ``entry`` on. Raises ``OSError`` if KVM refuses: then none runs."""
        try:
            self._make_vcpus(board, entry)
        except BaseException:
            self.close()
            raise
        self._threads = VcpuThreads(self.vcpus, board.ports, board.mmio, self._lock, self._pace)
        self._threads.start()

    def _make_vcpus(self, board: Board, entry: LinuxEntry) -> None:
        supported, types = self._system.get_supported_cpuid(), mtrr.mtrrs(self._system.physical_bits)
        for index in range(self._cpus):
            vcpu = board.vm.create_vcpu(index)
            self.vcpus.append(vcpu)
            vcpu.set_cpuid2(guest_cpuid(supported, cpu=index, cpus=self._cpus))
            vcpu.set_msrs(types)
        first = self.vcpus[0]
        first.enter_long_mode(
            cr3=entry.cr3,
            gdt=entry.gdt_base,
            gdt_limit=entry.gdt_limit,
            code=entry.code_selector,
            data=entry.data_selector,
        )
        first.set_regs(rip=entry.rip, rsi=entry.rsi, rflags=2)

    def close(self) -> None:
        """Take every vCPU out of the guest and close it; how the guest ended stays known. Idempotent."""
        if self._threads is not None:
            self._threads.stop()
        vcpus, self.vcpus = self.vcpus, []
        run_all(vcpu.close for vcpu in vcpus)

    def reset(self) -> None:
        """The same, and as before the first start."""
        self.close()
        self._threads = None

    @property
    def started(self) -> bool:
        return self._threads is not None

    @property
    def running(self) -> bool:
        threads = self._threads
        return threads is not None and not threads.over

    @property
    def over(self) -> bool:
        threads = self._threads
        return threads is not None and threads.over

    def wait(self, timeout: float | None = None) -> Ending | None:
        """As ``Machine.wait``."""
        threads = self._threads
        if threads is None:
            raise GuestError("the guest was not started")
        return threads.wait(timeout)

    def stop(self, ending: Ending) -> None:
        """As ``Machine.stop``."""
        threads = self._threads
        if threads is not None:
            threads.end(ending)

    def pause(self, timeout: float) -> None:
        """As ``Machine.pause``."""
        threads = self._threads
        if threads is None or threads.over:
            raise GuestError("the guest does not run")
        if not threads.pause(timeout):
            raise GuestError(f"a vCPU has not left the guest within {timeout:g} seconds", "read the guest's output")

    def resume(self) -> None:
        """As ``Machine.resume``."""
        threads = self._threads
        if threads is not None:
            threads.resume()

    @property
    def fault(self) -> str:
        return self._threads.fault if self._threads else ""

    @property
    def exits(self) -> int:
        return self._threads.exits if self._threads else 0

    @property
    def reasons(self) -> dict[str, int]:
        return self._threads.reasons if self._threads else {}
