"""A DMA domain over a made-up kernel: two groups, one with two devices, one with one."""

from __future__ import annotations

from typing import Any

from kvmpass.dma import BackendFactory, Domain, IommufdBackend, Type1
from kvmpass.layout import GIB, MIB, PAGE, Range, Reserved
from kvmpass.memory import GuestMemory, MemoryRegion
from kvmpass.vfio import Device
from support.fake_vfio import FakeBar, FakeKvmVfio, FakeVfio
from support.recording import Calls, recording

NIC, SOUND, DISK = "0000:01:00.0", "0000:01:00.1", "0000:02:00.0"
MEMBERS: dict[int, tuple[str, ...]] = {1: (NIC, SOUND), 2: (DISK,)}
BAR_AT = 0xE000_0000
MSI = Reserved(Range(0xFEE0_0000, MIB), "msi")


class Stage:
    """RAM and ROM, and a domain for them."""

    def __init__(self, kernel: Any, *, p2p: bool = False) -> None:
        self.kernel = kernel
        self.backend: BackendFactory = Type1 if isinstance(kernel, FakeVfio) else IommufdBackend
        self.calls: Calls = []
        self.kvm = FakeKvmVfio(self.kernel, "vm")
        self.memory = GuestMemory()
        self.rom = self.memory.add_rom(GIB, b"rom", "rom")
        self.ram = self.memory.add_ram(0, MIB, "ram")
        self.domain = Domain(self.memory, recording(self.calls, self.backend), self.kvm, [MSI], p2p=p2p)

    def check(self) -> None:
        """What the kernel has is what the domain says, and what the memory wants."""
        self.domain.audit()
        ledger = {Range(m.iova, m.size): (m.hva, m.writable) for m in self.domain.ledger}
        assert ledger == self.kernel.mappings
        assert self.kvm.files == self.kernel.files
        assert self.domain.active == bool(self.kernel.files)
        if isinstance(self.kernel, FakeVfio):
            assert self.domain.active == bool(self.kernel.containers)
            assert sorted(self.kernel.groups) == sorted(self.domain.backend._groups)
        else:
            assert self.domain.active == bool(self.kernel.contexts)

    def bar(self, device: Device, gpa: int = BAR_AT, size: int = PAGE, area_at: int = 0) -> MemoryRegion:
        """Let the guest see part of BAR 2 of a device, from ``area_at`` on, at ``gpa``."""
        mapping = FakeBar(self.kernel, device, 2, Range(area_at, size))
        return self.memory.add_bar(gpa, size, mapping, 0, "bar2")

    @property
    def registered(self) -> set[str | None]:
        """Which VM has the files that are open."""
        return {self.kernel.file(fd).kvm for fd in self.kernel.files}

    def close(self) -> None:
        """Nothing may be left anywhere."""
        self.kernel.fail(0)
        self.domain.close()
        assert (self.kernel.state(), self.kvm.files) == (({}, []), set())
        self.memory.close()
