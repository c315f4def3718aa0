"""What one access by a guest costs: of a port and of a register in Python, and of a register on the fast path.

Runs on any x86 host with /dev/kvm, also in an emulated one: a guest of a few instructions, which needs no device.
What is a device's is in a file here.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvmpass._native import ffi, lib
from kvmpass.bus import Bus
from kvmpass.kvm import FastFile, Fastpath, System, Vcpu
from kvmpass.layout import PAGE, Range
from kvmpass.machine.vcpus import VcpuThreads
from kvmpass.memory import HostMapping
from kvmpass.pci.configspace import ConfigSpace

CODE, CONFIG, BAR, PORT, END = 0x1000, 0x8000, 0x9000, 0x70, 0x80
EMULATED = 0x40  # bytes, from the start of configuration space on
# mov ecx, count; the access; dec ecx; jnz to the access; out END, al; jmp to itself
LOOP = "66b9 {count} {access} 6649 75{back:02x} e6{end:02x} ebfe"


class File:
    """A device's registers, as ``vfio.Region`` reads them."""

    size = PAGE

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes."""
        return os.pread(self._fd, size, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Write ``data``."""
        os.pwrite(self._fd, data, offset)

    def read_int(self, offset: int, size: int = 4) -> int:
        """Read a little-endian register."""
        return int.from_bytes(self.read(offset, size), "little")


class Zero:
    """A port that reads as zero, and an event when it is written."""

    def __init__(self) -> None:
        self.written = threading.Event()

    def read(self, offset: int, size: int) -> bytes:
        """Read zeroes."""
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        """Set the event."""
        self.written.set()


def program(access: str, count: int) -> bytes:
    """Return a guest that repeats an access."""
    length = len(bytes.fromhex(access))
    back = 256 - length - 4
    return bytes.fromhex(LOOP.format(count=struct.pack("<I", count).hex(), access=access, back=back, end=END))


@contextmanager
def vcpu_with(code: bytes, fastpath: Fastpath | None) -> Iterator[Vcpu]:
    """Make a processor in real mode, with a page of memory."""
    with System() as system, system.create_vm() as vm:
        memory = HostMapping(PAGE)
        memory.view(0, len(code))[:] = code
        vm.set_user_memory_region(0, CODE, PAGE, memory.address)
        with vm.create_vcpu(0, fastpath) as vcpu:
            sregs = ffi.new("struct kvm_sregs *")
            assert lib.kvm_get_sregs(vcpu.fd, sregs) == 0
            sregs.cs.base = sregs.cs.selector = 0
            assert lib.kvm_set_sregs(vcpu.fd, sregs) == 0
            vcpu.set_regs(rip=CODE, rflags=2)
            yield vcpu
        memory.close()


def nanoseconds(access: str, count: int, fastpath: Fastpath | None, mmio: Bus) -> float:
    """Return what one of ``count`` accesses takes."""
    ports, zero = Bus("port"), Zero()
    ports.add(PORT, 1, Zero())
    ports.add(END, 1, zero)
    with vcpu_with(program(access, count), fastpath) as vcpu:
        threads = VcpuThreads([vcpu], ports, mmio, threading.RLock(), lambda: None, fastpath=fastpath)
        started = time.monotonic_ns()
        threads.start()
        assert zero.written.wait(120), threads.fault
        taken = time.monotonic_ns() - started
        threads.stop()
        assert sum(threads.reasons.values()) > count
    return taken / count


def measure(count: int) -> dict[str, float]:
    """Return nanoseconds of each kind of access."""
    with tempfile.TemporaryFile() as file:
        file.truncate(PAGE)
        device, mmio, fastpath = File(file.fileno()), Bus("memory"), Fastpath()
        space = ConfigSpace(device)
        space.emulate(0, bytes(EMULATED))
        mmio.add(CONFIG, PAGE, space)  # type: ignore[arg-type]
        mmio.add(BAR, PAGE, device)
        fastpath.set(CONFIG, space.fast_registers(file.fileno(), 0, Range(0, 0)), "configuration space")
        fastpath.set(BAR, FastFile(file.fileno(), 0, PAGE), "BAR")
        found = {"read of a port, in Python": nanoseconds(f"e4{PORT:02x}", count, None, mmio)}  # in al, PORT
        for name, opcode, place in (  # mov eax, [place]; mov [place], eax
            ("read of an emulated register", "66a1", CONFIG),
            ("read of a device's register", "66a1", CONFIG + EMULATED),
            ("write of a device's register", "66a3", BAR),
        ):
            access = opcode + struct.pack("<H", place).hex()
            found[f"{name}, in Python"] = nanoseconds(access, count, None, mmio)
            found[f"{name}, on the fast path"] = nanoseconds(access, count, fastpath, mmio)
    return found


def main(count: str = "20000", rounds: str = "5") -> None:
    """Print the least of some rounds: what else the machine does only adds to it."""
    results = [measure(int(count)) for _ in range(int(rounds))]
    for name in results[0]:
        print(f"{min(result[name] for result in results):8.0f} ns  {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
