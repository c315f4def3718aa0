"""Registers that a guest accesses without Python: ``Vcpu.run`` answers, and enters the guest again.

(``cffi_build/fastpath.c``.) An exit that Python handles takes several times as long.
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

    Python handles writes. A read, of a dword or part of one, is one of the file of that size; ones where it fails.
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

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.values)


@dataclass(frozen=True, slots=True)
class FastFile:
    """Registers that are all a file's. An access of up to 8 bytes, inside an aligned quadword, is one of the file.

    Where that fails, a read returns ones and a write is lost.
    """

    fd: int
    """The file, which stays open while the registers are in a ``Fastpath``."""
    offset: int
    """Where the first register is in the file."""
    size: int
    """Bytes, a multiple of 8."""

    def part(self, range_: Range) -> FastFile:
        """Return the registers of a range, relative to the first one."""
        return FastFile(self.fd, self.offset + range_.start, range_.size)


class Fastpath:
    """The registers that vCPUs access without Python, by guest-physical address.

    Once ``remove`` has returned, none of their bytes are accessed any more, neither in memory nor in their file.

    Synchronization: ``set`` and ``remove`` with the bus lock held; they wait for the accesses in progress, which take
    no lock of Python's. ``counts``, ``read`` and ``write`` from any thread.
    """

    def __init__(self) -> None:
        self._native = ffi.new("struct kvmpass_fastpath *")
        check(lib.kvmpass_fastpath_init(self._native), "pthread_rwlock_init")
        self._registers: dict[int, tuple[FastRegisters | FastFile, str]] = {}
        self._tables: list[Any] = []  # that of C's is among them, and what it points to
        self._counters: dict[str, Any] = {}

    @property
    def native(self) -> Any:
        """For ``kvm_run``, which uses it while this object exists."""
        return self._native

    def set(self, gpa: int, registers: FastRegisters | FastFile, label: str) -> None:
        """Access ``registers`` at ``gpa``, a multiple of 8, until ``remove``; count that as ``label``. Idempotent.

        Raises ``ValueError``: sizes and addresses that do not fit, or that overlap others.
        """
        before = self._registers.get(gpa)
        if before is not None and before[0] is registers:
            return
        size = registers.size
        fits = not isinstance(registers, FastRegisters) or len(registers.emulated) == size
        if gpa % _UNIT or not size or size % _UNIT or not fits:
            raise ValueError(f"{size} registers at {gpa:#x}")
        others = (Range(other, found.size) for other, (found, _) in self._registers.items() if other != gpa)
        if any(Range(gpa, size).overlaps(other) for other in others):
            raise ValueError(f"registers at {gpa:#x} overlap others")
        self._use({**self._registers, gpa: (registers, label)})

    def remove(self, gpa: int) -> None:
        """Leave the registers at ``gpa`` to Python. Idempotent."""
        if gpa in self._registers:
            self._use({other: found for other, found in self._registers.items() if other != gpa})

    def _use(self, registers: dict[int, tuple[FastRegisters | FastFile, str]]) -> None:
        table = ffi.new("struct kvmpass_registers[]", max(1, len(registers)))
        buffers = []
        for out, (gpa, (found, label)) in zip(table, sorted(registers.items()), strict=False):
            out.gpa, out.size, out.fd, out.offset = gpa, found.size, found.fd, found.offset
            if isinstance(found, FastRegisters):
                # Exported, a bytearray cannot change its length, which would move it.
                values, emulated = ffi.from_buffer(found.values), ffi.from_buffer(found.emulated)
                buffers += [values, emulated]
                out.values, out.emulated = ffi.cast("uint8_t *", values), ffi.cast("uint8_t *", emulated)
                out.exit_start, out.exit_end = found.exits.start, found.exits.end
            out.counts = self._counters.setdefault(label, ffi.new("uint64_t[2]"))
        # Before C has them, as a signal handler may raise after that: what C may have can be removed.
        self._tables.append((table, buffers))
        self._registers = {**self._registers, **registers}
        check(lib.kvmpass_fastpath_set(self._native, table, len(registers)), "pthread_rwlock_wrlock")
        self._registers = registers
        del self._tables[:-1]

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Number of reads and of writes so far, by label."""
        return {label: (counter[0], counter[1]) for label, counter in self._counters.copy().items()}

    def read(self, gpa: int, size: int) -> bytes | None:
        """Read as a vCPU does (``cffi_build/fastpath.c``); None where Python has to."""
        data = ffi.new("uint8_t[8]")
        done = lib.kvmpass_fastpath_access(self._native, gpa, size, 0, data)
        return bytes(data[0:size]) if done else None

    def write(self, gpa: int, data: bytes) -> bool:
        """Write as a vCPU does (``cffi_build/fastpath.c``); return whether that is done, or else left to Python."""
        return bool(lib.kvmpass_fastpath_access(self._native, gpa, len(data), 1, ffi.new("uint8_t[8]", data[:8])))
