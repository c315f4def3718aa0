"""Registers that a guest reads without Python: ``Vcpu.run`` answers, and enters the guest again.

(``cffi_build/fastpath.c``.) An exit for a read that Python handles takes several times as long.
"""

from __future__ import annotations

from typing import Any

from kvmpass._dataclass import dataclass
from kvmpass._fd import check
from kvmpass._native import ffi, lib
from kvmpass.layout import Range

_UNIT = 8  # bytes that are loaded at once


@dataclass(frozen=True, slots=True)
class FastRegisters:
    """Registers of which some bytes are emulated and the others are a file's, such as a device's of VFIO.

    A read, of a dword or part of one, is one access of the file, of the same size; ones where that fails.
    """

    values: bytearray
    """What emulated bytes read as; a multiple of 8 bytes. May change at any time, a register with one store."""
    emulated: bytearray
    """0xff for each emulated byte, 0 for each of the file; as long as ``values``."""
    fd: int
    """The file, which stays open while the registers are in a ``Fastpath``."""
    offset: int
    """Where the first register is in the file."""
    exits: Range
    """The registers that Python reads, relative to the first one. May be empty."""


class Fastpath:
    """The registers that vCPUs read without Python, by guest-physical address.

    Once ``remove`` has returned, none of their bytes are read any more, neither in memory nor in their file.

    Synchronization: ``set``, ``remove`` and ``clear`` with the bus lock held; they wait for the reads in progress,
    which take no lock of Python's. ``reads`` and ``read`` from any thread.
    """

    def __init__(self) -> None:
        self._native = ffi.new("struct kvmpass_fastpath *")
        check(lib.kvmpass_fastpath_init(self._native), "pthread_rwlock_init")
        self._registers: dict[int, tuple[FastRegisters, str]] = {}
        self._tables: list[Any] = []  # that of C's is among them, and what it points to
        self._counters: dict[str, Any] = {}

    @property
    def native(self) -> Any:
        """For ``kvm_run``, which uses it while this object exists."""
        return self._native

    def set(self, gpa: int, registers: FastRegisters, label: str) -> None:
        """Read ``registers`` at ``gpa``, a multiple of 8, until ``remove``; count the reads as ``label``. Idempotent.

        Raises ``ValueError``: sizes and addresses that do not fit, or that overlap others.
        """
        before = self._registers.get(gpa)
        if before is not None and before[0] is registers:
            return
        size = len(registers.values)
        if gpa % _UNIT or not size or size % _UNIT or len(registers.emulated) != size:
            raise ValueError(f"{size} registers at {gpa:#x}")
        others = (Range(other, len(found.values)) for other, (found, _) in self._registers.items() if other != gpa)
        if any(Range(gpa, size).overlaps(other) for other in others):
            raise ValueError(f"registers at {gpa:#x} overlap others")
        self._use({**self._registers, gpa: (registers, label)})

    def remove(self, gpa: int) -> None:
        """Let Python read the registers at ``gpa``. Idempotent."""
        if gpa in self._registers:
            self._use({other: found for other, found in self._registers.items() if other != gpa})

    def clear(self) -> None:
        """Let Python read everything. Idempotent."""
        if self._registers:
            self._use({})

    def _use(self, registers: dict[int, tuple[FastRegisters, str]]) -> None:
        table = ffi.new("struct kvmpass_registers[]", max(1, len(registers)))
        buffers = []
        for out, (gpa, (found, label)) in zip(table, sorted(registers.items()), strict=False):
            # Exported, a bytearray cannot change its length, which would move it.
            values, emulated = ffi.from_buffer(found.values), ffi.from_buffer(found.emulated)
            buffers += [values, emulated]
            out.gpa, out.size, out.fd, out.offset = gpa, len(found.values), found.fd, found.offset
            out.values, out.emulated = ffi.cast("uint8_t *", values), ffi.cast("uint8_t *", emulated)
            out.exit_start, out.exit_end = found.exits.start, found.exits.end
            out.reads = self._counters.setdefault(label, ffi.new("uint64_t *"))
        self._tables.append((table, buffers))  # before C has it: a signal handler may raise after that
        check(lib.kvmpass_fastpath_set(self._native, table, len(registers)), "pthread_rwlock_wrlock")
        self._registers = registers
        del self._tables[:-1]

    @property
    def reads(self) -> dict[str, int]:
        """Number of reads so far, by label."""
        return {label: counter[0] for label, counter in self._counters.copy().items()}

    def read(self, gpa: int, size: int) -> bytes | None:
        """Read as a vCPU does (``cffi_build/fastpath.c``); None where Python has to."""
        data = ffi.new("uint8_t[8]")
        return bytes(data[0:size]) if lib.kvmpass_fastpath_read(self._native, gpa, size, data) else None
