"""A virtual CPU: registers, and the ioctl that runs it."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from kvmpass._fd import OwnedFd, check, failure
from kvmpass._native import ffi, lib
from kvmpass._teardown import undo_on_error
from kvmpass.kvm import exits
from kvmpass.kvm.fastpath import Fastpath
from kvmpass.kvm.types import CpuidEntry
from kvmpass.layout import PAGE
from kvmpass.memory import HostMapping

_RING = lib.KVM_COALESCED_MMIO_PAGE_OFFSET * PAGE
_RING_ENTRY = struct.Struct("=QII8s")  # struct kvm_coalesced_mmio: address, size, whether a port, data
_RING_ENTRIES = (PAGE - 8) // _RING_ENTRY.size  # KVM_COALESCED_MMIO_MAX


def _internal_error(out: Any) -> exits.Exit:
    suberror, datum = out.detail[0:2]
    if suberror == lib.KVM_INTERNAL_ERROR_DELIVERY_EV:
        return exits.DeliveryExit(datum)
    return exits.FailedExit("KVM_EXIT_INTERNAL_ERROR", suberror, datum)


_INTERRUPTED = exits.InterruptedExit()
_RARE_EXITS: dict[int, Callable[[Any], exits.Exit]] = {
    lib.KVM_EXIT_INTR: lambda out: _INTERRUPTED,
    lib.KVM_EXIT_HLT: lambda out: exits.HaltExit(),
    lib.KVM_EXIT_SHUTDOWN: lambda out: exits.ShutdownExit(),
    lib.KVM_EXIT_SYSTEM_EVENT: lambda out: exits.SystemEventExit(out.detail[0]),
    lib.KVM_EXIT_MEMORY_FAULT: lambda out: exits.MemoryFaultExit(out.address, out.detail[1], out.detail[0]),
    lib.KVM_EXIT_FAIL_ENTRY: lambda out: exits.FailedExit("the CPU refused to enter the guest", *out.detail[0:2]),
    lib.KVM_EXIT_INTERNAL_ERROR: _internal_error,
}


def install_kick(signal_number: int) -> None:
    """Install a handler that does nothing, so that the signal ends ``Vcpu.run``. Raises ``OSError``."""
    check(lib.kvmpass_install_kick(signal_number), "sigaction")


class Vcpu(OwnedFd):
    """One vCPU of a VM. ``fastpath``: registers that the guest accesses without a return of ``run``.

    Synchronization: ``request_exit`` and ``answered`` from any thread; everything else from the thread that runs it,
    or from any while that one is outside of ``run()``: before the start, or while the machine is paused.
    """

    def __init__(self, fd: int, index: int, run_size: int, fastpath: Fastpath | None = None) -> None:
        super().__init__(fd)
        self._fastpath = fastpath  # stays while a thread may be in it
        self.index = index
        """Its number and APIC id, from 0."""
        with undo_on_error(self.close):
            self._run = HostMapping(run_size, fd=fd)
            self._page = self._run.view(0, run_size)
        ring = self._page[_RING : _RING + PAGE]
        self._ring, self._ring_ends = ring, ring[:8].cast("I")
        self._exit = ffi.new("struct kvmpass_exit *")
        self._path = ffi.NULL if fastpath is None else fastpath.native

    def close(self) -> None:
        """Close the vCPU, while no thread is inside ``run()``, which reads ``kvm_run``. Idempotent."""
        if hasattr(self, "_run"):
            self._run.close()
        super().close()

    def run(self) -> exits.Exit:
        """Enter the guest until it exits (``KVM_RUN``), other than by an access on the fast path.

        A failure of the ioctl is an exit, too, as guests can cause it.

        ``EFAULT`` is the guest's access to memory that the host cannot provide: before Linux 6.8, and for a device's
        pages later too, without ``KVM_EXIT_MEMORY_FAULT``. ``EIO``: KVM found a bug of its own and ended the VM.
        Raises ``Closed`` after ``close()``.
        """
        out = self._exit
        result = lib.kvm_run(self.fd, self._run.address, out, self._path)
        if result < 0:
            if -result in (errno.EINTR, errno.EAGAIN):
                return _INTERRUPTED
            return exits.RefusedExit(-result)
        reason = out.reason
        if reason == lib.KVM_EXIT_IO:
            size, count, offset = out.size, out.count, out.data_offset
            data = bytes(self._page[offset : offset + size * count]) if out.is_write else b""
            return exits.PortExit(out.address, size, count, bool(out.is_write), data, offset)
        if reason == lib.KVM_EXIT_MMIO:
            size, offset = min(out.size, 8), out.data_offset
            data = bytes(self._page[offset : offset + size]) if out.is_write else b""
            return exits.MmioExit(out.address, size, bool(out.is_write), data, offset)
        rare = _RARE_EXITS.get(reason)
        return rare(out) if rare else exits.FailedExit("an exit that is not handled", reason, 0)

    @property
    def answered(self) -> int:
        """Number of exits so far that the fast path has handled, all for guest-physical addresses.

        Synchronization: from any thread.
        """
        return int(self._exit.answered)

    def complete(self, exit_: exits.PortExit | exits.MmioExit, data: bytes) -> None:
        """Set the result of a read, of exactly the requested size. It takes effect at the next ``run()``."""
        wanted = exit_.size * (exit_.repeat if isinstance(exit_, exits.PortExit) else 1)
        self._page[exit_.offset : exit_.offset + wanted] = data

    def coalesced_writes(self) -> Iterable[tuple[bool, int, bytes]]:
        """Take the writes that KVM has collected, of all vCPUs, oldest first: whether to a port, address, data.

        They come before the exit that this vCPU has returned last. The buffer is the VM's (struct
        kvm_coalesced_mmio_ring, which only KVM writes), and what other vCPUs add in the meantime can wait.

        Synchronization: from one vCPU's thread at a time (the bus lock), after ``run()``.
        """
        ends = self._ring_ends
        return () if ends[0] == ends[1] else self._take_writes(ends)  # nearly always empty

    def _take_writes(self, ends: memoryview) -> Iterator[tuple[bool, int, bytes]]:
        for _ in range(_RING_ENTRIES):
            first = ends[0]
            if first == ends[1]:
                return
            address, size, is_port, data = _RING_ENTRY.unpack_from(
                self._ring, 8 + first % _RING_ENTRIES * _RING_ENTRY.size
            )
            ends[0] = (first + 1) % _RING_ENTRIES
            yield bool(is_port), address, data[:size]

    def request_exit(self, wanted: bool = True) -> None:
        """Make the next ``run()`` return at once, and the current one at a signal to its thread.

        ``immediate_exit`` of ``struct kvm_run`` (``KVM_CAP_IMMEDIATE_EXIT``).

        Synchronization: from any thread.
        """
        lib.kvm_run_set_immediate_exit(self._run.address, int(wanted))

    # --- state, before the first run

    def set_cpuid2(self, entries: Sequence[CpuidEntry]) -> None:
        """Set the CPUID leaves that the guest sees (``KVM_SET_CPUID2``). Raises ``OSError``."""
        table = ffi.new("struct kvm_cpuid_entry2[]", max(1, len(entries)))
        for out, entry in zip(table, entries, strict=False):
            out.function, out.index, out.flags = entry.function, entry.index, entry.flags
            out.eax, out.ebx, out.ecx, out.edx = entry.eax, entry.ebx, entry.ecx, entry.edx
        check(lib.kvm_set_cpuid2(self.fd, table, len(entries)), "KVM_SET_CPUID2")

    def get_regs(self) -> dict[str, int]:
        """General registers by name: ``rax`` … ``rip``, ``rflags`` (``KVM_GET_REGS``). Raises ``OSError``."""
        regs = ffi.new("struct kvm_regs *")
        check(lib.kvm_get_regs(self.fd, regs), "KVM_GET_REGS")
        return {name: getattr(regs, name) for name in dir(regs)}

    def get_sregs(self) -> dict[str, int]:
        """Control registers (``cr0`` … ``cr8``, ``efer``, ``apic_base``) and segment selectors (``KVM_GET_SREGS``).

        Raises ``OSError``.
        """
        sregs = ffi.new("struct kvm_sregs *")
        check(lib.kvm_get_sregs(self.fd, sregs), "KVM_GET_SREGS")
        controls = {name: getattr(sregs, name) for name in _CONTROL_REGISTERS}
        return controls | {name: getattr(sregs, name).selector for name in _SEGMENTS}

    def set_regs(self, **values: int) -> None:
        """Set the named general registers; the others keep their values (``KVM_SET_REGS``).

        Raises ``OSError``, ``AttributeError`` for an unknown name.
        """
        regs = ffi.new("struct kvm_regs *")
        check(lib.kvm_get_regs(self.fd, regs), "KVM_GET_REGS")
        for name, value in values.items():
            setattr(regs, name, value)
        check(lib.kvm_set_regs(self.fd, regs), "KVM_SET_REGS")

    def get_msrs(self, indexes: Sequence[int]) -> dict[int, int]:
        """At most 64 model-specific registers by index (``KVM_GET_MSRS``).

        Raises ``OSError`` (``EINVAL``: KVM refuses one).
        """
        table = self._msrs(lib.kvm_get_msrs, "KVM_GET_MSRS", dict.fromkeys(indexes, 0))
        return {entry.index: entry.data for entry in table}

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Set at most 64 model-specific registers by index, in order (``KVM_SET_MSRS``).

        Raises ``OSError`` (``EINVAL``: KVM refuses one; those before it are set).
        """
        self._msrs(lib.kvm_set_msrs, "KVM_SET_MSRS", values)

    def _msrs(self, call: Callable[[int, Any, int], int], name: str, values: Mapping[int, int]) -> Any:
        table = ffi.new("struct kvm_msr_entry[]", list(values.items()))
        done = check(call(self.fd, table, len(values)), name, f"vCPU {self.index}")
        if done < len(values):
            raise failure(errno.EINVAL, name, f"vCPU {self.index}, MSR {table[done].index:#x}")
        return table

    def enter_long_mode(self, *, cr3: int, gdt: int, gdt_limit: int, code: int, data: int) -> None:
        """Enter 64-bit mode: page tables at ``cr3``, flat segments, interrupts disabled (``KVM_SET_SREGS``).

        ``gdt``: guest-physical address of a descriptor table with the selectors ``code`` and ``data``;
        ``gdt_limit``: its size in bytes, minus 1. Raises ``OSError``. (AMD64 manual volume 2, chapter 14.)
        """
        sregs = ffi.new("struct kvm_sregs *")
        check(lib.kvm_get_sregs(self.fd, sregs), "KVM_GET_SREGS")
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            _flat(getattr(sregs, name), code if name == "cs" else data, is_code=name == "cs")
        sregs.gdt.base, sregs.gdt.limit = gdt, gdt_limit
        sregs.cr3 = cr3
        sregs.cr4 |= _CR4_PAE
        sregs.cr0 |= _CR0_PE | _CR0_PG
        sregs.efer |= _EFER_LME | _EFER_LMA
        check(lib.kvm_set_sregs(self.fd, sregs), "KVM_SET_SREGS")


_CONTROL_REGISTERS = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_CR0_PE, _CR0_PG = 1 << 0, 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10


def _flat(segment: Any, selector: int, *, is_code: bool) -> None:
    segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, selector
    segment.type = 0b1011 if is_code else 0b0011  # accessed; execute/read, read/write
    segment.present, segment.dpl, segment.s, segment.g = 1, 0, 1, 1
    segment.l, segment.db = (1, 0) if is_code else (0, 1)
    segment.unusable = 0
